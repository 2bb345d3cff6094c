"""Pass@k of sampled answers, and the accuracy of what strategies choose from k of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from align.errors import RunError
from align.prompt_settings import PromptSection
from align.samples import Group, Sample
from align.score_lines import SampleScore
from evals import passing, sampled
from evals.evaluation import EVALS, EvalNeeds, Found
from evals.passing import REWARDLESS, VOTES, Tried
from objectives.checks import require

if TYPE_CHECKING:
    from evals.context import Context
    from evals.measured import Measured
    from evals.run_settings import Job

UNVERIFIED = "no sample could be verified"


@EVALS.register("pass_at_k")
@dataclass(frozen=True, kw_only=True)
class PassAtK:
    """How often one of k answers is right (unbiased pass@k), and how often the one that a strategy chooses is.

    References:
        Chen et al. 2021, arXiv:2107.03374; Di et al. 2025, arXiv:2510.03199.
    """

    verifier: sampled.Named
    """What says which answers are right: a scorer that gives 1 to them, e.g. {name: math, column: answer}, exact,
    regex, python, world_answer. It also finds the answers that strategies count."""
    prompts: PromptSection | None = None
    """Where prompts come from: dataset_name, split, columns, max_rows, keep (e.g. [answer]) and the other keys of
    align.sample's data section. Default: those of the pairs."""
    split_name: str | None = None
    """What results call the prompts. Default: the split."""
    sampling: sampled.EvalSampling = field(default_factory=lambda: sampled.EvalSampling(n=16))
    """How answers are drawn: n, temperature, top_p, top_k, min_p, max_tokens, stop, seed (else out.seed)."""
    ks: tuple[int, ...] | None = None
    """Numbers of answers, increasing, at most sampling.n. Default: 1, 2, 4, … and n."""
    strategies: sampled.Named = field(default_factory=list)
    """Ways to choose one answer of k: best_of_n, majority, {name: best_of_majority, alpha: 0.1} and others; see
    python -m align.answer --help. All but majority read rewards, and so take scorers."""
    scorers: sampled.Named = field(default_factory=list)
    """What gives rewards to choose by: reward_model, judge (pointwise), …; added with their weights."""
    right_at: float = 1.0
    """The verifier's score from which an answer is right."""
    subsets: int = 200
    """Random subsets of a prompt's samples that each number of a strategy without a formula is averaged over, ≥ 200."""

    needs: ClassVar[EvalNeeds] = EvalNeeds(samples=True)

    def __post_init__(self) -> None:
        verifiers = sampled.named("verifier", self.verifier)
        if len(verifiers) != 1:
            raise ValueError(f"verifier: {len(verifiers)} are listed; name one")
        chosen = sampled.named("strategies", self.strategies) if self.strategies else ()
        scorers = sampled.named("scorers", self.scorers) if self.scorers else ()
        names = [entry.name for entry in chosen]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"strategies lists {name} {names.count(name)} times; evaluate again with another split_name"
                )
            if name not in REWARDLESS and not scorers:
                raise ValueError(
                    f"strategies: {name} chooses by rewards; add scorers, e.g. [{{name: reward_model, …}}]"
                )
            if name in VOTES and not getattr(verifiers[0].built, "answers", False):
                raise ValueError(
                    f"strategies: {name} counts equal answers, and {verifiers[0].name} finds none in responses; take a "
                    "verifier that does (math, regex, exact, world_answer)"
                )
        if scorers and not set(names) - set(REWARDLESS):
            raise ValueError("scorers has no effect: no strategy reads rewards; remove it, or add best_of_n")
        if self.ks is not None:
            rising = bool(self.ks) and all(a < b for a, b in zip((0, *self.ks), self.ks, strict=False))
            require("ks", self.ks, rising, "increasing, and 1 or more")
            if self.ks[-1] > self.sampling.n:
                raise ValueError(
                    f"ks goes to {self.ks[-1]}, and sampling.n is {self.sampling.n}; draw as many, or more"
                )
        require("subsets", self.subsets, self.subsets >= 200, ">= 200")

    def check(self, job: Job) -> None:
        """That there are prompts, and scorers that can work."""
        sampled.prompts_of(self.prompts, job, "pass_at_k")
        sampled.check_scorers(sampled.named("verifier", self.verifier))
        sampled.check_scorers(sampled.named("scorers", self.scorers) if self.scorers else ())

    def __call__(self, context: Context) -> Found:
        """See ``evals.passing``."""
        from align.scores import Scoring

        (verifier,) = sampled.named("verifier", self.verifier)
        chosen = sampled.named("strategies", self.strategies) if self.strategies else ()
        scorers = sampled.named("scorers", self.scorers) if self.scorers else ()
        prompts = sampled.prompts_of(self.prompts, context.job, "pass_at_k")
        how = sampled.seeded(self.sampling, context.job)
        with Scoring([replace(verifier, weight=1.0)]) as verifying:
            # Made first: what can't work is known before anything is drawn.
            scoring = Scoring(scorers) if scorers else None
            groups = context.samples(prompts, how, "policy")
            context.free()
            verified = verifying(groups)
            rewards: Sequence[Sequence[SampleScore]] | None = None
            if scoring is not None:
                with scoring:
                    rewards = scoring(groups)
            tried, lost = self._tried(groups, verified, rewards, getattr(verifier.built, "answers", False))
            if not tried:
                raise RunError(
                    f"the verifier {verifier.name} could not tell of any answer to {len(groups)} prompts whether it is "
                    f"right ({', '.join(lost)}); name the column with the right answer, and keep it in prompts.keep"
                )
            found = [(passing.pass_at_k(tried, self._ks), {})]
            for entry in chosen:
                same = getattr(verifier.built, "equal", None)
                curve = passing.chosen_at_k(
                    entry.built, tried, self._ks, same=same, subsets=self.subsets, seed=how.seed
                )
                found.append((curve, {"strategy": {"name": entry.name, **entry.resolved()}}))
        extra = {
            **sampled.conditions(context, how, groups),
            "verifier": sampled.settings_of(verifier),
            "right_at": self.right_at,
            "dropped": lost,
            "without_answer": sum(line.answer is None for lines in verified for line in lines),
            **({"scorers": [sampled.settings_of(entry) for entry in scorers]} if scorers else {}),
        }
        return self._found(context, prompts, groups, found, extra, verified, rewards)

    @property
    def _ks(self) -> tuple[int, ...]:
        if self.ks is not None:
            return self.ks
        n = self.sampling.n
        return tuple(sorted({*(2**i for i in range(n.bit_length()) if 2**i <= n), n}))

    def _tried(
        self,
        groups: Sequence[Group],
        verified: Sequence[Sequence[SampleScore]],
        rewards: Sequence[Sequence[SampleScore]] | None,
        answering: bool,
    ) -> tuple[list[Tried], dict[str, int]]:
        """The prompts that could be verified, and how many could not, by reason.

        An answer that could not be verified beside others that could (it took too long) is wrong.
        """
        tried: list[Tried] = []
        lost: list[str] = []
        for number, lines in enumerate(verified):
            if all(line.score is None for line in lines):
                lost.append(next(iter(lines[0].reasons.values()), UNVERIFIED))
                continue
            right = [line.score is not None and line.score >= self.right_at for line in lines]
            own = None if rewards is None else [line.score for line in rewards[number]]
            known = None if own is None else [score for score in own if score is not None]
            tried.append(
                Tried(
                    prompt=groups[number].prompt_id,
                    answers=[line.answer for line in lines] if answering else list(range(len(lines))),
                    right=right,
                    rewards=known if known is not None and len(known) == len(lines) else None,
                )
            )
        return tried, sampled.by_reason(lost)

    def _found(
        self,
        context: Context,
        prompts: PromptSection,
        groups: Sequence[Group],
        found: Sequence[tuple[Measured, dict[str, Any]]],
        extra: dict[str, Any],
        verified: Sequence[Sequence[SampleScore]],
        rewards: Sequence[Sequence[SampleScore]] | None,
    ) -> Found:
        split = sampled.split_name(prompts, self.split_name)
        where: dict[str, Any] = {"dataset": prompts.dataset_name, "split": split, "step": context.step}
        of_answer: dict[tuple[str, int], dict[str, float]] = {}
        for lines in verified:
            for line in lines:
                if line.score is not None:
                    of_answer[line.prompt_id, line.sample] = {"right": float(line.score >= self.right_at)}
        for lines in rewards or ():
            for line in lines:
                known = {name: score for name, score in line.scores.items() if score is not None}
                of_answer.setdefault((line.prompt_id, line.sample), {}).update(known)

        def scores(sample: Sample) -> dict[str, float]:
            return of_answer.get((sample.prompt_id, sample.index), {})

        unverified = sum(line.score is None for lines in verified for line in lines)
        lost = sum(extra["dropped"].values())
        warnings = [f"{lost} of {len(groups)} prompts are left out: {', '.join(extra['dropped'])}"] if lost else []
        timed_out = unverified - lost * self.sampling.n
        if timed_out:
            warnings.append(f"{timed_out} answers could not be verified, and count as wrong")
        for measured, more in found:
            if measured.n_dropped:
                name = more["strategy"]["name"]
                warnings.append(
                    f"{name}: {measured.n_dropped} prompts have an answer without a reward, and are left out"
                )
        return Found(
            results=[r for measured, more in found for r in measured.results(**where, extra={**extra, **more})],
            scores=[each for measured, _ in found for each in measured.scores(**where)],
            generations=sampled.generations(
                groups, scores, **{**where, "split": f"{split}, pass_at_k"}, model=context.job.name
            ),
            warnings=warnings,
        )
