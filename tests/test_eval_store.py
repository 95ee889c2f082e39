"""`ragkv eval store`: every figure is there, comes from the disk, and wrong bytes are no speed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from ragkv.errors import ConfigError, StoreError, StoreFullError
from ragkv.eval import store_speed
from ragkv.eval.cli import app
from ragkv.eval.store_index import measure_index
from ragkv.eval.store_load import Load, drop_cached
from ragkv.eval.store_ours import Ours, Raw
from ragkv.eval.store_peers import PEERS, Contender, LMCache, Pickles, available
from ragkv.eval.store_speed import SIZES, Plan

TINY = ["store", "--size", "tiny", "--entries", "3", "--passes", "2", "--rows", "300"]


def load(entries: int = 3, tokens: int = 512) -> Load:
    return Load(SIZES["tiny"], tokens, entries)


def present() -> list[type[Contender]]:
    return [peer for peer in available()[0] if peer is not LMCache]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("disk")
    run = CliRunner().invoke(app, [*TINY, "--path", str(folder), "--json"])
    assert run.exit_code == 0, run.output
    assert not list(folder.iterdir()), "nothing is left behind"
    return json.loads(run.stdout)


def test_json_has_what_was_promised(result):
    for way in ("read", "write"):
        assert set(result[way]) == {"gbps", "raw_device_gbps", "ratio"}
        assert result[way]["ratio"] == pytest.approx(result[way]["gbps"] / result[way]["raw_device_gbps"])
    assert min(result[name] for name in ("lookups_per_s", "open_ms_at_1m_entries", "first_layer_ms")) > 0
    assert set(result["codec"]) == {"int8", "fp8"}
    assert all(set(speed) == {"encode_gbps", "decode_gbps"} for speed in result["codec"].values())
    assert result["index"]["rows"] == 300


def test_every_peer_is_measured_or_said_to_be_missing(result):
    assert all(set(peer) == {"name", "read_ratio", "write_ratio"} for peer in result["peers"])
    measured = {peer["name"] for peer in result["peers"]}
    assert measured | set(result["skipped"]) == {peer.name for peer in PEERS}
    assert {"safetensors", "pickle", "lmdb"} <= measured
    assert set(result["method"]["durable"]) == measured | {"raw", "raw, whole chunks", "ragkv"}


def test_a_pass_shows_that_the_page_cache_was_empty(result):
    for one in result["passes"]:
        for name, figures in one.items():
            entry_bytes, entries = result["method"]["entry_bytes"], result["method"]["plan"]["entries"]
            assert figures["cached_bytes_before_read"] <= 0.2 * entries * entry_bytes, name


def test_a_table_for_people(tmp_path):
    run = CliRunner().invoke(app, [*TINY, "--passes", "1", "--path", str(tmp_path)])
    assert run.exit_code == 0, run.output
    assert "raw device" in run.stdout
    assert "300 entries" in run.stdout


@pytest.mark.parametrize("kind", [Raw, Ours, *present()], ids=lambda kind: kind.name)
def test_a_contender_reads_what_it_wrote(tmp_path, kind):
    figures = store_speed.run(kind, tmp_path / "it", load(entries=9), threads=4)
    assert figures["read_gbps"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [Ours, *present()], ids=lambda kind: kind.name)
def test_wrong_bytes_are_no_result(tmp_path, kind, monkeypatch):
    """Each contender's every layer passes the comparison."""
    chunks = load()
    seen = set()
    monkeypatch.setattr(chunks, "arrived", lambda entry, layer, *parts: seen.add((entry, layer)))
    store_speed.run(kind, tmp_path / "it", chunks, threads=2)
    assert seen == {(entry, layer) for entry in range(3) for layer in range(chunks.geometry.layers)}


def test_arrived_compares_every_page():
    chunks = load(tokens=4096)
    slab = chunks.slab(1, 1).copy()
    chunks.arrived(1, 1, slab)
    chunks.arrived(1, 1, slab[: slab.size // 2], slab[slab.size // 2 :])
    slab[-4096] ^= 1
    with pytest.raises(StoreError, match="other bytes"):
        chunks.arrived(1, 1, slab)
    with pytest.raises(StoreError, match="came back"):
        chunks.arrived(1, 1, chunks.slab(1, 1)[:-4096])


def test_no_two_slabs_are_alike():
    chunks = load()
    slabs = {chunks.slab(entry, layer).tobytes() for entry in range(3) for layer in range(2)}
    assert len(slabs) == 6


def test_dropping_the_page_cache_counts_what_is_left(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(1 << 20))
    (tmp_path / "empty").touch()
    assert drop_cached(tmp_path) in (0, 1 << 20)  # all of it where the folder is a tmpfs


def test_an_error_or_ctrl_c_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(self: Pickles) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pickles, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store_speed.measure_store(Plan("tiny", entries=2, passes=1, rows=10, path=tmp_path), say=lambda *_: None)
    assert not list(tmp_path.iterdir())


def test_too_little_disk_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(StoreFullError, match="--path") as caught:
        store_speed.measure_store(Plan("8b", entries=10**9, path=tmp_path), say=lambda *_: None)
    assert caught.value.context["need"] > 10**16
    assert not list(tmp_path.iterdir())


def test_an_unknown_size_names_the_choices():
    with pytest.raises(ConfigError, match="8b, 1b, tiny"):
        Plan("70b")


def test_the_index_is_opened_clean_warm_and_after_a_crash(tmp_path):
    figures = measure_index(tmp_path / "index", rows=50, passes=1, say=lambda *_: None)
    assert set(figures) == {"rows", "open_ms", "open_warm_ms", "open_unclean_ms", "lookups_per_s"}


@pytest.mark.skipif("lmcache" in available()[1], reason="lmcache is not installed")
def test_lmcache_reads_what_it_wrote(tmp_path):
    assert store_speed.run(LMCache, tmp_path / "it", load(), threads=2)["read_gbps"] > 0
