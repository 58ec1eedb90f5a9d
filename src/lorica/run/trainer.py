"""TrainerMixin: any subclass of the Hugging Face Trainer trains an adapted model.

It replaces who makes the optimizer and the scheduler (the recipe's rule, groups and schedules,
which learn the horizon here), what enters the loss (the recipe's objectives, once per update, never
in evaluation), and what a checkpoint holds (the adapters, not the frozen base). A checkpoint folder
is complete or absent.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lorica import formats
from lorica.formats.atomic_folder import place, sync
from lorica.methods.optional import ClipsItself, FreezesLayers, RefusesOptim
from lorica.model.adapters import Adapters
from lorica.run import checkpoints
from lorica.run.guard import Guarded
from lorica.run.signals import SaveOnSignal
from lorica.run.token_weighting import counted_labels, share_of_update
from lorica.training.bind import KEY, bind
from lorica.training.horizon import fitted_curve
from lorica.training.left_out import TooManyLeftOut

logger = logging.getLogger("lorica")


class TrainerMixin(Guarded):
    """Put it before any Trainer class: `class Mine(TrainerMixin, SFTTrainer): ...`.

    Args:
        model: with adapters attached.
        args: as the Trainer's; `optim` has to be a kind of the recipe's rule, or the default. A
            rule that limits its own step sets `max_grad_norm` to 0 and says so.
        adapters: what `lorica.attach` returned; default: those of `model`.
        modules_learning_rate: rate of the modules that train in full beside the targets. Default:
            `args.learning_rate`.

    Raises:
        ValueError: no adapters are attached, `optim` is of another kind than the recipe's rule,
            an engine that flattens parameters is asked for, or there is a rate for modules that
            train in full and none does.

    Example:
        >>> from lorica.run import Trainer, TrainerMixin
        >>> issubclass(Trainer, TrainerMixin)
        True
    """

    model: Any
    args: Any
    optimizer: Any
    state: Any
    accelerator: Any

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        adapters: Adapters | None = None,
        modules_learning_rate: float | None = None,
        **kwargs: Any,
    ):
        self.adapters = Adapters.of(model) if adapters is None else adapters
        self.modules_learning_rate = modules_learning_rate
        if modules_learning_rate is not None:  # refused now, not at the first step
            self.adapters.param_groups(modules_learning_rate, modules_lr=modules_learning_rate)
        if args is not None:
            self._check_arguments(args)
        with _counts_as_adapted(model):
            super().__init__(model=model, args=args, **kwargs)  # type: ignore[call-arg]
        if args is None:
            self._check_arguments(self.args)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process trains on one GPU, and this one sees {self.args.n_gpu}: the Trainer"
                " would copy the model to each (`nn.DataParallel`), away from its adapters. Start a"
                " process a GPU with `torchrun --nproc-per-node N`, or set CUDA_VISIBLE_DEVICES=0"
            )
        rule = self.adapters.recipe.rule
        if isinstance(rule, ClipsItself) and self.args.max_grad_norm:
            logger.warning(
                "`%s` limits its own step, and clipping the gradients before it would spoil that:"
                " max_grad_norm is 0 instead of %g", rule.name, self.args.max_grad_norm,
            )  # fmt: skip
            self.args.max_grad_norm = 0.0
        self._from: Path | None = None  # the checkpoint that this call of `train` goes on from
        self.add_callback(_Regain(self))  # type: ignore[attr-defined]
        reentrant = (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
        if self.args.gradient_checkpointing and reentrant:
            # The frozen embeddings' output has no gradient, and a reentrant segment without a
            # differentiable input silently trains nothing.
            self.model.enable_input_require_grads()

    def _check_arguments(self, args: Any) -> None:
        rule = self.adapters.recipe.rule
        name = getattr(args.optim, "value", args.optim)
        # The default of the arguments can't be told from a wish, so it counts as none.
        unset = type(args).__dataclass_fields__["optim"].default
        if name not in rule.trainer_names | {getattr(unset, "value", unset)}:
            if isinstance(rule, RefusesOptim) and name in rule.trainer_refusals:
                raise ValueError(f"`optim={name}`: {rule.trainer_refusals[name]}")
            raise ValueError(
                f"`optim={name}` is not the rule of the recipe `{self.adapters.recipe.text()}`,"
                f" which is `{rule.name}`; allowed: {', '.join(sorted(rule.trainer_names))}."
                " Another rule is named in the method, e.g. `lora+sgd`"
            )
        if args.optim_args:
            raise ValueError(
                f"`optim_args={args.optim_args!r}` has no effect here: arguments of a rule"
                f" stand in the method, e.g. `{rule.name}(...)`"
            )
        self._check_phases(args)
        if args.deepspeed and (self.adapters.recipe.schedules or "pair" in rule.needs):
            raise ValueError(
                "DeepSpeed flattens parameters, so schedules and rules that see A and B together"
                " cannot reach them; use DDP or FSDP2 instead"
            )

    def _check_phases(self, args: Any) -> None:
        """Where something rests for a while, DDP has to look for it, and FSDP2 cannot resume."""
        schedules = self.adapters.recipe.schedules
        resting = [s.name for s in schedules if isinstance(s, FreezesLayers) and s.freezes_layers]
        if not resting:
            return
        if args.fsdp:
            raise ValueError(
                f"`{resting[0]}` lets some of what trains rest for a while, and torch restores a"
                " sharded optimizer only where every parameter has a state, so no checkpoint of"
                " this run could be gone on from; leave `fsdp` out (DDP)"
            )
        if args.ddp_find_unused_parameters is False:
            raise ValueError(
                f"`ddp_find_unused_parameters=False`, and `{resting[0]}` lets some of what trains"
                " rest for a while, for which DDP would wait for ever; leave it out"
            )
        args.ddp_find_unused_parameters = True  # the Trainer's default, but under checkpointing

    # -- optimizer, scheduler, loss --------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            rule = self.adapters.recipe.rule
            groups = self.adapters.param_groups(
                self.args.learning_rate, self.args.weight_decay, self.modules_learning_rate
            )
            self.optimizer = rule.make(groups, rule.options_from(self.args))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        inner = self.optimizer if optimizer is None else optimizer
        if isinstance(inner, AcceleratedOptimizer):
            inner = inner.optimizer
        if KEY not in inner.param_groups[0]:  # else the caller bound it with a horizon of their own
            name = self.args.lr_scheduler_type
            bind(
                inner,
                self.adapters,
                total_steps=num_training_steps,
                seed=self.args.seed,
                curve=fitted_curve(getattr(name, "value", name), self.args.warmup_steps),
            )
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]

    def _get_learning_rate(self) -> float:
        """What the last step was taken with: a schedule may have changed the scheduler's rate."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        own = inner.param_groups[0].get(KEY)
        taken = own is not None and own["step"] > 0
        return own["rate"] if taken else super()._get_learning_rate()  # type: ignore[misc]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        penalised = model.training and bool(self.adapters.recipe.objectives)
        # Before the call: with label smoothing the Trainer takes the labels out of the inputs.
        share = self._share(inputs, num_items_in_batch) if penalised else 1.0
        result = super().compute_loss(  # type: ignore[misc]
            model,
            inputs,
            return_outputs=return_outputs or penalised,
            num_items_in_batch=num_items_in_batch,
        )
        if not penalised:
            return result
        loss, outputs = result
        named = outputs if isinstance(outputs, dict) else {}
        loss = self.adapters.loss({**named, "loss": loss}, inputs, share=share)
        return (loss, outputs) if return_outputs else loss

    def _share(self, inputs: Any, items: Any) -> float:
        """This micro-batch's part of the update, by label tokens, as the Trainer weighs the task's
        loss."""
        if items is None or not self.model_accepts_loss_kwargs:  # type: ignore[attr-defined]
            return 1.0  # the Trainer divides by the number of micro-batches itself
        return float(share_of_update(self, counted_labels(self, inputs), items))

    # -- checkpoints -----------------------------------------------------------------------------

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        folder = Path(output_dir or self.args.output_dir)
        formats.save(self.adapters, folder, overwrite=True)
        if self.processing_class is not None and self.args.should_save:  # type: ignore[attr-defined]
            self.processing_class.save_pretrained(folder)  # type: ignore[attr-defined]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the whole folder aside, then rename it: a run killed here loses nothing that was
        complete."""
        self._check_drift()
        self.check_taken()
        final = Path(self._get_output_dir(trial))  # type: ignore[attr-defined]
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        aside = final / checkpoints.ASIDE
        pending = vars(self).get("_tr_loss")  # older Trainers keep it to themselves
        losses = gather_object([] if pending is None else [pending.item()])
        if trial is not None and self.args.should_save:  # each has a folder of its own
            final.mkdir(parents=True, exist_ok=True)
        try:
            with checkpoints.saving(name, final):
                self._write_checkpoint(model, trial, aside, name, losses)
        except BaseException:
            if self.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)
            raise

    def _write_checkpoint(
        self, model: Any, trial: Any, aside: Path, name: str, losses: list[float]
    ) -> None:
        final = aside.parent
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()  # the folder is there since the start, or it was moved away
        self.accelerator.wait_for_everyone()
        with _output_dir(self, aside):
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()
        best = final / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if self.state.best_global_step and (best.exists() or best.name == name):
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            self.state.save_to_json(str(aside / name / "trainer_state.json"))
            logged = self._globalstep_last_logged  # type: ignore[attr-defined]
            whole = not self.args.save_only_model
            checkpoints.seal(aside / name, whole=whole, losses=losses, logged=logged)
            for path in [*(aside / name).rglob("*"), aside / name]:
                sync(path)
            place(aside / name, final / name)
            shutil.rmtree(aside)
            kept = {final / name, Path(self.state.best_model_checkpoint or final / name)}
            checkpoints.rotate(final, self.args.save_total_limit, kept)
        self.accelerator.wait_for_everyone()

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        """What decides about saving under `save_strategy="best"`, where a signal has a say, too."""
        best = super()._determine_best_metric(metrics, trial)  # type: ignore[misc]
        callbacks = self.callback_handler.callbacks  # type: ignore[attr-defined]
        return best or any(isinstance(c, SaveOnSignal) and c.saving for c in callbacks)

    def _check_drift(self) -> None:
        if self.accelerator.num_processes == 1:
            return
        prints = gather_object([self.adapters.fingerprint(buffers=False)])
        if len(set(prints)) > 1:
            raise ValueError(
                f"the {len(prints)} processes hold different adapters at step"
                f" {self.state.global_step}: something edits weights by rank. No checkpoint was"
                " written; the last one is good"
            )

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As the Trainer's; True stands for the last checkpoint that is whole, and one that was cut
        or changed is named and never gone on from.

        Raises:
            ValueError: the checkpoint named is not whole, or none is.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._newest()
        self._from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if self._from is not None and (why := checkpoints.flaw(self._from)) is not None:
            raise ValueError(
                f"`resume_from_checkpoint={resume_from_checkpoint}` is no whole checkpoint: {why}."
                " Name another, or pass True for the last whole one"
            )
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
            self.check_taken()
            return output
        except TooManyLeftOut as error:
            step = self.state.global_step + 1
            assert self.guard is not None  # which looked at those steps
            raise ValueError(f"{error} {self.guard.last_good(step)}") from error
        finally:
            for callback in self.callback_handler.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, SaveOnSignal):
                    callback.restore()

    def load_optimizer(self, checkpoint: str | Path) -> None:
        """The optimizer and the scheduler as they were at the end of a run that is done; sharded
        ones need a prepared model, and are left out."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # type: ignore[attr-defined]
            return
        self.create_optimizer()
        self.create_scheduler(self.state.max_steps)
        self._load_optimizer_and_scheduler(str(checkpoint))  # type: ignore[attr-defined]

    def _newest(self) -> str:
        last, flaws = checkpoints.newest(Path(self.args.output_dir))
        why = checkpoints.describe_flaws(flaws)
        if last is None:
            raise ValueError(
                f"`resume_from_checkpoint=True`: there is no whole checkpoint in"
                f" `{self.args.output_dir}` {why}; name one, or leave it out"
            )
        if flaws:
            logger.warning(f"{why}. Going on from {last.name}")
        return str(last)

    def _regain_draws(self) -> None:
        """The random state, once more: data that find their place by themselves have drawn from it
        to get there."""
        if self._from is not None and self.args.ignore_data_skip:
            self._load_rng_state(str(self._from))  # type: ignore[attr-defined]
        self._from = None

    def _regain_loss(self) -> None:
        """The loss of the steps since the last line of the log."""
        if self._from is None:
            return
        told = checkpoints.read(self._from)
        losses, ranks = told["losses"], self.accelerator.num_processes
        mine = losses[self.accelerator.process_index] if len(losses) == ranks else None
        if mine is not None:
            self._tr_loss = torch.tensor(mine, device=self.args.device)
            self._globalstep_last_logged = told["logged"]

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # With a limit of one the Trainer would remove the last checkpoint beside the best one, and
        # what is left would be of no use to whoever is killed before the results are written.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.args.save_total_limit = limit

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        formats.restore(self.adapters, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        formats.restore(self.adapters, self.state.best_model_checkpoint)


class Trainer(TrainerMixin, transformers.Trainer):
    """The Hugging Face Trainer for adapted models; see `TrainerMixin`."""


class _Regain(TrainerCallback):
    """What the Trainer forgets of the run that it goes on with."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._regain_loss()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._regain_draws()


@contextlib.contextmanager
def _output_dir(trainer: Any, folder: Path) -> Iterator[None]:
    """Let the Trainer's own code write its checkpoint below `folder`."""
    trainer._get_output_dir = lambda trial: str(folder)
    try:
        yield
    finally:
        del trainer._get_output_dir


@contextlib.contextmanager
def _counts_as_adapted(model: Any) -> Iterator[None]:
    """The Trainer refuses a quantised model without an adapter it knows; ours are attached
    already."""
    if not vars(model).get("is_quantized", False):
        yield
        return
    before = vars(model).get("_hf_peft_config_loaded", False)
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        model._hf_peft_config_loaded = before
