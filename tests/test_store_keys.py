from __future__ import annotations

import pytest

from ragkv.store import chunk_key

BASE = {
    "model": "m",
    "tokenizer": "t",
    "dtype": "bfloat16",
    "codec": "raw",
    "context_policy": "document",
    "context": [1, 2],
    "tokens": [3, 4],
    "salt": b"s",
}


def test_key_is_the_same_in_every_process_and_version():
    assert chunk_key(**BASE).hex() == "b251feb8011811c9f1418dd27ad00f002c4cd4eda608055e76f49a715d5cbfd9"


@pytest.mark.parametrize("field", BASE)
def test_every_field_counts(field):
    other = {**BASE, field: BASE[field] + type(BASE[field])(BASE[field])}
    assert chunk_key(**other) != chunk_key(**BASE)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"model": "ab", "tokenizer": "c"}, {"model": "a", "tokenizer": "bc"}),
        ({"context": [1, 2], "tokens": [3]}, {"context": [1], "tokens": [2, 3]}),
        ({"tokens": [3], "salt": b""}, {"tokens": [], "salt": (3).to_bytes(8, "little")}),
    ],
)
def test_splits_of_the_same_bytes_do_not_collide(one, two):
    assert chunk_key(**{**BASE, **one}) != chunk_key(**{**BASE, **two})
