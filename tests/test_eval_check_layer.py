"""The layer at which values are compared: what repair it leads to, at the same cost."""

from __future__ import annotations

import pytest
import torch

from ragkv.eval.check_layer import best_check_layer, taken_away
from ragkv.methods import CHECK_LAYER

RATIOS = (0.05, 0.1, 0.2)


def model(layers: int, telling: int, tokens: int = 200) -> torch.Tensor:
    """Deviations (layers, tokens) of which few tokens have most, as values show from layer ``telling`` on; before it,
    other tokens seem to."""
    chance = torch.Generator().manual_seed(layers)
    deviation = torch.rand((layers, tokens), generator=chance, dtype=torch.float64) / 10
    deviation[0] = 0
    deviation[1:telling, 100:120] += 1
    deviation[telling:, :20] += 1
    return deviation


@pytest.mark.parametrize("telling", [1, 2, 3])
def test_a_deep_model_waits_for_the_layer_that_tells(telling):
    assert best_check_layer([model(32, telling)] * 2, RATIOS) == telling


def test_a_shallow_model_cannot_afford_to():
    """Of six layers a third one is more than any token repaired behind it is worth."""
    assert best_check_layer([model(6, 3)], RATIOS) == 1


def test_what_is_taken_away_is_what_is_no_longer_stored():
    """Against the table of all token-layers, computed one by one."""
    deviation = model(8, 2)
    budget, check = 1 + 0.3 * 7, 2
    computed = torch.zeros(8, 200, dtype=torch.bool)
    computed[:check] = True
    left = round((budget * 200 - int(computed.sum())) / 6)
    for token in sorted(range(200), key=lambda j: -float(deviation[check, j]))[:left]:
        computed[check:, token] = True
    assert float(computed.sum()) == pytest.approx(budget * 200, abs=6)
    assert taken_away(deviation, check, budget) == pytest.approx(float(deviation[computed].sum() / deviation.sum()))


def test_a_cost_that_ends_before_the_check_layer_repairs_no_token():
    deviation = model(8, 2)
    assert taken_away(deviation, 5, 2.9) == pytest.approx(float(deviation[:2].sum() / deviation.sum()))


def test_exact_kv_prompts_without_documents_and_models_of_one_layer_say_nothing():
    for silent in ([], [torch.zeros(8, 20)], [torch.zeros(8, 0).double()], [torch.ones(1, 20)]):
        assert best_check_layer(silent, RATIOS) == CHECK_LAYER
    assert best_check_layer([torch.full((8, 0), float("nan")), model(32, 2)], RATIOS) == 2
