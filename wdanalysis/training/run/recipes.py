"""Tables 8 to 11 of the paper as named presets.

A value that the paper does not print is None: whoever trains chooses it. Each recipe is a frozen dataclass, so that
`dataclasses.replace` overrides any value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

from wdanalysis.decomposition import Axis
from wdanalysis.errors import TrainingError
from wdanalysis.training.run.plan import plan_fields

ATTENTION_AND_MLP = ("q", "k", "v", "up", "down")
EVERY_LINEAR = ("q", "k", "v", "o", "up", "down", "gate")


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of one run of the paper; None is what it does not print.

    Attributes
    ----------
    name
        The preset's.
    table
        Of the paper.
    model, data
        What was tuned, and on what.
    method
        ``dora``, ``dvora`` or ``lora``.
    rank, alpha, dropout, targets
        Of the adapters; VeRA and DVoRA have no α.
    learning_rate, optimizer, scheduler
        The peak rate; ``adamw``; ``linear`` or ``cosine`` decay.
    batch_size, accumulation
        Examples in a batch, and batches in a step.
    warmup_steps, warmup_ratio
        Whichever of the two the table has.
    epochs
        Passes over the data.
    axis
        The authors' code's; the tables do not name one.
    """

    name: str
    table: int
    model: str
    data: str
    method: str
    rank: int
    targets: tuple[str, ...]
    learning_rate: float
    batch_size: int
    epochs: int
    scheduler: str
    dropout: float
    alpha: float | None = None
    accumulation: int | None = None
    warmup_steps: int | None = None
    warmup_ratio: float | None = None
    optimizer: str = "adamw"
    axis: Axis = "out"

    @property
    def unprinted(self) -> tuple[str, ...]:
        """The values that the paper does not print; the warm-up is printed as one of its two."""
        other = {"warmup_steps": self.warmup_ratio, "warmup_ratio": self.warmup_steps}
        return tuple(
            field.name
            for field in fields(self)
            if getattr(self, field.name) is None and other.get(field.name) is None
        )

    def settings(self) -> dict[str, Any]:
        """What the paper prints, as fields of a `TrainingPlan`.

        The model and the data are named in a recipe, not found by it: they are not among them.

        Examples
        --------
        >>> found = recipe("llama-7b-alpaca-dvora").settings()
        >>> found["methods"], found["rank"], found["warmup"]
        (('dvora',), 1024, 0.1)
        """
        printed = {
            "methods": (self.method,),
            "warmup": self.warmup_ratio if self.warmup_steps is None else self.warmup_steps,
            **{name: value for name, value in vars(self).items() if name in plan_fields()},
        }
        return {
            name: value
            for name, value in printed.items()
            if value is not None and name not in ("model", "data")
        }

    def describe(self) -> str:
        """Every value, a line each, with what the paper does not print said to be so."""
        shown = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "name"}
        lines = [f"{self.name} (Table {shown.pop('table')})"]
        for name, value in shown.items():
            if value is not None:
                text = (
                    ",".join(value)
                    if isinstance(value, tuple)
                    else format(value, "g" if isinstance(value, float) else "")
                )
                lines.append(f"  {name:<14} {text}")
            elif name in self.unprinted:
                lines.append(f"  {name:<14} not printed")
        return "\n".join(lines)


def _commonsense() -> list[Recipe]:
    """Table 8: DoRA at rank 32 and DoRA† at rank 16, which differ in their learning rate."""
    shared = Recipe(
        name="", table=8, model="", data="commonsense reasoning (170k)", method="dora", rank=0,
        targets=ATTENTION_AND_MLP, learning_rate=0, batch_size=16, epochs=3, scheduler="linear", dropout=0.05,
        warmup_steps=100,
    )  # fmt: skip
    learning_rates = {
        "llama-7b": {16: 2e-4, 32: 1e-4},
        "llama-13b": {16: 3e-4, 32: 2e-4},
        "llama2-7b": {16: 2e-4, 32: 2e-4},
        "llama3-8b": {16: 1e-4, 32: 1e-4},
    }
    return [
        replace(
            shared, name=f"{model}-commonsense-r{rank}", model=model, rank=rank, alpha=2 * rank, learning_rate=rate
        )
        for model, by_rank in learning_rates.items()
        for rank, rate in by_rank.items()
    ]  # fmt: skip


def _vl_bart() -> list[Recipe]:
    """Table 9."""
    image = Recipe(
        name="vl-bart-image-text", table=9, model="vl-bart", data="VQA, GQA, NLVR2, COCO captions", method="dora",
        rank=128, alpha=128, targets=("q", "k"), learning_rate=1e-3, batch_size=300, epochs=20, scheduler="linear",
        dropout=0.0, warmup_ratio=0.1,
    )  # fmt: skip
    video = replace(
        image, name="vl-bart-video-text", data="TVQA, How2QA, TVC, YC2C", learning_rate=3e-4, batch_size=40, epochs=7
    )  # fmt: skip
    return [image, video]


def _llava() -> list[Recipe]:
    """Table 10."""
    dora = Recipe(
        name="llava-1.5-7b-dora", table=10, model="llava-1.5-7b", data="visual instruction tuning", method="dora",
        rank=128, alpha=256, targets=EVERY_LINEAR, learning_rate=2e-4, batch_size=16, epochs=1, scheduler="cosine",
        dropout=0.05, warmup_ratio=0.03,
    )  # fmt: skip
    return [dora, replace(dora, name="llava-1.5-7b-lora", method="lora")]


def _alpaca() -> list[Recipe]:
    """Table 11."""
    dora = Recipe(
        name="", table=11, model="", data="cleaned Alpaca (10k)", method="dora", rank=64, targets=EVERY_LINEAR,
        learning_rate=4e-4, batch_size=4, accumulation=4, epochs=1, scheduler="cosine", dropout=0.0, warmup_ratio=0.1,
    )  # fmt: skip
    methods = [dora, replace(dora, method="dvora", rank=1024, learning_rate=4e-3)]
    return [
        replace(recipe, name=f"{model}-alpaca-{recipe.method}", model=model)
        for model in ("llama-7b", "llama2-7b")
        for recipe in methods
    ]


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {recipe.name: recipe for recipe in (*_commonsense(), *_vl_bart(), *_llava(), *_alpaca())}
)
"""Every recipe by its name, in the order of the paper's tables."""


def recipe(name: str) -> Recipe:
    """Return a recipe by its name.

    Raises
    ------
    TrainingError
        There is none of that name.
    """
    if name not in RECIPES:
        raise TrainingError(
            f"there is no recipe '{name}'; choose one of {', '.join(RECIPES)}.", parameter="recipe"
        )
    return RECIPES[name]
