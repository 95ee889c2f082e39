"""The kernels against their twins, in Triton's interpreter. tests/gpu runs the same checks compiled."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton, and TRITON_INTERPRET=1 before it is imported", allow_module_level=True)

from ragkv.kernels import attend, pointwise, rotate, scores, start, weigh
from tests import kernels_kit as kit

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of inf - inf in rows not used
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the interpreter makes scalars of arrays (numpy < 2.4)
]


@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize("dtype", kit.CPU_DTYPES)
@pytest.mark.parametrize("case", kit.CASES.values(), ids=kit.CASES)
@pytest.mark.parametrize("shape", kit.SHAPES[:1], ids=str)
def test_attend(shape, case, dtype, splits):
    kit.check_attend(attend, case, shape, dtype, "cpu", splits)


@pytest.mark.parametrize("shape", kit.SHAPES[1:], ids=str)
@pytest.mark.parametrize("case", ["scattered", "scattered-windowed"])
def test_attend_in_other_shapes(shape, case):
    kit.check_attend(attend, kit.CASES[case], shape, torch.float16, "cpu")


@pytest.mark.parametrize("case", ["scattered", "scattered-windowed"])
def test_several_layers(case):
    kit.check_layers(attend, scores, kit.CASES[case], kit.SHAPES[0], "cpu")


@pytest.mark.parametrize("last", [1, 5, 1000])
@pytest.mark.parametrize("case", kit.CASES.values(), ids=kit.CASES)
@pytest.mark.parametrize("shape", kit.SHAPES[:2], ids=str)
def test_scores(shape, case, last):
    kit.check_scores(scores, case, shape, torch.float32, "cpu", last)


@pytest.mark.parametrize("dtype", kit.CPU_DTYPES)
@pytest.mark.parametrize("rotation", kit.ROTATIONS.values(), ids=kit.ROTATIONS)
def test_rope_write(rotation, dtype):
    kit.check_rope_write(rotate, rotation, dtype, "cpu")


@pytest.mark.parametrize("dtype", kit.CPU_DTYPES)
@pytest.mark.parametrize("width", [64, 96, 3000])
def test_rms_norm(width, dtype):
    kit.check_rms_norm(pointwise, width, dtype, "cpu")


@pytest.mark.parametrize("dtype", kit.CPU_DTYPES)
@pytest.mark.parametrize("width", [96, 5000])
def test_silu_mul(width, dtype):
    kit.check_silu_mul(pointwise, width, dtype, "cpu")


@pytest.mark.parametrize("dtype", kit.CPU_DTYPES)
@pytest.mark.parametrize(("shape", "turning"), [(kit.SHAPES[0], 64), (kit.SHAPES[1], 48), (kit.SHAPES[3], 8)])
@pytest.mark.parametrize("codec", ["raw", "int8", "fp8"])
def test_slabs(codec, shape, turning, dtype):
    kit.check_slabs(codec, shape, turning, dtype)


@pytest.mark.parametrize("length", [1, 9, 1024, 9000])
def test_weigh(length):
    kit.check_weigh(weigh, length, "cpu")


@pytest.mark.parametrize(("width", "rotary", "places"), [(64, 16, 1), (96, 24, 40), (5000, 128, 33)])
@pytest.mark.parametrize("dtype", kit.CPU_DTYPES)
def test_start_rows(width, rotary, places, dtype):
    kit.check_start_rows(start, width, rotary, places, dtype, "cpu")


def test_what_does_not_fit_is_refused():
    q = torch.zeros((2, 4, 64), dtype=torch.float16)
    kv, slots = torch.zeros((5, 2, 64), dtype=torch.float16), torch.tensor([1, 2])
    for bad in (
        (q, kv, kv.float(), slots),
        (q, kv, kv[:4], slots),
        (q, kv, kv, slots[:1]),
        (q, kv, kv, slots.int()),
        (q[:, :, ::2], kv, kv, slots),
        (q.float(), kv, kv, slots),
    ):
        with pytest.raises(ValueError):
            attend.attend(*bad, scale=1.0)


@pytest.mark.parametrize("words", [1, 1023, 1024, 1025, 5000])
def test_fetch(words):
    from ragkv.kernels.fetch import fetch

    source, out = torch.arange(words, dtype=torch.int32), torch.full((words + 1,), -1, dtype=torch.int32)
    fetch(source, out)
    assert out.tolist() == [*range(words), -1]
