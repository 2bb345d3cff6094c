"""Samples and their scores to a dataset that can be trained on.

    python -m align.pairs --samples samples.jsonl --scores scores.jsonl --output train.jsonl
    python -m align.pairs --help        every key, its default and what it means

As lists of scored responses (kind scored) nothing is decided yet: a recipe's data.rule makes pairs, triples or labels
of them, and its reward_transforms and relabel see every score. The other kinds decide here.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from align import samples as stored
from align import settings
from align.keys import Schema
from align.samples import Group, Sample
from align.score_lines import SampleScore, read_scores
from data.errors import DataError
from data.files import replacing
from data.shapes import Rule, arrange
from objectives.checks import require
from objectives.rows import Candidate, Row, Text

LEGS: Mapping[str, tuple[str, ...]] = {
    "pairs": ("chosen", "rejected"),
    "triples": ("chosen", "rejected", "gold"),
    "labels": ("completion",),
}
"""Responses of a row, by kind; scored lists have no legs yet."""


@dataclass(frozen=True, kw_only=True)
class PairsSection:
    """What becomes of samples."""

    samples: str
    """File that python -m align.sample wrote."""
    scores: str
    """File that python -m align.scores wrote of them."""
    output: str
    """Dataset to write, JSON lines; replaced if it is there."""
    kind: Literal["scored", "pairs", "triples", "labels", "xpo", "nash_md"] = "scored"
    """scored: lists of responses with all their scores, of which a recipe's data.rule makes what it needs. pairs:
    chosen and rejected. triples: and the best one as gold. labels: completions, thumbs up or down. xpo: a sample and
    one of the opponent, with who wrote the chosen one. nash_md: a sample, and the probability σ(score − opponent's
    score) that it is preferred."""
    opponent: str | None = None
    """With kind xpo and nash_md: the opponent's samples for the same prompts."""
    opponent_scores: str | None = None
    """Their scores."""
    rule: Literal["best_vs_worst", "best_vs_random", "threshold", "margin"] = "best_vs_worst"
    """Which responses make a pair; as data.rule."""
    threshold: float | None = None
    """Least score of a good response, with rule threshold; of labels too."""
    margin: float = 0.0
    """Least difference between the scores of a pair."""
    max_length_ratio: float | None = None
    """The longer response of a pair has at most this many times the characters of the shorter one."""
    gold_column: str | None = None
    """A column that samples kept, which holds the gold response; instead of the best sample."""
    keep_unfinished: bool = False
    """Also take responses that were cut off at the limit of tokens, which training would teach to end there."""
    seed: int = 0
    """Of what is random."""

    def __post_init__(self) -> None:
        against = self.kind in ("xpo", "nash_md")
        if {against} != {self.opponent is not None, self.opponent_scores is not None}:
            raise ValueError("kinds xpo and nash_md need opponent and opponent_scores, and no other kind has them")
        if self.kind == "scored" or against:
            own = {"rule": "best_vs_worst", "threshold": None, "margin": 0.0, "max_length_ratio": None}
            idle = [key for key, default in own.items() if getattr(self, key) != default]
            if idle:
                why = f": a recipe's data.{idle[0]} decides" if self.kind == "scored" else ""
                raise ValueError(f"{idle[0]} has no effect with kind {self.kind}{why}")
        if self.kind == "labels" and self.rule != "threshold":
            raise ValueError("kind labels needs rule threshold and a threshold: the least score of thumbs up")
        if self.gold_column is not None and self.kind not in ("triples", "scored"):
            raise ValueError(f"gold_column has no effect with kind {self.kind}; use triples or scored")
        require("seed", self.seed, self.seed >= 0, ">= 0")


SCHEMA = Schema(
    sections={"pairs": PairsSection},
    required=("pairs",),
    example="launch/recipes/pairs.yaml",
    command="python -m align.pairs",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """Rows of a dataset, and what there was besides."""

    rows: list[dict[str, Any]]
    counts: Mapping[str, int]
    """Samples: ``samples``, ``repeated``, ``unfinished``, ``without_score``; ``prompts`` and ``prompts_left_out``."""
    reasons: Mapping[str, int]
    """Prompts that no row could be made of, by reason."""


def make_rows(scored: Iterable[tuple[Group, Sequence[SampleScore]]], how: PairsSection) -> Made:
    """Rows in the formats that ``data.formats`` reads.

    Equal responses to a prompt are one. Responses without a score are left out, and so are those that did not end.

    Args:
        scored: groups with the scores of their samples.
        how: the settings.
    Raises:
        DataError: nothing is left, all scores are equal, or a gold column is not there.
    """
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    rows: list[Row] = []
    lists: list[dict[str, Any]] = []
    columns: list[Mapping[str, Any]] = []
    for number, (group, scores) in enumerate(scored):
        counts["prompts"] += 1
        kept = _usable(group, scores, how, counts)
        gold = _gold(group, how)
        if not kept:
            reasons["no usable response"] += 1
            continue
        columns.append(group.columns)
        if how.kind == "scored":
            lists.append(_list(group, kept, gold))
            continue
        candidates = sorted(
            (Candidate(text=_like(sample.text, group.prompt), score=_score(score)) for sample, score in kept),
            key=lambda each: -each.score,
        )
        legs = {} if gold is None else {"gold": _like(gold, group.prompt)}
        rows.append(
            Row(prompt=group.prompt, responses=legs, candidates=tuple(candidates), source="samples", index=number)
        )
    made = lists
    if how.kind != "scored" and rows:
        made, left_out = _arranged(rows, how)
        reasons.update(left_out)
    if not made:
        why = "; ".join(f"{reason} ({count})" for reason, count in reasons.items()) or "the file is empty"
        raise DataError(f"{how.samples}: no row can be made of {counts['prompts']} prompts: {why}; see the settings")
    counts["prompts_left_out"] = sum(reasons.values())
    return Made(rows=made, counts=dict(counts), reasons=dict(reasons))


def _usable(
    group: Group, scores: Sequence[SampleScore], how: PairsSection, counts: Counter[str], *, repeated: bool = False
) -> list[tuple[Sample, SampleScore]]:
    """Samples that rows can be made of, each text once unless repetitions are to count."""
    kept: dict[Any, tuple[Sample, SampleScore]] = {}
    for sample, score in zip(group.samples, scores, strict=True):
        counts["samples"] += 1
        if sample.finish_reason == "length" and not how.keep_unfinished:
            counts["unfinished"] += 1
        elif score.score is None or not sample.text.strip():
            counts["without_score"] += 1
        elif sample.text in kept and not repeated:
            counts["repeated"] += 1
        else:
            kept[sample.index if repeated else sample.text] = (sample, score)
    return list(kept.values())


def _gold(group: Group, how: PairsSection) -> str | None:
    if how.gold_column is None:
        return None
    found = group.columns.get(how.gold_column)
    if not isinstance(found, str) or not found.strip():
        raise DataError(
            f"{how.samples}: prompt {group.prompt_id} has no text in the column {how.gold_column!r}; sample with "
            f"data.keep [{how.gold_column}], or leave gold_column out"
        )
    return found


def _score(score: SampleScore) -> float:
    assert score.score is not None, "those without were left out"
    return score.score


def _like(text: str, prompt: Text) -> Text:
    return text if isinstance(prompt, str) else ({"role": "assistant", "content": text},)


def _plain(text: Text) -> Any:
    return text if isinstance(text, str) else [dict(message) for message in text]


def _list(group: Group, kept: Sequence[tuple[Sample, SampleScore]], gold: str | None) -> dict[str, Any]:
    """All responses with their scores, best first; where several scorers had a say, what each one said is there too."""
    responses = []
    several = all(len(score.scores) > 1 and None not in score.scores.values() for _, score in kept)
    for sample, score in sorted(kept, key=lambda pair: -_score(pair[1])):
        entry: dict[str, Any] = {"text": sample.text, "score": score.score}
        if several:
            entry["scorers"] = dict(score.scores)  # for people: a recipe's transforms see the combined score
        if sample.mean_logp is not None:
            entry["mean_logp"] = sample.mean_logp
        responses.append(entry)
    row = {"prompt": _plain(group.prompt), "responses": responses}
    if gold is not None:
        row["gold"] = _plain(_like(gold, group.prompt))
    return row | {key: value for key, value in group.columns.items() if key not in row}


def _arranged(rows: Sequence[Row], how: PairsSection) -> tuple[list[dict[str, Any]], Counter[str]]:
    rule = Rule(name=how.rule, threshold=how.threshold, margin=how.margin, max_length_ratio=how.max_length_ratio)
    new, problems = arrange(rows, legs=LEGS[how.kind], labels=how.kind == "labels", rule=rule, seed=how.seed)
    made = []
    for row in new:
        entry: dict[str, Any] = {"prompt": _plain(row.prompt)}
        entry |= {leg: _plain(row.responses[leg]) for leg in LEGS[how.kind]}
        if how.kind == "labels":
            entry |= {"label": row.label, "score": row.scores["score"]}
        else:
            entry |= {f"score_{leg}": row.scores[leg] for leg in LEGS[how.kind] if leg in row.scores}
        made.append(entry)
    return made, Counter(problem.reason for problem in problems)


def against(
    scored: Iterable[tuple[Group, Sequence[SampleScore]]],
    opponent: Iterable[tuple[Group, Sequence[SampleScore]]],
    how: PairsSection,
) -> Made:
    """Rows of samples and an opponent's: the i-th usable one of a prompt against the i-th of the opponent's.

    Args:
        scored: the policy's samples with their scores.
        opponent: the opponent's, of the same prompts in any order.
        how: the settings; of kind xpo, equal scores and equal texts make no pair.
    Raises:
        DataError: nothing is left.
    """
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    others: dict[str, list[tuple[Sample, SampleScore]]] = {}
    of_opponent: Counter[str] = Counter()
    for group, scores in opponent:
        others[group.prompt_id] = _usable(group, scores, how, of_opponent, repeated=True)
    counts.update({f"opponent_{key}": number for key, number in of_opponent.items() if key != "samples"})
    rows: list[dict[str, Any]] = []
    for group, scores in scored:
        counts["prompts"] += 1
        # Repetitions count: rows stand for draws of the two policies.
        mine, theirs = _usable(group, scores, how, counts, repeated=True), others.get(group.prompt_id, [])
        counts["unpaired"] += abs(len(mine) - len(theirs))
        met = list(zip(mine, theirs, strict=False))
        made = [row for (a, x), (b, y) in met if (row := _against(group, a, x, b, y, how))]
        rows += made
        if not made:
            reasons["no pair with a usable response of the opponent" if not met else "equal scores or texts"] += 1
    if not rows:
        raise DataError(f"{how.samples}: no row can be made of {counts['prompts']} prompts: {dict(reasons)}")
    counts["prompts_left_out"] = sum(reasons.values())
    return Made(rows=rows, counts=dict(counts), reasons=dict(reasons))


def _against(
    group: Group, own: Sample, mine: SampleScore, other: Sample, theirs: SampleScore, how: PairsSection
) -> dict[str, Any] | None:
    lead = _score(mine) - _score(theirs)
    row: dict[str, Any] = {"prompt": _plain(group.prompt)}
    if how.kind == "nash_md":
        preference = 1 / (1 + math.exp(-max(min(lead, 500.0), -500.0)))
        return row | {"completion": _plain(_like(own.text, group.prompt)), "preference": preference}
    if lead == 0 or own.text == other.text:
        return None
    better, worse = (own, other) if lead > 0 else (other, own)
    legs = {"chosen": _plain(_like(better.text, group.prompt)), "rejected": _plain(_like(worse.text, group.prompt))}
    return row | legs | {"chosen_by": "policy" if lead > 0 else "reference"}


def run(how: PairsSection, say: Callable[[str], None] = print) -> Path:
    """Reads, makes and writes; says what there was.

    Raises:
        RecipeError, RunError, DataError: one sentence on what is wrong and what to do.
    """
    output = Path(how.output)
    scored = read_scores(Path(how.scores), stored.read(Path(how.samples)))
    if how.opponent is not None and how.opponent_scores is not None:
        made = against(scored, read_scores(Path(how.opponent_scores), stored.read(Path(how.opponent))), how)
    else:
        made = make_rows(scored, how)
    with replacing(output) as file:
        file.writelines((json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode() for row in made.rows)
    counts = made.counts
    say(f"{output}: {len(made.rows)} rows of {counts['prompts']} prompts with {counts['samples']} samples")
    for key, what in (
        ("repeated", "samples repeat another one's text"),
        ("unfinished", "samples did not end within the limit of tokens (keep_unfinished takes them)"),
        ("without_score", "samples have no score or no text"),
        ("opponent_unfinished", "of the opponent's samples did not end within the limit of tokens"),
        ("opponent_without_score", "of the opponent's samples have no score or no text"),
        ("unpaired", "samples have none of the other side's to be compared with"),
    ):
        if counts.get(key):
            say(f"  {counts[key]} {what}")
    for reason, count in made.reasons.items():
        say(f"  {count} prompts left out: {reason}")
    return output


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the dataset; see ``align.settings.command``."""

    def do(config: str | None, words: list[str]) -> None:
        run(settings.read_settings(config, words, SCHEMA)["pairs"])

    return settings.command(arguments, __doc__, SCHEMA, do, stopped="stopped; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
