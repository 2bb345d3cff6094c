"""Judges of pairs of answers: language models that are shown both, and whatever scores answers one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.special import expit

from align.judge_games import Meeting
from align.judges import EXCLUDED, Judge
from align.samples import Group, Sample
from align.scorers import without_thoughts
from align.scores import Scoring
from align.typed import Entry
from evals.sampled import by_reason, is_pairwise, settings_of
from evals.verdicts import Verdicts
from objectives.stats import beats

CUT_OFF = "an answer was cut off at its length limit"
Answers = tuple[Sample, Sample]
"""The model's and the baseline's, to one prompt."""


class Referee:
    """One judge, ready. A context manager: frees what it holds at its end, or before by ``rest``.

    Args:
        entry: a scorer.
        name: what results call it.
        tau: scores win with probability σ(difference/τ); None: the higher score wins.
    Raises:
        RunError: it can't work, whatever the answers are: no such model, no key.
    """

    def __init__(self, entry: Entry, name: str, *, tau: float | None) -> None:
        self.entry, self.name, self.tau = entry, name, tau
        self.judge: Judge | None = entry.built if is_pairwise(entry) else None
        self._scoring = None if self.judge is not None else Scoring([replace(entry, weight=1.0)])
        self._version = self.judge.fingerprint() if self.judge is not None else _version(entry)
        self._scores: dict[tuple[str, str], tuple[float, str]] = {}

    def __enter__(self) -> Referee:
        return self

    def __exit__(self, *_: object) -> None:
        self.rest()

    def rest(self) -> None:
        """Frees what it holds, a model's memory, say; the next call begins anew."""
        if self.judge is not None:
            self.judge.close()
        elif self._scoring is not None:
            self._scoring.__exit__(None, None, None)

    def described(self, orders: str) -> dict[str, Any]:
        """What verdicts depend on, as ``evals.compare`` reads it.

        Args:
            orders: as the evaluation has it.
        """
        found: dict[str, Any] = {
            "judge": self.name,
            "judge_template": self._version,
            "judge_settings": settings_of(self.entry),
        }
        if self.judge is not None:
            found["orders"] = orders
            found["judge_sampling"] = {"temperature": self.judge.temperature, "max_tokens": self.judge.max_tokens}
        elif self.tau is not None:
            found["tau"] = self.tau
        return found

    def __call__(self, pairs: Sequence[Answers], *, model: str, baseline: str, both: bool, exclude: bool) -> Verdicts:
        """Verdicts on pairs, from the model's point of view.

        Args:
            pairs: the model's answer and the baseline's.
            model: its name.
            baseline: its name.
            both: show language models both orders; else one, chosen by the prompt, the same for every model.
            exclude: pairs with a cut-off answer get no verdict.
        Raises:
            RunError: the judge can't go on.
        """
        cut = np.array(["length" in (one.finish_reason, two.finish_reason) for one, two in pairs], dtype=bool)
        asked = [pair for pair, was_cut in zip(pairs, cut, strict=True) if not (exclude and was_cut)]
        share = np.full(len(pairs), np.nan)
        reasons = [CUT_OFF] * len(pairs)
        places = [i for i in range(len(pairs)) if not (exclude and cut[i])]
        texts = [(said(mine), said(theirs)) for mine, theirs in pairs]
        identical = np.zeros(len(pairs), dtype=bool)
        games: list[tuple[str | None, str | None]] = [(None, None)] * len(pairs)
        ratings = None
        if self.judge is not None:
            for i, (meeting, turn) in zip(places, _played(self.judge, asked, both), strict=True):
                if meeting.value is not None:
                    share[i] = 1 - meeting.value if turn else meeting.value
                first, second = (*meeting.verdicts, None, None)[:2]
                games[i] = (None, first) if turn else (first, second)
                reasons[i], identical[i] = meeting.reason, meeting.identical
        else:
            ratings = np.full(len(pairs), np.nan)
            for i, (mine, theirs, reason) in zip(places, self._scored(asked), strict=True):
                ratings[i], reasons[i] = mine, reason
                share[i] = np.nan if reason else self._worth(mine, theirs)
                identical[i] = not reason and texts[i][0] == texts[i][1]
        return Verdicts(
            model=model,
            baseline=baseline,
            prompts=[mine.prompt_id for mine, _ in pairs],
            share=share,
            reasons=reasons,
            length_model=np.array([len(one) for one, _ in texts]),
            length_base=np.array([len(two) for _, two in texts]),
            whole=~cut & np.array([bool(one and two) for one, two in texts], dtype=bool),
            identical=identical,
            excluded=np.array([reason in (CUT_OFF, EXCLUDED.reason) for reason in reasons], dtype=bool),
            games=games if self.judge is not None else None,
            ratings=ratings if self.entry.name == "judge" else None,
        )

    def score(self, sample: Sample) -> dict[str, float]:
        """What was said of one answer by itself; nothing where answers are only compared."""
        value, reason = self._scores.get((sample.prompt_id, sample.text_key), (np.nan, "not asked"))
        return {} if reason else {self.name: value}

    def _worth(self, mine: float, theirs: float) -> float:
        if self.tau is None:
            return float(beats(np.array(mine), np.array(theirs)))
        return float(expit((mine - theirs) / self.tau))

    def _scored(self, pairs: Sequence[Answers]) -> list[tuple[float, float, str]]:
        assert self._scoring is not None
        new = {(each.prompt_id, each.text_key): each for pair in pairs for each in pair}
        new = {key: each for key, each in new.items() if key not in self._scores}
        lines = self._scoring([Group(samples=(each,)) for each in new.values()]) if new else []
        for key, (line,) in zip(new, lines, strict=True):
            reason = next(iter(line.reasons.values()), "")
            self._scores[key] = (np.nan if line.score is None else line.score, reason)
        of_pairs = [tuple(self._scores[each.prompt_id, each.text_key] for each in pair) for pair in pairs]
        return [(one[0], two[0], one[1] or two[1]) for one, two in of_pairs]


def _played(judge: Judge, pairs: Sequence[Answers], both: bool) -> list[tuple[Meeting, bool]]:
    """What came of pairs, and whether the baseline's answer was the first of the two."""
    turned = [not both and int(mine.prompt_id[-1], 16) % 2 == 1 for mine, _ in pairs]
    shown = [(theirs, mine) if turn else (mine, theirs) for turn, (mine, theirs) in zip(turned, pairs, strict=True)]
    return list(zip(judge.meet(shown, both=both), turned, strict=True))


def names_of(judges: Sequence[Entry]) -> list[str]:
    """What results call judges: a model by its name, others by their scorer's; equal ones are numbered."""
    found: list[str] = []
    for entry in judges:
        name = str(getattr(entry.built, "model", entry.name)).rstrip("/").split("/")[-1]
        same = sum(each.split(" #")[0] == name for each in found)
        found.append(f"{name} #{same + 1}" if same else name)
    return found


def said(sample: Sample) -> str:
    """An answer as judges see it."""
    return without_thoughts(sample.text).strip()


def dropped(verdicts: Verdicts) -> Mapping[str, int]:
    """Pairs without a verdict, by reason."""
    return by_reason(verdicts.reasons)


def _version(entry: Entry) -> str:
    return str(entry.built.fingerprint()) if hasattr(entry.built, "fingerprint") else ""
