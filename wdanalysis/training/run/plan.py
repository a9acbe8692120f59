"""What a run does: everything that decides its numbers, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from wdanalysis.decomposition import Axis
from wdanalysis.errors import TrainingError

if TYPE_CHECKING:
    from wdanalysis.training.injection import AdapterConfig
    from wdanalysis.training.run.recipes import Recipe

FULL_TUNING = "ft"
WITH_MAGNITUDE = ("dora", "dvora")
METHODS = (FULL_TUNING, "lora", "dora", "vera", "dvora")

LEARNING_RATES: Mapping[str, float] = MappingProxyType(
    {"ft": 2e-5, "lora": 2e-4, "dora": 2e-4, "vera": 4e-3, "dvora": 4e-3}
)
"""Where none is given: Table 8's for LoRA and DoRA, Table 11's for VeRA and DVoRA, the usual one for full tuning."""

RANKS: Mapping[str, int] = MappingProxyType({"lora": 8, "dora": 8, "vera": 256, "dvora": 256})
"""Where none is given; VeRA's shared matrices cost no trained parameters, and its authors take large ones."""

SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("4bit",)

DEFAULT_EPOCHS = 3.0
BUNDLED_STEPS = 200
"""Steps on the bundled text where none are asked for: minutes on two cores."""

CHECKPOINTS = 4
"""The paper's four steps of Figure 2: three intermediate and the last."""


@dataclass(frozen=True)
class TrainingPlan:
    """One or several methods on one model and one text, in one order of batches.

    Attributes
    ----------
    methods
        Of `METHODS`.
    model
        A folder or a hub id; None: the bundled base.
    data
        Files and folders, as `wdanalysis.training.data.batches` reads them; none: the documentation in Python's
        library.
    eval_data
        Held-out files, instead of `eval_fraction` of `data`.
    eval_fraction
        Share of `data` that is held out.
    rank, alpha, dropout, targets, magnitude_targets, axis, full_gradient
        Of the adapters; see `AdapterConfig`. A rank of None is the method's of `RANKS`.
    learning_rate
        None: the method's of `LEARNING_RATES`.
    weight_decay
        AdamW's, decoupled; not on biases and norms.
    batch_size, accumulation
        Examples on a device at once, and how many such batches make a step.
    steps, epochs
        Optimizer steps; or, where it is None, passes over the data.
    warmup
        Steps from 0 to the learning rate; below 1, a share of all steps.
    scheduler
        Of `SCHEDULERS`.
    max_length
        Tokens of an example.
    max_grad_norm
        Where gradients are clipped; 0: nowhere.
    save_steps
        Steps between checkpoints; None: `CHECKPOINTS` of them, evenly. The last step is always saved.
    seed
        Decides the held-out share, the order of the data, the adapters' start and dropout.
    dtype
        Of the base weights in memory. ``auto``: float32 for full tuning, whose updates a 16-bit weight would round
        away, and as stored for adapters, which are float32 themselves.
    quantize
        ``4bit``: the base of an adapter in bitsandbytes' NF4 (QLoRA, QDoRA).
    gradient_checkpointing
        Recompute activations in the backward pass: less memory, more time.
    """

    methods: tuple[str, ...] = ("dora",)
    model: str | None = None
    data: tuple[Path, ...] = ()
    eval_data: tuple[Path, ...] = ()
    eval_fraction: float = 0.05
    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ("q", "v")
    magnitude_targets: str | tuple[str, ...] | None = None
    axis: Axis = "out"
    full_gradient: bool = False
    learning_rate: float | None = None
    weight_decay: float = 0.0
    batch_size: int = 8
    accumulation: int = 1
    steps: int | None = None
    epochs: float = DEFAULT_EPOCHS
    warmup: float = 0
    scheduler: str = "linear"
    max_length: int = 256
    max_grad_norm: float = 1.0
    save_steps: int | None = None
    seed: int = 0
    dtype: str = "auto"
    quantize: str | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be run.

        Raises
        ------
        TrainingError
            A value is not one of the known ones, or not in its range.
        """
        choices: list[tuple[str, Any, tuple[Any, ...]]] = [
            *(("method", method, METHODS) for method in self.methods),
            ("scheduler", self.scheduler, SCHEDULERS),
            ("dtype", self.dtype, DTYPES),
            ("quantization", self.quantize, (None, *QUANTIZATIONS)),
        ]
        for what, value, known in choices:
            if value not in known:
                names = ", ".join(str(name) for name in known if name is not None)
                raise TrainingError(f"there is no {what} {value!r}: choose of {names}.")
        if not self.methods:
            raise TrainingError(f"there is no method to train with: choose of {', '.join(METHODS)}.")
        if self.quantize and FULL_TUNING in self.methods:
            raise TrainingError(
                "full tuning (ft) needs weights that are not quantized: leave out --quantize."
            )
        positive = (
            "rank",
            "alpha",
            "learning_rate",
            "batch_size",
            "accumulation",
            "steps",
            "epochs",
            "save_steps",
        )
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise TrainingError(f"{name.replace('_', ' ')} must be above 0, and is {value}.")
        for name in ("dropout", "eval_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise TrainingError(
                    f"{name.replace('_', ' ')} must be at least 0 and below 1, and is {getattr(self, name)}."
                )
        for name in ("weight_decay", "warmup", "max_grad_norm"):
            if not getattr(self, name) >= 0:
                raise TrainingError(
                    f"{name.replace('_', ' ')} must not be below 0, and is {getattr(self, name)}."
                )
        if self.max_length < 2:
            raise TrainingError(f"max length must be at least 2 tokens, and is {self.max_length}.")

    def adapter(self, method: str) -> AdapterConfig | None:
        """Return how a method adapts the model; None for full tuning."""
        if method == FULL_TUNING:
            return None
        from wdanalysis.training.injection import AdapterConfig

        # Beside methods that train a magnitude, what concerns it does not concern the others.
        has_magnitude = method in WITH_MAGNITUDE or not set(self.methods) & set(WITH_MAGNITUDE)
        return AdapterConfig(
            method,
            rank=self.rank or RANKS[method],
            alpha=self.alpha,
            dropout=self.dropout,
            targets=self.targets,
            magnitude_targets=self.magnitude_targets if has_magnitude else None,
            axis=self.axis,
            full_gradient=self.full_gradient and has_magnitude,
            seed=self.seed,
        )

    def learning_rate_of(self, method: str) -> float:
        """Return the learning rate given, or the method's own."""
        return self.learning_rate or LEARNING_RATES[method]

    def dtype_of(self, method: str) -> str:
        """Return the dtype given, or what ``auto`` means for the method."""
        return "float32" if self.dtype == "auto" and method == FULL_TUNING else self.dtype

    def settings(self, method: str) -> dict[str, Any]:
        """Return everything that decides the numbers of a method's run, ready for JSON."""
        settings = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("methods", "save_steps", "gradient_checkpointing")
        }
        own: dict[str, Any] = {
            "method": method,
            "learning_rate": self.learning_rate_of(method),
            "dtype": self.dtype_of(method),
            "epochs": self.epochs if self.steps is None else None,
            "targets": self.targets if isinstance(self.targets, str) else ",".join(self.targets),
        }
        if adapter := self.adapter(method):
            own["rank"] = adapter.rank
        else:
            adapters_own = (
                "rank", "alpha", "dropout", "targets", "magnitude_targets", "axis", "full_gradient", "quantize"
            )  # fmt: skip
            own |= dict.fromkeys(adapters_own)
        return {name: _plain(value) for name, value in {**settings, **own}.items()}


def recipe_settings(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's values as fields of a `TrainingPlan`; what it does not print is left out.

    The model and the data of the paper are named in a recipe, not found by it: they are not among the fields.
    """
    values = {
        "methods": (recipe.method,),
        "rank": recipe.rank,
        "alpha": recipe.alpha,
        "dropout": recipe.dropout,
        "targets": recipe.targets,
        "axis": recipe.axis,
        "learning_rate": recipe.learning_rate,
        "scheduler": recipe.scheduler,
        "batch_size": recipe.batch_size,
        "accumulation": recipe.accumulation,
        "warmup": recipe.warmup_ratio if recipe.warmup_steps is None else recipe.warmup_steps,
        "epochs": recipe.epochs,
    }
    return {name: value for name, value in values.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
