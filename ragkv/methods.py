"""What is particular about a method: which settings it depends on, and which layers it runs before its main pass.

Said here once, without torch, for settings, loading and the cost model; :mod:`ragkv.selection` runs methods by it.
"""

from __future__ import annotations

from dataclasses import dataclass

CHECK_LAYER = 1
_MOST_SEARCHED = 4
_PARAMETERS = {"none": (), "full": (), "hkvd": ("ratio", "check_layer")}


@dataclass(frozen=True)
class Outline:
    """What a method runs until it has selected.

    Attributes:
        searched: layers whose stored keys are scored by what the question, on its own, looks for: needed first.
        asked: layers in which the question's attention to loaded KV is added up, on its way from the first one on.
        dense: first layers, run over all tokens; the main pass goes on behind them.
    """

    searched: tuple[int, ...] = ()
    asked: range = range(0)
    dense: int = 0

    @property
    def ahead(self) -> int:
        """The first layers that the question passes on its own."""
        return max(self.searched, default=-1) + 1

    def loading_order(self, layers: int) -> list[int]:
        """All layers in the order in which their stored KV is needed."""
        return [*self.searched, *(layer for layer in range(layers) if layer not in self.searched)]


def parameters(method: str) -> tuple[str, ...]:
    """The settings that what ``method`` repairs depends on."""
    return _PARAMETERS.get(method, ("ratio",))


def outline(method: str, layers: int, check_layer: int = CHECK_LAYER) -> Outline:
    """Of ``method`` in a model of so many layers; a method without an entry here selects at once."""
    match method:
        case "links":
            return Outline(searched=searched_layers(layers))
        case "question":
            return Outline(asked=range(layers // 4, max(layers // 4 + 1, 3 * layers // 4)))
        case "hkvd":
            return Outline(dense=min(check_layer, layers - 1))
    return Outline()


def searched_layers(layers: int) -> tuple[int, ...]:
    """The layers whose queries rank the context: up to four in the middle of the third quarter."""
    third = range(layers // 2, max(layers // 2 + 1, 3 * layers // 4))
    spare = max(0, len(third) - _MOST_SEARCHED)
    return tuple(third[spare // 2 :][:_MOST_SEARCHED])
