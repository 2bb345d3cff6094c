"""Win rates: the model's answers against those of baselines, by one judge or several."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from align.errors import RecipeError
from align.prompt_settings import PromptSection
from evals import opponents, sampled
from evals.evaluation import EVALS, EvalNeeds, Found
from evals.sampled import is_pairwise
from objectives.checks import require

if TYPE_CHECKING:
    from evals.context import Context
    from evals.run_settings import Job


@EVALS.register("win_rate")
@dataclass(frozen=True, kw_only=True)
class WinRate:
    """In which share of prompts judges prefer the model's answers to a baseline's, plain and at equal length.

    References:
        Dubois et al. 2024, arXiv:2404.04475; Lin et al. 2024, arXiv:2406.04770; Li et al. 2024, arXiv:2406.11939.
    """

    baseline: str | dict[str, Any] | list[Any]
    """What it is compared with: reference, another model (Hub id, folder, adapter's folder), a file of samples
    (.jsonl), or {column: NAME} of the dataset, with answer_of: MODEL for a list of responses; several in a list."""
    judge: sampled.Named
    """Who decides: any scorer, e.g. {name: judge, model: M, engine: vllm} (in a vLLM server that is started for it),
    {name: judge, model: M, base_url: http://localhost:8000/v1} (any endpoint), {name: reward_model, model: M}, gold;
    several in a list."""
    prompts: PromptSection | None = None
    """Where prompts come from: dataset_name, split, columns, max_rows, keep and the other keys of align.sample's data
    section. Default: those of the pairs."""
    split_name: str | None = None
    """What results call the prompts. Default: the split."""
    sampling: sampled.EvalSampling = field(default_factory=sampled.EvalSampling)
    """How answers are drawn: n, temperature, top_p, top_k, min_p, max_tokens, stop, seed (else out.seed)."""
    kinds: tuple[Literal["raw", "length_controlled", "wildbench", "arena"], ...] = ("raw", "length_controlled")
    """raw: always. length_controlled: were all answers as long as the baseline's. wildbench: WB-Reward, of a pairwise
    judge (WB-Score of a pointwise one). arena: Arena-Hard's score of a pairwise judge, and Bradley-Terry strengths."""
    orders: Literal["both", "random"] = "both"
    """How language models are shown two answers: in both orders, or for half the price in one that the prompt
    decides."""
    baselines_meet: bool = False
    """With arena: baselines also play each other, for Bradley-Terry strengths of all."""
    margin: int = 500
    """With wildbench: a slight win by an answer longer by more than this many characters is a tie; -1 for none."""
    tau: float | None = None
    """With judges that score answers one by one: the model wins with probability σ(difference/τ). Default: the higher
    score wins, equal ones tie."""
    style_control: bool | tuple[Literal["length", "headers", "lists", "bold"], ...] = False
    """Also the win rate were answers alike in length, headers, lists and bold, or in those named: a regression that
    takes ten prompts for each feature and ten for the model. With arena, of Arena-Hard's games too."""
    difficulty: str | None = None
    """With length_controlled: also with the difficulty of every instruction. joint: fitted to all models that play the
    first baseline (this one and the other baselines; ten or more), and written to the output folder. Else a file that
    was written so."""
    truncated: Literal["keep", "exclude"] = "keep"
    """Pairs with an answer that was cut off at max_tokens: judged (language models are told), or left out."""
    max_unjudged: float = 0.2
    """A judge that gives no verdict on more than this share of pairs is not believed: there is no number then."""

    def __post_init__(self) -> None:
        listed = opponents.baselines_of(self.baseline)
        judges = sampled.named("judge", self.judge)
        for entry in judges:
            for key in ("baseline", "opponents") if entry.name == "judge" else ():
                if getattr(entry.built, key) is not None:
                    raise ValueError(f"judge.{key} has no effect here: who plays is said by baseline; remove it")
        pairwise = [is_pairwise(entry) for entry in judges]
        rates = [entry.name == "judge" for entry in judges]
        require("kinds", self.kinds, bool(self.kinds), "some of raw, length_controlled, wildbench and arena")
        if "wildbench" in self.kinds and not any(rates):
            raise ValueError("kinds: wildbench takes verdicts or ratings of a language model; set judge.name to judge")
        if self.baselines_meet and ("arena" not in self.kinds or len(listed) < 2):
            raise ValueError("baselines_meet has no effect without kind arena and two baselines; remove it")
        if self.margin != 500 and "wildbench" not in self.kinds:
            raise ValueError("margin has no effect without kind wildbench; remove it")
        require("margin", self.margin, self.margin >= -1, ">= 0, or -1 for no rule")
        if self.tau is not None:
            require("tau", self.tau, self.tau > 0, "> 0")
            if all(pairwise):
                raise ValueError("tau has no effect on judges that are shown both answers; remove it")
        if self.orders != "both" and not any(pairwise):
            raise ValueError("orders has no effect on judges that score answers one by one; remove it")
        if self.style_control == ():
            raise ValueError("style_control is empty; list some of length, headers, lists and bold, or write true")
        if self.difficulty is not None:
            self._check_difficulty(len(listed))
        require("max_unjudged", self.max_unjudged, 0 <= self.max_unjudged < 1, "in [0, 1)")

    def _check_difficulty(self, baselines: int) -> None:
        from evals.difficulty import ENOUGH

        if "length_controlled" not in self.kinds:
            raise ValueError("difficulty has no effect without kind length_controlled; add it, or remove difficulty")
        if self.is_joint and baselines < ENOUGH:
            raise ValueError(
                f"difficulty: joint takes {ENOUGH} models or more that play the first baseline, and {baselines} would, "
                "this one and every further baseline; list more baselines, or name a file that such a fit wrote"
            )

    @property
    def is_joint(self) -> bool:
        """Whether difficulties come from the games of this evaluation."""
        return self.difficulty == "joint"

    @property
    def difficulty_file(self) -> Path | None:
        """Where difficulties come from that were fitted before."""
        return None if self.difficulty is None or self.is_joint else Path(self.difficulty)

    @property
    def style_features(self) -> tuple[str, ...]:
        """What is held fixed of style; empty where nothing is."""
        from evals.style_control import FEATURES

        return FEATURES if self.style_control is True else () if self.style_control is False else self.style_control

    @property
    def needs(self) -> EvalNeeds:
        """A reference where it is the baseline."""
        listed = opponents.baselines_of(self.baseline)
        return EvalNeeds(samples=True, reference=any(each.model == opponents.REFERENCE for each in listed))

    def check(self, job: Job) -> None:
        """Files and models of baselines, as far as they can be seen; prompts; judges; difficulties."""
        sampled.prompts_of(self.prompts, job, "win_rate")
        sampled.check_scorers(sampled.named("judge", self.judge))
        if self.difficulty_file is not None:
            from evals.controlled import Difficulty

            try:
                Difficulty.read(self.difficulty_file)
            except ValueError as error:
                raise RecipeError(f"evals: win_rate: difficulty: {error}") from None
        for baseline in opponents.baselines_of(self.baseline):
            opponents.check(baseline, job)

    def __call__(self, context: Context) -> Found:
        """See ``evals.verdicts`` and ``evals.controlled``."""
        from evals.referees import Referee, names_of
        from evals.tournament import Tournament

        judges = sampled.named("judge", self.judge)
        listed = opponents.baselines_of(self.baseline)
        prompts = opponents.keeping(sampled.prompts_of(self.prompts, context.job, "win_rate"), listed)
        with contextlib.ExitStack() as stack:
            named = zip(judges, names_of(judges), strict=True)
            # Judges come first: one that can't work is known before anything is drawn.
            referees = [stack.enter_context(Referee(entry, name, tau=self._tau(entry))) for entry, name in named]
            how = sampled.seeded(self.sampling, context.job)
            groups = context.samples(prompts, how, "policy")
            others = [opponents.answers_of(each, context, groups, prompts, how) for each in listed]
            names = [context.job.name, *(each.name for each in others)]
            if len(set(names)) < len(names):
                raise RecipeError(f"baseline: two models are called alike ({', '.join(names)}); give each a name")
            context.free()  # a judge may be a large model on the same device
            return Tournament(self, how, context, prompts, groups, others).found(referees)

    def _tau(self, entry: Any) -> float | None:
        return None if is_pairwise(entry) else self.tau
