"""Shapes: pairs, labelled completions and scored lists, turned into the legs that an objective needs.

scored list  ─rule─►  pair, or triple with the best as gold  ─►  two labelled completions
             ────►    the best alone (gold or chosen); with rule threshold every response, labelled
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from data.errors import DataError
from data.formats import RowProblem
from data.rowstore import prompt_key
from objectives.columns import COLUMNS
from objectives.registry import OBJECTIVES, did_you_mean, example
from objectives.rows import Candidate, Row, Text

RULES = ("best_vs_worst", "best_vs_random", "threshold", "margin")
COMPLETION, MISMATCHED, PAIR = "completion", "mismatched", frozenset({"chosen", "rejected"})
SCORE = "score"
"""Name of a completion's one score, where it has no attributes."""


WELL_KNOWN = ("dpo", "ipo", "simpo", "orpo", "rpo", "tpo", "kto", "bco", "sft")
"""What a message offers first of the many objectives that would work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How scored responses become pairs. Equal scores never form one.

    ``best_vs_worst``: the best against the worst. ``best_vs_random``: the best against a random worse one.
    ``threshold``: a random one of at least the threshold against a random one below. ``margin``: every two responses
    whose scores differ by at least the margin, so that a prompt gives several pairs.
    """

    name: str = "best_vs_worst"
    """One of ``RULES``."""
    threshold: float | None = None
    """Score from which a response is good; with rule threshold, and only there."""
    margin: float = 0.0
    """The scores of a pair differ by at least this, ≥ 0; with rule margin > 0."""
    max_length_ratio: float | None = None
    """The longer response of a pair has at most this many times the characters of the shorter one, ≥ 1."""

    def __post_init__(self) -> None:
        if self.name not in RULES:
            near = did_you_mean(self.name, list(RULES))
            raise DataError(f"data.rule: unknown rule {self.name!r}{near} (known: {', '.join(RULES)})")
        if self.threshold is None and self.name == "threshold":
            raise DataError("data.rule threshold needs data.threshold, the score from which a response is good; set it")
        if self.threshold is not None and self.name != "threshold":
            raise DataError(
                f"data.threshold has no effect with data.rule {self.name}; leave it out, or set data.rule threshold"
            )
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise DataError(f"data.threshold must be a finite number, not {self.threshold}")
        if not (math.isfinite(self.margin) and self.margin >= 0):
            raise DataError(f"data.margin must be a finite number >= 0, not {self.margin}")
        if self.name == "margin" and self.margin == 0:
            raise DataError("data.rule margin needs data.margin > 0, by which the scores of a pair differ at least")
        if self.max_length_ratio is not None and not (
            math.isfinite(self.max_length_ratio) and self.max_length_ratio >= 1
        ):
            raise DataError(f"data.max_length_ratio must be a finite number >= 1, not {self.max_length_ratio}")

    def pairs(self, ranked: Sequence[Candidate], draw: random.Random) -> list[tuple[Candidate, Candidate]] | str:
        """Better and worse responses, or the reason why there are none.

        Args:
            ranked: the responses by score, best first.
            draw: where the rule is random, this decides.
        """
        if len(ranked) < 2:
            return "fewer than two responses with scores"
        if ranked[0].score == ranked[-1].score:
            return "all responses have the same score"
        if self.name == "best_vs_worst":
            worst = ranked[-1:] if self.max_length_ratio is None else reversed(ranked)  # the worst of like length
            options = [(ranked[0], worse) for worse in worst]
        elif self.name == "best_vs_random":
            options = [(ranked[0], worse) for worse in ranked]
        elif self.name == "margin":
            options = list(combinations(ranked, 2))
        else:
            good = [each for each in ranked if self.is_good(each)]
            bad = ranked[len(good) :]
            if not good or not bad:
                return f"no response scores {'below' if good else 'at least'} data.threshold"
            options = [(better, worse) for better in good for worse in bad]
        apart = [(better, worse) for better, worse in options if self._apart(better.score, worse.score)]
        if not apart:
            return "scores differ by less than data.margin"
        distinct = [(better, worse) for better, worse in apart if better.text != worse.text]
        if not distinct:
            return "identical chosen and rejected"
        alike = [pair for pair in distinct if self._of_like_length(*pair)]
        if not alike:
            return "lengths differ by more than data.max_length_ratio"
        if self.name == "margin":
            return alike
        return alike[:1] if self.name == "best_vs_worst" else [draw.choice(alike)]

    def is_good(self, response: Candidate) -> bool:
        """Whether a response reaches the threshold."""
        assert self.threshold is not None, "only rule threshold has one"
        return response.score >= self.threshold

    def _of_like_length(self, one: Candidate, other: Candidate) -> bool:
        if self.max_length_ratio is None:
            return True
        shorter, longer = sorted((characters(one.text), characters(other.text)))
        return longer <= self.max_length_ratio * shorter

    def _apart(self, better: float, worse: float) -> bool:
        # 0.9 and 0.8 differ by 0.1, whatever floating point makes of them.
        difference = better - worse
        return difference > 0 and (difference >= self.margin or math.isclose(difference, self.margin, rel_tol=1e-9))


def characters(text: Text) -> int:
    """Length of a text, or of all messages' contents together."""
    return len(text) if isinstance(text, str) else sum(len(str(each.get("content") or "")) for each in text)


@dataclass(frozen=True, slots=True)
class RowsKind:
    """What rows offer: enough to say which objectives they serve."""

    legs: frozenset[str]
    labelled: bool = False
    scored: bool = False
    scores: frozenset[str] = frozenset()

    @staticmethod
    def of(row: Row) -> RowsKind:
        """The kind of one row."""
        return RowsKind(frozenset(row.responses), row.label is not None, bool(row.candidates), frozenset(row.scores))

    def missing(self, wanted: Iterable[str], *, labels: bool, scores: Iterable[str] = ()) -> list[str]:
        """Which of the wanted legs, scores (``score_chosen``), or ``label`` such rows can't give, conversions included.

        A column of ``COLUMNS`` is missing, too, where its response is not the row's own. Attributes of a completion are
        not looked for here: a row may lack some.
        """
        pairs = self.scored or self.legs >= PAIR
        offered = self.legs | ({"chosen", "rejected", "gold"} if self.scored else set())
        offered = offered | ({COMPLETION} if pairs else set()) | {MISMATCHED}
        lacking = [leg for leg in wanted if leg not in offered]
        if labels and not (self.labelled or pairs):
            # A completion without a label is read as the gold response: what such rows lack is the label alone.
            lacking = [*(leg for leg in lacking if leg != COMPLETION), "label"]
        elif COMPLETION in lacking and self.legs >= {"gold"} and not labels:
            lacking.remove(COMPLETION)  # a completion without a label is read as the gold response
        have = self.scores | (PAIR if self.scored else frozenset())
        lacking += [name for name in scores if name in COLUMNS and not self._tells(name)]
        return lacking + [f"score_{name}" for name in scores if name in (*PAIR, "gold") and name not in have]

    def _tells(self, column: str) -> bool:
        is_pair = self.legs >= PAIR
        return column in self.scores and not self.scored and is_pair == (COLUMNS[column].leg in PAIR)

    def __str__(self) -> str:
        """The columns such rows have."""
        legs = [leg for leg in ("chosen", "rejected", "gold", COMPLETION) if leg in self.legs]
        legs += sorted(self.legs.difference(legs))
        if legs == ["gold"] and not self.scored:
            legs = ["completion"]
        return ", ".join(["prompt", *["responses with scores"] * self.scored, *legs, *["label"] * self.labelled])


def objectives_for(kinds: Iterable[RowsKind]) -> list[str]:
    """Names of the registered objectives, as they are by default, that rows of all these kinds serve."""
    kinds = list(kinds)
    names = []
    for name in OBJECTIVES.names():
        needs = example(OBJECTIVES[name]).needs
        attributes = set(attributes_in(needs.numbers))
        rated = all((kind.scored and attributes == {SCORE}) or attributes <= kind.scores for kind in kinds)
        lacking = (kind.missing(needs.legs, labels=needs.labels, scores=needs.numbers) for kind in kinds)
        if rated and not any(lacking):
            names.append(name)
    return names


def arrange(
    rows: Sequence[Row], *, legs: Sequence[str], labels: bool, rule: Rule, seed: int, scores: Sequence[str] = ()
) -> tuple[list[Row], list[RowProblem]]:
    """Gives every row the legs that an objective needs, and a label where it needs one.

    Scored lists become pairs by the rule. Where gold is wanted besides, it is the row's own gold response, or else the
    single best, and the pair is made of the rest. Gold or chosen wanted alone are the best. Where a completion is
    wanted, a pair becomes two rows, chosen with label true and rejected with label false; of a scored list, rule
    threshold labels every response, and without labels every response is one. What is random depends on ``seed`` and
    the row's source and number, not on its place among the rows.

    Args:
        rows: as loaded; they are not changed.
        legs: the responses needed. ``mismatched`` is left to ``with_mismatched``.
        labels: whether rows need a label.
        rule: how scored responses become pairs.
        seed: of what is random.
        scores: those needed: of a leg or a column of ``COLUMNS``, in every row, or attributes of a completion, at least
            one in a row.
    Returns:
        The rows, in order, and those that the rule leaves out.
    Raises:
        DataError: rows lack something that no conversion gives, or all scores of a dataset are equal.
    """
    wanted = [leg for leg in legs if leg != MISMATCHED]
    require(rows, wanted, labels=labels, scores=scores)
    if compares_scores(wanted, rule, labels=labels):
        refuse_equal_scores(rows)
    arranged, problems = arrange_each(rows, wanted, labels=labels, rule=rule, seed=seed)
    return _with_attributes(arranged, scores, problems), problems


def arrange_each(
    rows: Iterable[Row], wanted: Sequence[str], *, labels: bool, rule: Rule, seed: int
) -> tuple[list[Row], list[RowProblem]]:
    """The part of ``arrange`` that looks at one row at a time."""
    every = _takes_every(wanted, rule, labels=labels)
    arranged: list[Row] = []
    problems: list[RowProblem] = []
    for row in rows:
        if not row.candidates:
            made = [row]
        elif every:
            made = [
                _made(row, {COMPLETION: each}, label=rule.is_good(each) if labels else None) for each in row.candidates
            ]
        else:
            made = _from_scores(row, wanted, rule, seed)
        if isinstance(made, str):
            problems.append(RowProblem(source=row.source, index=row.index, reason=made))
        elif COMPLETION in wanted:
            arranged += [half for each in made for half in _halves(each, wanted)]
        else:
            arranged += made
    return arranged, problems


def attributes_in(scores: Sequence[str]) -> list[str]:
    """Those of the scores that are of a completion's attributes, not of a leg."""
    return [name for name in scores if name not in (*PAIR, "gold")]


def no_attribute(source: str, name: str, there: Iterable[str]) -> DataError:
    """What is said when no row has a score of an attribute that the objective learns."""
    return DataError(
        f"{source}: the objective learns the attribute {name!r}, and no row has a score of it (scores "
        f"there: {', '.join(sorted(set(there))) or 'none'}); add a column {name}, map one with data.columns, or change "
        "the objective's attributes"
    )


def _with_attributes(rows: list[Row], scores: Sequence[str], problems: list[RowProblem]) -> list[Row]:
    """The rows that have a score for some attribute, of those that are wanted; every attribute must be somewhere."""
    attributes = attributes_in(scores)
    if not attributes or not rows:
        return rows
    for name in attributes:
        if not any(name in row.scores for row in rows):
            raise no_attribute(rows[0].source, name, (key for row in rows for key in row.scores))
    kept: list[Row] = []
    for row in rows:
        if any(name in row.scores for name in attributes):
            kept.append(row)
        else:
            problems.append(RowProblem(source=row.source, index=row.index, reason="no score of any attribute"))
    return kept


def rule_matters(legs: Sequence[str], *, labels: bool) -> bool:
    """Whether the rule has a say in what these legs are made of."""
    wanted = [leg for leg in legs if leg != MISMATCHED]
    return not _takes_best(wanted) and (labels or wanted != [COMPLETION])


def compares_scores(wanted: Sequence[str], rule: Rule, *, labels: bool) -> bool:
    """Whether pairs are made of scored responses, so that all equal scores would give none."""
    return not _takes_best(wanted) and not _takes_every(wanted, rule, labels=labels)


def _takes_best(wanted: Sequence[str]) -> bool:
    return list(wanted) in (["gold"], ["chosen"])


def _takes_every(wanted: Sequence[str], rule: Rule, *, labels: bool) -> bool:
    """Whether each response becomes a row of its own."""
    return list(wanted) == [COMPLETION] and (rule.name == "threshold" or not labels)


def _from_scores(row: Row, wanted: Sequence[str], rule: Rule, seed: int) -> list[Row] | str:
    ranked = row.candidates
    gold = row.responses.get("gold")
    if _takes_best(wanted):
        return [_made(row, {} if wanted[0] in row.responses else {wanted[0]: ranked[0]})]
    best: dict[str, Candidate] = {}
    if "gold" in wanted and gold is None:
        if len(ranked) < 3:
            return "fewer than three responses with scores"
        if ranked[0].score == ranked[1].score:
            return "two responses share the best score, so that none is the gold one"
        best, ranked = {"gold": ranked[0]}, ranked[1:]
    pairs = rule.pairs(ranked, random.Random(f"rule/{seed}/{row.source}/{row.index}"))
    if isinstance(pairs, str):
        return pairs
    return [_made(row, {"chosen": better, "rejected": worse, **best}) for better, worse in pairs]


def _made(row: Row, legs: Mapping[str, Candidate], label: bool | None = None) -> Row:
    """The row with these responses as legs, besides a gold response of its own."""
    return replace(
        row,
        responses={**{leg: each.text for leg, each in legs.items()}, **row.responses},
        scores={**{SCORE if leg == COMPLETION else leg: each.score for leg, each in legs.items()}, **row.scores},
        label=label,
        candidates=(),
    )


def _halves(row: Row, wanted: Sequence[str]) -> list[Row]:
    """A pair as two labelled completions, each with the other legs that are wanted; other rows as they are."""
    if COMPLETION in row.responses:
        return [row]
    if not row.responses.keys() >= PAIR:  # prompt and completion without a label, which is read as the gold response
        return [replace(row, responses={**row.responses, COMPLETION: row.responses["gold"]})]
    kept = {leg: text for leg, text in row.responses.items() if leg in wanted}
    return [
        replace(
            row,
            responses={COMPLETION: row.responses[leg], **kept},
            scores={**({SCORE: row.scores[leg]} if leg in row.scores else {}), **_only(row.scores, kept)},
            label=leg == "chosen",
        )
        for leg in ("chosen", "rejected")
    ]


def _only(scores: Mapping[str, float], legs: Iterable[str]) -> dict[str, float]:
    return {leg: scores[leg] for leg in legs if leg in scores}


def require(rows: Sequence[Row], wanted: Sequence[str], *, labels: bool, scores: Sequence[str] = ()) -> None:
    """Raises ``DataError`` for the first row that lacks a leg, score or label: what is missing, what would work."""
    kinds: dict[str, dict[RowsKind, Row]] = {}
    for row in rows:
        kinds.setdefault(row.source, {}).setdefault(RowsKind.of(row), row)
    for found in kinds.values():
        for kind, row in found.items():
            if missing := kind.missing(wanted, labels=labels, scores=scores):
                raise DataError(_lacking(row, kind, missing, list(found)))


def _lacking(row: Row, kind: RowsKind, missing: Sequence[str], kinds: Sequence[RowsKind]) -> str:
    told = [name for name in missing if name in COLUMNS]
    legs = [name for name in missing if name not in ("label", *told) and not name.startswith("score_")]
    needs = [f"a {legs[0]} response" if len(legs) == 1 else f"{_listing(legs)} responses"] if legs else []
    scores = [name.removeprefix("score_") for name in missing if name.startswith("score_")]
    needs += [f"scores of {_listing(scores)}"] * bool(scores)
    needs += ["a label"] * ("label" in missing)
    needs += [f"{name}, {COLUMNS[name].about}," for name in told]
    who = "the rows have" if len(kinds) == 1 else "this row has"
    columns = _listing(["gold (or reference)" if name == "gold" and len(missing) > 1 else name for name in missing])
    if missing == ["gold"] and kind.labelled:
        remedy = "set data.format: prompt_completion to train on the completions whatever their label"
    elif missing == ["gold"]:
        remedy = "add a gold or reference column (data.columns maps names)"
    elif scores and not legs:
        remedy = f"add {_listing([f'score_{name}' for name in scores])} columns, or a margin (data.columns maps names)"
    elif told and not legs:
        remedy = _add_told(kind, told)
    elif missing == ["label"]:
        remedy = "add a label column with true and false (data.columns maps names)"
    else:
        many = len(missing) > 1
        remedy = f"add {'' if many else 'a '}{columns} column{'s' * many} (data.columns maps names)"
    names = objectives_for(kinds)
    first = [name for name in WELL_KNOWN if name in names] or names
    more = f", and {len(names) - len(first)} more (python -m objectives)" if len(names) > len(first) else ""
    other = f", or use an objective that works with this data: {', '.join(first)}{more}" if names else ""
    return f"{row.where}: the objective needs {_listing(needs)} and {who} {kind}; {remedy}{other}"


def _add_told(kind: RowsKind, names: Sequence[str]) -> str:
    columns = _listing([f"a {name} column with {COLUMNS[name].expects}" for name in names])
    own = [
        f"a {COLUMNS[name].leg} response that is the row's own" for name in names if kind.scored or name in kind.scores
    ]
    return f"add {columns} (data.columns maps names)" + f", and give {_listing(own)}" * bool(own)


def _listing(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def refuse_equal_scores(rows: Iterable[Row]) -> None:
    """Raises ``DataError`` if all scores of a source are equal."""
    scores: dict[str, set[float]] = {}
    for row in rows:
        if len(seen := scores.setdefault(row.source, set())) < 2:
            # Rows that are pairs already count as two scores: they need none.
            seen.update((each.score for each in row.candidates) if row.candidates else (0.0, 1.0))
    for source, seen in scores.items():
        if len(seen) == 1:
            raise DataError(
                f"{source}: all scores are {seen.pop():g}, so that no pair of a better and a worse response can be "
                "made; give scores that differ, or use an objective that takes one response: sft"
            )


def refuse_one_class(desirable: int, undesirable: int, names: str) -> None:
    """Raises ``DataError`` if all labels of a training set are the same."""
    if (desirable == 0) == (undesirable == 0):
        return
    label, other = ("true", "false") if desirable else ("false", "true")
    alone = ", or train on the completions as they are: objective sft with data.format prompt_completion"
    raise DataError(
        f"{names}: all {desirable + undesirable} training rows have label {label}, and the objective learns from both "
        f"kinds; add rows with label {other} (of scored responses: change data.threshold){alone if desirable else ''}"
    )


def with_mismatched(rows: Sequence[Row], seed: int) -> list[Row]:
    """Every row with a leg ``mismatched``: the completion of another row, whose prompt differs.

    Rows are shuffled, those of one prompt are put side by side, and all completions move on by the number of rows of
    the commonest prompt: each serves once, and none its own prompt. Where one prompt has more than half of the rows,
    the other completions serve several times. Text is only put after text, and messages after messages.

    Raises:
        DataError: all rows have the same prompt.
    """
    numbers: dict[str, int] = {}
    prompts = np.array([numbers.setdefault(prompt_key(row.prompt), len(numbers)) for row in rows], dtype=np.int64)
    other = other_prompts(prompts, np.array([isinstance(row.prompt, str) for row in rows], dtype=bool), rows, seed)
    return [
        replace(row, responses={**row.responses, MISMATCHED: rows[i].responses[COMPLETION]})
        for row, i in zip(rows, other.tolist(), strict=True)
    ]


def other_prompts(prompts: np.ndarray, is_text: np.ndarray, rows: Sequence[Row], seed: int) -> np.ndarray:
    """For each row the number of one with another prompt.

    Args:
        prompts: a number for each prompt, (row,).
        is_text: whether the prompt is text, (row,).
        rows: for messages.
        seed: of the shuffle.
    """
    other = np.empty(len(rows), dtype=np.int64)
    for numbers in (np.flatnonzero(is_text), np.flatnonzero(~is_text)):
        if not len(numbers):
            continue
        order = list(range(len(numbers)))
        random.Random(f"mismatched/{seed}").shuffle(order)
        shuffled = numbers[np.array(order)]
        _, first, group = np.unique(prompts[shuffled], return_index=True, return_inverse=True)
        if len(first) == 1:
            chat = (
                "" if len(numbers) == len(rows) else " among those written as text or as messages alike (data.as_chat)"
            )
            raise DataError(
                f"{rows[int(numbers[0])].where}: all {len(numbers)} rows{chat} have the same prompt, and the objective "
                "needs completions of another one to compare with (mismatched); add rows with other prompts"
            )
        # A stable sort by nothing but the groups' first appearance keeps them side by side in shuffled order.
        place = np.argsort(first[group], kind="stable")
        lined_up, appearance = shuffled[place], first[group][place]
        commonest, size = _commonest(appearance)
        if 2 * size <= len(lined_up):
            other[lined_up] = np.roll(lined_up, -size)
            continue
        largest, rest = lined_up[appearance == commonest], lined_up[appearance != commonest]
        other[largest] = rest[np.arange(len(largest)) % len(rest)]
        other[rest] = largest[np.arange(len(rest)) % len(largest)]
    return other


def _commonest(values: np.ndarray) -> tuple[int, int]:
    """The value that occurs most often, the smallest of several, and how often."""
    found, counts = np.unique(values, return_counts=True)
    most = int(np.argmax(counts))
    return int(found[most]), int(counts[most])
