"""The run: one model, one text, one order of batches, and one method after another.

The optimizer, mixed precision, several GPUs and FSDP are `transformers.Trainer`'s and `accelerate`'s:
``accelerate launch -m wdanalysis.cli train …`` is how a run on several devices starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from wdanalysis._version import __version__
from wdanalysis.errors import TrainingError
from wdanalysis.training.data.batches import Collator, TrainingData, load_data, split_data
from wdanalysis.training.data.formats import Document, Record, read_records
from wdanalysis.training.data.text import library_documentation
from wdanalysis.training.injection import ParameterCount, count_parameters
from wdanalysis.training.methods import METHODS
from wdanalysis.training.run.curves import draw_losses, read_losses
from wdanalysis.training.run.folder import RunFolder
from wdanalysis.training.run.model import (
    BUNDLED_NAME,
    count_methods,
    dtype_of,
    load_model,
    load_tokenizer,
    on_cpus,
    processes,
    sentence_of,
)
from wdanalysis.training.run.plan import CHECKPOINTS, TrainingPlan
from wdanalysis.training.run.trainer import (
    MethodTrainer,
    NotFiniteError,
    ProgressReport,
    Schedule,
    TrainingProgress,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LIVE = "live"
"""The folder, in a method's own, that the live measurements are kept in."""

Say = Callable[[str], None]
"""Called with a sentence worth telling."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C in a run; `str(error)` says which checkpoint is kept and how to go on."""


@dataclass(frozen=True)
class MethodRun:
    """One method's finished run.

    Attributes
    ----------
    method
        Its name.
    folder
        Where it lies.
    parameters
        Trained and all.
    losses
        The table of `wdanalysis.training.run.curves.losses`.
    checkpoints
        Folders by step.
    """

    method: str
    folder: Path
    parameters: ParameterCount
    losses: pd.DataFrame
    checkpoints: tuple[Path, ...]


def quieten_transformers() -> None:
    """Let transformers print errors alone, and no progress bars of its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def train(
    plan: TrainingPlan,
    out: str | Path,
    *,
    resume: bool = False,
    live_every: int | None = None,
    report_to: Sequence[str] = (),
    callbacks: Sequence[TrainerCallback] = (),
    progress: TrainingProgress | None = None,
    say: Say | None = None,
) -> list[MethodRun]:
    """Tune a model by each method of a plan.

    Every method sees the same batches in the same order, and writes ``OUT/<method>/checkpoint-<step>/``: a
    safetensors model for full tuning, a PEFT adapter folder otherwise, both with what it takes to resume. Beside them
    lie ``losses.csv`` and ``training.json``; ``OUT/losses.png`` shows the losses of all methods there.

    Parameters
    ----------
    plan
        What to do.
    out
        The folder.
    resume
        Go on from the last checkpoint of each method; one that is finished is left as it is.
    live_every
        Steps between measurements of ΔM and ΔD, which go to ``OUT/<method>/live/``; None: no measurements.
    report_to
        Loggers of the Trainer: ``tensorboard``, ``wandb`` …
    callbacks
        More callbacks for the Trainer.
    progress
        Told the step.
    say
        Told the number of trained parameters, and what of the data was left out.

    Raises
    ------
    TrainingError
        The model or the data cannot be used, the folder holds a run of other settings, or the loss became NaN.
    OutputError
        The folder holds a run that is not to be resumed, or cannot be written.
    TrainingInterrupted
        On Ctrl-C.
    """
    out, process = Path(out), processes()
    folders = {method: RunFolder(out / method) for method in plan.methods}
    for folder in folders.values():
        folder.check(resume=resume)
    count_methods(plan)  # what cannot be adapted is told before anything is trained
    tokenizer = load_tokenizer(plan)
    data = plan_data(plan, tokenizer)
    tell = say if say is not None and process.is_main_process else lambda _: None
    for note in data.notes:
        tell(note)
    fingerprint = {"tokens": data.train.tokens, "data_fingerprint": data.train.fingerprint()}
    planned = []
    for method, folder in folders.items():
        settings = {**plan.settings(method), "dtype": dtype_of(plan, method), **fingerprint}
        if resume:
            folder.check_same(settings)
        reports = [ProgressReport(method, progress)] if progress else []
        planned.append(
            _Run(
                plan,
                method,
                folder,
                settings,
                data,
                tokenizer,
                live_every,
                report_to,
                [*callbacks, *reports],
                tell,
            )
        )
    process.wait_for_everyone()  # nobody writes before everybody has looked
    try:
        return [run.go(resume=resume) for run in planned]
    finally:
        if process.is_main_process:
            draw_losses(out, tuple(METHODS))


def plan_data(plan: TrainingPlan, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
    """Read the plan's data; without any, the documentation in Python's library, whose held-out files are fixed.

    Raises
    ------
    TrainingError
        As `wdanalysis.training.data.batches.load_data`.
    """
    if not plan.data:
        documents = [Document(text) for text in library_documentation()]
        held_out: list[Record] | float = 0.0
        if plan.eval_data:
            held_out = [
                record for path in plan.eval_data for record in read_records(path, parameter="eval_data")
            ]
        elif plan.eval_fraction:
            held_out = [Document(text) for text in library_documentation(held_out=True)]
        return split_data(documents, held_out, tokenizer, max_length=plan.max_length)
    return load_data(
        plan.data,
        tokenizer,
        max_length=plan.max_length,
        eval_fraction=plan.eval_fraction,
        eval_paths=plan.eval_data,
        seed=plan.seed,
    )


@dataclass(frozen=True)
class _Run:
    plan: TrainingPlan
    method: str
    folder: RunFolder
    settings: dict[str, Any]
    data: TrainingData
    tokenizer: PreTrainedTokenizerBase
    live_every: int | None
    report_to: Sequence[str]
    callbacks: Sequence[TrainerCallback]
    tell: Say

    def go(self, *, resume: bool) -> MethodRun:
        checkpoint = self.folder.last_checkpoint() if resume else None
        model = load_model(self.plan, self.method, checkpoint)
        self._check_fits(model)
        parameters = count_parameters(model)
        self.tell(sentence_of(self.method, parameters))
        if resume and self.folder.is_finished():
            self.tell(f"{self.method}: {self.folder.path} is finished.")
            return self._finished(parameters)
        if processes().is_main_process:
            self.folder.describe(self.settings, {"trainable": parameters.trainable, "versions": _versions()})
        trainer = self._trainer(model, fresh=checkpoint is None)
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except NotFiniteError as error:
            raise TrainingError(
                f"{self.method}: {error}; {self._kept()}: train anew, into another folder, with a lower learning rate "
                "or a longer warmup.",
                parameter="learning_rate",
            ) from error
        except KeyboardInterrupt:
            step = trainer.state.global_step
            raise TrainingInterrupted(
                f"{self.method} was interrupted after step {step}; {self._kept()}: resume it with the same settings."
            ) from None
        return self._finished(parameters)

    def _trainer(self, model: nn.Module, *, fresh: bool) -> MethodTrainer:
        plan, held_out = self.plan, self.data.held_out
        schedule = Schedule(
            self.folder.path, every=plan.save_steps, checkpoints=CHECKPOINTS, evaluate=held_out is not None
        )
        live = self._live()
        pad = self.tokenizer.pad_token_id
        trainer = MethodTrainer(
            model=model,
            args=self._arguments(fresh=fresh),
            train_dataset=self.data.train,
            eval_dataset=held_out,
            data_collator=Collator(self.tokenizer.eos_token_id if pad is None else pad),
            processing_class=self.tokenizer,
            callbacks=[schedule, *live, *self.callbacks],
            adapter_base=None if plan.adapter(self.method) is None else plan.model or BUNDLED_NAME,
        )
        for printing in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printing)
        for callback in live:
            callback.log_to(trainer)
        return trainer

    def _arguments(self, *, fresh: bool) -> TrainingArguments:
        plan = self.plan
        return TrainingArguments(
            output_dir=str(self.folder.path),
            per_device_train_batch_size=plan.batch_size,
            per_device_eval_batch_size=plan.batch_size,
            gradient_accumulation_steps=plan.accumulation,
            max_steps=plan.steps or -1,
            num_train_epochs=plan.epochs,
            learning_rate=plan.learning_rate_of(self.method),
            lr_scheduler_type=plan.scheduler,
            warmup_steps=plan.warmup,
            weight_decay=plan.weight_decay,
            max_grad_norm=plan.max_grad_norm,
            optim="adamw_torch",
            seed=plan.seed,
            data_seed=plan.seed,
            eval_on_start=fresh and self.data.held_out is not None,
            eval_strategy="no",
            save_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,
            include_num_input_tokens_seen="non_padding",
            prediction_loss_only=True,
            use_cpu=on_cpus(),
            ddp_find_unused_parameters=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to=list(self.report_to) or "none",
            disable_tqdm=True,
            log_level="error",
        )

    def _live(self) -> list[Any]:
        if self.live_every is None:
            return []
        from wdanalysis.training.live import WeightDecompositionCallback

        return [
            WeightDecompositionCallback(
                self.folder.path / LIVE, every=self.live_every, axis=self.plan.axis, method=self.method
            )
        ]

    def _check_fits(self, model: PreTrainedModel) -> None:
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None and self.plan.max_length > positions:
            raise TrainingError(
                f"{self.plan.model or 'the bundled model'} has {positions} positions, fewer than the "
                f"{self.plan.max_length} of an example's max length: lower that.",
                parameter="max_length",
            )
        embedding: Any = model.get_input_embeddings()
        known = embedding.weight.shape[0]
        highest = max(int(example.tokens.max()) for example in self.data.train.examples)
        if highest >= known:
            raise TrainingError(
                f"the tokenizer of {self.plan.model} gives the token {highest}, and the model knows {known}: "
                "they do not belong together.",
                parameter="model",
            )

    def _kept(self) -> str:
        last = self.folder.last_checkpoint()
        return "no checkpoint was written yet" if last is None else f"{last} is kept"

    def _finished(self, parameters: ParameterCount) -> MethodRun:
        return MethodRun(
            self.method,
            self.folder.path,
            parameters,
            read_losses(self.folder.path),
            tuple(self.folder.checkpoints()),
        )


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "accelerate", "safetensors")
    return {"wdanalysis": __version__, **{package: version(package) for package in packages}}
