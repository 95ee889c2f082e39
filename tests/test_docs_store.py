"""docs/store.md describes the chunk store as it is: its examples run, and its tables are complete."""

from __future__ import annotations

import ast
import dataclasses
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from ragkv.store import CODECS, ChunkStore, EntryHeader, Geometry
from ragkv.store.files import Folder
from tests.store_kit import flip, retold

PAGE = (Path(__file__).parent.parent / "docs" / "store.md").read_text(encoding="utf-8")
DTYPES = ("bfloat16", "float16", "float32")
TOKENS = 7


def block(beginning: str) -> str:
    """The code block that begins so."""
    blocks: list[str] = re.findall(r"^```\w*\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    [found] = [code for code in blocks if code.startswith(beginning)]
    return found


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.fixture
def reader() -> dict[str, Any]:
    return run(block("import json"))


def put(root: Path, codec: str, dtype: str) -> tuple[Path, EntryHeader, list[tuple[np.ndarray, np.ndarray]]]:
    """An entry of uneven KV, as the store reads it: its file, its header, and K and V of each layer."""
    geometry = Geometry(3, 2, 9, dtype)
    kv = np.random.default_rng(0).standard_normal((3, 2, TOKENS, 2, 9)) * np.logspace(-6, 3, 9)
    kv[:, :, 2] = 0
    with ChunkStore(root, capacity_bytes=1 << 20, ram_bytes=0) as store:
        store.put(bytes(32), geometry, kv.astype(geometry.numpy_dtype), tokens=TOKENS, model="α", codec=codec)
        [entry] = store.open([bytes(32)])
        with entry:
            layers = [entry.decode(slab) for [slab] in store.open_layers([entry])]
            return Path(store.folder.entry_path(bytes(32))), entry.header, layers


def test_the_first_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(block("import numpy"))
    assert str(names["info"]) in PAGE
    assert names["keys"].shape == names["values"].shape == (100, 4, 64)
    np.testing.assert_allclose(names["keys"], names["kv"][-1, 0], atol=0.03)
    np.testing.assert_allclose(names["values"], names["kv"][-1, 1], atol=0.03)


def test_the_key_is_as_said():
    names = run("from ragkv.store import chunk_key")
    made, said = ast.parse(block("chunk_key(")).body
    assert eval(ast.unparse(made), names) == ast.literal_eval(ast.unparse(said))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", CODECS)
def test_the_reader_reads_what_the_store_writes(reader, tmp_path, codec, dtype):
    path, header, layers = put(tmp_path, codec, dtype)
    about, read = reader["read_entry"](path)
    geometry = dataclasses.asdict(header.geometry)
    expected = {name: getattr(header, name) for name in about.keys() - geometry.keys()}
    assert about == {**expected, **geometry, "key": header.key.hex()}
    for (keys, values), (own_keys, own_values) in zip(read, layers, strict=True):
        assert keys.dtype == own_keys.dtype
        assert keys.tobytes() == own_keys.tobytes()
        assert values.tobytes() == own_values.tobytes()


@pytest.mark.parametrize("spelling", [{}, {"indent": 300}, {"ensure_ascii": False, "separators": (",", ":")}])
def test_page_and_store_read_what_others_write(reader, tmp_path, spelling):
    path, header, layers = put(tmp_path, "int8", "bfloat16")
    path.write_bytes(retold(path.read_bytes(), lambda about: about.update(unknown=[1]), **spelling))
    about, read = reader["read_entry"](path)
    assert (about["model"], about["unknown"]) == ("α", [1])
    with ChunkStore(tmp_path, capacity_bytes=1 << 20, ram_bytes=0) as store:
        [entry] = store.open([header.key])
        with entry:
            assert dataclasses.replace(entry.header, slabs=()) == dataclasses.replace(header, slabs=())
            again = [entry.decode(slab) for [slab] in store.open_layers([entry])]
    for found in (read, again):
        assert [part.tobytes() for both in found for part in both] == [x.tobytes() for both in layers for x in both]


def test_the_header_is_as_long_as_said(tmp_path):
    path, _, _ = put(tmp_path, "raw", "float32")
    raw = path.read_bytes()
    size, layers, length = struct.unpack_from("<III", raw, 20)
    assert "32 + 24 n + j, rounded up to blocks" in section("The file, byte by byte")
    assert size == -(-(32 + 24 * layers + length) // 4096) * 4096
    assert not any(raw[32 + 24 * layers + length : size])


@pytest.mark.parametrize("byte", [3, 12, 40, 4095, 4096, 8192])
def test_the_reader_refuses_damage(reader, tmp_path, byte):
    path, _, _ = put(tmp_path, "int8", "float16")
    flip(path, 8 * byte)
    with pytest.raises(ValueError, match="damaged"):
        reader["read_entry"](path)


def test_the_reader_refuses_another_version(reader, tmp_path):
    path, _, _ = put(tmp_path, "raw", "float32")
    raw = bytearray(path.read_bytes())
    raw[16] = 2
    raw[8:16] = xxhash.xxh3_64_intdigest(bytes(raw[16:4096])).to_bytes(8, "little")
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="another version"):
        reader["read_entry"](path)


def test_the_dump_is_what_the_store_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1.8e9)
    key = bytes(range(32))
    with ChunkStore(tmp_path, capacity_bytes=1 << 20, ram_bytes=0) as store:
        store.put(key, Geometry(1, 1, 4, "float16"), [np.arange(16, dtype="<f2")], tokens=2, model="m")
        raw = Path(store.folder.entry_path(key)).read_bytes()
    assert block("00000000") == hexdump(raw)


def hexdump(raw: bytes) -> str:
    """As ``hexdump -C`` prints it."""
    lines, before = [], b""
    for offset in range(0, len(raw), 16):
        row = raw[offset : offset + 16]
        if row != before:
            text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
            lines.append(f"{offset:08x}  {row[:8].hex(' ')}  {row[8:].hex(' ')}  |{text}|")
        elif lines[-1] != "*":
            lines.append("*")
        before = row
    return "\n".join([*lines, f"{len(raw):08x}", ""])


def test_every_field_of_the_description_is_documented(tmp_path, reader):
    about, _ = reader["read_entry"](put(tmp_path, "raw", "float32")[0])
    table = section("The file, byte by byte").partition("| description |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(about)


@pytest.mark.parametrize("word", [*CODECS, *DTYPES])
def test_every_codec_and_dtype_is_documented(word):
    assert f"`{word}`" in section("The file, byte by byte")


def test_everything_in_the_folder_is_documented(tmp_path):
    put(tmp_path, "raw", "float32")
    documented = set(re.findall(r"^\| `([^/`]+)", section("The folder"), re.MULTILINE))
    assert {path.name for path in tmp_path.iterdir()} <= documented
    assert Folder(tmp_path).quarantined.name in documented
