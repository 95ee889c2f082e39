from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ragkv.errors import CollectionError, ConfigError, DocumentError, FilterError, InputError, NotFoundError
from ragkv.retrievers import Collection, Document, Splitter, SvdEmbedder, snapshot
from ragkv.retrievers.database import Database

ROOT = Path(__file__).resolve().parents[1]
PETS = [
    Document("cats", "Cats chase mice. They purr.", "On cats", {"year": 2020, "reader": ["ann", "bob"]}),
    Document("dogs", "Dogs chase cats. They bark.", None, {"year": 2021, "reader": ["bob"]}),
    Document("money", "Stocks fell on Monday.", None, {"year": 2022, "reader": []}),
]


def splitter(tokens: int = 16) -> Splitter:
    return Splitter(lambda text: len(text.split()), tokens)


@pytest.fixture
def pets(tmp_path: Path) -> Iterator[Collection]:
    with Collection(tmp_path / "pets", splitter()) as collection:
        collection.add(PETS)
        yield collection


def found(collection: Collection, query: str, k: int = 5, **options: Any) -> list[str]:
    return [hit.chunk.document_id for hit in collection.retrieve(query, k, **options)]


def test_documents_come_back_as_they_went_in(pets: Collection) -> None:
    assert len(pets) == 3
    assert pets.get("dogs") == PETS[1]
    assert pets.get("cats").text == PETS[0].full_text == "On cats\nCats chase mice. They purr."
    assert pets.add(pets.get(document.id) for document in PETS).unchanged == ("cats", "dogs", "money")
    assert "".join(chunk.text for chunk in pets.chunks("cats")) == PETS[0].full_text
    assert [info.id for info in pets.documents()] == ["cats", "dogs", "money"]
    assert [info.id for info in pets.documents(offset=1, limit=1)] == ["dogs"]
    assert "dogs" in pets
    assert "birds" not in pets
    stats = pets.stats()
    assert (stats.documents, stats.chunks, stats.embedder) == (3, 3, "svd")
    assert stats.characters == sum(len(document.full_text) for document in PETS)


@pytest.mark.parametrize("mode", ["fused", "bm25", "dense"])
def test_the_right_document_comes_first(pets: Collection, mode: str) -> None:
    assert found(pets, "what happened to stocks on monday?", mode=mode)[0] == "money"
    hits = pets.retrieve("cats that purr", 2, mode=mode)  # type: ignore[arg-type]
    assert [hit.rank for hit in hits] == [1, 2]
    assert hits[0].chunk == pets.chunks("cats")[0]
    assert hits[0].score >= hits[1].score
    assert hits[0].ranks == ({"bm25": 1, "dense": 1} if mode == "fused" else {mode: 1})


def test_filters_leave_room_for_what_is_permitted(pets: Collection) -> None:
    assert found(pets, "cats", 1) == ["cats"]
    assert found(pets, "cats", 1, filters={"year": {"$gt": 2020}}) == ["dogs"]
    assert found(pets, "cats", 1, filters={"reader": "ann"}) == ["cats"]
    assert found(pets, "cats", filters={"reader": "eve"}) == []
    with pytest.raises(FilterError):
        pets.retrieve("cats", 1, filters={"year": {"$near": 1}})


def test_filters_that_look_alike_are_told_apart(pets: Collection) -> None:
    pets.add([Document("bool", "cats flag", None, {"flag": True}), Document("one", "cats flag", None, {"flag": 1})])
    assert found(pets, "cats flag", filters={"flag": True}) == ["bool"]
    assert found(pets, "cats flag", filters={"flag": 1}) == ["one"]
    assert found(pets, "cats flag", filters={"flag": "1"}) == []


@pytest.mark.parametrize("query", ["", "...", "zebra"])
@pytest.mark.parametrize("mode", ["fused", "bm25", "dense"])
def test_a_query_without_a_known_word_finds_nothing(pets: Collection, query: str, mode: str) -> None:
    assert found(pets, query, mode=mode) == []


def test_impossible_queries_are_refused(pets: Collection) -> None:
    for k in (0, -1, True, 1.5):
        with pytest.raises(InputError, match="positive"):
            pets.retrieve("cats", k)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="fused, bm25, dense"):
        pets.retrieve("cats", 1, mode="magic")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="negative"):
        pets.documents(offset=-1)


def test_an_empty_collection_finds_nothing(tmp_path: Path) -> None:
    with Collection(tmp_path, splitter()) as collection:
        assert found(collection, "cats") == []
        with pytest.raises(FilterError):
            collection.retrieve("cats", 1, filters={"a": {"$b": 1}})
        collection.add(PETS)
        assert found(collection, "purr")[0] == "cats"
        for document in PETS:
            assert collection.delete(document.id)
        assert found(collection, "cats") == []
        assert len(collection) == 0


def test_adding_again_changes_nothing(pets: Collection) -> None:
    report = pets.add(PETS)
    assert report.unchanged == ("cats", "dogs", "money")
    assert (report.added, report.replaced, report.chunks_added, report.chunks_removed) == ((), (), 0, 0)


@pytest.mark.parametrize(
    "changed",
    [
        Document("cats", "Cats chase mice. They purr.", "On cats", {"year": 2019}),
        Document("cats", "Cats chase mice. They purr.", "Of cats", PETS[0].metadata),
        Document("cats", "Cats chase birds.", "On cats", PETS[0].metadata),
    ],
)
def test_a_change_of_any_part_replaces(pets: Collection, changed: Document) -> None:
    assert pets.add([changed, PETS[1]]).replaced == ("cats",)
    assert pets.get("cats").metadata == changed.metadata
    assert pets.get("cats").text == changed.full_text
    assert [info.id for info in pets.documents()] == ["cats", "dogs", "money"]


def test_only_changed_chunks_are_counted(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i} has just enough words to be a chunk of its own.\n\n" for i in range(10)]
    with Collection(tmp_path, splitter()) as collection:
        assert collection.add([Document("d", "".join(paragraphs))]).chunks_added == 10
        paragraphs[4] = "This paragraph is now another one but it is still about as long.\n\n"
        report = collection.add([Document("d", "".join(paragraphs))])
        assert (report.chunks_added, report.chunks_removed) == (1, 1)


def test_another_splitter_splits_again(tmp_path: Path) -> None:
    document = Document("d", "One two three four five. " * 20)
    with Collection(tmp_path, splitter(16)) as collection:
        collection.add([document])
        fine = len(collection.chunks("d"))
    with Collection(tmp_path, splitter(64)) as collection:
        assert collection.add([document]).replaced == ("d",)
        assert len(collection.chunks("d")) < fine
    with Collection(tmp_path, splitter(16)) as collection:
        assert collection.resplit().replaced == ("d",)
        assert len(collection.chunks("d")) == fine
        assert collection.resplit().unchanged == ("d",)


@pytest.mark.parametrize("between", [1, 300])
def test_an_id_given_twice_is_refused_unless_the_content_is_the_same(tmp_path: Path, between: int) -> None:
    first, others = Document("a", "first"), [Document(f"b{i}", "x") for i in range(between)]
    with Collection(tmp_path, splitter()) as collection:
        said: list[int] = []
        report = collection.add([first, *others, first], said.append)
        assert report.added == ("a", *(other.id for other in others))
        assert (report.unchanged, said[-1]) == ((), between + 2)
        with pytest.raises(DocumentError, match="'a' comes twice"):
            collection.add([first, *others, Document("a", "second")])
        assert collection.get("a").text == "first"


def test_deleted_documents_are_gone(pets: Collection) -> None:
    assert found(pets, "bark")[0] == "dogs"
    assert pets.delete("dogs")
    assert not pets.delete("dogs")
    assert "dogs" not in found(pets, "dogs bark")
    for call in (pets.get, pets.chunks):
        with pytest.raises(NotFoundError, match="dogs"):
            call("dogs")


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        (Document("", "text"), "printable"),
        (Document("a\nb", "text"), "printable"),
        (Document("x" * 2000, "text"), "printable"),
        (Document("a", " \n"), "no text"),
        (Document("a", "half \ud800"), "surrogate"),
        (Document("a", "text", "t" * 501), "title"),
        (Document("a", "text", None, {"x": object()}), "not JSON"),
        (Document("a", "text", None, {"x": float("nan")}), "not JSON"),
    ],
)
def test_a_bad_document_spoils_only_its_batch(pets: Collection, document: Document, problem: str) -> None:
    with pytest.raises(DocumentError, match=problem):
        pets.add([Document("fine", "fine"), document])
    assert len(pets) == 3


def test_odd_text_survives(pets: Collection) -> None:
    text = "nul \0 inside, \u2028 line, 🐈 astral, e\u0301 combining"
    pets.add([Document("odd ⁂ id/with#signs", text)])
    assert pets.get("odd ⁂ id/with#signs").text == text


def test_progress_is_told_by_batches(tmp_path: Path) -> None:
    done: list[int] = []
    with Collection(tmp_path, splitter()) as collection:
        collection.add((Document(str(i), f"text {i}") for i in range(600)), done.append)
    assert done == [256, 512, 600]


def test_reopening_gives_the_same_hits_without_building(pets: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    before = pets.retrieve("cats and mice", 3)
    monkeypatch.setattr(snapshot, "_build", None)
    with Collection(pets.folder, splitter()) as again:
        assert again.retrieve("cats and mice", 3) == before


@pytest.mark.parametrize("damage", ["delete", "truncate", "flip", "foreign"])
def test_a_damaged_index_is_rebuilt(pets: Collection, damage: str) -> None:
    before = pets.retrieve("cats and mice", 3)
    cache = pets.folder / "index.npz"
    data = bytearray(cache.read_bytes())
    if damage == "delete":
        cache.unlink()
    elif damage == "truncate":
        cache.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        with np.load(cache) as arrays:
            at = data.index(arrays["vectors"].tobytes())
        data[at + 5] ^= 0x40
        cache.write_bytes(data)
    else:
        np.savez(cache, key=np.zeros(3))
    with Collection(pets.folder, splitter()) as again:
        assert again.retrieve("cats and mice", 3) == before


def test_a_folder_without_room_for_the_index_still_answers(pets: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert found(pets, "purr")[0] == "cats"
    assert not list(pets.folder.glob("*.tmp"))


def test_a_failing_disk_is_no_reason_to_delete_a_collection(pets: Collection) -> None:
    database = Database(pets.folder / "collection.db")
    with pytest.raises(CollectionError, match="disk is well and has space") as caught, database.read():
        raise sqlite3.OperationalError("disk I/O error")
    database.close()
    assert "delete" not in caught.value.message


def test_a_small_change_embeds_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded: list[str] = []

    class Model:
        def __init__(self, *_: object, **__: object) -> None: ...

        def encode_document(self, texts: list[str], **_: object) -> np.ndarray:
            embedded.extend(texts)
            return np.array([self._vector(text) for text in texts])

        def encode_query(self, texts: list[str], **_: object) -> np.ndarray:
            return np.array([self._vector(text) for text in texts])

        def _vector(self, text: str) -> list[float]:
            return [text.count("a") + 1.0, text.count("e"), text.count("o")]

    module = ModuleType("sentence_transformers")
    module.SentenceTransformer = Model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    with Collection(tmp_path, splitter(), embedder="my/model") as collection:
        collection.add(PETS)
        collection.refresh()
        assert len(embedded) == 3
        collection.add([Document("new", "Owls hoot.")])
        collection.delete("money")
        assert found(collection, "ooo", 1, mode="dense") == ["new"]
        assert embedded[3:] == ["Owls hoot."]
        fresh = collection.retrieve("cats", 3)
        (tmp_path / "index.npz").unlink()
    with Collection(tmp_path, splitter()) as again:
        assert again.embedder == "my/model"
        assert again.retrieve("cats", 3) == fresh


def test_a_large_collection_folds_in_a_few_new_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_REFIT_BELOW", 10)
    fits = []
    fit = SvdEmbedder.fit

    def counted(texts: list[str]) -> SvdEmbedder:
        fits.append(len(texts))
        return fit(texts)

    monkeypatch.setattr(SvdEmbedder, "fit", counted)
    with Collection(tmp_path, splitter()) as collection:
        collection.add(Document(str(i), f"number {i} of word{i % 7}") for i in range(40))
        collection.refresh()
        collection.add([Document("new", "number of word3")])
        assert "new" in found(collection, "word3", 10, mode="dense")
        assert fits == [40]
        collection.add(Document(f"more{i}", f"zebra{i} number") for i in range(10))
        assert found(collection, "zebra4", 1, mode="dense") == ["more4"]
        assert fits == [40, 51]


def test_what_another_process_commits_is_seen(pets: Collection) -> None:
    with Collection(pets.folder, splitter()) as other:
        assert found(pets, "owls") == []
        other.add([Document("owls", "Owls hoot.")])
        assert found(pets, "owls hoot", 1) == ["owls"]
        pets.delete("owls")
        assert found(other, "owls") == []


def test_queries_run_while_documents_come_and_go(tmp_path: Path) -> None:
    errors: list[BaseException] = []
    stop = threading.Event()
    with Collection(tmp_path, splitter()) as collection:
        collection.add([Document("fixed", "the fixed star")])

        def ask() -> None:
            while not stop.is_set():
                try:
                    assert found(collection, "fixed star", 1) == ["fixed"]
                except BaseException as error:
                    errors.append(error)
                    return

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for i in range(10):
            collection.add(Document(f"d{i}-{j}", f"planet {i} {j}") for j in range(5))
            collection.delete(f"d{i}-0")
        stop.set()
        for thread in threads:
            thread.join()
        assert not errors
        assert len(collection) == 41
        assert found(collection, "planet 9 4", 1) == ["d9-4"]


def run(code: str, *arguments: str) -> subprocess.Popen[str]:
    preamble = "import sys\nfrom ragkv.retrievers import *\ns = Splitter(lambda t: len(t.split()), 16)\n"
    return subprocess.Popen(
        [sys.executable, "-c", preamble + textwrap.dedent(code), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_kill_leaves_every_document_old_or_new(tmp_path: Path) -> None:
    def document(i: int, version: str) -> Document:
        return Document(str(i), f"{version} {i}. " * 30)

    with Collection(tmp_path, splitter()) as collection:
        collection.add(document(i, "old") for i in range(700))
    code = """
    documents = (Document(str(i), f"new {i}. " * 30) for i in range(700))
    Collection(sys.argv[1], s).add(documents, lambda n: print(n, flush=True))
    """
    with run(code, str(tmp_path)) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    with Collection(tmp_path, splitter()) as collection:
        texts = [collection.get(str(i)).text for i in range(700)]
        versions = [text.split()[0] for text in texts]
        assert versions[0] == "new"
        assert texts == [document(i, version).text for i, version in enumerate(versions)]
        assert found(collection, "new 7", 1) == ["7"]


def test_processes_create_and_fill_one_collection_together(tmp_path: Path) -> None:
    code = """
    with Collection(sys.argv[1], s) as c:
        for i in range(10):
            c.add([Document(f"{sys.argv[2]}-{i}", f"text {i}")])
            c.retrieve("text", 1)
    """
    processes = [run(code, str(tmp_path), str(n)) for n in range(3)]
    for process in processes:
        with process:
            process.communicate()
        assert process.returncode == 0
    with Collection(tmp_path, splitter()) as collection:
        assert len(collection) == 30


def test_files_that_cannot_be_a_collection_are_refused(tmp_path: Path) -> None:
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / "collection.db").write_bytes(b"not a database, but long enough to be one" * 100)
    with pytest.raises(CollectionError, match="restore it from a backup"):
        Collection(tmp_path / "garbage", splitter())
    (tmp_path / "foreign").mkdir()
    connection = sqlite3.connect(tmp_path / "foreign" / "collection.db")
    connection.execute("CREATE TABLE t (x)")
    connection.close()
    with pytest.raises(CollectionError, match="not a ragkv collection"):
        Collection(tmp_path / "foreign", splitter())
    (tmp_path / "file").write_text("")
    with pytest.raises(CollectionError, match="cannot create"):
        Collection(tmp_path / "file", splitter())


def test_a_newer_format_is_refused(pets: Collection) -> None:
    connection = sqlite3.connect(pets.folder / "collection.db")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(CollectionError, match="upgrade ragkv"):
        Collection(pets.folder, splitter())


def test_damage_below_an_open_collection_is_an_error_of_ours(tmp_path: Path) -> None:
    with Collection(tmp_path, splitter()) as collection:
        collection.add(Document(str(i), f"text {i} " * 50) for i in range(300))
    file = tmp_path / "collection.db"
    data = bytearray(file.read_bytes())
    data[8192:] = np.random.default_rng(0).bytes(len(data) - 8192)
    file.write_bytes(data)
    with pytest.raises(CollectionError), Collection(tmp_path, splitter()) as collection:
        collection.retrieve("text", 1)


def test_the_embedder_is_kept(pets: Collection) -> None:
    with pytest.raises(ConfigError, match="made with embedder 'svd', not 'other/model'"):
        Collection(pets.folder, splitter(), embedder="other/model")


def test_a_closed_collection_says_so(pets: Collection) -> None:
    pets.close()
    with pytest.raises(CollectionError, match="closed"):
        len(pets)
