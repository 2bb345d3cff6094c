"""Relabelers: maps from one text row to new ones. They never edit what they are given."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from objectives.checks import require
from objectives.registry import RELABELERS
from objectives.rows import Message, Row, Text

Relabeler = Callable[[Row], list[Row]]
"""Maps one row to the rows that replace it."""


class LeftOut(ValueError):  # noqa: N818  # not an error: rows are left out on purpose
    """Why a relabeler has no use for a row; such rows are counted by reason."""


@RELABELERS.register("reward_augmented")
@dataclass(frozen=True, slots=True, kw_only=True)
class RewardAugmented:
    """Reward-augmented relabelling: each pair is learned twice, under the score of either response as a goal.

        row(x, y_w, y_l, s_w, s_l)  →  row(goal(s_w) + x, y_w ≻ y_l),  row(goal(s_l) + x, y_l ≻ y_w)

    So a good rejected response is not unlearned: it is what should be said when its score is asked for. The goal is a
    text before the conversation; at inference, ask for the highest score with ``condition(prompt)``, because without a
    goal the model is out of its distribution. The reference is conditioned in the same way.

    Pairs whose scores print alike would give two contradictory rows, and are left out. New rows carry the groups
    ``goal=chosen`` and ``goal=rejected``, which evaluation reports apart: the second measures goal following.

    The published code for models without a system role exchanges the user turns instead of the answers, and so keeps
    the better answer under the lower goal; here the answers are exchanged. The wording is ours. UNVERIFIED: that the
    authors ask for the highest score at inference (they publish no script).

    References:
        Zhang et al. 2024, arXiv:2410.08067; template structure of the authors' code.
    """

    form: str = "system"
    """Where the goal stands: ``system``, in the system message; ``text``, before the first user turn (or before plain
    text), for models without a system role."""
    lowest: float = 1.0
    """Lower end of the scores' scale, as the goal text states it."""
    highest: float = 10.0
    """Upper end; what is asked for at inference."""
    decimals: int = 2
    """Scores are printed rounded to this many decimals, whole numbers without; in [0, 6]."""

    legs: ClassVar[tuple[str, ...]] = ("chosen", "rejected")

    def __post_init__(self) -> None:
        require("form", self.form, self.form in ("system", "text"), "'system' or 'text'")
        require("lowest", self.lowest, math.isfinite(self.lowest), "finite")
        above = self.lowest < self.highest < math.inf
        require("highest", self.highest, above, f"above lowest ({self.lowest:g}) and finite")
        require("decimals", self.decimals, 0 <= self.decimals <= 6, "in [0, 6]")

    def __call__(self, row: Row) -> list[Row]:
        """The two rows that replace one pair.

        Raises:
            LeftOut: both scores print alike.
            ValueError: a score is missing or outside the scale, or the prompt has no place for the goal.
        """
        scores: list[float] = []
        for leg in self.legs:
            score = row.scores.get(leg)
            if score is None:
                raise ValueError(
                    f"{row.where}: reward_augmented needs a score of the {leg} response and there is none; add columns "
                    "score_chosen and score_rejected, use lists of scored responses, or leave relabel out"
                )
            if not self.lowest <= score <= self.highest:
                raise ValueError(
                    f"{row.where}: the score {score:g} is outside the scale from {self.lowest:g} to {self.highest:g}; "
                    "set relabel's lowest and highest to the scores' scale"
                )
            scores.append(score)
        if self.printed(scores[0]) == self.printed(scores[1]):
            raise LeftOut("chosen and rejected have the same score")
        as_ranked = replace(row, prompt=self._conditioned(row.prompt, scores[0], row), group=_group(row, "goal=chosen"))
        exchanged = replace(
            row,
            prompt=self._conditioned(row.prompt, scores[1], row),
            responses={**row.responses, "chosen": row.responses["rejected"], "rejected": row.responses["chosen"]},
            scores={**row.scores, "chosen": scores[1], "rejected": scores[0]},
            group=_group(row, "goal=rejected"),
        )
        return [as_ranked, exchanged]

    def printed(self, score: float) -> str:
        """A score as the goal text has it: ``9`` for 9.0, ``3.5`` for 3.5."""
        rounded = round(float(score), self.decimals) + 0.0  # −0.0 + 0.0 is 0.0
        written = f"{rounded:.{self.decimals}f}"
        return written.rstrip("0").rstrip(".") if "." in written else written

    def goal(self, score: float | None = None) -> str:
        """The goal text for a score; None asks for the highest."""
        low, high = self.printed(self.lowest), self.printed(self.highest)
        wanted = self.printed(self.highest if score is None else score)
        return (
            f"The assistant's answers reach the target scores below, on a scale from {low} (lowest) to {high} "
            f"(highest), without mentioning them.\nOverall score: {wanted}."
        )

    def condition(self, prompt: Text, score: float | None = None) -> Text:
        """A prompt that asks for a score, as in training; None asks for the highest, which is meant for inference.

        Raises:
            ValueError: plain text with ``form="system"``, or messages without a user turn with ``form="text"``.
        """
        goal = self.goal(score)
        if isinstance(prompt, str):
            if self.form == "system":
                raise ValueError("plain text has no system message: set data.as_chat, or relabel's form to text")
            return f"{goal}\n\n{prompt}"
        if self.form == "system":
            if prompt and prompt[0]["role"] == "system":
                return ({**prompt[0], "content": f"{goal}\n\n{prompt[0]['content']}"}, *prompt[1:])
            return ({"role": "system", "content": goal}, *prompt)
        first = next((i for i, message in enumerate(prompt) if message["role"] == "user"), None)
        if first is None:
            raise ValueError("the prompt has no user turn to put the goal into: set relabel's form to system")
        asked: Message = {**prompt[first], "content": f"{goal}\n\n{prompt[first]['content']}"}
        return (*prompt[:first], asked, *prompt[first + 1 :])

    def usage(self) -> str:
        """How a model trained on such rows is meant to be asked, for its card."""
        place = "as the system message" if self.form == "system" else "and a blank line before the first user turn"
        return f"Ask for the highest score. Put this {place}, word for word:\n\n{self.goal()}"

    def _conditioned(self, prompt: Text, score: float, row: Row) -> Text:
        try:
            return self.condition(prompt, score)
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from None


def _group(row: Row, name: str) -> str:
    return f"{row.group}, {name}" if row.group else name
