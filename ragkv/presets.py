"""``random:<preset>``: the shapes of a known model with seeded random weights, for measuring speed without a download.

The answers mean nothing; times, bytes and memory are those of the model named.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
from blake3 import blake3
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ragkv import attention
from ragkv.errors import NotAModelError

PREFIX = "random:"
SEED = 0
_STD = 0.02


class Preset(NamedTuple):
    """A model type and what its published configuration says of its shapes."""

    family: str
    options: dict[str, Any]

    @property
    def config(self) -> Any:
        return CONFIG_MAPPING[self.family](**self.options)


def _options(
    layers: int, hidden: int, intermediate: int, heads: tuple[int, int], vocab: int, positions: int, **others: Any
) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
        **others,
    }


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def _llama3(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


# The published config.json of each: of the Instruct model where base and Instruct differ (Qwen2.5), of v0.3 (Mistral).
PRESETS: dict[str, Preset] = {
    "llama-3.1-8b": Preset(
        "llama",
        _options(32, 4096, 14336, (32, 8), 128_256, 131_072, rms_norm_eps=1e-5, rope_parameters=_llama3(8.0)),
    ),
    "llama-3.2-1b": Preset(
        "llama",
        _options(16, 2048, 8192, (32, 8), 128_256, 131_072, rms_norm_eps=1e-5, rope_parameters=_llama3(32.0))
        | {"head_dim": 64, "tie_word_embeddings": True},
    ),
    "qwen2.5-0.5b": Preset(
        "qwen2",
        _options(24, 896, 4864, (14, 2), 151_936, 32_768, rms_norm_eps=1e-6, rope_parameters=_rope(1e6))
        | {"tie_word_embeddings": True},
    ),
    "qwen2.5-7b": Preset(
        "qwen2", _options(28, 3584, 18_944, (28, 4), 152_064, 32_768, rms_norm_eps=1e-6, rope_parameters=_rope(1e6))
    ),
    "qwen2.5-32b": Preset(
        "qwen2", _options(64, 5120, 27_648, (40, 8), 152_064, 32_768, rms_norm_eps=1e-6, rope_parameters=_rope(1e6))
    ),
    "qwen3-8b": Preset(
        "qwen3",
        _options(36, 4096, 12_288, (32, 8), 151_936, 40_960, rms_norm_eps=1e-6, rope_parameters=_rope(1e6))
        | {"head_dim": 128},
    ),
    "mistral-7b": Preset(
        "mistral",
        _options(32, 4096, 14_336, (32, 8), 32_768, 32_768, rms_norm_eps=1e-5, rope_parameters=_rope(1e6))
        | {"head_dim": 128, "sliding_window": None},
    ),
}


def is_random(name: str) -> bool:
    return name.startswith(PREFIX)


def find_preset(name: str) -> Preset:
    """The preset of ``random:<preset>``. Raises NotAModelError, naming those there are."""
    preset = name.removeprefix(PREFIX)
    if preset not in PRESETS:
        raise NotAModelError(
            f"there is no preset {preset!r} for random weights; choose {', '.join(PREFIX + p for p in PRESETS)}",
            model=name,
        )
    return PRESETS[preset]


@torch.no_grad()
def random_model(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The model of ``random:<preset>``, made on ``device`` in ``dtype``: never anywhere else, never wider.

    Matrices are normal with the library's usual deviation, norms one, biases zero.

    Raises:
        NotAModelError: no such preset.
    """
    config = find_preset(name).config
    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(SEED)
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if parameter.dim() > 1:
            parameter.normal_(0.0, _STD, generator=generator)
        else:
            parameter.fill_(0.0 if path.endswith("bias") else 1.0)
    return model


def fingerprint(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """What tells these weights from others. The device belongs to it: CPU and GPU draw different numbers."""
    facts = [name, find_preset(name), SEED, str(dtype), device.type]
    return blake3(json.dumps(facts).encode()).hexdigest(16)
