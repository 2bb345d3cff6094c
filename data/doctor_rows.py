"""Checks of rows as they were read: duplicates, contradictions, lengths, scores, labels, flaws of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from data.duplicates import banding, contradictory, later_copies, near_copies, same_answers
from data.findings import (
    BALANCE_WARNING,
    EXAMPLES,
    LENGTH_REMARK,
    LENGTH_WARNING,
    Finding,
    graded,
)
from data.formats import RowProblem
from data.overlap import evaluated, overlaps, versions_of
from data.rowstore import numbered
from data.sources import LoadedRows
from data.surveyed import Surveyed
from data.tokens import Dropped
from data.traits import FLAWS
from objectives.stats import beats, clustered_wilson, mean_with_interval, wilson

CLEAN = "python -m data check … --write clean --drop {0}, or filter: {{name: {0}}}"


@dataclass(frozen=True, kw_only=True)
class Patient:
    """What is looked at, and how closely."""

    rows: Surveyed
    loaded: Sequence[LoadedRows]
    """The training sources."""
    held_out: str
    """What is evaluated on, in words; empty where nothing is."""
    against: tuple[str, ...] = ()
    """Evaluation sets to look for in the training rows."""
    ngram: int = 13
    """Words of the n-grams that are looked for."""
    threshold: float = 0.8
    """Least similarity of near duplicates."""
    shingle: int = 3
    """Words of their shingles."""
    near: bool = True
    """Whether to look for them."""
    max_dropped_share: float = 0.5

    def found(self, check: str, which: np.ndarray, text: str, key: str, *, of: np.ndarray | None = None) -> Finding:
        """A share of the rows as a finding.

        Args:
            check: name.
            which: rows concerned, (row,).
            text: one sentence; ``{rows}``, ``{n}`` and ``{share}`` are filled in.
            key: what mends it.
            of: rows that are looked at; default: all.
        """
        n = len(self.rows) if of is None else int(of.sum())
        number = int(which.sum())
        share = number / max(n, 1)
        sources = len(dict.fromkeys(self.rows.sources)) > 1 and number
        return Finding(
            check=check,
            verdict=graded(check, number, n),
            text=text.format(rows=number, n=n, share=f"{share:.1%}"),
            key=key if number else "",
            value=share,
            n=n,
            rows=number,
            examples=tuple(self.rows.names(which, EXAMPLES)),
            by_source=self.rows.by_source(which) if sources else {},
        )


def formats(patient: Patient) -> list[Finding]:
    """Rows by format: how each dataset is written."""
    told = "; ".join(f"{each.source}: {len(each.rows)} rows as {each.format}" for each in patient.loaded)
    return [Finding(check="formats", verdict="fine", text=f"{told}.", n=len(patient.rows))]


def dropped(patient: Patient) -> list[Finding]:
    """Rows that were read and can't be used, or that filters removed, by reason."""
    problems = [problem for each in patient.loaded for problem in each.problems]
    return [lost_rows(problems, len(patient.rows) + len(problems), patient.max_dropped_share, len(patient.loaded) > 1)]


def lost_rows(problems: Sequence[RowProblem | Dropped], read: int, most: float, several: bool) -> Finding:
    """The finding about rows that leave.

    Args:
        problems: a source, a row number and a reason each.
        read: rows there were.
        most: share of them from which on a run stops.
        several: whether there are several datasets.
    """
    reasons = Counter(problem.reason for problem in problems).most_common()
    told = ", ".join(f"{count} × {reason}" for reason, count in reasons[:6])
    share = len(problems) / max(read, 1)
    return Finding(
        check="dropped",
        verdict="fault" if share > most else graded("dropped", len(problems), read),
        text=f"{len(problems)} of {read} rows leave before training{f' ({told})' if told else ''}.",
        key="mend the rows, say what they hold with data.columns, or raise data.max_length" if problems else "",
        value=share,
        n=read,
        rows=len(problems),
        examples=tuple(f"{each.source}, row {each.index}" for each in problems[:EXAMPLES]),
        by_source=dict(Counter(each.source for each in problems)) if several and problems else {},
    )


def exact_duplicates(patient: Patient) -> list[Finding]:
    """Rows that are the same as an earlier one, and responses that an earlier row has for the same prompt."""
    traits = patient.rows.traits
    same = later_copies(traits.contents)
    again = same_answers(traits.answers, traits.answered) & ~same
    return [
        patient.found(
            "exact_duplicates",
            same,
            "{rows} of {n} rows ({share}) are the same as an earlier one.",
            CLEAN.format("exact_duplicates"),
        ),
        patient.found(
            "same_answers",
            again,
            "{rows} of {n} rows ({share}) have a response that an earlier row, otherwise different, has for the same "
            "prompt.",
            f"{CLEAN.format('same_answers')}; or data.rule, if the pairs are made of scored responses",
        ),
    ]


def near_duplicates(patient: Patient) -> list[Finding]:
    """Rows nearly the same as an earlier one, without exact copies; see ``data.duplicates.near_copies``."""
    if not patient.near:
        return []
    rows = patient.rows
    stays = ~later_copies(rows.traits.contents)
    near = near_copies(rows, stays, threshold=patient.threshold, ngram=patient.shingle)
    bands, numbers = banding(patient.threshold)
    how = (
        f"Jaccard similarity of prompts and of responses at least {patient.threshold:g} in {patient.shingle}-word "
        f"shingles; {bands} bands of {numbers}"
    )
    text = "{rows} of {n} rows ({share}) are nearly the same as an earlier one (" + how + ")."
    return [patient.found("near_duplicates", near, text, CLEAN.format("near_duplicates"))]


def shared_prompts(patient: Patient) -> list[Finding]:
    """Training rows whose prompt is evaluated on."""
    if patient.rows.held is None:
        told = patient.held_out or "nothing is held out to evaluate on"
        return [Finding(check="shared_prompts", verdict="fine", text=f"{told[0].upper()}{told[1:]}.")]
    text = "{rows} of {n} training rows ({share}) have a prompt of the evaluation set " + f"{patient.held_out}."
    return [patient.found("shared_prompts", patient.rows.shared_prompts(), text, CLEAN.format("shared_with_eval"))]


def overlap(patient: Patient) -> list[Finding]:
    """Training rows that share a word n-gram with an evaluation set; see ``data.overlap``."""
    if not patient.against:
        return []
    sets = evaluated(patient.against, patient.ngram, versions_of(patient.against))
    which = overlaps(patient.rows, patient.against, patient.ngram)
    names = ", ".join(patient.against).replace("{", "{{").replace("}", "}}")
    text = (
        "{rows} of {n} rows ({share}) share " + f"{patient.ngram} words in a row with {names} ({sets.texts} texts; "
        f"{sets.passed_over} of fewer than 5 words passed over)."
    )
    return [patient.found("overlap", which, text, CLEAN.format("overlap"))]


def identical_pairs(patient: Patient) -> list[Finding]:
    """Pairs whose responses are the same but for white space and letter case; equal ones are among the dropped."""
    if not patient.rows.pairs.any():
        return []
    text = "{rows} of {n} pairs ({share}) have responses that differ in white space or letter case only."
    which = patient.rows.traits.has("identical_pairs")
    return [patient.found("identical_pairs", which, text, CLEAN.format("identical_pairs"), of=patient.rows.pairs)]


def contradictions(patient: Patient) -> list[Finding]:
    """Rows that another one contradicts: the pair the other way round, or the same completion with the other label."""
    of = patient.rows.pairs | patient.rows.labelled
    if not of.any():
        return []
    traits = patient.rows.traits
    which = contradictory(traits.compared, traits.side, np.ones(len(traits), dtype=bool))
    text = "{rows} of {n} rows ({share}) say the opposite of another row about the same responses."
    return [patient.found("contradictions", which, text, CLEAN.format("contradictions"), of=of)]


_MENDS = {
    "echo": CLEAN.format("echo"),
    "empty_responses": "remove these rows: without text there is nothing to train on",
    "replacement_characters": "export the data again as UTF-8: the characters are lost",
    "mojibake": "mend the texts (ftfy.fix_text), or export them again as UTF-8",
    "control_characters": "strip them where the data is made",
    "html": "turn the texts into plain text or Markdown, if they are not about HTML",
    "special_tokens": "remove them from the texts; data.as_chat and the chat template write control tokens themselves",
}


def flaws(patient: Patient) -> list[Finding]:
    """Flaws that are seen in the text of a row; ``data.traits.FLAWS`` says what each is."""
    found = []
    for name, mend in _MENDS.items():
        text = "{rows} of {n} rows ({share}): " + f"{FLAWS[name]}."
        found.append(patient.found(name, patient.rows.traits.has(name), text, mend))
    return found


def length_bias(patient: Patient) -> list[Finding]:
    """How often the longer response is the chosen one, ties one half, and by how many characters it is longer.

    Intervals are clustered by prompt; without ties, Wilson's.
    """
    traits = patient.rows.traits
    pairs = np.flatnonzero(patient.rows.pairs)
    if not len(pairs):
        return []
    chosen, rejected = (traits.length(leg)[pairs].astype(np.float64) for leg in ("chosen", "rejected"))
    clusters = numbered(patient.rows.rows.prompts()[pairs])
    return [longer_wins("length_bias", "characters", chosen, rejected, clusters)]


def longer_wins(check: str, unit: str, chosen: np.ndarray, rejected: np.ndarray, clusters: np.ndarray) -> Finding:
    """The finding about length.

    Args:
        check: its name.
        unit: in which lengths are counted.
        chosen: lengths of the chosen responses, (pair,).
        rejected: of the rejected ones.
        clusters: number of each pair's prompt.
    """
    wins = beats(chosen, rejected)
    own = clusters.tolist()
    ties = (wins == 0.5).any()
    share = mean_with_interval(wins.tolist(), own) if ties else clustered_wilson(wins.tolist(), own)
    longer = mean_with_interval((chosen - rejected).tolist(), own, shares=False)
    known = share.clusters > 1
    low, high = max(share.low, 0.0) if known else 0.0, min(share.high, 1.0) if known else 1.0
    side = low > LENGTH_REMARK or high < 1 - LENGTH_REMARK
    strong = low > LENGTH_WARNING or high < 1 - LENGTH_WARNING
    which, value = ("longer", share.value) if share.value >= 0.5 else ("shorter", 1 - share.value)
    spread = f" ± {longer.value - longer.low:.1f}" if known else ""
    return Finding(
        check=check,
        verdict="warning" if strong else "remark" if side else "fine",
        text=f"{which} wins {value:.1%} of {len(wins)} pairs, in {unit}; chosen is {longer.value:+.1f}{spread} {unit} "
        "longer on average.",
        key="an objective normalised by length (simpo, dpo_norm), modifiers r_dpo or ld_dpo, or filter: "
        "{name: length_ratio, most: 2}"
        if side
        else "",
        value=share.value,
        low=low if known else None,
        high=high if known else None,
        n=len(wins),
        rows=int((wins == 1).sum()),
    )


def scores(patient: Patient) -> list[Finding]:
    """Where rows have scores: least, quartiles and most; pairs of which chosen scores lower than rejected, and ties."""
    traits = patient.rows.traits
    pairs = np.isfinite(traits.scores[:, 0]) & np.isfinite(traits.scores[:, 1])
    every = np.concatenate([traits.candidate_scores, traits.scores[pairs].reshape(-1)])
    if not len(every):
        return []
    low, first, middle, third, high = np.quantile(every, [0, 0.25, 0.5, 0.75, 1])
    told = f"{len(every)} scores from {low:g} to {high:g}, quartiles {first:g}, {middle:g}, {third:g}"
    lower = pairs & (traits.scores[:, 0] < traits.scores[:, 1])
    ties = int((pairs & (traits.scores[:, 0] == traits.scores[:, 1])).sum())
    if not pairs.any():
        return [Finding(check="scores", verdict="fine", text=f"{told}.", value=float(middle), n=len(every))]
    text = (
        f"{told}; of {int(pairs.sum())} scored pairs {ties} are ties, and in " + "{rows} chosen scores below rejected."
    )
    return [patient.found("scores", lower, text, "data.columns: are the score columns exchanged?", of=pairs)]


def labels(patient: Patient) -> list[Finding]:
    """Share of desirable completions among labelled rows, with Wilson's interval."""
    values = patient.rows.rows.labels()
    of = values >= 0
    n, good = int(of.sum()), int((values == 1).sum())
    if not n:
        return []
    low, high = wilson(good, n)
    rarer = min(good, n - good) / n
    verdict = "fault" if rarer == 0 else "warning" if rarer < BALANCE_WARNING else "fine"
    key = "objective.desirable_weight and objective.undesirable_weight (kto), or rows with the other label"
    return [
        Finding(
            check="labels",
            verdict=verdict,
            text=f"{good} of {n} labelled rows ({good / n:.1%}) are desirable.",
            key=key if verdict != "fine" else "",
            value=good / n,
            low=low,
            high=high,
            n=n,
            rows=min(good, n - good),
        )
    ]


CHECKS: Sequence[Callable[[Patient], list[Finding]]] = (
    *(formats, dropped, exact_duplicates, near_duplicates, shared_prompts, overlap, identical_pairs, contradictions),
    *(flaws, length_bias, scores, labels),
)
"""In the order in which they are told."""
