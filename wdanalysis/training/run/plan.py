"""What a run does: everything that decides its numbers, declared once for Python, for the command and for recipes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

from wdanalysis.decomposition import Axis
from wdanalysis.errors import TrainingError
from wdanalysis.training.methods import ADAPTER_METHODS, FULL_TUNING, METHODS

if TYPE_CHECKING:
    from wdanalysis.training.injection import AdapterConfig

INPUTS, ADAPTERS, OPTIMIZATION, OUTPUT = PANELS = (
    "What to train, and on what",
    "Adapters",
    "Optimization",
    "Run and output",
)
"""The headings under which settings are listed."""

DEFAULT_EPOCHS = 3.0
BUNDLED_STEPS = 200
"""Steps on the bundled text where none are asked for: minutes on two cores."""

CHECKPOINTS = 4
"""The paper's four steps of Figure 2: three intermediate and the last."""


BOUNDS: Mapping[str, tuple[str, Callable[[float], bool]]] = MappingProxyType(
    {
        "x>0": ("above 0", lambda x: 0 < x < math.inf),
        "x>=0": ("at least 0", lambda x: x >= 0),
        "x>=1": ("at least 1", lambda x: x >= 1),
        "x>=2": ("at least 2", lambda x: x >= 2),
        "0<=x<1": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    }
)
"""What a number may be: in words, and whether one is."""


@dataclass(frozen=True)
class Setting:
    """What a field of a plan says of itself; its check and the command's option are made of it.

    Attributes
    ----------
    help
        What it does, in a line; the name of another setting stands in backticks.
    panel
        Of `PANELS`; None: the command has no option for it.
    bounds
        Of `BOUNDS`.
    written
        How its value is written on a command line, where its type does not say so.
    otherwise
        What is done where it is not given, where its default does not say so.
    decides
        Whether the numbers depend on it, so that a resumed run must have the same.
    """

    help: str
    panel: str | None
    bounds: str | None = None
    written: str | None = None
    otherwise: str | None = None
    decides: bool = True

    def objection(self, value: float) -> str | None:
        """Say what is wrong with a number; None where it is within the bounds.

        >>> Setting("Before A.", ADAPTERS, "0<=x<1").objection(1.5)
        'must be at least 0 and below 1, and is 1.5'
        """
        if self.bounds is None:
            return None
        words, holds = BOUNDS[self.bounds]
        return None if holds(value) else f"must be {words}, and is {value}"


def _of_methods(value: str, form: str) -> str:
    """A value that each method has of its own, for reading: ``lora, dora 8; vera, dvora 256``."""
    having = [method for method in METHODS.values() if getattr(method, value) is not None]
    groups = groupby(having, key=lambda method: getattr(method, value))
    texts = (f"{', '.join(method.name for method in same)} {of_them:{form}}" for of_them, same in groups)
    return "; ".join(texts).replace("e-0", "e-")


@dataclass(frozen=True)
class TrainingPlan:
    """One or several methods on one model and one text, in one order of batches.

    What each field does stands beside it; `plan_fields` lists them.

    Raises
    ------
    TrainingError
        A value is not one of the known ones, or not in its range.

    Examples
    --------
    >>> plan = TrainingPlan(methods=("lora", "dora"), targets="q,v", steps=100)
    >>> plan.learning_rate_of("lora")
    0.0002
    >>> TrainingPlan(dropout=1)
    Traceback (most recent call last):
        ...
    wdanalysis.errors.TrainingError: dropout must be at least 0 and below 1, and is 1.
    """

    # fmt: off
    methods: Annotated[tuple[str, ...], Setting(
        f"Of {','.join(METHODS)}; several see the same batches in the same order.", INPUTS, written="NAMES",
        otherwise="dora, or the recipe's", decides=False)] = ("dora",)
    model: Annotated[str | None, Setting(
        "A causal language model. `dry_run` takes a config.json as well.", INPUTS, written="PATH|HUB-ID",
        otherwise="the bundled base")] = None
    data: Annotated[tuple[Path, ...], Setting(
        "Text, or JSON with text or instruction, input, output (loss on the answer only); a file or a folder.", INPUTS,
        written="PATH", otherwise="documentation in Python's library")] = ()
    eval_data: Annotated[tuple[Path, ...], Setting("Held-out data.", INPUTS, written="PATH")] = ()
    eval_fraction: Annotated[float, Setting("Share of `data` to hold out.", INPUTS, "0<=x<1")] = 0.05
    max_length: Annotated[int, Setting("Tokens of a block or record.", INPUTS, "x>=2")] = 256

    rank: Annotated[int | None, Setting("r.", ADAPTERS, "x>=1", otherwise=_of_methods("rank", "d"))] = None
    alpha: Annotated[float | None, Setting("α.", ADAPTERS, "x>0", otherwise="2 r")] = None
    dropout: Annotated[float, Setting("Before A.", ADAPTERS, "0<=x<1")] = 0.0
    targets: Annotated[str | tuple[str, ...], Setting(
        "What is adapted.", ADAPTERS, written="q,v | all | REGEX")] = ("q", "v")
    magnitude_targets: Annotated[str | tuple[str, ...] | None, Setting(
        "Where DoRA trains m (paper, section 5.6).", ADAPTERS, written="ROLES|REGEX",
        otherwise="as `targets`")] = None
    axis: Annotated[Axis, Setting("m for each output or each input feature.", ADAPTERS)] = "out"
    full_gradient: Annotated[bool, Setting("Gradient through the norm (Eq. 6).", ADAPTERS)] = False
    quantize: Annotated[Literal["4bit"] | None, Setting(
        "Base of an adapter in 4 bits (QLoRA).", ADAPTERS)] = None

    learning_rate: Annotated[float | None, Setting(
        "Peak learning rate.", OPTIMIZATION, "x>0", otherwise=_of_methods("learning_rate", ".0e"))] = None
    weight_decay: Annotated[float, Setting("AdamW's.", OPTIMIZATION, "x>=0")] = 0.0
    batch_size: Annotated[int, Setting("Examples on a device.", OPTIMIZATION, "x>=1")] = 8
    accumulation: Annotated[int, Setting("Batches in a step.", OPTIMIZATION, "x>=1")] = 1
    steps: Annotated[int | None, Setting("Instead of `epochs`.", OPTIMIZATION, "x>=1")] = None
    epochs: Annotated[float, Setting(
        "Passes over the data.", OPTIMIZATION, "x>0",
        otherwise=f"{DEFAULT_EPOCHS:g}; bundled data: {BUNDLED_STEPS} steps")] = DEFAULT_EPOCHS
    warmup: Annotated[float, Setting("Steps; below 1, a share of all.", OPTIMIZATION, "x>=0")] = 0
    scheduler: Annotated[Literal["linear", "cosine", "constant", "constant_with_warmup"], Setting(
        "After the warmup.", OPTIMIZATION)] = "linear"
    max_grad_norm: Annotated[float, Setting("Where gradients are clipped; 0: nowhere.", None, "x>=0")] = 1.0
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], Setting(
        "Of the base in memory.", OPTIMIZATION,
        otherwise="auto: ft float32, adapters as stored; float32 on a CPU")] = "auto"
    gradient_checkpointing: Annotated[bool, Setting(
        "Less memory, more time.", OPTIMIZATION, decides=False)] = False
    seed: Annotated[int, Setting("Of data order, held-out share, adapters, dropout.", OPTIMIZATION)] = 0

    save_steps: Annotated[int | None, Setting(
        "Steps between checkpoints.", OUTPUT, "x>=1", otherwise="four, evenly", decides=False)] = None
    # fmt: on

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if not self.methods:
            raise TrainingError(
                f"there is no method to train with: choose of {', '.join(METHODS)}.", parameter="methods"
            )
        for method in self.methods:
            _check_known("methods", "method", method, tuple(METHODS))
        for field in plan_fields().values():
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                field.check(value)
        if self.quantize and FULL_TUNING in self.methods:
            raise TrainingError(
                f"full tuning ({FULL_TUNING}) needs weights that are not quantized: quantize none, or leave it out.",
                parameter="quantize",
            )

    def adapter(self, method: str) -> AdapterConfig | None:
        """Return how a method adapts the model; None for full tuning."""
        if method not in ADAPTER_METHODS:
            return None
        from wdanalysis.training.injection import AdapterConfig

        # Beside methods that train a magnitude, what concerns it does not concern the others.
        of_magnitude = METHODS[method].magnitude or not any(METHODS[name].magnitude for name in self.methods)
        return AdapterConfig(
            method,
            rank=self.rank or METHODS[method].rank or 0,
            alpha=self.alpha,
            dropout=self.dropout,
            targets=self.targets,
            magnitude_targets=self.magnitude_targets if of_magnitude else None,
            axis=self.axis,
            full_gradient=self.full_gradient and of_magnitude,
            seed=self.seed,
        )

    def learning_rate_of(self, method: str) -> float:
        """Return the learning rate given, or the method's own."""
        return self.learning_rate or METHODS[method].learning_rate

    def dtype_of(self, method: str) -> str:
        """Return the dtype given, or what ``auto`` means: float32 for full tuning, whose updates 16 bits round away."""
        return "float32" if self.dtype == "auto" and method == FULL_TUNING else self.dtype

    def settings(self, method: str) -> dict[str, Any]:
        """Return everything that decides the numbers of a method's run, as JSON gives it back."""
        adapter = self.adapter(method)
        of_plan = {
            name: None if field.setting.panel == ADAPTERS and adapter is None else getattr(self, name)
            for name, field in plan_fields().items()
            if field.setting.decides
        }
        of_method: dict[str, Any] = {
            "method": method,
            "learning_rate": self.learning_rate_of(method),
            "dtype": self.dtype_of(method),
            "epochs": self.epochs if self.steps is None else None,
        }
        if adapter is not None:
            targets = adapter.targets
            of_method["rank"] = adapter.rank
            of_method["targets"] = targets if isinstance(targets, str) else ",".join(targets)
        plain: dict[str, Any] = json.loads(json.dumps(of_plan | of_method, default=str))
        return plain


@dataclass(frozen=True)
class PlanField:
    """A field of `TrainingPlan`; `choices` are the values it knows, where they are few."""

    name: str
    kind: Any
    default: Any
    choices: tuple[Any, ...]
    setting: Setting

    def check(self, value: Any) -> None:
        """Refuse a value that is not one of the known ones, or not within the bounds.

        Raises
        ------
        TrainingError
            It is not.
        """
        spoken = self.name.replace("_", " ")
        if self.choices:
            _check_known(self.name, spoken, value, self.choices)
        if objection := self.setting.objection(value):
            raise TrainingError(f"{spoken} {objection}.", parameter=self.name)


def _check_known(parameter: str, what: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        raise TrainingError(
            f"there is no {what} {value!r}: choose of {', '.join(map(str, known))}.", parameter=parameter
        )


@cache
def plan_fields() -> Mapping[str, PlanField]:
    """Every field of `TrainingPlan` by its name, in their order.

    >>> plan_fields()["scheduler"].choices
    ('linear', 'cosine', 'constant', 'constant_with_warmup')
    >>> plan_fields()["rank"].setting.otherwise
    'lora, dora 8; vera, dvora 256'
    """
    hints = get_type_hints(TrainingPlan, include_extras=True)
    found = []
    for field in fields(TrainingPlan):
        kind, setting = get_args(hints[field.name])
        few = [part for part in (kind, *get_args(kind)) if get_origin(part) is Literal]
        found.append(PlanField(field.name, kind, field.default, get_args(few[0]) if few else (), setting))
    return MappingProxyType({field.name: field for field in found})
