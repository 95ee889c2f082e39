from __future__ import annotations

import gc

import pytest
import torch


@pytest.fixture(autouse=True)
def _memory_is_given_back():
    """A runner and its graphs hold each other, and some gigabytes, until they are collected."""
    yield
    gc.collect()
    torch.cuda.empty_cache()
