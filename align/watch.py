"""What a run tells while it runs: ``metrics.jsonl``, a progress bar, the displacement alarm."""

from __future__ import annotations

import datetime
import json
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

if TYPE_CHECKING:
    from align.trainer import ObjectiveTrainer


def metric_name(key: str) -> str:
    """Our name of a logged key: ``eval_ranking/accuracy`` is ``eval/ranking/accuracy``."""
    return f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else key


class MetricsFile(TrainerCallback):
    """One JSON object per logged step. A resumed run first removes the lines after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut_after(self, step: int) -> list[dict[str, float]]:
        """Removes lines of later steps, and a last line that a crash left unfinished; returns what remains."""
        if not self.path.is_file():
            return []
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                values = json.loads(line)
                if values["step"] <= step:
                    kept.append(values)
            except (ValueError, KeyError):
                continue
        self.path.write_text("".join(f"{json.dumps(values)}\n" for values in kept))
        return kept

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Appends one line."""
        if not state.is_world_process_zero or not logs:
            return
        line = {"step": state.global_step, **{metric_name(key): value for key, value in logs.items()}}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class Speed(TrainerCallback):
    """Adds rows and useful tokens per second to the log: ``time/rows_per_second``, ``time/tokens_per_second``.

    Useful tokens are prompts once plus responses, of all ranks.
    """

    def __init__(self) -> None:
        self.trainer: ObjectiveTrainer | None = None
        self._at = (0.0, 0, 0)
        self._begun = 0.0
        self.steps: list[float] = []
        """Seconds of each optimizer step, without evaluating, logging and saving."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks at the clock."""
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Notes how long the step took."""
        if args.device.type == "cuda":  # which is behind: the optimizer's kernels have only been asked for
            torch.cuda.synchronize(args.device)
        self.steps.append(time.perf_counter() - self._begun)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        assert self.trainer is not None
        self._at = (time.perf_counter(), self.trainer.rows_seen, self.trainer.tokens_seen)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Measures since the last line of training metrics. Ranks work alike, so the first one's share is scaled."""
        assert self.trainer is not None
        if not logs or "loss" not in logs:
            return
        now = (time.perf_counter(), self.trainer.rows_seen, self.trainer.tokens_seen)
        elapsed, world = max(now[0] - self._at[0], 1e-9), args.world_size
        logs["time/rows_per_second"] = (now[1] - self._at[1]) * world / elapsed
        logs["time/tokens_per_second"] = (now[2] - self._at[2]) * world / elapsed
        self._at = now


class Progress(ProgressCallback):
    """transformers' bar with the few numbers one looks for; where nobody watches, a line for every log instead."""

    def __init__(self, watched: bool | None = None) -> None:
        super().__init__()
        self.watched = sys.stderr.isatty() if watched is None else watched
        self._started = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the bar and the clock."""
        self._started = (time.perf_counter(), state.global_step)
        if self.watched:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar."""
        if self.watched:
            super().on_step_end(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the bar."""
        if self.watched:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Shows loss, margin and speed."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        shown = {"loss": f"{logs['loss']:.4f}"}
        if "rewards/margins" in logs:
            shown["margin"] = f"{logs['rewards/margins']:.3f}"
        shown["rows/s"] = f"{logs['time/rows_per_second']:.2f}"
        shown["useful tokens/s"] = f"{logs['time/tokens_per_second']:.0f}"
        if self.watched:
            self.training_bar.set_postfix(shown)  # type: ignore[union-attr]
            return
        elapsed, done = time.perf_counter() - self._started[0], state.global_step - self._started[1]
        left = datetime.timedelta(seconds=round(elapsed / max(done, 1) * (state.max_steps - state.global_step)))
        numbers = "  ".join(f"{key} {value}" for key, value in shown.items())
        print(f"step {state.global_step}/{state.max_steps}  {numbers}  left {left}", flush=True)

    def on_prediction_step(self, *arguments: Any, **kwargs: Any) -> None:
        """Evaluation has no bar of its own."""


class DisplacementAlarm(TrainerCallback):
    """Says when chosen responses lose probability while margins rise: the model forgets both, one of them faster.

    Looks back over ``window`` lines of training metrics. It speaks when the chosen responses have fallen by more than
    ``share`` of their log-prob since the window began while the margin rose, and again when the fall has doubled.

    References:
        Razin et al. 2024, arXiv:2410.08847 (likelihood displacement).
    """

    def __init__(self, say: Any = print, window: int = 5, share: float = 0.01) -> None:
        self.say, self.share = say, share
        self.lines: deque[Mapping[str, float]] = deque(maxlen=window)
        self.alarmed_at = 0.0
        self.sentence = ""
        """What it last said."""

    def replay(self, lines: Sequence[Mapping[str, float]]) -> None:
        """Takes in the lines of a run that is resumed, in silence."""
        for line in lines:
            self._look(line)

    def _look(self, line: Mapping[str, float]) -> bool:
        """Takes in one line and says whether to raise the alarm."""
        if not {"loss", "displacement/chosen", "logps/chosen", "rewards/margins"} <= line.keys():
            return False
        self.lines.append(line)
        first = self.lines[0]
        fallen = -line["displacement/chosen"]
        falling = line["displacement/chosen"] < first["displacement/chosen"]
        rising = line["rewards/margins"] > first["rewards/margins"]
        enough = max(self.share * abs(line["logps/chosen"]), 2 * self.alarmed_at)
        if len(self.lines) < 2 or not (falling and rising) or fallen <= enough:
            return False
        self.alarmed_at = fallen
        return True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Looks at one more line."""
        if not logs or not self._look(dict(logs)):
            return
        logs["alarm/displacement"] = self.alarmed_at
        if state.is_world_process_zero:
            self.sentence = (
                f"step {state.global_step}: likelihood displacement. Chosen responses lost {self.alarmed_at:.1f} nats "
                f"on average since the start (now {logs['logps/chosen']:.1f}) while the margin rose to "
                f"{logs['rewards/margins']:.2f}: probability goes to responses that are in no pair. If that is not "
                "what you want: add a likelihood term (objective: [{name: dpo}, {name: sft, leg: chosen, weight: 0.2}])"
                ", raise beta, lower the learning rate, or remove pairs whose responses are nearly alike."
            )
            self.say(self.sentence)
