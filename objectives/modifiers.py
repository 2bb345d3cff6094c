"""Modifiers: changes to a pairwise objective that do not depend on which one it is.

A modifier either changes the batch before the formula sees it (what is summed, β, the margin, the score of a
response), or weighs the rows of what comes out. It says itself which objectives it makes no sense for, and why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from objectives.batch import Leg, LegBatch, masked_sum
from objectives.checks import require
from objectives.needs import Coupled, Needs, Objective, PairForm, Stateful, form_of
from objectives.numerics import capped_exp
from objectives.output import Mean, Output
from objectives.registry import MODIFIERS

LEGS = ("chosen", "rejected")


@runtime_checkable
class Modifier(Protocol):
    """A frozen dataclass whose fields are its recipe keys.

    ``refuses`` gives the reason why it can't act on an objective of that form, or None. ``prepare`` changes the batch
    before the formula; ``row_weights`` gives detached weights of the rows of all terms, or None. ``keeps_step0`` says
    whether the loss at π_θ = π_ref stays what it was.
    """

    scores: ClassVar[tuple[str, ...]]
    extras: ClassVar[tuple[str, ...]]
    keeps_step0: bool

    def refuses(self, form: PairForm, needs: Needs) -> str | None: ...
    def prepare(self, batch: LegBatch) -> LegBatch: ...
    def row_weights(self, batch: LegBatch) -> Float[Tensor, " row"] | None: ...
    def metrics(self, batch: LegBatch) -> Mapping[str, Mean]: ...


def _only_difference(form: PairForm) -> str | None:
    if form.coupled:
        return "its rows are coupled by the step"
    if not form.difference:
        return "each reward enters by itself, not the difference alone, so log Z(x) would not cancel"
    return None


@MODIFIERS.register("r_dpo")
@dataclass(frozen=True, slots=True, kw_only=True)
class RDPO:
    """R-DPO: the reward counts length, so a longer chosen response has to be pushed less.

        margin' = margin + α·(|chosen| − |rejected|)

    with lengths in response tokens. It follows from maximising E[r − α·|y|] under the KL constraint: the implicit
    reward is then β·logratio + α·|y|. Where a pair's margin is 0 and the chosen response is longer, its loss is *below*
    log 2. One public re-implementation has the opposite sign, which rewards length; to match it, take a negative α.

    For objectives on the difference of summed log-probs; per-token ones have accounted for length already. The paper's
    α of 0.05 to 1 is UNVERIFIED; where lengths differ by hundreds of tokens, start at 0.005 to 0.05.

    References:
        Park et al. 2024, arXiv:2403.19159, Eq. 9.
    """

    length_alpha: float = 0.01
    """α in units of reward per token, finite and not 0; > 0 makes responses shorter."""

    scores: ClassVar[tuple[str, ...]] = ()
    extras: ClassVar[tuple[str, ...]] = ()
    keeps_step0: ClassVar[bool] = False

    def __post_init__(self) -> None:
        holds = math.isfinite(self.length_alpha) and self.length_alpha != 0
        require("length_alpha", self.length_alpha, holds, "finite and not 0, 0.005 to 0.05 at first")

    def refuses(self, form: PairForm, needs: Needs) -> str | None:
        """Why it can't act on such an objective."""
        if form.per_token:
            return "its log-probs are per token, so length is accounted for"
        return _only_difference(form)

    def prepare(self, batch: LegBatch) -> LegBatch:
        """Adds the length reward to every margin."""
        gap = self.length_alpha * (batch["chosen"].length() - batch["rejected"].length())
        before = batch.adjust.margin
        return replace(batch, adjust=replace(batch.adjust, margin=gap if before is None else before + gap))

    def row_weights(self, batch: LegBatch) -> None:
        """None: all rows count alike."""

    def metrics(self, batch: LegBatch) -> dict[str, Mean]:
        """The length reward and the difference in length that it comes from."""
        gap = batch["chosen"].length() - batch["rejected"].length()
        return {"r_dpo/margin": Mean.of(self.length_alpha * gap), "r_dpo/length_gap": Mean.of(gap)}


@MODIFIERS.register("ld_dpo")
@dataclass(frozen=True, slots=True, kw_only=True)
class LDDPO:
    """LD-DPO: tokens beyond the shorter response's length count less.

        log π(y|x)' = Σ_{t ≤ k} log π(y_t) + α·Σ_{t > k} log π(y_t),    k = min(|chosen|, |rejected|)

    with t counted from the first response token. α = 1 changes nothing, α = 0 compares prefixes of equal length.
    Likelihood terms are not changed. ``applies_to: both`` treats policy and reference alike, so that the loss at
    π_θ = π_ref stays what it is (TRL 1.16); ``policy`` leaves the reference whole (TRL up to 0.28, LLaMA-Factory).

    References:
        Liu et al. 2024, arXiv:2409.06411, Eq. 11; TRL's ``ld_alpha``.
    """

    ld_alpha: float = 0.5
    """α, in [0, 1)."""
    applies_to: str = "both"
    """``both`` or ``policy``."""

    scores: ClassVar[tuple[str, ...]] = ()
    extras: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        require("ld_alpha", self.ld_alpha, 0 <= self.ld_alpha < 1, "in [0, 1) (1 changes nothing), 0.5 in the paper")
        require("applies_to", self.applies_to, self.applies_to in ("both", "policy"), "'both' or 'policy'")

    @property
    def keeps_step0(self) -> bool:
        """Where the reference is treated alike."""
        return self.applies_to == "both"

    def refuses(self, form: PairForm, needs: Needs) -> str | None:
        """Why it can't act on such an objective."""
        return "it compares whole distributions token by token" if "ref_kl" in needs.extras else None

    def prepare(self, batch: LegBatch) -> LegBatch:
        """Sets each token's share."""
        common = torch.minimum(batch["chosen"].length(), batch["rejected"].length())

        def shared(leg: Leg) -> Leg:
            number = leg.mask.cumsum(dim=-1)  # 1 for the first response token
            tail = leg.logps.new_tensor(self.ld_alpha)  # two numbers alone would make a float32 tensor
            share = torch.where(number <= common[:, None], 1.0, tail)
            return replace(leg, share=share, ref_share=share if self.applies_to == "both" else None)

        changed = {name: shared(batch[name]) for name in LEGS}
        return replace(batch, legs={**batch.legs, **changed})

    def row_weights(self, batch: LegBatch) -> None:
        """None: all rows count alike."""

    def metrics(self, batch: LegBatch) -> dict[str, Mean]:
        """Share of tokens beyond the common length."""
        common = torch.minimum(batch["chosen"].length(), batch["rejected"].length())
        lengths = batch["chosen"].length() + batch["rejected"].length()
        beyond = lengths.sum() - 2 * common.sum()
        return {"ld_dpo/beyond": Mean(total=beyond.detach(), count=float(lengths.sum()))}


@MODIFIERS.register("wpo")
@dataclass(frozen=True, slots=True, kw_only=True)
class WPO:
    """WPO: pairs the current policy would not have written itself count less.

        loss' = W·loss,    W = min(1, w(chosen)·w(rejected))
        w(y) = exp{ 1/|y| Σ_t [log π_θ(y_t) − log Σ_v π_θ(v)²] }

    W is detached and multiplies every per-row term of the objective. log Σ_v π_θ(v)² is what a token sampled from the
    policy would have on average, so w is about 1 for on-policy responses; a lucky one exceeds it. ``clamp: false``
    leaves W unbounded, as TRL 1.16 does; the authors' code and TRL up to 0.28 take the minimum.

    TRL 1.16 fails with weighted ``hinge`` and ``sft`` (in-place writes); open-instruct's version averages log-probs
    that are already sums, so its weights are almost 0.

    References:
        Zhou et al. 2024, arXiv:2406.11827, Eq. 2; the minimum as in the authors' code.
    """

    clamp: bool = True
    """Whether W is at most 1."""

    scores: ClassVar[tuple[str, ...]] = ()
    extras: ClassVar[tuple[str, ...]] = ("log_sum_p2",)
    keeps_step0: ClassVar[bool] = False

    def refuses(self, form: PairForm, needs: Needs) -> str | None:
        """Why it can't act on such an objective."""
        return "its rows are coupled by the step, so a row has no loss of its own to weigh" if form.coupled else None

    def prepare(self, batch: LegBatch) -> LegBatch:
        """The batch as it is."""
        return batch

    def row_weights(self, batch: LegBatch) -> Float[Tensor, " row"]:
        """W of every pair."""
        weights = self.weight(batch["chosen"]) * self.weight(batch["rejected"])
        return weights.clamp(max=1) if self.clamp else weights

    def weight(self, leg: Leg) -> Float[Tensor, " row"]:
        """w of every response, detached; 1 for an empty one."""
        relative = leg.logps.detach() - leg.extra("log_sum_p2").detach()
        return capped_exp(masked_sum(relative, leg.mask) / leg.length().clamp(min=1))

    def metrics(self, batch: LegBatch) -> dict[str, Mean]:
        """Weights of pairs, and of both legs."""
        found = {f"wpo/{leg}": Mean.of(self.weight(batch[leg])) for leg in LEGS}
        return {"wpo/weight": Mean.of(self.row_weights(batch)), **found}


@MODIFIERS.register("mm_dpo")
@dataclass(frozen=True, slots=True, kw_only=True)
class MMDPO:
    """MM-DPO's dynamic reward scaling: pairs that are clearly apart take a larger β.

        β' = β·[1 + w·(1 − exp(−k·δ))],    δ = max(0, score(chosen) − score(rejected))

    β' lies in [β, β·(1+w)]. Every row needs both scores, from a reward model. This is the paper's formula; the released
    code scales by the policy's own margins by default (``implicit_beta``), clamps below and inverts the meaning of its
    label smoothing. UNVERIFIED: the paper's k.

    References:
        Zhang et al. 2025 (MM-RLHF), arXiv:2502.10391 (dynamic reward scaling).
    """

    scaling: float = 0.5
    """w ≥ 0: how much β grows at most, relatively; 0.5 in the paper, 0.1 in the released script."""
    sharpness: float = 0.5
    """k > 0, per unit of score."""

    scores: ClassVar[tuple[str, ...]] = LEGS
    extras: ClassVar[tuple[str, ...]] = ()
    keeps_step0: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require("scaling", self.scaling, 0 < self.scaling < math.inf, "> 0 and finite, 0.5 in the paper")
        require("sharpness", self.sharpness, 0 < self.sharpness < math.inf, "> 0 and finite")

    def refuses(self, form: PairForm, needs: Needs) -> str | None:
        """Why it can't act on such an objective."""
        if form.own_beta:
            return "it has no β to scale, or sets β itself"
        return "its rows are coupled by the step" if form.coupled else None

    def factor(self, batch: LegBatch) -> Float[Tensor, " row"]:
        """β'/β of every pair."""
        apart = (batch.score("chosen") - batch.score("rejected")).clamp(min=0).to(batch["chosen"].logps.dtype)
        return 1 - self.scaling * torch.expm1(-self.sharpness * apart)

    def prepare(self, batch: LegBatch) -> LegBatch:
        """Sets each pair's β."""
        return replace(batch, adjust=replace(batch.adjust, beta=self.factor(batch)))

    def row_weights(self, batch: LegBatch) -> None:
        """None: all rows count alike."""

    def metrics(self, batch: LegBatch) -> dict[str, Mean]:
        """The factor of β."""
        return {"mm_dpo/factor": Mean.of(self.factor(batch))}


@MODIFIERS.register("f_divergence")
@dataclass(frozen=True, slots=True, kw_only=True)
class FDivergence:
    """f-DPO: another divergence than the reverse KL holds policy and reference together.

        margin' = β·[f′(chosen) − f′(rejected)],    with r = logratio(y):
        forward_kl  f′ = 1 − e^{−r}        js  f′ = log 2 + log σ(r)        alpha  f′ = (e^{(α−1)·r} − 1)/(α−1)

    reverse_kl is f′ = r (up to a constant), that is no modifier at all, and the limit of alpha at α → 1. Exponents are
    capped at 80. Logged rewards stay β·logratio. For objectives on the difference of log-ratios, in which β·log Z(x)
    cancels. TRL up to 0.28 wrote alpha as (1 − e^{−α·r})/α.

    References:
        Wang et al. 2023, arXiv:2309.16240, Table 1 and Eq. 8; TRL's ``f_divergence_type``.
    """

    divergence: str = "js"
    """``forward_kl``, ``js`` or ``alpha``."""
    divergence_alpha: float = 0.5
    """α of divergence alpha, in [0, 1); 0 is forward_kl."""

    scores: ClassVar[tuple[str, ...]] = ()
    extras: ClassVar[tuple[str, ...]] = ()
    keeps_step0: ClassVar[bool] = True

    def __post_init__(self) -> None:
        known = self.divergence in ("forward_kl", "js", "alpha")
        require("divergence", self.divergence, known, "'forward_kl', 'js' or 'alpha' (reverse_kl is dpo itself)")
        alpha = self.divergence_alpha
        require("divergence_alpha", alpha, 0 <= alpha < 1, "in [0, 1), 0.5 in TRL; 1 would be dpo itself")

    def idle(self) -> dict[str, str]:
        """Keys that have no effect beside the others, with the reason."""
        return {} if self.divergence == "alpha" else {"divergence_alpha": f"divergence {self.divergence} has none"}

    def refuses(self, form: PairForm, needs: Needs) -> str | None:
        """Why it can't act on such an objective."""
        return _only_difference(form) if needs.reference else "it has no reference to diverge from"

    def slope(self, logratio: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
        """f′ at π_θ/π_ref, from the log-ratio; 0 where they are equal."""
        if self.divergence == "js":
            return math.log(2) + logsigmoid(logratio)
        power = -1.0 if self.divergence == "forward_kl" else self.divergence_alpha - 1
        return (capped_exp(power * logratio) - 1) / power

    def prepare(self, batch: LegBatch) -> LegBatch:
        """Replaces the score of a response."""
        return replace(batch, adjust=replace(batch.adjust, divergence=self.slope))

    def row_weights(self, batch: LegBatch) -> None:
        """None: all rows count alike."""

    def metrics(self, batch: LegBatch) -> dict[str, Mean]:
        """The scores that take the place of log-ratios."""
        return {f"f_divergence/{leg}": Mean.of(self.slope(batch[leg].logratio().detach())) for leg in LEGS}


@MODIFIERS.register("tr_dpo")
@dataclass(frozen=True, slots=True, kw_only=True)
class TRDPO:
    """TR-DPO: the reference follows the policy.

        π_ref ← α·π_θ + (1 − α)·π_ref    every ``sync_steps`` optimizer steps, parameter by parameter

    α = 1 is a hard update. The formula of the objective stays; log-ratios shrink, and logged margins jump, at every
    sync. The reference is a live second model (``reference.source: live``), trained are all weights; the synced
    reference is part of every checkpoint (TRL leaves it out, and a resumed run continues with the first one).

    References:
        Gorbatovski et al. 2024, arXiv:2404.09656, Eq. 6–7; defaults as in TRL.
    """

    sync_alpha: float = 0.6
    """α, in (0, 1]."""
    sync_steps: int = 512
    """Optimizer steps between two syncs, ≥ 1."""

    scores: ClassVar[tuple[str, ...]] = ()
    extras: ClassVar[tuple[str, ...]] = ()
    keeps_step0: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require("sync_alpha", self.sync_alpha, 0 < self.sync_alpha <= 1, "in (0, 1], 0.6 in TRL")
        require("sync_steps", self.sync_steps, self.sync_steps >= 1, ">= 1")

    def refuses(self, form: PairForm, needs: Needs) -> str | None:
        """Why it can't act on such an objective."""
        return None if needs.reference else "it has no reference"

    def prepare(self, batch: LegBatch) -> LegBatch:
        """The batch as it is: the trainer moves the reference."""
        return batch

    def row_weights(self, batch: LegBatch) -> None:
        """None: all rows count alike."""

    def metrics(self, batch: LegBatch) -> dict[str, Mean]:
        """None of its own."""
        return {}

    def sync(self, reference: Tensor, policy: Tensor) -> None:
        """Moves one reference parameter, in place."""
        reference.lerp_(policy.detach().to(reference), self.sync_alpha)


class Modified:
    """An objective with modifiers on it; itself an objective, stateful or coupled as the inner one is."""

    def __init__(self, objective: Objective, modifiers: Mapping[str, Modifier]) -> None:
        self.objective, self.modifiers = objective, dict(modifiers)

    @property
    def pair_form(self) -> PairForm | None:
        """The inner objective's."""
        return form_of(self.objective)

    @property
    def needs(self) -> Needs:
        """The inner objective's, and what modifiers read."""
        needs = self.objective.needs
        each = self.modifiers.values()
        return replace(
            needs,
            scores=tuple(dict.fromkeys([*needs.scores, *(name for one in each for name in one.scores)])),
            extras=tuple(dict.fromkeys([*needs.extras, *(name for one in each for name in one.extras)])),
        )

    @property
    def step0(self) -> float | None:
        """Known where the inner one is and no modifier moves it."""
        return self.objective.step0 if all(one.keeps_step0 for one in self.modifiers.values()) else None

    def _prepared(self, batch: LegBatch) -> LegBatch:
        for one in self.modifiers.values():
            batch = one.prepare(batch)
        return batch

    def __call__(self, batch: LegBatch) -> Output:
        batch = self._prepared(batch)
        output = self.objective(batch)
        terms, metrics = dict(output.terms), dict(output.metrics)
        for one in self.modifiers.values():
            weights = one.row_weights(batch)
            if weights is not None:
                terms = {name: replace(term, values=term.values * weights) for name, term in terms.items()}
            metrics |= one.metrics(batch)
        return Output(terms=terms, metrics=metrics)


class _WithState(Modified):
    """Remembers what the inner objective remembers, of what modifiers make of a batch."""

    def init_state(self) -> Mapping[str, Tensor]:
        return self.objective.init_state()  # type: ignore[attr-defined]

    def observe(self, batch: LegBatch) -> Mapping[str, Tensor]:
        return self.objective.observe(self._prepared(batch))  # type: ignore[attr-defined]

    def update(self, state: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.objective.update(state, observed)  # type: ignore[attr-defined]


class _WithStep(Modified):
    """Couples rows as the inner objective does, of what modifiers make of a batch."""

    def step_pass(self, batch: LegBatch) -> Mapping[str, Tensor]:
        return self.objective.step_pass(self._prepared(batch))  # type: ignore[attr-defined]


class _WithBoth(_WithState, _WithStep):
    """Both."""


def _under(objective: Objective, modifiers: Mapping[str, Modifier]) -> Modified:
    """An objective with modifiers on it, stateful or coupled as it is itself: protocols look methods up on classes."""
    kinds = {(True, True): _WithBoth, (True, False): _WithState, (False, True): _WithStep, (False, False): Modified}
    return kinds[isinstance(objective, Stateful), isinstance(objective, Coupled)](objective, modifiers)


def modified(
    name: str, objective: Objective, modifiers: Sequence[tuple[str, Modifier]]
) -> tuple[Objective, dict[str, str]]:
    """The objective under all modifiers that make sense for it.

    Args:
        name: of the objective.
        objective: the objective.
        modifiers: by name, in the order they are written.
    Returns:
        The objective, and for each modifier that leaves it alone the reason.
    """
    acting: dict[str, Modifier] = {}
    refused: dict[str, str] = {}
    for key, modifier in modifiers:
        form = form_of(objective)
        reason = "it is not about log-probs of pairs" if form is None and key != "tr_dpo" else None
        reason = reason or modifier.refuses(form or PairForm(difference=False), objective.needs)
        if reason is None:
            acting[key] = modifier
        else:
            refused[key] = reason
    return (_under(objective, acting) if acting else objective), refused


def refuse_contradictions(modifiers: Sequence[tuple[str, Modifier]]) -> None:
    """Raises ``ValueError`` naming two modifiers that can't both be meant."""
    names = [name for name, _ in modifiers]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is listed twice")
    if {"r_dpo", "ld_dpo"} <= set(names):
        raise ValueError("r_dpo and ld_dpo both take the effect of length away, each as if it were all there; keep one")
