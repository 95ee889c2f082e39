from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ragkv.errors import CollectionError, InputError, NotFoundError
from ragkv.retrievers import Catalog, Document, Splitter

ROOT = Path(__file__).resolve().parents[1]


def splitter() -> Splitter:
    return Splitter(lambda text: len(text.split()), 16)


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with Catalog(tmp_path / "root", splitter()) as catalog:
        yield catalog


def test_collections_come_and_go(catalog: Catalog) -> None:
    assert catalog.names() == []
    papers = catalog.create("papers")
    papers.add([Document("d", "some text")])
    assert catalog.get_or_create("notes.2024").embedder == "svd"
    assert catalog.names() == ["notes.2024", "papers"]
    assert catalog.open("papers") is papers is catalog.get_or_create("papers")
    catalog.drop("papers")
    assert catalog.names() == ["notes.2024"]
    assert len(catalog.create("papers")) == 0


def test_collections_outlive_the_catalog(catalog: Catalog) -> None:
    catalog.create("papers").add([Document("d", "some text")])
    catalog.close()
    with Catalog(catalog.root, splitter()) as again:
        assert again.open("papers").get("d").text == "some text"


def test_an_unknown_name_is_answered_with_the_known_ones(catalog: Catalog) -> None:
    with pytest.raises(NotFoundError, match="none yet"):
        catalog.open("papers")
    catalog.create("a")
    catalog.create("b")
    for call in (catalog.open, catalog.drop):
        with pytest.raises(NotFoundError, match="there are: a, b"):
            call("papers")


def test_a_name_is_taken_once(catalog: Catalog) -> None:
    catalog.create("papers")
    with pytest.raises(InputError, match="already exists"):
        catalog.create("papers")


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", "a\\b", ".hidden", "a b", "é", "x" * 65, "a\n", None])
def test_a_name_is_never_a_path(catalog: Catalog, name: str) -> None:
    for call in (catalog.open, catalog.create, catalog.get_or_create, catalog.drop):
        with pytest.raises(InputError, match="not valid"):
            call(name)
    assert not catalog.root.exists()


def test_another_process_may_drop_and_create(catalog: Catalog) -> None:
    catalog.create("papers").add([Document("d", "old")])
    with Catalog(catalog.root, splitter()) as other:
        other.drop("papers")
        with pytest.raises(NotFoundError):
            catalog.open("papers")
        other.create("papers").add([Document("d", "new")])
        assert catalog.open("papers").get("d").text == "new"
        other.drop("papers")
        other.create("papers").add([Document("d", "newer")])
        assert catalog.open("papers").get("d").text == "newer"


def test_a_damaged_collection_spares_the_others(catalog: Catalog) -> None:
    catalog.create("good").add([Document("d", "text")])
    catalog.create("bad")
    catalog.close()
    (catalog.root / "bad" / "collection.db").write_bytes(b"nonsense" * 1000)
    with pytest.raises(CollectionError, match=r"bad.collection\.db"):
        catalog.open("bad")
    assert catalog.open("good").get("d").text == "text"
    catalog.drop("bad")
    assert catalog.names() == ["good"]


def test_importing_is_light() -> None:
    heavy = "{'torch', 'sklearn', 'faiss', 'bm25s', 'bs4'}"
    code = f"import sys, ragkv.retrievers; print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
