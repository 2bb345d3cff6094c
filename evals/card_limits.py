"""What a run cannot say, from its own numbers: every sentence is there only where it is true."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from evals.card_info import CardInfo
from evals.card_results import conditions
from evals.curves import show_number, show_share
from evals.results import Result
from evals.run_files import RunFiles
from evals.summary import HEADLINES, notes, show, show_interval, tables, unit_of

WIDE = 0.1
"""Of a share's interval: ten points."""
AIMED = 0.02
"""Half the width of an interval that tells models apart that differ by a few points."""
FEW_PROMPTS = 30
"""Below it, intervals cover the truth less often than they say."""
JUDGED = ("win_rate", "wildbench", "arena", "judge")
"""Kinds of metrics that rest on a judge's verdicts."""


def limits(run: RunFiles, info: CardInfo, results: Sequence[Result]) -> list[str]:
    """Sentences for a card, those about single numbers first.

    Args:
        run: the run's files.
        info: of the card.
        results: the latest ones, as ``evals.card_results.final`` gives them, without those of parts.
    """
    own = notes(run)
    return [
        *(note.text for note in own),
        *_precision(results),
        *_parts(run),
        *_ranking(results),
        *_displacement(run, results, said=any("Likelihood displacement" in note.text for note in own)),
        *_judged(results, info),
        *_not_measured(results, info),
        *_training(run, info),
        *_of_the_data(run, info),
    ]


def _kind(result: Result) -> str:
    return result.metric.partition("/")[0]


def _precision(results: Sequence[Result]) -> Iterator[str]:
    """The widest interval of each kind of share, and splits of very few prompts."""
    widest: dict[str, Result] = {}
    for result in results:
        if unit_of(result.metric) != "share" or result.low is None or result.high is None:
            continue
        kind = _kind(result)
        if result.metric in HEADLINES or kind in (*JUDGED, "pass_at_k", "retention", "labels", "answers"):
            before = widest.get(kind)
            if before is None or result.high - result.low > _width(before):
                widest[kind] = result
    for result in widest.values():
        width = _width(result)
        if width > WIDE:
            # The width shrinks with the square root of the number of prompts.
            needed = math.ceil(result.clusters * (width / 2 / AIMED) ** 2 / 10) * 10
            yield (
                f"{result.metric} comes from {_prompts(result.clusters)}: its 95 % interval is {_points(width)} points "
                f"wide, so differences smaller than that don't show. An interval of ±{_points(AIMED)} points would "
                f"take about {show_number(needed)} prompts."
            )
    few = {(r.dataset, r.split): r.clusters for r in results if r.clusters < FEW_PROMPTS}
    for (_, split), prompts in few.items():
        yield (
            f"{_prompts(prompts).capitalize()} of split {split} carry an interval: with fewer than {FEW_PROMPTS} the "
            "intervals cover the truth less often than 95 %."
        )
    unknown = [r for r in results if r.low is None or r.high is None]
    if unknown:
        names = ", ".join(dict.fromkeys(r.metric for r in unknown[:5]))
        yield f"{len(unknown)} number(s) have no interval, because their spread is not known ({names})."


def _parts(run: RunFiles) -> Iterator[str]:
    """One sentence on all parts of few prompts: there may be a hundred of them."""
    sizes = [max(r.clusters for r in part.cells.values()) for table in tables(run) for part in table.parts]
    few = sum(size < FEW_PROMPTS for size in sizes)
    if few:
        yield (
            f"{few} of {len(sizes)} parts of the rows have fewer than {FEW_PROMPTS} prompts, so that their intervals "
            "cover the truth less often than 95 %."
        )


def _width(result: Result) -> float:
    assert result.low is not None
    assert result.high is not None
    return result.high - result.low


def _points(share: float) -> str:
    return f"{100 * share:.3g}"


def _prompts(number: int) -> str:
    return f"{show_number(number)} prompt{'' if number == 1 else 's'}"


def _ranking(results: Sequence[Result]) -> Iterator[str]:
    found = {result.metric: result for result in results}
    gap, accuracy = found.get("ranking/gap"), found.get("ranking/accuracy")
    if gap is not None and gap.value > 0:
        best = found.get("ranking/idealised")
        reached = f" ({show_share(best.value)})" if best is not None else ""
        yield (
            f"Ranking accuracy is {_points(gap.value)} points {show_interval('ranking/gap', gap.low, gap.high)} below "
            f"what the optimum of the objective would have on the same pairs{reached}."
        )
    elif accuracy is not None and "ranking/idealised" not in found:
        yield (
            "What the optimum of the objective would reach on these pairs was not computed, so ranking accuracy has no "
            "upper bound to be compared with."
        )
    if accuracy is not None:
        yield (
            "Ranking accuracy measures which of two given responses the model finds more probable, not how good its "
            "own responses are."
        )


def _displacement(run: RunFiles, results: Sequence[Result], *, said: bool) -> Iterator[str]:
    alarms = run.series("alarm/displacement")[0]
    if alarms:
        times = "once" if len(alarms) == 1 else f"{len(alarms)} times"
        yield f"The displacement alarm was raised {times} during training, first at step {alarms[0]:g}."
    down = next((r for r in results if r.metric == "displacement/chosen"), None)
    if down is not None and down.value < 0 and not said:
        yield (
            f"Chosen responses lost {show('displacement/chosen', -down.value)} nats of log-prob on average "
            f"{_interval_of_loss(down)} since the reference."
        )


def _interval_of_loss(down: Result) -> str:
    if down.low is None or down.high is None:
        return "(one prompt: spread unknown)"
    return show_interval("displacement/chosen", -down.high, -down.low)


def _judged(results: Sequence[Result], info: CardInfo) -> Iterator[str]:
    verdicts = [result for result in results if _kind(result) in JUDGED]
    if not verdicts:
        if not info.outputs:
            yield "No judge and no person has compared its responses with those of another model."
        return
    judges = list(dict.fromkeys(filter(None, (conditions(r.extra).get("judge") for r in verdicts))))
    named = f" ({'; '.join(judges)})" if judges else ""
    yield f"Win rates are verdicts of a judge{named}, not of people: another judge may rank models otherwise."
    first = next((r for r in verdicts if r.metric == "judge/consistency"), None)
    if first is not None and first.value < 1:
        yield f"The judge changed its mind with the order of the answers on {show_share(1 - first.value)} of prompts."
    failed = next((r for r in verdicts if r.metric == "judge/parse_failures"), None)
    if failed is not None and failed.value > 0:
        yield f"{show_share(failed.value)} of prompts have no usable verdict in one of the orders."


def _not_measured(results: Sequence[Result], info: CardInfo) -> Iterator[str]:
    kinds = {_kind(result) for result in results}
    if not results:
        yield "Nothing was evaluated, so nothing is known of what training changed."
        return
    if info.outputs:
        yield (
            "Scores of responses to different prompts are not comparable unless the training data made them so; what "
            "preferences teach is differences between responses to one prompt."
        )
        yield (
            "A policy that is optimised against the scores finds what they reward beside quality, such as length; "
            "accuracy on given pairs does not show that."
        )
        return
    if "retention" not in kinds:
        yield "Whether it lost other abilities was not measured (retention)."
    if not kinds & {"extraction", "membership", "memorisation"}:
        yield "Whether it repeats its training data was not measured (memorisation)."
    if not kinds & {"generations", "answers", "pass_at_k", *JUDGED}:
        yield "Its own responses were not looked at: neither length nor repetition nor refusals."


def _training(run: RunFiles, info: CardInfo) -> Iterator[str]:
    seed = run.get("train.seed")
    seed = (run.results.run.get("seed") if run.results else None) if seed is None else seed
    named = "" if seed is None else f" ({seed})"
    yield (
        f"One run with one seed{named}: the intervals speak about this checkpoint on prompts like those evaluated, and "
        "say nothing about the spread over seeds."
    )
    if info.resumes:
        times = "once" if len(info.resumes) == 1 else f"{len(info.resumes)} times"
        yield f"The run was interrupted and resumed {times}."
    if info.reference_moves:
        yield "The reference followed the policy, so rewards and displacement are against a model that moved."


def _of_the_data(run: RunFiles, info: CardInfo) -> Iterator[str]:
    data: Mapping[str, Any] = run.data
    rows, cut = data.get("rows") or {}, data.get("truncated") or {}
    kept = rows.get("kept") or 0
    # Above a tenth, the run's own notes say so already.
    for leg, count in cut.items():
        if kept and 0 < count / kept <= 0.1:
            yield f"{show_number(count)} rows ({show_share(count / kept)}) had their {leg} cut to fit."
    shared = data.get("eval_prompts_in_training") or 0
    if shared:
        yield f"{show_number(shared)} evaluation prompts are in the training data too."
    if rows.get("eval") and not run.get("data.eval_dataset_name"):
        yield "Held-out prompts come from the training dataset: on other data it may do worse."
    if info.license is None:
        yield "The licence of the model is not stated; those of the base model and of the data apply."
    if not info.language:
        yield "The language of the data is not stated, and nothing was measured by language."
    yield (
        "It learned the preferences in its training data, mistakes and biases included, and was not evaluated for "
        "safety or factual accuracy."
    )
