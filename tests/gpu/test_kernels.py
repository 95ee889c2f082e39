"""The kernels against their twins, and the fused layer loop against the plain one, compiled."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from ragkv.kernels import attend, pointwise, rotate, scores, start, weigh
from ragkv.runner import ModelRunner
from ragkv.selfcheck import settle_layer_loop
from tests import fused_kit, kernels_kit
from tests.families import make_model
from tests.sync_kit import no_waiting

pytestmark = pytest.mark.gpu
HALVES = [torch.bfloat16, torch.float16]
# Every shape in both would only compile for minutes.
SHAPES = [(kernels_kit.SHAPES[0], torch.float16), *((shape, torch.bfloat16) for shape in kernels_kit.SHAPES)]
LONG = kernels_kit.Case([*range(0, 3000, 7), *range(3000, 3033)], 3033)


@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize("case", kernels_kit.CASES.values(), ids=kernels_kit.CASES)
@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
def test_attend(shape, case, dtype, splits, monkeypatch):
    monkeypatch.setattr(attend, "_dropped", [True])
    kernels_kit.check_attend(attend, case, shape, dtype, "cuda", splits)


@pytest.mark.parametrize("window", [None, 500])
@pytest.mark.parametrize("heads", [(32, 8, 128), (14, 2, 64), (28, 4, 128), (8, 8, 96)])
def test_attend_to_many_keys(heads, window, monkeypatch):
    monkeypatch.setattr(attend, "_dropped", [True])
    shape = kernels_kit.Shape(*heads)
    kernels_kit.check_attend(attend, LONG._replace(window=window), shape, torch.bfloat16, "cuda")


# Rows that fill several tiles: dense, scattered, with empty shares of the keys, blocks that are masked on both sides.
MANY = {
    "dense": kernels_kit.Case(list(range(700)), 700),
    "long": LONG,
    "far-apart": kernels_kit.Case(list(range(0, 9000, 30)), 9001),
    "in-front": kernels_kit.Case(list(range(300)), 5000),
    "behind": kernels_kit.Case(list(range(4000, 4511)), 4512),
}


@pytest.mark.skipif(torch.cuda.get_device_capability() != (9, 0), reason="it is for Hopper")
@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize("window", [None, 1, 100, 300, 2000])
@pytest.mark.parametrize("case", MANY.values(), ids=MANY)
@pytest.mark.parametrize(("heads", "dtype"), [((8, 2, 128), torch.bfloat16), ((14, 2, 64), torch.float16)])
def test_attend_on_hopper(heads, dtype, case, window, splits):
    shape = kernels_kit.Shape(*heads)
    case = case._replace(window=window)
    given = kernels_kit.attend_inputs(case, shape, dtype, "cuda")
    assert attend.AttendRoom(given.q, shape.kv_heads, case.length).hopper is not None
    kernels_kit.check_attend(attend, case, shape, dtype, "cuda", splits)


def test_a_dropped_kernel_is_not_used_again(monkeypatch):
    monkeypatch.setattr(attend, "_dropped", [])
    q = torch.zeros((700, 8, 128), dtype=torch.bfloat16, device="cuda")
    assert not attend.drop_hopper(8, 128, q)  # so few never go through it
    if attend.AttendRoom(q, 2, 700).hopper is not None:
        assert attend.drop_hopper(2800, 128, q)
    assert attend.AttendRoom(q, 2, 700).hopper is None
    assert not attend.drop_hopper(2800, 128, q)


@pytest.mark.parametrize("case", [*kernels_kit.CASES.values(), LONG])
def test_several_layers(case):
    kernels_kit.check_layers(attend, scores, case, kernels_kit.SHAPES[0], "cuda")


@pytest.mark.parametrize("last", [1, 33, 1000])
@pytest.mark.parametrize("case", [*kernels_kit.CASES.values(), LONG, LONG._replace(window=500)])
@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
def test_scores(shape, case, dtype, last):
    kernels_kit.check_scores(scores, case, shape, dtype, "cuda", last)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rotation", kernels_kit.ROTATIONS.values(), ids=kernels_kit.ROTATIONS)
def test_rope_write(rotation, dtype):
    kernels_kit.check_rope_write(rotate, rotation, dtype, "cuda")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [64, 896, 4096, 5120])
def test_rms_norm(width, dtype):
    kernels_kit.check_rms_norm(pointwise, width, dtype, "cuda")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", [96, 4864, 14336])
def test_silu_mul(width, dtype):
    kernels_kit.check_silu_mul(pointwise, width, dtype, "cuda")


@pytest.mark.parametrize("length", [1, 9, 1024, 9000])
def test_weigh(length):
    kernels_kit.check_weigh(weigh, length, "cuda")


@pytest.mark.parametrize(("width", "rotary", "places"), [(64, 16, 1), (96, 24, 40), (5000, 128, 33)])
@pytest.mark.parametrize("dtype", HALVES)
def test_start_rows(width, rotary, places, dtype):
    kernels_kit.check_start_rows(start, width, rotary, places, dtype, "cuda")


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float16) for name in fused_kit.FUSED), ("qwen3", torch.bfloat16)]
)
def test_fused_passes(name, dtype):
    fused_kit.check_passes(name, dtype, "cuda")


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_fused_values(name):
    fused_kit.check_values(name, torch.bfloat16, "cuda")


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_some_rows_go_on(name):
    fused_kit.check_some_rows_go_on(name, torch.bfloat16, "cuda")


def test_rows_start():
    fused_kit.check_starts(ModelRunner(make_model("llama").to("cuda", torch.bfloat16), fused=True))


@pytest.mark.parametrize("name", ["llama", "qwen2-windowed", "qwen3", "smollm3"])
def test_looking_ahead(name):
    fused_kit.check_looking_ahead(name, torch.float16, "cuda")


@pytest.mark.parametrize("name", fused_kit.FUSED)
def test_a_model_on_the_device_runs_fused(name):
    runner = ModelRunner(make_model(name).to("cuda", torch.bfloat16))
    settle_layer_loop(runner)
    assert runner.plain_because is None


def test_full_precision_runs_plain():
    runner = ModelRunner(make_model("llama").to("cuda"))
    assert "float32" in runner.plain_because


@torch.inference_mode()
def test_a_layer_never_waits_for_the_device():
    runner = ModelRunner(make_model("llama").to("cuda", torch.bfloat16))
    ids = fused_kit.ids_of(runner, 40)
    kv = runner.new_kv(40)
    runner.prefill(ids, kv)
    rows = fused_kit.scattered(runner, kv, ids, score_rows=8)
    runner.run_layer(0, rows)  # compiles
    with no_waiting():
        for layer in range(1, runner.shape.layers):
            runner.run_layer(layer, rows)


@torch.inference_mode()
def test_no_kernel_is_compiled_per_length():
    runner = ModelRunner(make_model("qwen3").to("cuda", torch.bfloat16))
    settle_layer_loop(runner)
    kernels = [attend._attend, attend._join, scores._score_keys, rotate._rope_write, pointwise._rms_norm]
    counts = None
    for length in (50, 64, 97, 200, 256):
        ids, kv = fused_kit.ids_of(runner, length), runner.new_kv(length)
        runner.prefill(ids, kv)
        rows = fused_kit.scattered(runner, kv, ids, score_rows=length % 7 + 1)
        for layer in range(runner.shape.layers):
            runner.run_layer(layer, rows)
        now = [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]
        assert counts in (None, now)
        counts = now
