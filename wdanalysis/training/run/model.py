"""A plan's model: its configuration, its tokenizer, and its weights as a method needs them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import parse_flag_from_env  # type: ignore[import-untyped]
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from wdanalysis.errors import TrainingError
from wdanalysis.training.bundled import bundled_model_folder
from wdanalysis.training.counting import count
from wdanalysis.training.injection import ParameterCount, inject
from wdanalysis.training.model_configs import MODEL_CONFIGS
from wdanalysis.training.peft_folder import load_adapter
from wdanalysis.writing import first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from wdanalysis.training.run.plan import TrainingPlan

BUNDLED_NAME = "wdanalysis/training/bundled"
"""What the bundled base is called in an adapter's configuration."""

NOT_LOADED = (OSError, ValueError, KeyError)
"""What transformers raises where a model is missing or is none."""


def processes() -> Any:
    """Return accelerate's view of the processes."""
    return PartialState(cpu=on_cpus())


def on_cpus() -> bool:
    """Whether accelerate was launched to use CPUs, perhaps several processes on them."""
    return bool(parse_flag_from_env("ACCELERATE_USE_CPU"))


def dtype_of(plan: TrainingPlan, method: str) -> str:
    """Return the plan's dtype; on a CPU, which is slow and rough in 16 bits, ``auto`` is float32."""
    dtype = plan.dtype_of(method)
    return "float32" if dtype == "auto" and processes().device.type == "cpu" else dtype


def count_methods(plan: TrainingPlan) -> dict[str, ParameterCount]:
    """Count what each method of the plan trains, from the model's configuration alone.

    `plan.model` may here also be a ``config.json``, or a name of `wdanalysis.training.model_configs`.

    Raises
    ------
    TrainingError
        There is no such configuration, or the model cannot be adapted as asked.
    """
    source = _source(plan)
    known = source in MODEL_CONFIGS or Path(source).exists()
    configuration = source if known else _hub_configuration(source)
    return {method: count(configuration, plan.adapter(method)) for method in plan.methods}


def sentence_of(method: str, parameters: ParameterCount) -> str:
    """Say how many parameters a method trains, as the paper's tables count them.

    >>> sentence_of("dora", ParameterCount(trainable=25, total=1000))
    'dora: trainable 25 of 1,000 parameters (2.50 %)'
    """
    return (
        f"{method}: trainable {parameters.trainable:,} of {parameters.total:,} parameters "
        f"({parameters.percent:.2f} %)"
    )


def load_tokenizer(plan: TrainingPlan) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the plan's model.

    Raises
    ------
    TrainingError
        There is none.
    """
    try:
        return AutoTokenizer.from_pretrained(_source(plan))
    except NOT_LOADED as error:
        raise TrainingError(
            f"the tokenizer of {plan.model} cannot be loaded ({first_line(error)}): the model must be a folder that "
            "holds one (tokenizer.json), or its name on the hub.",
            parameter="model",
        ) from error


def load_model(plan: TrainingPlan, method: str, adapter_folder: Path | None = None) -> PreTrainedModel:
    """Load the plan's model as the method needs it, and adapt it, anew or as an adapter's folder says.

    Raises
    ------
    TrainingError
        It cannot be loaded as a causal language model, or cannot be adapted as asked.
    """
    dtype = dtype_of(plan, method)
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if plan.quantize:
        options["quantization_config"] = _four_bits()
        if torch.cuda.is_available():
            options["device_map"] = {"": processes().local_process_index}
    try:
        model = AutoModelForCausalLM.from_pretrained(_source(plan), **options)
    except NOT_LOADED as error:
        raise TrainingError(
            f"{plan.model} cannot be loaded as a causal language model: {first_line(error).rstrip('.')}.",
            parameter="model",
        ) from error
    if adapter := plan.adapter(method):
        if adapter_folder is None:
            inject(model, adapter)
        else:
            load_adapter(model, adapter_folder, full_gradient=adapter.full_gradient)
    if plan.quantize:
        _make_trainable_on_4_bits(model)
    if plan.gradient_checkpointing:
        enable = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    return model


def _source(plan: TrainingPlan) -> str:
    return plan.model or str(bundled_model_folder())


def _hub_configuration(name: str) -> PretrainedConfig:
    try:
        configuration: PretrainedConfig = AutoConfig.from_pretrained(name)
    except NOT_LOADED as error:
        raise TrainingError(
            f"the configuration of {name} cannot be loaded: {first_line(error).rstrip('.')}.",
            parameter="model",
        ) from error
    return configuration


def _make_trainable_on_4_bits(model: Any) -> None:
    """Let the Trainer and bitsandbytes know that adapters are trained on the 4-bit weights."""
    model.is_quantized = False  # the Trainer refuses quantized models that have none of PEFT's adapters
    for layer in model.modules():
        # Evaluated on such a CPU, a layer packs its weight anew, and from then on passes no gradient back.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def _four_bits() -> Any:
    from transformers import BitsAndBytesConfig

    try:
        version("bitsandbytes")
    except PackageNotFoundError:
        raise TrainingError(
            "a base in 4 bits needs bitsandbytes: install it with `pip install wdanalysis[quantized]`.",
            parameter="quantize",
        ) from None
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
