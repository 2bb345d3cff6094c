"""W&B, TensorBoard and trackio behind one small interface: metrics, a table of samples, an alarm, the end.

Whatever a tracker raises goes to ``align.trackers``, which tells it once and lets the run go on.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from align.errors import RecipeError

STEP = "train/global_step"
"""Axis of all metrics, as in transformers' own integrations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What a tracker is told when it opens a run."""

    run_dir: Path
    project: str
    name: str | None
    """Of the run; trackers make one up where it is None."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved recipe, without credentials and local paths."""
    earlier: Mapping[str, Any] = field(default_factory=dict)
    """What the tracker left in ``trackers.json``, where a run is resumed."""
    step: int = 0
    """Of the checkpoint that the run goes on from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleTable:
    """Answers of one model at one evaluation."""

    name: str
    """``samples/<split>``."""
    step: int
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    """Text and numbers; None where a row has no such number."""


class Tracker(Protocol):
    """One run in one tracker."""

    entry: Mapping[str, Any]
    """Goes into ``trackers.json``: what resuming needs, and for people ``shown`` and, where there is one, ``link``."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Logs numbers by name."""
        ...

    def samples(self, table: SampleTable) -> None:
        """Logs a table."""
        ...

    def alarm(self, title: str, text: str, step: int) -> None:
        """Raises an alarm where the tracker has such a thing, else writes the text down."""
        ...

    def close(self, *, failed: bool) -> None:
        """Ends the run; what is still to be sent is sent."""
        ...


class WeightsAndBiases:
    """Online, or offline with ``WANDB_MODE=offline``; files go to ``WANDB_DIR`` or into the run directory.

    Neither the command line nor the state of the checkout is sent along: both may hold what is nobody's business, and
    the config has the recipe.
    """

    def __init__(self, opening: Opening) -> None:
        import wandb

        self._wandb = wandb
        earlier = opening.earlier
        self._run = wandb.init(
            project=opening.project,
            name=opening.name,
            id=earlier.get("id") or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4),
            resume="allow",
            dir=os.environ.get("WANDB_DIR") or str(opening.run_dir),
            mode=_wandb_mode(),
            config=dict(opening.config),
            reinit="create_new",  # a run of its own, whatever else this process follows
            settings=wandb.Settings(x_disable_meta=True, disable_git=True, save_code=False, console="off"),
        )
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP, step_sync=True)
        link = self._run.url
        shown = f"W&B: run {self._run.id} of project {opening.project}"
        offline = "" if link else ", offline (`wandb sync` uploads it)"
        self.entry: Mapping[str, Any] = {
            "id": self._run.id,
            "shown": shown + offline,
            **({"link": link} if link else {}),
        }

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Under ``STEP``, not W&B's own counter, which can't go back when a resumed run repeats steps."""
        self._run.log({**values, STEP: step})

    def samples(self, table: SampleTable) -> None:
        """As a ``wandb.Table``."""
        rows: list[Any] = [list(row) for row in table.rows]
        logged = self._wandb.Table(columns=list(table.columns), data=rows, allow_mixed_types=True)
        self._run.log({table.name: logged, STEP: table.step})

    def alarm(self, title: str, text: str, step: int) -> None:
        """As an alert, which W&B can mail."""
        self._run.alert(title=title, text=text, level="WARN")

    def close(self, *, failed: bool) -> None:
        """Marks the run as finished or failed."""
        self._run.finish(exit_code=int(failed))


class TensorBoard:
    """Event files in ``tensorboard/`` of the run directory, or below ``TENSORBOARD_LOGGING_DIR``."""

    def __init__(self, opening: Opening) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or opening.run_dir / "tensorboard")
        folder = folder / opening.name if opening.name else folder
        resumed = bool(opening.earlier)
        self._writer = SummaryWriter(str(folder), purge_step=opening.step + 1 if resumed else None)
        if not resumed:
            self._writer.add_text("recipe", _fenced(json.dumps(opening.config, indent=1, default=str)), 0)
        self.entry: Mapping[str, Any] = {"shown": "TensorBoard: event files in the run directory"}

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """As scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def samples(self, table: SampleTable) -> None:
        """As a Markdown table, whose cells are escaped."""
        lines = [table.columns, ["---"] * len(table.columns), *table.rows]
        self._writer.add_text(
            table.name, "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines), table.step
        )
        self._writer.flush()

    def alarm(self, title: str, text: str, step: int) -> None:
        """As a text."""
        self._writer.add_text("alarm", f"**{title}** {_cell(text)}", step)
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        """Closes the file."""
        self._writer.close()


class Trackio:
    """Local, or wherever ``TRACKIO_SPACE_ID`` and ``TRACKIO_SERVER_URL`` say."""

    def __init__(self, opening: Opening) -> None:
        import trackio  # pyright: ignore[reportMissingImports]  # an extra

        self._trackio = trackio
        earlier = opening.earlier
        self._run = self._opened(opening, resume="allow" if earlier else "never")
        if earlier and earlier.get("id", self._run.id) != self._run.id:
            # trackio finds runs by their names alone, and the newest one of this name is not ours.
            self._run.finish()
            self._run = self._opened(opening, resume="never")
        shown = f"trackio: run {self._run.name} of project {opening.project}"
        self.entry: Mapping[str, Any] = {"id": self._run.id, "name": self._run.name, "shown": shown}

    def _opened(self, opening: Opening, *, resume: str) -> Any:
        name = opening.earlier.get("name") or opening.name
        return self._trackio.init(
            project=opening.project, name=name, config=dict(opening.config), resume=resume, embed=False
        )

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """At the run's own step."""
        self._run.log(dict(values), step=step)

    def samples(self, table: SampleTable) -> None:
        """As a ``trackio.Table``."""
        rows = [list(row) for row in table.rows]
        self._run.log({table.name: self._trackio.Table(columns=list(table.columns), data=rows)}, step=table.step)

    def alarm(self, title: str, text: str, step: int) -> None:
        """As an alert, which trackio can post to a webhook."""
        self._run.alert(title=title, text=text, level=self._trackio.AlertLevel.WARN, step=step)

    def close(self, *, failed: bool) -> None:
        """Waits until everything is written."""
        self._run.finish()


KINDS: Mapping[str, Callable[[Opening], Tracker]] = {
    "wandb": WeightsAndBiases,
    "tensorboard": TensorBoard,
    "trackio": Trackio,
}
"""Trackers by their name in ``train.report_to``; transformers' own integrations serve the other names."""

PACKAGES = {"azure_ml": "azureml-sdk", "flyte": "flytekit", "kubeflow": "kubeflow-trainer"}
"""What pip calls a tracker, where that is not its name."""


def refuse_without_login(names: Sequence[str]) -> None:
    """Raises ``RecipeError`` where W&B would ask for a key in the middle of things."""
    if "wandb" not in names or _wandb_mode() not in (None, "online"):
        return
    import wandb

    settings = wandb.setup().settings
    if settings.mode in ("offline", "disabled") or wandb.login(prompt=False, verify=False):
        return
    raise RecipeError(
        "train.report_to: wandb has no API key; run `wandb login` or set WANDB_API_KEY, or set WANDB_MODE=offline and "
        "upload later with `wandb sync`"
    )


def _wandb_mode() -> Any:
    return os.environ.get("WANDB_MODE") or None


def _cell(value: Any) -> str:
    """On one line; neither a table nor TensorBoard's Markdown breaks on it."""
    text = "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    for mark, instead in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("\n", "<br>")):
        text = text.replace(mark, instead)
    return text


def _fenced(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
