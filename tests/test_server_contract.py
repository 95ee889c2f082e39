"""The real engine offers what the server calls, and the tests' fake is no more than that."""

from __future__ import annotations

import importlib
import inspect

import pytest

from ragkv.server import EngineAPI
from tests.fake_engine import FakeEngine

METHODS = sorted(name for name, member in vars(EngineAPI).items() if inspect.isfunction(member) and name[0] != "_")


def engine_class(name):
    # Imported here: it loads torch, which no other test of the server needs.
    return FakeEngine if name == "fake" else importlib.import_module("ragkv.engine").Engine


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", ["fake", "real"])
def test_the_engine_takes_what_the_server_sends(engine, method):
    wanted = getattr(EngineAPI, method)
    offered = getattr(engine_class(engine), method)
    parameters = inspect.signature(offered).parameters
    for name, parameter in inspect.signature(wanted).parameters.items():
        assert name in parameters, f"{method}({name})"
        assert parameters[name].kind == parameter.kind
        if parameter.default is not parameter.empty:
            assert parameters[name].default == parameter.default
    sent = set(inspect.signature(wanted).parameters)
    required = {n for n, p in parameters.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD,)}
    assert required <= sent
    assert inspect.iscoroutinefunction(offered) == inspect.iscoroutinefunction(wanted)
    assert inspect.isasyncgenfunction(offered) == (method == "astream")


def test_the_contract_is_not_empty():
    assert {"astream", "cancel", "ingest", "health"} <= set(METHODS)
