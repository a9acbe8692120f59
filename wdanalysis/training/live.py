"""ΔM and ΔD while a model is trained: a callback for `transformers.Trainer` that needs no checkpoints.

>>> from wdanalysis.training.live import WeightDecompositionCallback
>>> live = WeightDecompositionCallback("live/", every=50, modules=["q", "v"])  # doctest: +SKIP
>>> trainer = Trainer(model, args, train_dataset=data, callbacks=[live])  # doctest: +SKIP
>>> live.log_to(trainer)  # doctest: +SKIP
>>> trainer.train()  # then: wd-analyze plot live/  # doctest: +SKIP

It measures what `compare` would measure on a checkpoint of the same step, with the same code: the weights in memory are
described as a checkpoint, and its plan and kernels do the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from wdanalysis import report
from wdanalysis.analysis.findings import Findings
from wdanalysis.analysis.table import COLUMNS, metrics_table
from wdanalysis.checkpoints import open_checkpoint
from wdanalysis.checkpoints.adapters import read_adapter
from wdanalysis.checkpoints.architectures import WRAPPERS
from wdanalysis.checkpoints.names import NameIndex
from wdanalysis.checkpoints.tensors import Checkpoint, LowRankUpdate, Series, StoredTensor
from wdanalysis.decomposition import Axis
from wdanalysis.errors import ComparisonError, TrainingError
from wdanalysis.measure.plan import plan
from wdanalysis.measure.stream import stream
from wdanalysis.results import folder
from wdanalysis.results.provenance import Live, Matrices, Options, Run, Unfinished, versions
from wdanalysis.training.in_memory import IN_MEMORY, STORAGE, stored
from wdanalysis.training.layers import Adapted, VeRAUpdate, adapted_modules, features
from wdanalysis.writing import write_whole

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

BASE = "base.safetensors"
"""In the folder of the table: the watched matrices of a fully tuned model as they were when its run began."""

PEFT_PREFIX = "base_model.model."

Updates = tuple[LowRankUpdate, ...]


class WeightDecompositionCallback(TrainerCallback):
    """Measures ΔM (Eq. 3) and ΔD (Eq. 4) of every watched matrix each so many steps.

    Works in any script with `transformers.Trainer`: full tuning, this package's adapters, and PEFT's LoRA, DoRA and
    VeRA. The sums are taken on the CPU in float64.

    Full tuning needs the base, which it overwrites: a copy of the watched matrices alone is kept on the CPU, in their
    dtype (`nbytes`), and in `directory`. A run that is resumed takes it from there, unless the callback was given to
    the Trainer's constructor, where it sees the weights before the checkpoint comes, or has a `base`. Adapters need no
    copy.

    Parameters
    ----------
    directory
        Where to keep the table, with the columns of `compare`'s: `wd-analyze plot` and `Comparison.load` read it. None
        keeps it in memory only.
    every
        Steps between measurements; the last step of the training is always measured.
    modules
        As in `compare`; None: the attention projections that are trained, or every trained matrix where no projection
        is recognised.
    axis
        As in `compare`.
    method
        What the table calls the method; None: ft, lora, dora, vera or dvora, by what is found in the model.
    base
        The pre-trained model of full tuning, a file or folder as in `compare`, where the model in memory is not it: it
        was loaded from a checkpoint, or is about to be.

    Attributes
    ----------
    metrics
        A row for every matrix and step that was measured so far, with the columns of `compare`'s.
    nbytes
        Memory of the copy of the base, in bytes.

    Examples
    --------
    >>> from torch import nn
    >>> model = nn.ModuleDict({"first": nn.Linear(4, 2), "second": nn.Linear(2, 4)})
    >>> live = WeightDecompositionCallback()
    >>> live.measure(model, step=0)["delta_d"].tolist()  # in a training, the Trainer calls it
    [0.0, 0.0]
    >>> _ = model["first"].weight.data[0].neg_()  # one vector of two turns round: 1 − cos is 2, and on average 1
    >>> live.measure(model, step=1)["delta_d"].round(6).tolist()
    [1.0, 0.0]
    """

    def __init__(
        self,
        directory: str | Path | None = None,
        *,
        every: int = 50,
        modules: Sequence[str] | str | None = None,
        axis: Axis = "out",
        method: str | None = None,
        base: str | Path | None = None,
    ) -> None:
        if every < 1:
            raise TrainingError(
                f"the steps between measurements must be at least 1, and are {every}.", parameter="every"
            )
        self._directory = None if directory is None else Path(directory)
        self._every, self._modules, self._axis, self._method = every, modules, axis, method
        self._base = None if base is None else Path(base)
        self._log: Callable[[dict[str, float]], None] | None = None
        self._watched: _Watched | None = None
        self._metrics = pd.DataFrame(columns=list(COLUMNS))

    @property
    def metrics(self) -> pd.DataFrame:
        """What was measured so far."""
        return self._metrics.copy()

    @property
    def nbytes(self) -> int:
        """Memory of the copy of the base, in bytes; 0 for adapters."""
        return 0 if self._watched is None else self._watched.nbytes

    def log_to(self, trainer: Trainer) -> None:
        """Send the mean ΔM and ΔD of every module to the trainer's loggers as well.

        Without this they go to `state.log_history` only, because a Trainer does not show its loggers to its callbacks.
        """
        self._log = trainer.log

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the base, before any checkpoint is loaded over it."""
        self._watch(kwargs["model"], main=state.is_world_process_zero)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the base where the callback was added late, and take up the table of a run that is resumed."""
        main, resumed = state.is_world_process_zero, state.global_step > 0
        if main and self._directory is not None and not resumed:
            folder.check_free(self._directory, force=False)
        watched = self._watched or self._watch(kwargs["model"], main=main, resumed=resumed)
        if not main or self._directory is None:
            return
        if resumed and (self._directory / "run.json").is_file():
            earlier = folder.load(self._directory).metrics
            self._metrics = earlier[earlier["step"] <= state.global_step][list(COLUMNS)]
        elif isinstance(watched, _FullTuning):
            watched.keep_in(self._directory / BASE)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure, where it is time."""
        if state.global_step % self._every and state.global_step < state.max_steps:
            return
        rows = self.measure(kwargs["model"], state.global_step, main=state.is_world_process_zero)
        if not state.is_world_process_zero:
            return
        columns = ["delta_m", "delta_d"]
        means = rows.groupby("module", sort=False)[columns].mean().to_dict("index")
        logged = {f"{column}/{module}": row[column] for module, row in means.items() for column in columns}
        if self._log is None:
            state.log_history.append({**logged, "step": state.global_step})
            return
        due = control.should_log  # logging marks it as done, and the training loss has still to be logged
        self._log(logged)
        control.should_log = due

    def measure(self, model: nn.Module, step: int, *, main: bool = True) -> pd.DataFrame:
        """Measure now, and add the rows to the table.

        Parameters
        ----------
        model
            The model in training.
        step
            Its training step.
        main
            Whether this process keeps the table; the others only take part in gathering sharded weights.

        Returns
        -------
        DataFrame
            The new rows, with the columns of `compare`.
        """
        watched = self._watched or self._watch(model, main=main)
        tensors, updates = watched.now(model)
        if not main:
            return self._metrics
        method = self._method or watched.method
        tuned = _in_memory(model, tensors, updates, step)
        base = _in_memory(model, watched.base(model))
        planned = plan(base, {method: Series(IN_MEMORY, method, (tuned,), ())}, modules=self._modules)
        rows = metrics_table([row for rows in stream(planned, self._axis) for row in rows], [method])
        self._metrics = pd.concat([self._metrics, rows], ignore_index=True) if len(self._metrics) else rows
        if self._directory is not None:
            _save(self._directory, self._metrics, self._run())
        return rows

    def _run(self) -> Run:
        """Where the table comes from."""
        rows, modules = len(self._metrics), self._modules
        return Run(
            versions=versions(),
            options=Options(
                axis=self._axis, modules=modules if isinstance(modules, str | None) else list(modules)
            ),
            matrices=Matrices(measured=rows, in_table=rows),
            live=Live(every=self._every, base_copy_bytes=self.nbytes),
        )

    def _watch(self, model: nn.Module, *, main: bool, resumed: bool = False) -> _Watched:
        names = _selected(model, self._modules)
        if adapted_modules(model):
            self._watched = _OurAdapters(model, names)
        elif _is_peft(model):
            self._watched = _PeftAdapters(model, names)
        else:
            base = self._base_folder(model, resumed=resumed) if main else None
            self._watched = _FullTuning(model, names, base, keep=main)
        return self._watched

    def _base_folder(self, model: nn.Module, *, resumed: bool) -> Path | None:
        """Where the base of full tuning lies; None where it is the model as it is now.

        Raises
        ------
        TrainingError
            It is neither, as the model has been tuned before.
        """
        checkpoint = _checkpoint_of(model)
        if self._base is not None or not (resumed or checkpoint):
            return self._base
        if self._directory is not None and (self._directory / BASE).is_file():
            return self._directory / BASE
        came = f"loaded from {checkpoint}" if checkpoint else "resumed from a checkpoint"
        raise TrainingError(
            f"the model was {came} and its base is not kept, so that its weights are no longer those that its tuning "
            "began with; pass the pre-trained model as base, or the checkpoint to measure from there on.",
            parameter="base",
        )


def _save(directory: Path, metrics: pd.DataFrame, run: Run) -> None:
    findings = Findings(metrics)

    def page() -> list[Path]:
        return [report.write(directory / folder.REPORT_HTML, findings, run)] if report.is_available() else []

    folder.save(directory, findings, run, others=page, to_do=Unfinished(report=True))


class _Watched(Protocol):
    """The matrices that are measured: what they were, and what they are now."""

    method: str

    @property
    def nbytes(self) -> int: ...

    def base(self, model: nn.Module) -> dict[str, StoredTensor]: ...

    def now(self, model: nn.Module) -> tuple[dict[str, StoredTensor], Updates]: ...


class _FullTuning:
    """Every trained matrix, against a copy of it on the CPU or a file of the base."""

    method = "ft"

    def __init__(self, model: nn.Module, names: Iterable[str], base: Path | None, *, keep: bool) -> None:
        trained = _trained_matrices(model)
        self._names = list(names)
        self._copies: dict[str, Tensor] = {}
        self._stored: dict[str, StoredTensor] = {}
        if base is not None:
            self._stored = _matrices_of(base, {name: trained[name].shape for name in self._names})
            return
        copies = {name: _whole(trained[name]).to("cpu", copy=True) for name in self._names}
        self._copies = copies if keep else {}

    @property
    def nbytes(self) -> int:
        return sum(copy.nbytes for copy in self._copies.values())

    def base(self, model: nn.Module) -> dict[str, StoredTensor]:
        return self._stored or {name: stored(name, tensor) for name, tensor in self._copies.items()}

    def now(self, model: nn.Module) -> tuple[dict[str, StoredTensor], Updates]:
        trained = _trained_matrices(model)
        return {name: stored(name, _whole(trained[name])) for name in self._names}, ()

    def keep_in(self, file: Path) -> None:
        """Keep the copies in a file as well."""
        from safetensors.torch import save_file

        if self._copies:
            copies = {name: tensor.contiguous() for name, tensor in self._copies.items()}
            write_whole(file, lambda opened: save_file(copies, opened.name))


class _PeftAdapters:
    """PEFT's own description of its adapter, read as its saved file would be."""

    nbytes = 0

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._names = list(names)
        self.method = "dora" if any(update.magnitude for update in self._updates(model)) else "lora"

    def base(self, model: nn.Module) -> dict[str, StoredTensor]:
        matrices = _peft_matrices(model)
        return {name: stored(name, _whole(matrices[name])) for name in self._names}

    def now(self, model: nn.Module) -> tuple[dict[str, StoredTensor], Updates]:
        return {}, self._updates(model)

    def _updates(self, model: nn.Module) -> Updates:
        from peft import get_peft_model_state_dict

        adapters: Mapping[str, Any] = model.peft_config  # type: ignore[assignment]
        adapter, settings = next(iter(adapters.items()))
        config = {**settings.to_dict(), "peft_type": settings.peft_type.value}
        state = get_peft_model_state_dict(model, adapter_name=adapter)
        tensors = {name: stored(name, _whole(tensor)) for name, tensor in state.items()}
        return read_adapter(IN_MEMORY, tensors, config, None).updates


class _OurAdapters:
    """The package's own adapters, from the factors in their modules."""

    nbytes = 0

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        modules = adapted_modules(model).values()
        directions = "vera" if any(isinstance(module.update, VeRAUpdate) for module in modules) else "lora"
        has_magnitude = any(module.magnitude is not None for module in modules)
        self.method = {"lora": "dora", "vera": "dvora"}[directions] if has_magnitude else directions

    def base(self, model: nn.Module) -> dict[str, StoredTensor]:
        return {name: stored(name, _base_as_stored(module)) for name, module in self._modules(model)}

    def now(self, model: nn.Module) -> tuple[dict[str, StoredTensor], Updates]:
        return {}, tuple(_low_rank(name, module) for name, module in self._modules(model))

    def _modules(self, model: nn.Module) -> Iterator[tuple[str, Adapted]]:
        for name, module in adapted_modules(model).items():
            if (weight := f"{_plain_name(name)}.weight") in self._names:
                yield weight, module


def _selected(model: nn.Module, modules: Sequence[str] | str | None) -> list[str]:
    """The names of the trained matrices that are to be watched, found as `compare` finds them."""
    candidates = _candidates(model)
    tensors = {name: stored(name, tensor) for name, tensor in candidates.items() if tensor.dtype in STORAGE}
    if not tensors:
        raise TrainingError("no matrix of the model is trained, so that there is nothing to measure.")
    everything = _in_memory(model, tensors)
    try:
        planned = plan(everything, {"": Series(IN_MEMORY, "", (everything,), ())}, modules=modules)
    except ComparisonError as error:
        raise TrainingError(
            f"{modules!r} selects none of the {len(tensors)} trained matrices, such as {next(iter(tensors))}: "
            "choose other modules to measure."
        ) from error
    return list(dict.fromkeys(job.base.name for job in planned.jobs))


def _candidates(model: nn.Module) -> dict[str, Tensor]:
    """Every matrix that is trained, directly or by an adapter, as stored in the base."""
    if adapted := adapted_modules(model):
        return {f"{_plain_name(name)}.weight": _base_as_stored(module) for name, module in adapted.items()}
    return _peft_matrices(model) if _is_peft(model) else _trained_matrices(model)


def _checkpoint_of(model: nn.Module) -> Path | None:
    """The Trainer's checkpoint that a model was loaded from, where it was."""
    folder = Path(getattr(model, "name_or_path", ""))
    is_one = folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") and (folder / "trainer_state.json").is_file()
    return folder if is_one else None


def _matrices_of(base: Path, shapes: Mapping[str, torch.Size]) -> dict[str, StoredTensor]:
    """The matrices of a pre-trained model, under the names that the model in training has for them."""
    tensors = open_checkpoint(base).tensors
    index = NameIndex(tensors)
    found = {name: tensors[own] for name in shapes if (own := index.find(name)) is not None}
    for name, shape in shapes.items():
        if name not in found or found[name].shape != tuple(shape):
            has = f"as {found[name].shape}" if name in found else "not"
            raise TrainingError(
                f"{base} has {name} {has}, and the model in training as {tuple(shape)}; pass the pre-trained model "
                "that it was.",
                parameter="base",
            )
    return found


def _trained_matrices(model: nn.Module) -> dict[str, Tensor]:
    return {
        _plain_name(name): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.ndim >= 2
    }


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "base_model")


def _peft_matrices(model: nn.Module) -> dict[str, Tensor]:
    """The base weights of the layers that PEFT adapts."""
    return {
        f"{_plain_name(name)}.weight": module.base_layer.weight
        for name, module in model.named_modules()
        if hasattr(module, "base_layer") and hasattr(module, "get_delta_weight")
    }


def _plain_name(name: str) -> str:
    """The name in the base model: without what PEFT, DDP, FSDP and torch.compile put in."""
    return ".".join(part for part in name.removeprefix(PEFT_PREFIX).split(".") if part not in WRAPPERS)


def _whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP has sharded, gathered; all processes must ask for it."""
    tensor = tensor.detach()
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def _base_as_stored(module: Adapted) -> Tensor:
    weight = _whole(module.base_weight())
    return weight.mT if module.stores_in_by_out else weight


def _low_rank(name: str, module: Adapted) -> LowRankUpdate:
    """A module's update as a checkpoint has it; a magnitude alone updates the direction by zero."""
    if module.update is None:
        outputs, inputs = features(module.base)
        A, B = torch.zeros(1, inputs), torch.zeros(outputs, 1)
    else:
        A, B = (_whole(factor) for factor in module.update.factors())
    magnitude = module.magnitude
    module_name = name.removesuffix(".weight")
    return LowRankUpdate(
        module=module_name,
        A=stored(f"{module_name}.A", A),
        B=stored(f"{module_name}.B", B),
        scale=1.0,  # the factors have it
        magnitude=None if magnitude is None else stored(f"{module_name}.m", _whole(magnitude)),
        in_by_out=module.stores_in_by_out,
        magnitude_axis=module.axis,
    )


def _in_memory(
    model: nn.Module, tensors: Mapping[str, StoredTensor], updates: Updates = (), step: int | None = None
) -> Checkpoint:
    config: Any = getattr(model, "config", None)
    return Checkpoint(
        path=IN_MEMORY,
        format="in memory",
        tensors=tensors,
        updates=updates,
        step=step,
        config=config.to_dict() if hasattr(config, "to_dict") else None,
    )
