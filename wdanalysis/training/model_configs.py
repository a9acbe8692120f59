"""The sizes of the paper's models, as their `config.json` has them: enough to count their parameters.

From the models' published configurations. What transformers has as a default (activation, norm, positions) is left out,
as it adds no parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


def _llama(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    *,
    kv_heads: int | None = None,
    vocabulary: int = 32000,
) -> Mapping[str, Any]:
    return MappingProxyType(
        {
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads or heads,
            "vocab_size": vocabulary,
            "tie_word_embeddings": False,
        }
    )


_LLAMA_7B = _llama(4096, 11008, layers=32, heads=32)

MODEL_CONFIGS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama-7b": _LLAMA_7B,
        "llama-13b": _llama(5120, 13824, layers=40, heads=40),
        "llama2-7b": _LLAMA_7B,
        "llama3-8b": _llama(4096, 14336, layers=32, heads=32, kv_heads=8, vocabulary=128256),
        "llava-1.5-7b": MappingProxyType(
            {
                "model_type": "llava",
                "text_config": _LLAMA_7B,
                "vision_config": MappingProxyType(
                    {
                        "model_type": "clip_vision_model",
                        "hidden_size": 1024,
                        "intermediate_size": 4096,
                        "num_hidden_layers": 24,
                        "num_attention_heads": 16,
                        "image_size": 336,
                        "patch_size": 14,
                        "projection_dim": 768,
                    }
                ),
                "tie_word_embeddings": False,
            }
        ),
    }
)
"""`config.json` by the name that recipes and `count` know a model by."""
