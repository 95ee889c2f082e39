"""Decoding's kernels and its fused loop in Triton's interpreter. tests/gpu runs the same checks compiled."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton, and TRITON_INTERPRET=1 before it is imported", allow_module_level=True)

from ragkv.kernels import paged, vector
from tests import fused_kit, kernels_kit
from tests import paged_kit as kit

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of inf - inf in rows not used
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the interpreter makes scalars of arrays (numpy < 2.4)
]


@pytest.mark.parametrize("window", [None, 1, 40, 1000])
@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize("shape", kit.PAGED_SHAPES[:2], ids=str)
def test_attend_paged(shape, splits, window):
    kit.check_attend_paged(paged, shape, torch.float32, "cpu", splits, window)


@pytest.mark.parametrize("shape", kit.PAGED_SHAPES[2:], ids=str)
def test_attend_paged_in_other_shapes(shape):
    kit.check_attend_paged(paged, shape, torch.float16, "cpu", None, 40)


@pytest.mark.parametrize("dtype", kernels_kit.CPU_DTYPES)
@pytest.mark.parametrize("case", ["plain", "normed", "gated", "added", "biased"])
def test_product(case, dtype):
    kit.check_product(vector, 600, 50, case, dtype, "cpu")


@pytest.mark.parametrize("name", fused_kit.FUSED)
def test_loops(name):
    kit.check_loops(name, torch.float32, "cpu")


def test_what_does_not_fit_is_refused():
    x, weight, out = torch.zeros((1, 8)), torch.zeros((4, 8)), torch.zeros((1, 4))
    for bad in (
        (x.half(), weight, out),
        (x, weight[:3], out),
        (torch.zeros((2, 8)), weight, out),
        (x, weight.t(), out),
    ):
        with pytest.raises(ValueError):
            vector.product(*bad)
    q, kv = torch.zeros((1, 4, 64)), torch.zeros((3, 16, 2, 64))
    tables, one = torch.zeros((1, 3), dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    for bad in (
        (q.half(), kv, kv, tables, one, one),
        (q, kv, kv, tables.long(), one, one),
        (q, kv, kv[:2], tables, one, one),
    ):
        with pytest.raises(ValueError):
            paged.attend_paged(*bad, scale=1.0)
