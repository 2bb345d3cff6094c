"""The training loop: transformers' Trainer with our batches, our loss and our bookkeeping.

What is overridden, and why:
  get_train_dataloader   steps are planned; the loader must not be sharded again
  compute_loss           sums over legs divided by the counts of the whole step, times the number of processes,
                         because data-parallel engines average gradients over ranks
  evaluate               per-pair log-probs of held-out rows, with intervals
  log                    sums and counts since the last line, over all ranks
  _save_checkpoint       checkpoints appear complete or not at all; they may be written in the background
  train                  ends when the last of them is written
  _run_epoch             no step after the last one
  create_scheduler       comes right after the model is divided, and before a checkpoint is read
  _prepare_for_training  start-up checks and the reference pass need the wrapped model
The underscored ones are private to transformers, which is why its version is pinned; equivalence tests are the alarm.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from align.anchors import InitialWeights, MovingReference
from align.engines import before_fsdp, fill, finite, keep_float32, launched, size, steps_in_backward
from align.errors import RunError
from align.forward import causal_lm, dense
from align.lifetime import StopSignal, Watchdog
from align.losses import Losses
from align.meter import Meter
from align.saving import PARTIAL, RECIPE, STATE, explained, publish, write_manifest
from align.writing import BackgroundWriter, HostCopies
from data.loader import PlannedBatches
from data.pack import PackedBatch
from objectives import LegBatch, Output

SETTINGS = ("weight_decay", "betas", "eps")
"""Of a group of parameters: what a recipe says. Other entries may be state, which a checkpoint is right about."""
PairSums = Mapping[str, np.ndarray]
"""Per-row numbers of an evaluation: ``policy_<leg>`` and ``ref_<leg>`` (sums), ``length_<leg>``, ``score_<name>`` and
``row``; of reward models ``value_<leg>/<output>`` in place of sums."""


class ObjectiveTrainer(Trainer):
    """Trains a bound model (see ``align.forward.bind``) on planned batches with a mixture of objectives.

    Args:
        model: with or without adapter; calling it with ``packed=batch`` gives log-probs.
        args: with ``gradient_accumulation_steps`` equal to the plan's microbatches.
        losses: what to minimise.
        batches: training rows, planned for this rank.
        eval_batches: held-out rows, all in one step of their plan; None for none.
        prepare: called once with the trainer when the model is wrapped and restored, before the first step; it fills
            the reference cache and runs the start-up checks.
        evaluations: maps per-row sums of held-out rows to metrics, logged under ``eval/``.
        row_name: names a training row for messages.
        recipe_yaml: stored in every checkpoint.
        anchor: the initial weights, for regularizers; None for none.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        args: TrainingArguments,
        losses: Losses,
        batches: PlannedBatches,
        eval_batches: PlannedBatches | None = None,
        prepare: Callable[[ObjectiveTrainer], None] | None = None,
        evaluations: Callable[[PairSums, int], dict[str, float]] | None = None,
        row_name: Callable[[int], str] = str,
        recipe_yaml: str = "",
        anchor: InitialWeights | None = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        assert args.gradient_accumulation_steps == batches.plan.microbatches
        self.losses, self.batches, self.eval_batches = losses, batches, eval_batches
        self.prepare, self.evaluations = prepare, evaluations
        self.row_name, self.recipe_yaml = row_name, recipe_yaml
        # What is sent to the others when FSDP2 has divided the model; None on other engines, and afterwards.
        self._whole = before_fsdp(model) if launched() == "fsdp2" else None
        self._summed: dict[str, Tensor] = {}
        self._settings: list[dict[str, Any]] = []
        self.anchor = anchor
        self.moving_reference: MovingReference | None = None
        self.meter = Meter()
        self.resumed = False
        self.stop_signal, self.stopping = StopSignal(), False
        self.watchdog: Watchdog | None = None
        self.rows_seen = self.tokens_seen = 0
        self._step_losses: list[tuple[PackedBatch, Tensor]] = []
        self._saving = False
        self.writer: BackgroundWriter | None = None
        """What writes checkpoints while training goes on; None where it waits for them."""
        super().__init__(
            model=model,
            args=args,
            train_dataset=batches,
            eval_dataset=eval_batches,
            data_collator=lambda items: items[0],
            processing_class=processing_class,
            callbacks=[_Bookkeeping(self), *(callbacks or [])],
        )
        keep_float32(self.accelerator)
        self.loss_is_scaled_for_ga = True  # counts are of the whole step, so nothing is left to divide by

    @property
    def wrapped(self) -> nn.Module:
        """The model as the engine has it: what must be called, so that gradients and shards are looked after."""
        assert isinstance(self.model_wrapped, nn.Module)
        return self.model_wrapped

    @property
    def unwrapped(self) -> nn.Module:
        """The model itself, with its adapter if it has one."""
        model = self.accelerator.unwrap_model(self.wrapped)
        assert isinstance(model, nn.Module)
        return model

    @property
    def run_dir(self) -> Path:
        """Where the run writes."""
        assert self.args.output_dir is not None
        return Path(self.args.output_dir)

    # ---- batches ----

    def get_train_dataloader(self) -> DataLoader[PackedBatch]:
        """The planned microbatches; not passed through ``accelerator.prepare``, which would shard them again."""
        return self.batches.loader(self.args.dataloader_num_workers)

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Rows of the training set."""
        return len(self.batches.table)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        """Nothing to count: every batch carries the counts of its whole step, from the plan."""

    def _prepare_inputs(self, inputs: PackedBatch) -> PackedBatch:  # type: ignore[override]
        return inputs.to(self.args.device)

    def floating_point_ops(self, inputs: PackedBatch) -> int:  # type: ignore[override]
        """6 N per useful token, N the parameters of a forward pass without the embedding: what a run is billed for."""
        return 6 * inputs.useful_tokens * self._forward_parameters

    @property
    def _forward_parameters(self) -> int:
        inner = causal_lm(self.unwrapped)
        return sum(size(p) for name, p in inner.named_parameters() if "embed" not in name and "wte" not in name)

    # ---- loss ----

    def compute_output(
        self, model: nn.Module, batch: PackedBatch, *, weigh: bool = True
    ) -> tuple[Output, LegBatch, Tensor]:
        """Terms and metrics of one microbatch, its legs, and ``nothing_of`` the model's outputs."""
        return self.losses.output(model, batch, weigh=weigh, whole_step=self._step_is_one_batch)

    def with_whole_step(self, batches: Sequence[PackedBatch], *, weigh: bool) -> list[PackedBatch]:
        """The microbatches of one step, each with what a pass without gradient finds of all its rows, on all ranks."""
        found: list[dict[str, Tensor]] = []
        with self.scoring():
            for batch in batches:
                moved = batch.to(self.args.device)
                legs = self.losses.legs(moved, *self.losses.scored(self.wrapped, moved))
                found.append(self.losses.step_pass(legs, weigh=weigh))
        sizes = [len(batch.rows) for batch in batches]
        mine = torch.tensor([float(sum(sizes))], device=self.args.device)
        first = int(self.concatenate_over_ranks(mine)[: self.args.process_index].sum())
        step = {name: self.concatenate_over_ranks(torch.cat([part[name] for part in found])) for name in found[0]}
        placed = []
        for batch, rows in zip(batches, sizes, strict=True):
            placed.append(replace(batch, step=step, place=torch.arange(first, first + rows)))
            first += rows
        return placed

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The microbatches of the next step, which is where all of them are seen at once."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        # One microbatch that is the whole step finds what it needs in its own forward.
        if batches and self.losses.couples and not self._step_is_one_batch:
            batches = self.with_whole_step(batches, weigh=True)
        return batches, count

    @property
    def _step_is_one_batch(self) -> bool:
        return self.args.gradient_accumulation_steps * self.args.world_size == 1

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: PackedBatch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """This microbatch's share of the step's loss, times the number of processes."""
        self.note(f"forward and backward of step {self.state.global_step + 1}")
        output, legs, anchor = self.compute_output(model, inputs)
        loss = output.loss(inputs.counts) + anchor
        self.meter.add(output, legs.counts())
        # Shares add up to the step's loss, and their counts to one step, even if a resumed run splits steps otherwise.
        self.meter.add_mean("loss", loss, 1 / (self.args.gradient_accumulation_steps * self.args.world_size))
        self.losses.observe(legs)
        self._step_losses.append((inputs, loss.detach()))
        if steps_in_backward(self.accelerator) and self.accelerator.sync_gradients:
            self._agree()
        self.rows_seen += len(inputs.rows)
        self.tokens_seen += inputs.useful_tokens
        return loss * self.args.world_size

    def finish_step(self) -> None:
        """Before the optimizer moves: refuses a loss that is not a number. Asks the device once per step."""
        if not self.args.max_grad_norm:  # else it was asked before clipping
            self._look_at_step()
        self._step_losses = []
        self.losses.finish_step(self._summed, self.concatenate_over_ranks)
        self._summed = {}

    def _look_at_step(self) -> None:
        if not steps_in_backward(self.accelerator):  # where it was too late after the last backward pass
            self._agree()
        self._add_penalties()

    def _agree(self) -> None:
        """What processes tell each other in a step, in one sum: bad losses, what objectives observe, signals to stop.

        Raises:
            RunError: on every rank, if the loss is not finite on any: one that went on alone would wait for the others.
        """
        losses = torch.stack([loss for _, loss in self._step_losses])
        bad = (~losses.isfinite()).nonzero()
        told = torch.tensor([len(bad), self.stop_signal.asked], device=self.args.device, dtype=torch.float64)
        parts = {name: value.to(told) for name, value in self.losses.observed.items()}
        self.note(f"agreeing on step {self.state.global_step + 1}")
        everything = self.sum_over_ranks(torch.cat([told, *(value.flatten() for value in parts.values())]))
        sums = everything[2:].split([value.numel() for value in parts.values()])
        for (name, value), total in zip(self.losses.observed.items(), sums, strict=True):
            self._summed[name] = total.reshape(value.shape).to(value.dtype)
        self.stopping = self.stopping or bool(everything[1])
        if not bool(everything[0]):
            return
        first = int(bad[0]) if len(bad) else 0
        message = self.name_bad_rows(self._step_losses[first][0], float(losses[first]))  # sharded: all take part
        raise RunError(next(str(each) for each in self.gather(message if len(bad) else "") if each))

    def name_bad_rows(self, batch: PackedBatch, loss: float) -> str:
        """What to say of a loss that is not a number: which rows it comes from. Every process has to ask."""
        scores = self.score(batch)
        if "values" in scores:
            finite = scores["values"].isfinite().all(-1).reshape(len(batch.legs), -1).all(0)
        else:
            flat = scores["logps"]
            finite = torch.stack([dense(flat, batch, name).isfinite().all(-1) for name in batch.legs]).all(0)
        rows = batch.rows[~finite] if not bool(finite.all()) else batch.rows
        names = "; ".join(self.row_name(int(row)) for row in rows[:5]) or "a batch without rows"
        step = self.state.global_step + 1
        return (
            f"the loss is {loss} at step {step}, in {names}; nothing was updated. Lower train.learning_rate, check "
            "these rows, or resume from the last checkpoint"
        )

    def _add_penalties(self) -> None:
        """Adds the regularizers to the step's loss and gradient."""
        if self.anchor is None or not self.anchor.penalties:
            return
        for name, value in self.anchor.add_gradients(self.unwrapped).items():
            share = value.to(self.args.device) / self.args.world_size  # every rank computes all of it
            self.meter.add_mean("loss", share, 0.0)
            self.meter.add_mean(f"loss/{name}", share, 1 / self.args.world_size)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self._look_at_step()  # which knows the rows; a gradient is of all of them
        norm = super()._clip_grad_norm(model)
        if norm is not None and not finite(norm):
            rows = [int(row) for batch, _ in self._step_losses for row in batch.rows]
            names = "; ".join(self.row_name(row) for row in rows[:5])
            moved = steps_in_backward(self.accelerator)
            outcome = "the weights are lost, resume from the last checkpoint" if moved else "nothing was updated"
            raise RunError(
                f"the gradient norm is {float(norm)} at step {self.state.global_step + 1}, with rows {names} …;"
                f" {outcome}. Lower train.learning_rate or check these rows"
            )
        return norm

    # ---- ranks ----

    def note(self, doing: str) -> None:
        """Takes down what this process does next, for the others to read if it hangs."""
        if self.watchdog is not None:
            self.watchdog.note(doing)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum over processes, on the device and in the type that came in."""
        if self.args.world_size == 1:
            return values
        device = values.device
        moved = values.to(self.args.device)
        torch.distributed.all_reduce(moved)
        return moved.to(device)

    def concatenate_over_ranks(self, values: Tensor) -> Tensor:
        """The values of all processes, in order of rank."""
        if self.args.world_size == 1:
            return values
        return torch.cat([torch.as_tensor(part) for part in self.gather(values.cpu())]).to(values.device)

    def gather(self, value: object) -> list[object]:
        """One object from every rank, in order of rank."""
        if self.args.world_size == 1:
            return [value]
        gathered: list[object] = [None] * self.args.world_size
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    # ---- evaluation ----

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        """Eval mode without gradients, in the run's precision; what was before is restored."""
        model = self.wrapped
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                yield
        finally:
            model.train(was_training)

    def score(self, batch: PackedBatch, keep_head: bool = False) -> Mapping[str, Any]:
        """What the policy gives for a batch, without gradient."""
        self.note("scoring")
        with self.scoring():
            return self.wrapped(packed=batch.to(self.args.device), keep_head=keep_head)

    def evaluate(  # type: ignore[override]
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and per-pair metrics of the held-out rows; logs them."""
        assert self.eval_batches is not None
        meter, sums = Meter(), []
        batches: Iterable[PackedBatch] = (self.eval_batches[number] for number in range(len(self.eval_batches)))
        if self.losses.mixture.coupled:
            batches = self.with_whole_step(list(batches), weigh=False)
        with self.scoring():
            for each in batches:
                self.note("evaluating")
                batch = each.to(self.args.device)
                output, legs, _ = self.compute_output(self.wrapped, batch, weigh=False)
                meter.add(output, legs.counts())
                meter.add_mean("loss", output.loss(batch.counts) * len(self.eval_batches) * self.args.world_size, 1.0)
                sums.append(_row_sums(batch, legs))
        metrics = meter.read(self.sum_over_ranks)
        gathered = [entry for rank in self.gather(sums) for entry in rank]  # type: ignore[union-attr]
        rows = {name: np.concatenate([entry[name] for entry in gathered]) for name in gathered[0]}
        if self.evaluations is not None:
            metrics |= self.evaluations(rows, self.state.global_step)
        # The callbacks of transformers know evaluation by this prefix.
        named = {f"eval_{name.removeprefix('eval/')}": value for name, value in metrics.items()}
        self.log(dict(named))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    # ---- log ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what the meter holds to a line of training metrics."""
        if "train_runtime" in logs:
            return  # a summary of the whole run; the report has it
        if "loss" in logs:
            logs |= self.meter.read(self.sum_over_ranks)
            if "rewards/margins" not in logs and {"rewards/chosen", "rewards/rejected"} <= logs.keys():
                # Of labelled rows, which have no pairs: the difference of the two classes' means.
                logs["rewards/margins"] = logs["rewards/chosen"] - logs["rewards/rejected"]
        super().log(logs, start_time)

    # ---- start ----

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        result = super()._init_training_state(*args, **kwargs)
        checkpoint = kwargs.get("resume_from_checkpoint", args[3] if len(args) > 3 else None)
        if checkpoint is not None:
            self.resumed = True
            stored = json.loads((Path(checkpoint) / STATE).read_text())
            self.meter.load_state_dict(stored["meter"], first_rank=self.args.process_index == 0)
            self.losses.load_state_dict(stored)
            if self.moving_reference is not None:
                self.moving_reference.load(Path(checkpoint))
        self.losses.to(self.args.device)
        return result

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Not one step more, where a run goes on from its last checkpoint: transformers looks after a step only."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self.note("wrapping the model")
        result = super()._prepare_for_training(*args, **kwargs)
        if self.resumed:
            self._take_settings()
        if self.prepare is not None:
            self.prepare(self)
        if self.eval_batches is not None and not self.resumed:
            self.evaluate()
        return result

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers makes it; the recipe's settings are noted, before a checkpoint brings its own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        self._settings = [{key: group[key] for key in SETTINGS if key in group} for group in _filled(optimizer)]
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """What transformers does first after the model is divided: its parts come before a checkpoint is read."""
        if self._whole is not None:
            fill(self.unwrapped, self._whole, self.args.device)
            self._whole = None
            if self.anchor is not None:
                self.anchor.keep(self.unwrapped)
        return super().create_scheduler(*args, **kwargs)

    def _take_settings(self) -> None:
        """Puts the recipe's own settings of the optimizer in place of those that came with a checkpoint."""
        args, optimizer = self.args, cast(torch.optim.Optimizer, self.optimizer)
        schedulers: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        base = getattr(schedulers, "base_lrs", [])
        if base and base[0] != args.learning_rate:
            schedulers.base_lrs = [args.learning_rate] * len(base)
            schedulers._last_lr = [rate * args.learning_rate / base[0] for rate in schedulers.get_last_lr()]
            for group in optimizer.param_groups:
                group |= {"initial_lr": args.learning_rate, "lr": schedulers.get_last_lr()[0]}
        groups = optimizer.param_groups  # of which DeepSpeed leaves empty ones out, and ZeRO-3 empties all
        groups = groups if len(groups) == len(self._settings) else _filled(optimizer)
        for group, settings in zip(groups, self._settings, strict=True):
            group |= settings

    # ---- checkpoints ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Whole weights or the adapter, which ``from_pretrained`` reads, on every engine.

        Checkpoints of FSDP have the weights in shards, and not whole as well.
        """
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
        elif not _internal_call:
            state: Any = self.accelerator.get_state_dict(self.wrapped)  # whole on the first process; all take part
            if self.args.should_save:
                self._save(output_dir or str(self.run_dir), state_dict=state)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / PARTIAL) if self._saving else folder

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers does it; a checkpoint that is being written is complete before this ends, however it ends."""
        try:
            result = super().train(*args, **kwargs)
        except BaseException:
            with contextlib.suppress(Exception):  # the first fault is the one to tell
                self.finish_writing()
            raise
        self.finish_writing()
        return result

    def finish_writing(self) -> None:
        """Waits for the write under way, if there is one.

        Raises:
            RunError: it failed.
        """
        if self.writer is not None:
            self.note(f"waiting until {self.writer.writing} is written")
            self.writer.wait()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes beside the run, then renames: a crash leaves the former checkpoints and no half one."""
        self.finish_writing()  # one at a time
        name = f"checkpoint-{self.state.global_step}"
        self.note(f"writing {name}")
        meter = self.meter.state_dict(self.sum_over_ranks)
        later = None if self.writer is None else HostCopies(self.writer.group)
        self._saving = True
        try:
            with self._tidied(), contextlib.nullcontext() if later is None else later.taking():
                super()._save_checkpoint(model, trial)
                if self.moving_reference is not None:
                    write = save_file if later is None else later.keep
                    folder = self.run_dir / PARTIAL / name
                    self.moving_reference.save(folder, write if self.args.should_save else None)
        finally:
            self._saving = False
        state = json.dumps(self._state_to_json() | {"meter": meter})
        if self.writer is None or later is None:
            self._complete(name, state, lambda: None, self.accelerator.wait_for_everyone)
        else:
            self.writer.start(name, partial(self._complete, name, state, later.write, self.writer.meet))

    def _complete(self, name: str, state: str, write: Callable[[], None], meet: Callable[[], None]) -> None:
        """Makes a checkpoint of what lies beside the run, or will when ``write`` has written it."""
        run_dir = self.run_dir
        with self._tidied():
            write()
            meet()
            if self.args.should_save:
                folder = run_dir / PARTIAL / name
                (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle of settings the recipe holds anyway
                (folder / STATE).write_text(state)
                (folder / RECIPE).write_text(self.recipe_yaml)
                write_manifest(folder)
                publish(folder, run_dir / name)
                folder.parent.rmdir()
                rotate_checkpoints(str(run_dir), save_total_limit=self.args.save_total_limit)
        meet()  # no process begins another one, or looks for this one, before it is there

    @contextlib.contextmanager
    def _tidied(self) -> Iterator[None]:
        """Explains what comes of the disk, and leaves no half a checkpoint."""
        try:
            with explained(self.run_dir):
                yield
        except Exception:
            shutil.rmtree(self.run_dir / PARTIAL, ignore_errors=True)
            raise

    def _state_to_json(self) -> dict[str, Any]:
        return {
            **self.losses.state_dict(),
            "rows": self.batches.table.fingerprint(),
            "engine": launched(),
            "processes": self.args.world_size,
        }


def _filled(optimizer: Any) -> list[dict[str, Any]]:
    """Groups that hold parameters."""
    return [group for group in getattr(optimizer, "param_groups", []) if group["params"]]


def _row_sums(batch: PackedBatch, legs: LegBatch) -> dict[str, np.ndarray]:
    sums = {"row": batch.rows.cpu().numpy()}
    sums |= {f"score_{name}": values.double().cpu().numpy() for name, values in legs.scores.items()}
    for name in legs:
        leg = legs[name]
        sums[f"length_{name}"] = leg.length().cpu().numpy()
        for output, values in leg.values.items():
            sums[f"value_{name}/{output}"] = values.double().cpu().numpy()
        if not leg.values:
            sums[f"policy_{name}"] = leg.sum_logps().double().cpu().numpy()
        if leg.ref_logps is not None:
            sums[f"ref_{name}"] = leg.ref_sum_logps().double().cpu().numpy()
    return sums


class _Bookkeeping(TrainerCallback):
    """Tells the trainer where the loop is."""

    def __init__(self, trainer: ObjectiveTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Chooses the epoch's plan. ``state.epoch`` is a fraction; a resumed epoch begins in its middle."""
        trainer = self.trainer
        trainer.batches.set_epoch(state.global_step // trainer.batches.plan.steps_per_epoch)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the reference, and looks whether a write has failed; logs the last step, whatever ``logging_steps``
        is: a short run has numbers too."""
        moving = self.trainer.moving_reference
        if moving is not None:
            moving.after_step(state.global_step, self.trainer.unwrapped)
        if self.trainer.writer is not None:
            self.trainer.writer.look()
        if state.global_step >= state.max_steps:
            control.should_log = True
        elif self.trainer.stopping:
            control.should_save = control.should_training_stop = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.finish_step()
