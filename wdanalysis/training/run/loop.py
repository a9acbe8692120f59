"""The run: one model, one text, one order of batches, and one method after another.

The optimizer, mixed precision, several GPUs and FSDP are `transformers.Trainer`'s and `accelerate`'s:
``accelerate launch -m wdanalysis.cli train …`` is how a run on several devices starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import parse_flag_from_env  # type: ignore[import-untyped]
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
)

from wdanalysis._version import __version__
from wdanalysis.errors import TrainingError
from wdanalysis.training.bundled import bundled_model_folder
from wdanalysis.training.counting import count
from wdanalysis.training.data.batches import (
    Collator,
    Document,
    Record,
    TrainingData,
    load_data,
    read_records,
    split_data,
)
from wdanalysis.training.injection import ParameterCount, count_parameters, inject
from wdanalysis.training.model_configs import MODEL_CONFIGS
from wdanalysis.training.peft_folder import load_adapter
from wdanalysis.training.run.curves import draw_losses, read_losses
from wdanalysis.training.run.plan import CHECKPOINTS, METHODS, TrainingPlan
from wdanalysis.training.run.run_folder import RunFolder
from wdanalysis.training.run.trainer import MethodTrainer, NotFiniteError, Progress, ProgressReport, Schedule

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

BUNDLED_NAME = "wdanalysis/training/bundled"
"""What the bundled base is called in an adapter's configuration."""

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


def train(
    plan: TrainingPlan,
    out: str | Path,
    *,
    resume: bool = False,
    live_every: int | None = None,
    report_to: Sequence[str] = (),
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress | None = None,
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
    out, process = Path(out), _processes()
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
        settings = {**plan.settings(method), "dtype": _dtype(plan, method), **fingerprint}
        if resume:
            folder.check_same(settings)
        planned.append(_Run(plan, method, folder, settings, data, tokenizer))
    process.wait_for_everyone()  # nobody writes before everybody has looked
    runs = []
    try:
        for run in planned:
            extra = [*callbacks, *([ProgressReport(run.method, progress)] if progress else [])]
            runs.append(
                run.go(resume=resume, live_every=live_every, report_to=report_to, callbacks=extra, tell=tell)
            )
    finally:
        if process.is_main_process:
            draw_losses(out, METHODS)
    return runs


def count_methods(plan: TrainingPlan) -> dict[str, ParameterCount]:
    """Count what each method of the plan trains, from the model's configuration alone.

    `plan.model` may here also be a ``config.json``, or a name of `wdanalysis.training.model_configs`.

    Raises
    ------
    TrainingError
        There is no such configuration, or the model cannot be adapted as asked.
    """
    source = _model_source(plan)
    known = source in MODEL_CONFIGS or Path(source).exists()
    configuration = source if known else _hub_configuration(source)
    return {method: count(configuration, plan.adapter(method)) for method in plan.methods}


def sentence_of(method: str, parameters: ParameterCount) -> str:
    """Say how many parameters a method trains, as the paper's tables count them."""
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
        return AutoTokenizer.from_pretrained(_model_source(plan))
    except (OSError, ValueError, KeyError) as error:
        raise TrainingError(
            f"the tokenizer of {plan.model} cannot be loaded ({_first_line(error)}); --model must be a folder that "
            "holds one (tokenizer.json), or the name of a model on the hub"
        ) from error


def load_model(plan: TrainingPlan, method: str, adapter_folder: Path | None = None) -> PreTrainedModel:
    """Load the plan's model as the method needs it, and adapt it, anew or as an adapter's folder says.

    Raises
    ------
    TrainingError
        It cannot be loaded as a causal language model, or cannot be adapted as asked.
    """
    dtype = _dtype(plan, method)
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if plan.quantize:
        options["quantization_config"] = _four_bits()
        if torch.cuda.is_available():
            options["device_map"] = {"": _processes().local_process_index}
    try:
        model = AutoModelForCausalLM.from_pretrained(_model_source(plan), **options)
    except (OSError, ValueError, KeyError) as error:
        raise TrainingError(
            f"{plan.model} cannot be loaded as a causal language model: {_first_line(error)}"
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


def plan_data(plan: TrainingPlan, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
    """Read the plan's data; without any, the documentation in Python's library, whose held-out files are fixed.

    Raises
    ------
    TrainingError
        As `wdanalysis.training.data.batches.load_data`.
    """
    if not plan.data:
        from wdanalysis.training.data.text import library_documentation

        documents = [Document(text) for text in library_documentation()]
        held_out: list[Record] | float = 0.0
        if plan.eval_data:
            held_out = [record for path in plan.eval_data for record in read_records(path)]
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

    def go(
        self,
        *,
        resume: bool,
        live_every: int | None,
        report_to: Sequence[str],
        callbacks: Sequence[TrainerCallback],
        tell: Say,
    ) -> MethodRun:
        checkpoint = self.folder.last_checkpoint() if resume else None
        model = load_model(self.plan, self.method, checkpoint)
        self._check_fits(model)
        parameters = count_parameters(model)
        tell(sentence_of(self.method, parameters))
        if resume and self.folder.is_finished():
            tell(f"{self.method}: {self.folder.path} is finished.")
            return self._finished(parameters)
        if _processes().is_main_process:
            self.folder.describe(self.settings, {"trainable": parameters.trainable, "versions": _versions()})
        trainer = self._trainer(model, callbacks, live_every, report_to, fresh=checkpoint is None)
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except NotFiniteError as error:
            raise TrainingError(
                f"{self.method}: {error}; {self._kept()}: train anew with a lower --lr or a longer --warmup, "
                "and another --out."
            ) from error
        except KeyboardInterrupt:
            step = trainer.state.global_step
            raise TrainingInterrupted(
                f"{self.method} was interrupted after step {step}; {self._kept()}: go on with the same options and "
                "--resume."
            ) from None
        return self._finished(parameters)

    def _trainer(
        self,
        model: nn.Module,
        callbacks: Sequence[TrainerCallback],
        live_every: int | None,
        report_to: Sequence[str],
        *,
        fresh: bool,
    ) -> MethodTrainer:
        plan, held_out = self.plan, self.data.held_out
        arguments = TrainingArguments(
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
            eval_on_start=fresh and held_out is not None,
            eval_strategy="no",
            save_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,
            include_num_input_tokens_seen="non_padding",
            prediction_loss_only=True,
            use_cpu=_on_cpus(),
            ddp_find_unused_parameters=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to=list(report_to) or "none",
            disable_tqdm=True,
            log_level="error",
        )
        schedule = Schedule(
            self.folder.path, every=plan.save_steps, checkpoints=CHECKPOINTS, evaluate=held_out is not None
        )
        live = self._live(live_every)
        pad = self.tokenizer.pad_token_id
        trainer = MethodTrainer(
            model=model,
            args=arguments,
            train_dataset=self.data.train,
            eval_dataset=held_out,
            data_collator=Collator(self.tokenizer.eos_token_id if pad is None else pad),
            processing_class=self.tokenizer,
            callbacks=[schedule, *live, *callbacks],
            adapter_base=None if plan.adapter(self.method) is None else plan.model or BUNDLED_NAME,
        )
        for printing in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printing)
        for callback in live:
            callback.log_to(trainer)
        return trainer

    def _live(self, every: int | None) -> list[Any]:
        if every is None:
            return []
        from wdanalysis.training.live import WeightDecompositionCallback

        directory = self.folder.path / LIVE
        return [WeightDecompositionCallback(directory, every=every, axis=self.plan.axis, method=self.method)]

    def _check_fits(self, model: PreTrainedModel) -> None:
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None and self.plan.max_length > positions:
            raise TrainingError(
                f"{self.plan.model or 'the bundled model'} has {positions} positions, fewer than the "
                f"{self.plan.max_length} of --max-length: lower that."
            )
        embedding: Any = model.get_input_embeddings()
        known = embedding.weight.shape[0]
        highest = max(int(example.tokens.max()) for example in self.data.train.examples)
        if highest >= known:
            raise TrainingError(
                f"the tokenizer of {self.plan.model} gives the token {highest}, and the model knows {known}: "
                "they do not belong together."
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


def _hub_configuration(name: str) -> PretrainedConfig:
    try:
        configuration: PretrainedConfig = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise TrainingError(f"the configuration of {name} cannot be loaded: {_first_line(error)}") from error
    return configuration


def _processes() -> Any:
    """Return accelerate's view of the processes."""
    return PartialState(cpu=_on_cpus())


def _on_cpus() -> bool:
    """Whether accelerate was launched to use CPUs, perhaps several processes on them."""
    return bool(parse_flag_from_env("ACCELERATE_USE_CPU"))


def _model_source(plan: TrainingPlan) -> str:
    return plan.model or str(bundled_model_folder())


def _dtype(plan: TrainingPlan, method: str) -> str:
    """The plan's dtype; on a CPU, which is slow and rough in 16 bits, ``auto`` is float32."""
    dtype = plan.dtype_of(method)
    return "float32" if dtype == "auto" and _processes().device.type == "cpu" else dtype


def _make_trainable_on_4_bits(model: PreTrainedModel) -> None:
    """Let the Trainer and bitsandbytes know that adapters are trained on the 4-bit weights."""
    model._hf_peft_config_loaded = True  # the Trainer refuses quantized models that have no adapters
    layer: Any
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
            "--quantize 4bit needs bitsandbytes: install it with `pip install wdanalysis[quantized]`."
        ) from None
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "accelerate", "safetensors")
    return {"wdanalysis": __version__, **{package: version(package) for package in packages}}


def _first_line(error: BaseException) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0].rstrip()
    return line if line.endswith(".") else f"{line}."
