"""Ctrl-C and SIGTERM: a checkpoint at the end of the step, then an exit."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lorica.run.stopping import SIGNALS, Stopped, check_stopped, in_main_thread

ECHO = 1.0  # seconds in which a launcher's signal may arrive twice: from it, and from the terminal


class SaveOnSignal(TrainerCallback):
    """Writes a checkpoint at the end of the step in which SIGINT or SIGTERM arrives, and leaves
    `train` by raising `Stopped`.

    The handlers stand while `train` runs, if it runs in the main thread, and those from before
    stand again afterwards. A second signal raises at once, without a new checkpoint. The checkpoint
    is one to go on from, also under `save_only_model`. A signal during an evaluation waits for its
    end, and one in the last step of a pass for the evaluation after it, so that the run, resumed,
    is the one that was never stopped. Of several processes one that gets the signal is enough.

    Raises:
        Stopped: out of `train`; a SystemExit whose code is 128 + the signal's number.

    Example:
        >>> from lorica.run.signals import SaveOnSignal
        >>> callback = SaveOnSignal()     # Trainer(..., callbacks=[callback])
        >>> callback.number is None       # no signal yet
        True
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.saving = False  # what is being written is the checkpoint to leave with
        self._asks = False  # some process got a signal
        self._ends = False  # the step that was taken ends a pass over the data
        self._first = 0.0
        self._owner = 0
        self._before: dict[int, Any] = {}
        self._sent: torch.Tensor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check_stopped()
        self.number, self.saving, self._sent = None, False, None
        self._asks = self._ends = False
        if in_main_thread() and not self._before:
            self._owner = os.getpid()
            self._before = {number: signal.signal(number, self._caught) for number in SIGNALS}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Set the handlers that stood before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _caught(self, number: int, frame: Any) -> None:
        if os.getpid() != self._owner:  # a loader's worker: Ctrl-C reaches it too, and it is needed
            return
        now = time.monotonic()
        if self.number is not None:
            if _launched() and now - self._first < ECHO:
                return
            raise Stopped(number)
        self.number, self._first = number, now
        text = "a checkpoint is written at the end of this step; once more leaves at once"
        with contextlib.suppress(OSError):  # not through `print`: it may be what was interrupted
            os.write(2, f"\n{signal.Signals(number).name}: {text}\n".encode())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self._asks = self._asked(args.device)
        self._ends = state.epoch is not None and state.epoch == int(state.epoch)
        if self._asks and not self._ends:
            self._save(args, control)
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self._ends = False
        if self._asks or self._alone():
            self._save(args, control)
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self._alone():
            self._save(args, control)
        return control

    def _alone(self) -> bool:
        """Whether a signal came and no other process has to agree."""
        return self.number is not None and not _several()

    def _save(self, args: Any, control: Any) -> None:
        args.save_only_model = False  # what is left behind can be gone on from
        self.saving = control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.saving or (self._alone() and not args.save_only_model and not self._ends):
            name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            # Of several processes another may have got it.
            number = signal.SIGTERM if self.number is None else self.number
            raise Stopped(number, state.global_step, Path(args.output_dir) / name)

    def _asked(self, device: torch.device) -> bool:
        """Whether any process got a signal, with the same answer on all.

        What they tell each other at one step is read at the next, so that none waits for it.
        """
        if not _several():
            return self.number is not None
        told = self._sent is not None and bool(self._sent.item())
        self._sent = torch.tensor(float(self.number is not None), device=device)
        dist.all_reduce(self._sent, op=dist.ReduceOp.MAX)
        return told


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _launched() -> bool:
    """Whether a launcher started this process, which passes signals on."""
    return "LOCAL_RANK" in os.environ
