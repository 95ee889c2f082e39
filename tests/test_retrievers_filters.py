from __future__ import annotations

from typing import Any

import pytest

from ragkv.errors import FilterError
from ragkv.retrievers import compile_filters

DOCUMENT = {
    "lang": "en",
    "year": 2021,
    "tags": ["a", "b"],
    "draft": False,
    "author": {"name": "Doe", "age": None},
    "dotted.key": 1,
    "empty": [],
}


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (None, True),
        ({}, True),
        ({"lang": "en"}, True),
        ({"lang": "de"}, False),
        ({"lang": "en", "year": 2020}, False),
        ({"lang": ["de", "en"]}, True),
        ({"lang": []}, False),
        ({"tags": "b"}, True),
        ({"tags": ["c", "b"]}, True),
        ({"tags": {"$eq": ["a", "b"]}}, True),
        ({"tags": {"$ne": "a"}}, False),
        ({"tags": {"$nin": ["c"]}}, True),
        ({"year": {"$gte": 2021, "$lt": 2022}}, True),
        ({"year": {"$gt": 2021}}, False),
        ({"year": {"$lte": 2020.5}}, False),
        ({"year": {"$gt": "2000"}}, False),
        ({"lang": {"$gte": "e"}}, True),
        ({"year": "2021"}, False),
        ({"year": 2021.0}, True),
        ({"draft": 0}, False),
        ({"draft": False}, True),
        ({"author.name": "Doe"}, True),
        ({"author.name.first": "Doe"}, False),
        ({"author.age": None}, True),
        ({"dotted.key": 1}, True),
        ({"missing": None}, False),
        ({"missing": {"$ne": 1}}, True),
        ({"missing": {"$nin": [1]}}, True),
        ({"missing": {"$lt": 1}}, False),
        ({"missing": {"$exists": False}}, True),
        ({"empty": {"$exists": True}}, True),
        ({"empty": {"$ne": 1}}, True),
    ],
)
def test_conditions(filters: dict[str, Any] | None, expected: bool) -> None:
    assert compile_filters(filters)(DOCUMENT) is expected


@pytest.mark.parametrize(
    ("filters", "problem"),
    [
        ({"year": {"$above": 3}}, r"unknown filter operator '\$above'.*\$exists, \$gt"),
        ({"author": {"name": "Doe"}}, "unknown filter operator 'name'"),
        ({"year": {}}, "no condition"),
        ({"year": {"$in": 3}}, "needs a list"),
        ({"year": {"$exists": 1}}, "needs true or false"),
        ({"year": {"$lt": [1]}}, "needs a number or a string"),
        ({"": 1}, "non-empty"),
        ({1: 1}, "non-empty"),
        (["lang"], "must be a mapping"),
    ],
)
def test_a_malformed_filter_is_an_error(filters: Any, problem: str) -> None:
    with pytest.raises(FilterError, match=problem):
        compile_filters(filters)
