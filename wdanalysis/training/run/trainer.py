"""What `transformers.Trainer` needs beside itself: when to save, what to save of an adapter, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from wdanalysis.training.peft_folder import save_adapter
from wdanalysis.training.run.curves import losses, write_losses

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

LOGGED_ROWS = 200
"""About so many rows of losses a run."""

TrainingProgress = Callable[[str, int, int, float | None, bool], None]
"""Called with the method, the step, the last step, the loss where one is known, and whether it is evaluating."""


class NotFiniteError(Exception):
    """The loss or a weight became NaN or infinite; `str(error)` says which and at which step."""


class MethodTrainer(Trainer):
    """A Trainer that stops at a loss which is not finite, never saves weights that are not, and knows our adapters.

    Parameters
    ----------
    adapter_base
        Name of the base model, where the model carries our adapters: then a checkpoint is a PEFT folder.
    """

    def __init__(self, *args: Any, adapter_base: str | None = None, **kwargs: Any) -> None:
        self._adapter_base = adapter_base
        super().__init__(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Do one forward and backward pass.

        Raises
        ------
        NotFiniteError
            The loss is not finite, on whichever process.
        """
        loss: Tensor = super().training_step(*args, **kwargs)
        everywhere = self.accelerator.gather(loss.detach().reshape(1)) if self.args.world_size > 1 else loss
        if not torch.isfinite(everywhere).all():
            value = "NaN" if torch.isnan(everywhere).any() else "infinite"
            raise NotFiniteError(f"the loss became {value} at step {self.state.global_step + 1}")
        return loss

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save the model, or its adapter.

        Raises
        ------
        NotFiniteError
            A trained weight is not finite.
        """
        assert self.model is not None
        for name, parameter in self.model.named_parameters():
            values = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if parameter.requires_grad and not torch.isfinite(values).all():
                raise NotFiniteError(f"{name} is no longer finite after step {self.state.global_step}")
        if self._adapter_base is None:
            super().save_model(output_dir, *args, **kwargs)
            return
        # Gathering what FSDP has sharded takes every process.
        gathered = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            model = self.accelerator.unwrap_model(self.model)
            save_adapter(model, folder, base_name=self._adapter_base, state_dict=gathered)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Leave adapters as they are: the model was given those of the checkpoint when it was loaded.

        The Trainer has no public way to resume the optimizer without the weights, and reads adapters of PEFT's only.
        """
        if self._adapter_base is None or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


class Schedule(TrainerCallback):
    """Saves, evaluates and logs at chosen steps, and keeps ``losses.csv``.

    Parameters
    ----------
    folder
        The method's.
    every
        Steps between checkpoints; None: `checkpoints` of them, evenly. The last step is always one.
    checkpoints
        How many, where `every` is None.
    evaluate
        Whether there is held-out data.
    """

    def __init__(self, folder: Path, *, every: int | None, checkpoints: int, evaluate: bool) -> None:
        self._folder, self._every, self._checkpoints, self._evaluate = folder, every, checkpoints, evaluate

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for what is due."""
        step, last = state.global_step, state.max_steps
        due = step in saved_steps(last, every=self._every, checkpoints=self._checkpoints)
        control.should_save = due
        control.should_evaluate = due and self._evaluate
        # A checkpoint is logged as well, so that the mean loss of the next row starts there, resumed or not.
        control.should_log = due or step == 1 or step % math.ceil(last / LOGGED_ROWS) == 0

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the table of losses anew."""
        if state.is_world_process_zero:
            write_losses(losses(state.log_history), self._folder)


class ProgressReport(TrainerCallback):
    """Tells a function how far the training is."""

    def __init__(self, method: str, progress: TrainingProgress) -> None:
        self._method, self._progress = method, progress
        self._loss: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell where it starts."""
        self._tell(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the step."""
        self._tell(state)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell that it evaluates."""
        self._tell(state, evaluating=True)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell that it is done with that."""
        self._tell(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Remember the loss."""
        self._loss = (logs or {}).get("loss", self._loss)

    def _tell(self, state: TrainerState, *, evaluating: bool = False) -> None:
        if state.is_world_process_zero:
            self._progress(self._method, state.global_step, state.max_steps, self._loss, evaluating)


def saved_steps(last: int, *, every: int | None, checkpoints: int) -> list[int]:
    """Return the steps of which a checkpoint is kept: each `every`, or `checkpoints` of them evenly; and the last.

    >>> saved_steps(100, every=None, checkpoints=4)
    [25, 50, 75, 100]
    >>> saved_steps(10, every=4, checkpoints=4)
    [4, 8, 10]
    """
    if every is not None:
        return [*range(every, last, every), last]
    return sorted({math.ceil(last * part / checkpoints) for part in range(1, checkpoints + 1)})
