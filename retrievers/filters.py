"""Metadata filters: which documents a query may see.

A filter is a mapping; every entry must hold:

    {"lang": "en"}                                  equal
    {"lang": ["en", "de"]}                          any of
    {"year": {"$gte": 2020, "$lt": 2024}}           compared
    {"author.name": {"$ne": "Doe"}}                 a dot goes into nested metadata
    {"draft": {"$exists": False}}

Operators: ``$eq $ne $gt $gte $lt $lte $in $nin $exists``. Where a document's value is a list, one matching
element is enough (``$ne`` and ``$nin``: no element may match). A missing field fails every operator but
``$ne``, ``$nin`` and ``{"$exists": false}``. Values of different types are unequal and never ordered;
``True`` is not ``1``.

Filters act on *documents*: all chunks of a document share its metadata. A chunk's KV is computed behind the
chunks before it in its own document, so this is what keeps document context inside an access filter: whoever
may see a chunk may see everything that coloured it. Split texts of different readership into different
documents.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from ragkv.errors import FilterError

Filters = Mapping[str, Any]
_MISSING = object()


def compile_filters(filters: Filters | None) -> Callable[[Mapping[str, Any]], bool]:
    """The filter as a function of a document's metadata. Raises FilterError where it is malformed."""
    if filters is None:
        filters = {}
    if not isinstance(filters, Mapping):
        raise FilterError(f"filters must be a mapping of field to condition, not {type(filters).__name__}")
    tests = [(field, _condition(field, wanted)) for field, wanted in filters.items()]
    return lambda metadata: all(test(_lookup(metadata, field)) for field, test in tests)


def _condition(field: object, wanted: Any) -> Callable[[Any], bool]:
    if not isinstance(field, str) or not field:
        raise FilterError(f"filter fields must be non-empty strings, not {field!r}")
    if isinstance(wanted, Mapping):
        if not wanted:
            raise FilterError(f"filter field {field!r} has no condition; choose from {_CHOICES}", field=field)
        tests = [_operator(field, name, value) for name, value in wanted.items()]
        return lambda value: all(test(value) for test in tests)
    return _operator(field, "$in" if isinstance(wanted, list | tuple) else "$eq", wanted)


def _operator(field: str, name: Any, wanted: Any) -> Callable[[Any], bool]:
    test = _OPERATORS.get(name)
    if test is None:
        raise FilterError(
            f"unknown filter operator {name!r} for field {field!r}; choose from {_CHOICES}",
            field=field,
            operator=str(name),
        )
    if name in ("$in", "$nin") and not isinstance(wanted, list | tuple):
        raise FilterError(f"{name} for field {field!r} needs a list, not {wanted!r}", field=field, operator=name)
    if name == "$exists" and not isinstance(wanted, bool):
        raise FilterError(f"$exists for field {field!r} needs true or false, not {wanted!r}", field=field)
    if name in ("$gt", "$gte", "$lt", "$lte") and _kind(wanted) not in ("number", "str"):
        raise FilterError(f"{name} for field {field!r} needs a number or a string, not {wanted!r}", field=field)
    return lambda value: test(value, wanted)


def _lookup(metadata: Mapping[str, Any], path: str) -> Any:
    """The value at ``path``. A key that itself holds dots wins over nesting."""
    if path in metadata:
        return metadata[path]
    value: Any = metadata
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _elements(value: Any) -> list[Any]:
    if value is _MISSING:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _kind(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number"
    return type(value).__name__


def _equal(a: Any, b: Any) -> bool:
    return _kind(a) == _kind(b) and bool(a == b)


def _any_of(value: Any, wanted: Any) -> bool:
    return any(_equal(element, one) for element in _elements(value) for one in wanted)


def _ordered(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    return lambda value, wanted: any(
        _kind(element) == _kind(wanted) and compare(element, wanted) for element in _elements(value)
    )


_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "$eq": lambda value, wanted: _any_of(value, [wanted]) or (value is not _MISSING and _equal(value, wanted)),
    "$ne": lambda value, wanted: not _any_of(value, [wanted]),
    "$gt": _ordered(operator.gt),
    "$gte": _ordered(operator.ge),
    "$lt": _ordered(operator.lt),
    "$lte": _ordered(operator.le),
    "$in": _any_of,
    "$nin": lambda value, wanted: not _any_of(value, wanted),
    "$exists": lambda value, wanted: (value is not _MISSING) == wanted,
}
_CHOICES = ", ".join(sorted(_OPERATORS))
