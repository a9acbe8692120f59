"""Trainable parameters of a method on a model, from the model's configuration alone.

The model is built on torch's meta device, where a tensor has a shape and no memory, and adapted there: what is counted
is what would be trained. Nothing is downloaded, and no weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wdanalysis.checkpoints.storage import read_json
from wdanalysis.errors import TrainingError
from wdanalysis.training.injection import AdapterConfig, ParameterCount, count_parameters, inject
from wdanalysis.training.model_configs import MODEL_CONFIGS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

BUILDERS: Mapping[str, str] = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "AutoModel": "MODEL_MAPPING",
}
"""transformers' classes that build a model from a configuration, each with the configurations that it knows; the first
that knows a model's does."""


def count(
    model: str | Path | Mapping[str, Any] | PretrainedConfig, adapter: AdapterConfig | None
) -> ParameterCount:
    """Count a model's parameters with an adapter in it.

    As in the paper, the total is every parameter of the adapted model, adapters included. VeRA's shared random matrices
    are buffers, and count in neither number.

    Parameters
    ----------
    model
        A name of `MODEL_CONFIGS`, a `config.json`, a folder with one, its content, or transformers' configuration.
    adapter
        The method, its rank and its targets; None for full tuning, which trains everything.

    Raises
    ------
    TrainingError
        There is no such configuration, transformers does not know the type of model, or it cannot be adapted as asked.
    CheckpointError
        The configuration is not JSON.

    Examples
    --------
    >>> round(count("llama-7b", AdapterConfig("dora", rank=32, targets="q,k,v,up,down")).percent, 2)  # Table 1
    0.84
    """
    empty = empty_model(model)
    if adapter is not None:
        inject(empty, adapter)
    return count_parameters(empty)


def empty_model(model: str | Path | Mapping[str, Any] | PretrainedConfig) -> PreTrainedModel:
    """Build a model on the meta device; see `count` for what `model` may be and what is raised."""
    import torch
    import transformers

    config = _configuration(model)
    for builder, known in BUILDERS.items():
        if type(config) in getattr(transformers, known):
            with torch.device("meta"):
                built: PreTrainedModel = getattr(transformers, builder).from_config(config)
            return built
    raise TrainingError(f"transformers has no model of the type '{config.model_type}'; use another model.")


def _configuration(model: str | Path | Mapping[str, Any] | PretrainedConfig) -> PretrainedConfig:
    from transformers import AutoConfig, PretrainedConfig

    if isinstance(model, PretrainedConfig):
        return model
    content = dict(model) if isinstance(model, Mapping) else _content(model)
    model_type = content.pop("model_type", None)
    if model_type is None:
        raise TrainingError(
            f"the configuration of {_shown(model)} has no model_type; add the one of its architecture."
        )
    try:
        config: PretrainedConfig = AutoConfig.for_model(model_type, **_plain(content))
    except Exception as error:  # each configuration checks its values in its own way
        reason = " ".join(str(error).split())[:200]
        raise TrainingError(
            f"transformers cannot read the configuration of {_shown(model)} ({reason}); correct it."
        ) from error
    return config


def _content(model: str | Path) -> dict[str, Any]:
    path = Path(model)
    content = read_json(path / "config.json" if path.is_dir() else path)
    if content is not None:
        return content
    if str(model) in MODEL_CONFIGS:
        return dict(MODEL_CONFIGS[str(model)])
    raise TrainingError(
        f"there is no configuration at {model}; pass a config.json, a folder with one, or one of "
        f"{', '.join(MODEL_CONFIGS)}."
    )


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same as dictionaries, which are what transformers takes."""
    return {key: _plain(value) if isinstance(value, Mapping) else value for key, value in content.items()}


def _shown(model: object) -> str:
    return str(model) if isinstance(model, str | Path) else "the model"
