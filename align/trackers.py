"""A run, followed live: metrics, samples and the displacement alarm go to the trackers that ``train.report_to`` names.

Names are those of transformers' and TRL's runs, so that old dashboards show new runs: ``train/`` before the training
metrics of ``metrics.jsonl`` (``train/loss``, ``train/rewards/margins``), evaluations as they are there
(``eval/ranking/accuracy``, ``…_low``, ``…_high``). ``alarm/displacement`` is 1 at steps that raise the alarm and 0 at
others. Only the first process has trackers. One that fails is told once and left out; the run goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from align.tracker_adapters import KINDS, Opening, SampleTable, Tracker
from align.watch import DisplacementAlarm, metric_name
from data.files import write_atomically

NAME = "trackers.json"
PROJECT = "align"
ALARM = "alarm/displacement"
Say = Callable[[str], None]


def tracker_name(key: str) -> str:
    """What trackers call a logged key."""
    name = metric_name(key)
    return name if name.startswith("eval/") else f"train/{name}"


class Trackers(TrainerCallback):
    """Tells trackers what happens.

    Args:
        names: of ``KINDS``.
        alarm: whose sentence goes to the trackers; its callback must come before this one.
        say: prints on the first rank.
    """

    def __init__(self, names: Sequence[str], alarm: DisplacementAlarm, say: Say) -> None:
        self.names, self.alarm, self.say = tuple(names), alarm, say
        self.open: dict[str, Tracker] = {}
        self.samples: Callable[[], Iterable[SampleTable]] = tuple
        """What models wrote since it was last asked; nothing until somebody who knows is put in its place."""
        self.step = 0

    def begin(
        self, run_dir: Path, config: Mapping[str, Any], *, project: str | None, name: str | None, resumed: int | None
    ) -> None:
        """Opens the run in every tracker.

        Args:
            run_dir: for ``trackers.json`` and for files of trackers that are local.
            config: the recipe, without what is nobody's business.
            project: that trackers file the run under; default is ``WANDB_PROJECT`` or ``align``.
            name: of the run.
            resumed: step of the checkpoint that it goes on from; None for a run that starts.
        """
        if not self.names:
            return
        path = run_dir / NAME
        earlier = json.loads(path.read_text()) if resumed is not None and path.is_file() else {}
        self.step = resumed or 0
        for kind in self.names:
            opening = Opening(
                run_dir=run_dir,
                project=project or os.environ.get("WANDB_PROJECT") or PROJECT,
                name=name,
                config=config,
                earlier=earlier.get(kind, {}),
                step=self.step,
            )
            self._guarded(kind, lambda kind=kind, opening=opening: self.open.update({kind: KINDS[kind](opening)}))
        entries = {**earlier, **{kind: tracker.entry for kind, tracker in self.open.items()}}
        write_atomically(path, json.dumps(entries, indent=1) + "\n")
        for tracker in self.open.values():
            self.say(f"following: {tracker.entry.get('link') or tracker.entry['shown']}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Passes a line on, and with a line of training metrics whether the alarm was raised."""
        if not self.open or not logs:
            return
        self.step = state.global_step
        values = {tracker_name(key): float(value) for key, value in logs.items() if key != ALARM}
        if "displacement/chosen" in logs and "loss" in logs:
            values[ALARM] = float(ALARM in logs)
        self._each(lambda tracker: tracker.metrics(values, self.step))
        if ALARM in logs and self.alarm.sentence:
            self._each(lambda tracker: tracker.alarm("Likelihood displacement", self.alarm.sentence, self.step))
        self._send_samples()

    def results(self, values: Mapping[str, float], step: int) -> None:
        """Numbers that no line of metrics has, such as those of evaluations after the last step."""
        if values:
            self._each(lambda tracker: tracker.metrics(values, step))
        self._send_samples()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self.close(failed=kind is not None)

    def close(self, *, failed: bool) -> None:
        """Ends the run in every tracker; does nothing the second time."""
        self._each(lambda tracker: tracker.close(failed=failed))
        self.open.clear()

    def _send_samples(self) -> None:
        try:
            tables = list(self.samples()) if self.open else []
        except (ValueError, OSError) as error:
            self.samples = tuple
            self.say(f"trackers get no more samples: {error}")
            return
        for table in tables:
            self._each(lambda tracker, table=table: tracker.samples(table))

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for kind, tracker in list(self.open.items()):
            self._guarded(kind, lambda tracker=tracker: do(tracker))

    def _guarded(self, kind: str, do: Callable[[], None]) -> None:
        """A tracker is there to watch: whatever becomes of it, the run goes on."""
        try:
            do()
        except Exception as error:
            self.open.pop(kind, None)
            lines = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
            self.say(f"warning: {kind} failed at step {self.step} ({reason}); the run goes on without it")
