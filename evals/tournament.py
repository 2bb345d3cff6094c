"""Games of a model against baselines before judges: results, every prompt's score, every answer's verdicts."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import RunError
from align.prompt_settings import PromptSection
from align.samples import Group, Sample
from align.sampling import Sampling
from evals import controlled, sampled, verdicts
from evals.controlled import Difficulty
from evals.difficulty import RIDGE
from evals.evaluation import Found
from evals.measured import Measured
from evals.opponents import Opponent
from evals.referees import Answers, Referee, dropped, said
from evals.results import Result
from evals.scores import Scores
from evals.verdicts import Verdicts

if TYPE_CHECKING:
    from evals.context import Context
    from evals.evaluations.win_rate import WinRate

NO_ANSWER = "the baseline has no answer to the prompt"
REMEDY = "look at its replies, and at model, max_tokens and rubric, or raise max_unjudged"


class Tournament:
    """The model against every baseline, before every judge.

    Args:
        keys: of the evaluation.
        how: answers were drawn.
        context: of the evaluation.
        prompts: that were asked.
        groups: the model's answers.
        others: the baselines' answers.
    """

    def __init__(
        self,
        keys: WinRate,
        how: Sampling,
        context: Context,
        prompts: PromptSection,
        groups: Sequence[Group],
        others: Sequence[Opponent],
    ) -> None:
        self.keys, self.context, self.groups, self.others = keys, context, groups, others
        self.dataset, self.split = prompts.dataset_name, sampled.split_name(prompts, keys.split_name)
        self.conditions = sampled.conditions(context, how, groups)
        self.results: list[Result] = []
        self.scores: list[Scores] = []
        self.warnings = [line for each in others for line in each.warnings]
        self.refused: list[str] = []
        self.of_answers: dict[tuple[str, str, int], dict[str, float]] = defaultdict(dict)
        self.several_judges = False

    def found(self, referees: Sequence[Referee]) -> Found:
        """Everything, by every judge; one that can't be believed costs its own numbers alone."""
        self.several_judges = len(referees) > 1
        believed: dict[str, dict[str, Verdicts]] = {}
        for referee in referees:
            self.context.say(f"{referee.name} judges {len(self.groups)} prompts against {len(self.others)} baselines")
            believed[referee.name] = self._judged(referee)
            referee.rest()  # the next one may want the device for itself
        for one, two in combinations(believed, 2):
            for other in self.others:
                if other.name in believed[one] and other.name in believed[two]:
                    self._agreement(other, believed[one][other.name], believed[two][other.name], one, two)
        if not self.results:
            raise RunError("; ".join(self.refused))
        return Found(
            results=self.results,
            scores=self.scores,
            generations=self._generations(),
            warnings=[*self.refused, *self.warnings],
        )

    def _judged(self, referee: Referee) -> dict[str, Verdicts]:
        keys, policy = self.keys, self.context.job.name
        both = keys.orders == "both"
        found: dict[str, Verdicts] = {}
        extras: dict[str, dict[str, Any]] = {}
        for other in self.others:
            pairs, missing = _pairs(self.groups, other)
            found[other.name] = self._play(referee, pairs, policy, other.name)
            if not self._believed(referee, found[other.name]):
                del found[other.name]
                continue
            own = found[other.name]
            extra = extras[other.name] = self._extra(referee, other, own, missing)
            where = self._where(other.name, referee.name)
            measured, warnings = verdicts.measure(own, keys.kinds, both=both, margin=keys.margin)
            self.warnings += [f"{where['split']}: {line}" for line in warnings]
            measured += self._controlled(referee, other, own, pairs, where["split"])
            self._file(measured, where, extra)
            self._note(referee, own, pairs)
        if "arena" in keys.kinds and found:
            self._strengths(referee, found)
        if keys.is_joint and found:
            self._joint(referee, found, extras)
        return found

    def _controlled(
        self, referee: Referee, other: Opponent, own: Verdicts, pairs: Sequence[Answers], split: str
    ) -> list[Measured]:
        """What holds more than length fixed; what the verdicts can't give is left out with a warning."""
        keys = self.keys
        makes: dict[str, Callable[[], Measured]] = {}
        if keys.style_features:
            texts = [(said(mine), said(theirs)) for mine, theirs in pairs]
            style = (own, texts, keys.style_features, self._tokens)
            makes["win_rate/style_controlled"] = lambda: controlled.by_style(*style)
            if "arena" in keys.kinds and own.games is not None and keys.orders == "both":
                makes["arena/style_controlled"] = lambda: controlled.by_style_of_games(*style)
        path = keys.difficulty_file
        if path is not None:
            makes["win_rate/length_controlled_difficulty"] = lambda: self._frozen(path, referee, other, own)
        found: list[Measured] = []
        for what, make in makes.items():
            try:
                found.append(make())
            except ValueError as error:
                self.warnings.append(f"{split}: {what} is left out: {error}")
        return found

    def _tokens(self, text: str) -> int:
        """Those of the model's own tokenizer, for the answers of all: what is compared are lengths in one unit."""
        return len(self.context.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _frozen(self, path: Path, referee: Referee, other: Opponent, own: Verdicts) -> Measured:
        known, judge = Difficulty.read(path), referee.described(self.keys.orders)
        wanted, here = (known.baseline, known.judge), (other.described, judge["judge"])
        if wanted != here or known.judge_template != judge["judge_template"]:
            told = " by ".join(here) if wanted != here else f"{here[1]} with another prompt or version"
            raise ValueError(
                f"the difficulties in {path.name} are of games against {known.baseline} judged by {known.judge}, and "
                f"these are against {told}"
            )
        return controlled.with_difficulty(own, known, path.name)

    def _joint(self, referee: Referee, found: dict[str, Verdicts], extras: Mapping[str, dict[str, Any]]) -> None:
        """One fit over all models that play the first baseline, and its difficulties in a file."""
        first, *rest = self.others
        where = self._where(first.name, referee.name)
        try:
            if first.name not in found:
                raise ValueError(f"there are no verdicts against {first.name}, which all are compared with")
            matches = [found[first.name]]
            for other in rest:
                pairs, _ = _pairs(other.groups, first)
                played = self._play(referee, pairs, other.name, first.name) if pairs else None
                matches += [played] if played is not None and self._believed(referee, played) else []
            measured, psi = controlled.jointly(matches)
        except ValueError as error:
            self.warnings.append(f"{where['split']}: win_rate/length_controlled_joint is left out: {error}")
            return
        self._file([measured], where, extras[first.name])
        judge = referee.described(self.keys.orders)
        path = self.context.out / f"difficulty-{re.sub(r'[^A-Za-z0-9._-]+', '-', where['split'])}.json"
        Difficulty(
            baseline=first.described,
            judge=judge["judge"],
            judge_template=judge["judge_template"],
            models=[match.model for match in matches],
            ridge=RIDGE,
            psi=psi,
        ).write(path)
        self.context.say(f"wrote {path}: difficulties of {len(psi)} prompts, by {len(matches)} models")

    def _play(self, referee: Referee, pairs: Sequence[Answers], model: str, baseline: str) -> Verdicts:
        return referee(
            pairs,
            model=model,
            baseline=baseline,
            both=self.keys.orders == "both",
            exclude=self.keys.truncated == "exclude",
        )

    def _believed(self, referee: Referee, own: Verdicts) -> bool:
        reasons = dropped(own)
        told = ", ".join(f"{number} × {reason}" for reason, number in reasons.items())
        if own.unjudged > self.keys.max_unjudged:
            self.refused.append(
                f"the judge {referee.name} has no verdict on {100 * own.unjudged:.0f} % of {len(own)} pairs against "
                f"{own.baseline} ({told}), more than max_unjudged {self.keys.max_unjudged:g}; {REMEDY}"
            )
            return False
        return True

    def _extra(self, referee: Referee, other: Opponent, own: Verdicts, missing: int) -> dict[str, Any]:
        reasons = {**dropped(own), **({NO_ANSWER: missing} if missing else {})}
        return {
            **self.conditions,
            **referee.described(self.keys.orders),
            "baseline": other.described,
            "truncated_baseline": sampled.cut_off(other.groups),
            "truncated_policy": self.keys.truncated,
            "identical": int(own.identical.sum()),
            "dropped": reasons,
        }

    def _strengths(self, referee: Referee, found: dict[str, Verdicts]) -> None:
        matches = list(found.values())
        met = [each for each in self.others if each.name in found]
        for one, two in combinations(met, 2) if self.keys.baselines_meet else ():
            pairs, _ = _pairs(one.groups, two)
            played = self._play(referee, pairs, one.name, two.name) if pairs else None
            matches += [played] if played is not None and self._believed(referee, played) else []
        split = self._split(None, referee.name)
        try:
            measured = verdicts.of_strengths(verdicts.strengths(matches, met[0].name), self.context.job.name)
        except ValueError as error:
            self.warnings.append(f"{split}: bradley_terry is left out: {error}")
            return
        together = " ".join(each.described for each in met)
        extra = {**self.conditions, **referee.described(self.keys.orders), "baseline": together}
        self._file([measured], self._where(None, referee.name), extra)

    def _agreement(self, other: Opponent, one: Verdicts, two: Verdicts, first: str, second: str) -> None:
        split = self._split(other.name, f"{first} and {second}")
        extra = {**self.conditions, "baseline": other.described, "judge": f"{first} and {second}"}
        try:
            self._file([verdicts.compared(one, two)], self._where(other.name, f"{first} and {second}"), extra)
        except ValueError as error:
            self.warnings.append(f"{split}: {error}")

    def _where(self, baseline: str | None, judge: str) -> dict[str, Any]:
        return {"dataset": self.dataset, "split": self._split(baseline, judge), "step": self.context.step}

    def _split(self, baseline: str | None, judge: str) -> str:
        named = f"{self.split} vs {baseline}" if baseline is not None and len(self.others) > 1 else self.split
        return f"{named} by {sampled.plain_name(judge)}" if self.several_judges else named

    def _file(self, measured: Sequence[Measured], where: dict[str, Any], extra: dict[str, Any]) -> None:
        for each in measured:
            self.results += each.results(**where, extra=extra)
            # Those without a better way are not compared.
            by = {name: found for name, found in each.by_prompt.items() if name != "win_rate/discrete"}
            self.scores += replace(each, by_prompt=by).scores(**where)

    # ---- for the browser of responses ----

    def _note(self, referee: Referee, own: Verdicts, pairs: Sequence[Answers]) -> None:
        policy = self.context.job.name
        several = len(self.others) > 1
        for (mine, theirs), share in zip(pairs, own.share.tolist(), strict=True):
            for who, sample, value, against in (
                (policy, mine, share, own.baseline),
                (own.baseline, theirs, 1 - share, policy),
            ):
                label = f"win_rate/raw vs {against}" if several and who == policy else "win_rate/raw"
                label = f"{label} by {referee.name}" if self.several_judges else label
                self.of_answers[who, sample.prompt_id, sample.index] |= {label: value, **referee.score(sample)}

    def _generations(self) -> list[Any]:
        where = {"dataset": self.dataset, "split": f"{self.split}, win_rate", "step": self.context.step}
        return list(self._lines(where))

    def _lines(self, where: dict[str, Any]) -> Iterator[Any]:
        for name, groups in [(self.context.job.name, self.groups), *((o.name, o.groups) for o in self.others)]:

            def scores(sample: Sample, name: str = name) -> dict[str, float]:
                return self.of_answers.get((name, sample.prompt_id, sample.index), {})

            yield from sampled.generations(groups, scores, **where, model=name)


def _pairs(groups: Sequence[Group], other: Opponent) -> tuple[list[Answers], int]:
    """Sample i of the model with sample i of the baseline (from the first on again, where that has fewer), and how many
    have none to meet."""
    pairs: list[Answers] = []
    missing = 0
    for group in groups:
        theirs = other.answers.get(group.prompt_id, ())
        missing += 0 if theirs else len(group.samples)
        pairs += [(mine, theirs[i % len(theirs)]) for i, mine in enumerate(group.samples) if theirs]
    return pairs, missing
