"""The ten laws, over everything that is registered: a new objective gets all of them by being there.

The laws cannot see a flipped sign or a wrong constant; the anchors can (a case by hand, vectors of another
implementation, a transcription of the paper).
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, asdict, dataclass, fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from objectives import OBJECTIVES, Coupled, LegBatch, Objective, Stateful, with_own_step
from objectives.beta_dpo import BetaDPO
from objectives.online import NashMD
from objectives.registry import field_docs, formula, source
from objectives.tdpo import TDPO
from tests.objectives.batches import (
    FP32_ROUNDING,
    FP64_ROUNDING,
    PER_ROW,
    after_a_step,
    build,
    in_float64,
    inputs_of,
    loss_and_grad,
    make_batch,
    map_legs,
    rows_of,
    tensors_of,
    with_columns,
    with_inputs,
    with_junk,
    with_logps,
    without_shape_checks,
)
from tests.support import VECTORS
from tests.vectors.reading import vectors_of

every_objective = pytest.mark.parametrize("name", OBJECTIVES.names())
weighable = [name for name in OBJECTIVES.names() if build(name).needs.likelihood]
every_case = pytest.mark.parametrize(
    ("name", "weighted"),
    [*((name, False) for name in OBJECTIVES.names()), *((name, True) for name in weighable)],
    ids=[*OBJECTIVES.names(), *(f"{name}-weighted" for name in weighable)],
)
"""Every objective, and with token weights those that have a likelihood term for them to act on."""
seeds = st.integers(0, 1000)


@dataclass(frozen=True, kw_only=True)
class Values:
    """What a recipe may and may not say for one key."""

    allowed: tuple[Any, ...]
    refused: tuple[Any, ...]


NOT_A_NUMBER = (math.nan, math.inf, -math.inf)
POSITIVE = Values(allowed=(1e-2, 5), refused=(0.0, -0.1, *NOT_A_NUMBER))
BETA = Values(allowed=(0.1,), refused=POSITIVE.refused)  # where other keys make combinations enough
NOT_NEGATIVE = Values(allowed=(0.0, 0.05), refused=(-0.01, *NOT_A_NUMBER))
SMOOTHING = Values(allowed=(0.0, 0.1, 0.49), refused=(-0.01, 0.5, 1.0, *NOT_A_NUMBER))
SOME_SMOOTHING = Values(allowed=(0.0, 0.1), refused=SMOOTHING.refused)
LINK = Values(allowed=("sigmoid", "hinge", "ipo"), refused=("logistic", "Sigmoid", ""))
LEG = Values(allowed=("gold", "chosen"), refused=("rejected", "prompt", ""))
ATTRIBUTE = Values(allowed=("reward", "helpfulness"), refused=("", "  "))
CLASS_WEIGHT = Values(allowed=(1, 1.33), refused=(0.0, -1.0, *NOT_A_NUMBER))

KEYS: dict[tuple[str, str], Values] = {
    ("alpha_po", "beta"): Values(allowed=(2.5,), refused=POSITIVE.refused),
    ("alpha_po", "alpha"): Values(allowed=(-0.5, 0.0, 0.25), refused=(-10.1, 10.1, *NOT_A_NUMBER)),
    ("alpha_po", "gamma"): NOT_NEGATIVE,
    ("aot", "beta"): POSITIVE,
    ("aot", "label_smoothing"): SMOOTHING,
    ("aot_unpaired", "beta"): POSITIVE,
    ("aot_unpaired", "label_smoothing"): SMOOTHING,
    ("apo_down", "beta"): POSITIVE,
    ("apo_zero", "beta"): POSITIVE,
    ("apo_zero_unpaired", "beta"): BETA,
    ("apo_zero_unpaired", "desirable_weight"): CLASS_WEIGHT,
    ("apo_zero_unpaired", "undesirable_weight"): CLASS_WEIGHT,
    ("bco", "beta"): POSITIVE,
    ("bco", "shift"): Values(allowed=("mean", "balanced"), refused=("median", "")),
    ("bco", "prompt_encoder"): Values(allowed=(None, "policy"), refused=("", "  ")),
    ("bco", "min_density_ratio"): Values(allowed=(0.0, 0.5), refused=(-0.1, *NOT_A_NUMBER)),
    ("bco", "max_density_ratio"): Values(allowed=(0.5, 10.0), refused=(0.49, -1.0, *NOT_A_NUMBER)),
    ("bco", "prompt_sample_size"): Values(allowed=(1, 1024), refused=(0, -1)),
    ("bco_pair", "beta"): POSITIVE,
    ("bco_pair", "shift"): Values(allowed=("mean", "none"), refused=("balanced", "median", "")),
    ("beta_dpo", "beta"): BETA,
    ("beta_dpo", "modulation"): Values(allowed=(0.0, 0.6), refused=(-0.1, *NOT_A_NUMBER)),
    ("beta_dpo", "filtered"): Values(allowed=(0.0, 0.2), refused=(-0.1, 1.0, *NOT_A_NUMBER)),
    ("beta_dpo", "momentum"): Values(allowed=(0.0, 0.9), refused=(-0.1, 1.0, *NOT_A_NUMBER)),
    ("beta_dpo", "seed"): Values(allowed=(0, 7), refused=(-1, 2**31)),
    ("bradley_terry", "center_rewards_coefficient"): NOT_NEGATIVE,
    ("bradley_terry", "attribute"): ATTRIBUTE,
    ("cal_dpo", "beta"): POSITIVE,
    ("cpo", "beta"): BETA,
    ("cpo", "cpo_alpha"): NOT_NEGATIVE,
    ("cpo", "label_smoothing"): SOME_SMOOTHING,
    ("cpo", "link"): LINK,
    ("dco", "attempts"): Values(allowed=(1, 8, 64), refused=(0, -1, 2**20 + 1)),
    ("dco", "leg"): LEG,
    ("discopop", "beta"): POSITIVE,
    ("discopop", "tau"): Values(allowed=(0.05, 1.0), refused=(0.0, -0.1, 1.01, *NOT_A_NUMBER)),
    ("dpo", "beta"): Values(allowed=(1e-3, 0.1, 5), refused=(0.0, -0.1, *NOT_A_NUMBER)),
    ("dpo", "label_smoothing"): SMOOTHING,
    ("dpo_norm", "beta"): POSITIVE,
    ("dpop", "beta"): POSITIVE,
    ("dpop", "penalty"): Values(allowed=(0.0, 50.0), refused=(-0.1, *NOT_A_NUMBER)),
    ("exo", "beta"): POSITIVE,
    ("exo", "label_smoothing"): Values(allowed=(1e-3, 0.1, 0.49), refused=(0.0, -0.01, 0.5, 1.0, *NOT_A_NUMBER)),
    ("hinge", "beta"): POSITIVE,
    ("ipo", "beta"): POSITIVE,
    ("ipo", "reduction"): Values(allowed=("mean", "sum"), refused=("average", "token", "")),
    ("irpo", "beta"): POSITIVE,
    ("irpo", "alpha"): POSITIVE,
    ("irpo", "form"): Values(allowed=("token", "sequence"), refused=("cumulative", "row", "")),
    ("kto", "beta"): POSITIVE,
    ("kto", "desirable_weight"): CLASS_WEIGHT,
    ("kto", "undesirable_weight"): CLASS_WEIGHT,
    ("margin_bt", "attribute"): ATTRIBUTE,
    ("nash_md", "beta"): POSITIVE,
    ("nca", "beta"): POSITIVE,
    ("ntl_mse", "leg"): LEG,
    ("ntl_was", "leg"): LEG,
    ("orpo", "beta"): POSITIVE,
    ("orpo", "nll"): Values(allowed=("token", "sequence"), refused=("row", "mean", "")),
    ("reward_regression", "attributes"): Values(
        allowed=(("score",), ("helpfulness", "correctness")),
        refused=((), ("",), ("a", "a"), ("chosen", "score"), ("preference",)),
    ),
    ("robust", "beta"): POSITIVE,
    ("robust", "label_smoothing"): SMOOTHING,
    ("rpo", "beta"): POSITIVE,
    ("rpo", "eta"): Values(allowed=(0.005, 0.2), refused=(0.0, -0.1, *NOT_A_NUMBER)),
    ("rpo", "form"): Values(allowed=("cumulative", "average"), refused=("token", "sum", "")),
    ("rpo_reward_aware", "beta"): BETA,
    ("rpo_reward_aware", "reward_scale"): Values(allowed=(0.1, 2), refused=(0.0, -1.0, *NOT_A_NUMBER)),
    ("rpo_reward_aware", "distance"): Values(
        allowed=("bwd_kl", "fwd_kl", "sq"), refused=("rpo_sq", "backward", "kl", "")
    ),
    ("scaled_bt", "attribute"): ATTRIBUTE,
    ("sft", "leg"): LEG,
    ("sft", "per"): Values(allowed=("token", "sequence", "row"), refused=("batch", "mean", "")),
    ("simpo", "beta"): Values(allowed=(2.0, 10), refused=POSITIVE.refused),
    ("simpo", "gamma"): Values(allowed=(0.0, 1.5), refused=(-0.1, *NOT_A_NUMBER)),
    ("simpo", "label_smoothing"): SOME_SMOOTHING,
    ("sppo", "beta"): POSITIVE,
    ("symbolic", "program"): Values(allowed=("rejected -> chosen",), refused=()),
    ("symbolic", "condition"): Values(allowed=("chosen or rejected",), refused=()),
    ("symbolic", "addition"): Values(allowed=("chosen and rejected",), refused=()),
    ("symbolic", "link"): Values(allowed=("logistic", "squared", "hinge"), refused=("sigmoid", "ipo", "")),
    ("symbolic", "beta"): Values(allowed=(5,), refused=POSITIVE.refused),
    ("symbolic", "reduction"): Values(allowed=("mean", "sum"), refused=("token", "")),
    ("symbolic", "reference"): Values(allowed=(False, True), refused=()),
    ("tdpo", "beta"): BETA,
    ("tdpo", "alpha"): Values(allowed=(0.0, 0.5), refused=(-0.1, *NOT_A_NUMBER)),
    ("tdpo", "variant"): Values(allowed=("tdpo1", "tdpo2"), refused=("tdpo", "TDPO1", "")),
    ("tpo", "beta"): POSITIVE,
    ("tpo", "alpha"): NOT_NEGATIVE,
    ("tpo", "label_smoothing"): SOME_SMOOTHING,
    ("tpo", "link"): LINK,
    ("tpo_l", "beta"): Values(allowed=(0.01, 10), refused=(0.0, -0.1, *NOT_A_NUMBER)),
    ("tpo_l", "gamma"): Values(allowed=(0.0, 1.6), refused=(-0.1, *NOT_A_NUMBER)),
    ("tpo_l", "alpha"): NOT_NEGATIVE,
    ("tpo_l", "label_smoothing"): SOME_SMOOTHING,
    ("xpo", "alpha"): POSITIVE,
    ("xpo", "beta"): POSITIVE,
}
"""Every key of every objective. The bounds come from the papers, not from the classes."""

KEYS |= {
    (name, key): Values(allowed=tuple(allowed), refused=tuple(refused))
    for name in OBJECTIVES.names()
    for key, (allowed, refused) in getattr(OBJECTIVES[name], "conformance", {}).items()
}
# Objectives of other packages say it themselves, and keep their vectors beside their module.

TOGETHER: dict[str, dict[str, tuple[Any, ...]]] = {
    "cpo": {"label_smoothing": (0.1, 0.49), "link": ("hinge", "ipo")},
    "tpo": {"label_smoothing": (0.1, 0.49), "link": ("hinge", "ipo")},
    "bco": {"max_density_ratio": (0.5, 1.0), "min_density_ratio": (1.01, 2.0)},
}
"""Values that are allowed alone and refused together; the message begins with the first key."""


def configs(values: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Every combination."""
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def refused_together(name: str, config: dict[str, Any]) -> bool:
    clash = TOGETHER.get(name)
    return clash is not None and all(config.get(key) in values for key, values in clash.items())


def variants(name: str) -> list[Objective]:
    """The objective under its defaults and with every combination of allowed values."""
    allowed = {key: values.allowed for (objective, key), values in KEYS.items() if objective == name}
    return [
        build(name),
        *(build(name, **config) for config in configs(allowed) if not refused_together(name, config)),
    ]


def test_the_registry_is_not_empty():
    """A suite over an empty registry would pass."""
    assert {"bco", "dpo", "irpo", "kto", "rpo", "sft", "tpo", "tpo_l"} <= set(OBJECTIVES.names())


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("sigmoid", "dpo"),
        ("exo_pair", "exo"),
        ("nca_pair", "nca"),
        ("sppo_hard", "sppo"),
        ("aot_pair", "aot_unpaired"),
        ("sigmoid_norm", "dpo_norm"),
        ("smaug", "dpop"),
        ("slic", "hinge"),
        ("lrml", "discopop"),
        ("tdpo2", "tdpo"),
        ("alphapo", "alpha_po"),
        ("rpo_bwd_kl", "rpo_reward_aware"),
    ],
)
def test_names_of_papers_and_other_trainers_are_answered_with_ours(theirs: str, ours: str):
    with pytest.raises(ValueError, match=f"unknown objective '{theirs}': it is called '{ours}' here"):
        OBJECTIVES[theirs]


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("simp", "simpo"), ("opro", "orpo"), ("bcopair", "bco_pair"), ("caldpo", "cal_dpo"), ("discpop", "discopop")],
)
def test_typing_errors_are_answered_with_what_was_meant(typo: str, meant: str):
    with pytest.raises(ValueError, match=rf"unknown objective '{typo}'; did you mean '{meant}'\? \(known: "):
        OBJECTIVES[typo]


# (1)


def innermost(objective: Objective) -> Objective:
    """The objective itself, without its modifiers."""
    return getattr(objective, "objective", objective)


def stopped(objective: Objective) -> set[str]:
    """Those inputs through which, by the paper, nothing is differentiated although the loss depends on them."""
    inner = innermost(objective)
    return {"chosen/ref_kl"} if isinstance(inner, TDPO) and inner.variant == "tdpo2" else set()


def with_own_weights(batch: LegBatch, changed: LegBatch) -> LegBatch:
    """``changed`` with WPO's weights, which are constants to a gradient, as they were in ``batch``."""
    legs = {}
    for name in changed:
        leg = changed[name]
        if "log_sum_p2" in leg.extras:
            moved = batch[name].extras["log_sum_p2"] + (leg.logps - batch[name].logps).detach()
            leg = replace(leg, extras={**leg.extras, "log_sum_p2": moved})
        legs[name] = leg
    return replace(changed, legs=legs)


def with_own_ratios(batch: LegBatch, changed: LegBatch) -> LegBatch:
    """``changed`` with log-ratios of tokens, which are constants to Nash-MD's gradient, as they were in ``batch``."""
    legs = {}
    for name in changed:
        moved = batch[name].ref_logps + (changed[name].logps - batch[name].logps).detach()
        legs[name] = replace(changed[name], ref_logps=moved)
    return replace(changed, legs=legs)


def assert_gradients_are_finite_differences(objective: Objective, batch: LegBatch) -> None:
    """By every input at once. A sort is made again where an input moves; β-DPO's β and selection are constants."""
    inputs = {name: values for name, values in inputs_of(batch).items() if name not in stopped(objective)}

    def loss(*values: Tensor) -> Tensor:
        changed = with_own_weights(batch, with_inputs(batch, dict(zip(inputs, values, strict=True))))
        if isinstance(innermost(objective), NashMD):
            changed = with_own_ratios(batch, changed)
        if not isinstance(innermost(objective), BetaDPO):
            changed = with_own_step(objective, changed)
        return objective(changed).loss(batch.counts())

    leaves = [values.clone().requires_grad_() for values in inputs.values()]
    loss(*leaves)  # once with shapes checked
    with without_shape_checks():
        assert torch.autograd.gradcheck(loss, leaves, fast_mode=False, check_undefined_grad=False)
    for name in stopped(objective):
        assert not loss_and_grad(objective, batch)[1][name].any(), name


@pytest.mark.slow
@every_case
def test_gradients_are_finite_differences(name: str, weighted: bool):
    for seed, objective in enumerate(variants(name)):
        rows = 3 if isinstance(objective, Coupled) else 2 if seed == 0 else 1
        batch = make_batch(objective, seed=seed, rows=rows, weighted=weighted, later=seed % 2 == 1)
        assert_gradients_are_finite_differences(objective, batch)
        more = make_batch(objective, seed=seed, rows=6, weighted=weighted)  # one row may have none: a hinge, a tie
        assert any(slope.abs().sum() > 0 for slope in loss_and_grad(objective, more)[1].values())


# (2)


def assert_masked_places_change_nothing(objective: Objective, batch: LegBatch, junk: float) -> None:
    """Bit for bit: what the model says about padding is never read."""
    expected_loss, expected_grad = loss_and_grad(objective, batch)
    spoiled = with_own_step(objective, with_junk(batch, junk))
    for key, values in (spoiled.step or {}).items():
        assert torch.equal(values, (batch.step or {})[key]), key
    loss, grad = loss_and_grad(objective, spoiled)
    assert torch.equal(loss, expected_loss)
    for key, slopes in grad.items():
        assert torch.equal(slopes, expected_grad[key]), key
        if slopes.dim() == 2:
            assert (slopes[~batch[key.partition("/")[0]].mask] == 0).all(), key
    metrics = objective(batch).metrics
    for key, metric in objective(spoiled).metrics.items():
        assert torch.equal(metric.total, metrics[key].total), key
    assert spoiled.counts() == batch.counts()
    if isinstance(objective, Stateful):
        observed = objective.observe(batch)
        for key, value in objective.observe(spoiled).items():
            assert torch.equal(value, observed[key]), key


@pytest.mark.slow
@every_case
@given(seed=seeds, later=st.booleans(), junk=st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 0.0]))
def test_masked_places_change_nothing(name: str, weighted: bool, seed: int, later: bool, junk: float):
    objective = build(name)
    batch = make_batch(objective, seed=seed, weighted=weighted, dtype=torch.float32, later=later)
    assert_masked_places_change_nothing(objective, batch, junk)


# (3)


def assert_microbatches_add_up(objective: Objective, batch: LegBatch, cuts: Sequence[int]) -> None:
    """Loss, gradient, counts, metrics, what is observed and what a step is told of its rows, under any split."""
    edges = [0, *sorted(cuts), batch.rows]
    parts = [rows_of(batch, slice(start, end)) for start, end in itertools.pairwise(edges)]
    whole_loss, whole_grad = loss_and_grad(objective, batch)
    shares = [loss_and_grad(objective, part, batch.counts()) for part in parts]
    assert_close(sum(loss for loss, _ in shares), whole_loss, **FP64_ROUNDING)
    for key, slopes in whole_grad.items():
        assert_close(torch.cat([grad[key] for _, grad in shares]), slopes, **FP64_ROUNDING)
    counts = [part.counts() for part in parts]
    for unit, count in batch.counts().items():
        assert sum(each[unit] for each in counts) == count
    metrics = [objective(part).metrics for part in parts]
    for key, metric in objective(batch).metrics.items():
        assert metric.count > 0, key  # the batch has both labels; a part need not
        assert_close(sum(each[key].total for each in metrics), metric.total, **FP64_ROUNDING)
        assert sum(each[key].count for each in metrics) == metric.count
    if isinstance(objective, Stateful):
        observed = [objective.observe(part) for part in parts]
        for key, value in objective.observe(batch).items():
            assert_close(sum(each[key] for each in observed), value, **FP64_ROUNDING)
    if isinstance(objective, Coupled):
        passes = [objective.step_pass(part) for part in parts]
        for key, values in objective.step_pass(batch).items():
            assert torch.equal(torch.cat([each[key] for each in passes]), values), key


@pytest.mark.slow
@every_case
@given(seed=seeds, later=st.booleans(), cuts=st.lists(st.integers(0, 6), min_size=1, max_size=3))
def test_microbatches_add_up(name: str, weighted: bool, seed: int, later: bool, cuts: list[int]):
    """A part may be empty or of one label, and parts differ in rows and in tokens."""
    objective = build(name)
    batch = make_batch(objective, seed=seed, rows=6, weighted=weighted, later=later)
    assert_microbatches_add_up(objective, batch, cuts)


# (4)


def assert_rows_may_be_permuted(objective: Objective, batch: LegBatch, order: Sequence[int]) -> None:
    """Within a step that stays as it is, and with the whole step."""
    index = torch.tensor(order)
    loss, grad = loss_and_grad(objective, batch)
    for permuted in (rows_of(batch, index), with_own_step(objective, rows_of(batch, index))):
        permuted_loss, permuted_grad = loss_and_grad(objective, permuted)
        assert_close(permuted_loss, loss, **FP64_ROUNDING)
        for key, slopes in grad.items():
            assert_close(permuted_grad[key], slopes[index], **FP64_ROUNDING)
        if not isinstance(objective, Coupled):
            break


@pytest.mark.slow
@every_case
@given(seed=seeds, later=st.booleans(), order=st.permutations(range(5)))
def test_rows_may_be_permuted(name: str, weighted: bool, seed: int, later: bool, order: list[int]):
    objective = build(name)
    batch = make_batch(objective, seed=seed, rows=5, weighted=weighted, later=later)
    assert_rows_may_be_permuted(objective, batch, order)


# (5)


def assert_padding_columns_change_nothing(objective: Objective, batch: LegBatch, extra: int) -> None:
    """Up to rounding only: a longer sum may be added up in another order."""
    wide = with_own_step(objective, with_columns(batch, extra))
    loss, grad = loss_and_grad(objective, batch)
    wide_loss, wide_grad = loss_and_grad(objective, wide)
    assert wide.counts() == batch.counts()
    assert_close(wide_loss, loss, **FP64_ROUNDING)
    for key, slopes in grad.items():
        width = slopes.shape[-1]
        assert_close(wide_grad[key][..., :width], slopes, **FP64_ROUNDING)
        assert (wide_grad[key][..., width:] == 0).all()
    if isinstance(objective, Stateful):
        observed = objective.observe(batch)
        for key, value in objective.observe(wide).items():
            assert_close(value, observed[key], **FP64_ROUNDING)


@pytest.mark.slow
@every_case
@given(seed=seeds, later=st.booleans(), extra=st.integers(1, 40))
def test_padding_columns_change_nothing(name: str, weighted: bool, seed: int, later: bool, extra: int):
    objective = build(name)
    batch = make_batch(objective, seed=seed, weighted=weighted, later=later)
    assert_padding_columns_change_nothing(objective, batch, extra)


# (6)


def assert_finite(objective: Objective, batch: LegBatch) -> None:
    batch = with_own_step(objective, batch)
    inputs = {name: values.detach().clone().requires_grad_() for name, values in inputs_of(batch).items()}
    output = objective(with_inputs(batch, inputs))
    loss = output.loss(batch.counts())
    assert loss.isfinite(), loss
    slopes = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True)
    for key, slope in zip(inputs, slopes, strict=True):
        assert slope.isfinite().all(), key
    for key, metric in output.metrics.items():
        assert metric.total.isfinite(), key
    if isinstance(objective, Stateful):
        for key, value in objective.update(batch.state, objective.observe(batch)).items():
            assert value.isfinite(), key


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_finite_everywhere(name: str, weighted: bool, dtype: torch.dtype):
    """At the reference, and where policy or reference all but excludes a response: up to 10⁵ nats a token."""
    # What does not overflow in float32 does not in float64: there, the defaults will do.
    for objective in variants(name) if dtype == torch.float32 else [build(name)]:
        options = {"seed": 3, "dtype": dtype, "weighted": weighted}
        for later in (False, True) if isinstance(objective, Stateful) else (False,):
            assert_finite(objective, make_batch(objective, at_reference=True, later=later, **options))
        for scale in (0.0, 1e-30, 1e3, 1e5):
            extreme = make_batch(objective, scale=scale, **options)
            assert_finite(objective, extreme)
            if isinstance(objective, Stateful):
                assert_finite(objective, after_a_step(objective, extreme))
            # Each leg in turn certain under the policy, so that margins go to both extremes.
            for leg in extreme if scale else ():
                certain = {other: extreme[other].logps for other in extreme} | {
                    leg: torch.zeros_like(extreme[leg].logps)
                }
                assert_finite(objective, with_logps(extreme, certain))


@every_objective
def test_empty_responses_are_finite(name: str):
    """A row whose response was cut away entirely, and a batch of nothing else."""
    objective = build(name)
    batch = make_batch(objective, seed=4, rows=3)
    for kept in (torch.tensor([[True], [False], [True]]), torch.zeros(3, 1, dtype=torch.bool)):
        assert_finite(objective, map_legs(batch, lambda leg, kept=kept: replace(leg, mask=leg.mask & kept)))


# (7)


@pytest.mark.slow
@every_case
def test_step0_is_what_it_says(name: str, weighted: bool):
    for objective in variants(name):
        if objective.step0 is None:
            continue
        for seed, rows in enumerate((1, 2, 3, 4, 5)):
            batch = make_batch(objective, seed=seed, rows=rows, weighted=weighted, at_reference=True)
            loss, _ = loss_and_grad(objective, batch)
            assert loss.item() == pytest.approx(objective.step0, rel=1e-12), rows


@pytest.mark.slow
@every_objective
def test_step0_is_given_where_it_exists(name: str):
    """None is for losses that depend on the data even where the policy is the reference."""
    for objective in variants(name):
        if objective.step0 is None:
            batches = [make_batch(objective, seed=seed, rows=5, at_reference=True) for seed in range(8)]
            assert len({round(loss_and_grad(objective, batch)[0].item(), 9) for batch in batches}) > 1, objective


# (8)


@pytest.mark.slow
@every_objective
def test_what_was_declared_is_asked_for_by_name(name: str):
    """What data or trainer failed to supply is a clear error, not a wrong number."""
    for objective in variants(name):
        batch = make_batch(objective, seed=5)
        needs = objective.needs
        assert tuple(batch) == needs.legs
        objective(batch)  # nothing beyond what is declared is in the batch, and nothing beyond it is read
        for missing in batch:
            rest = {leg: batch[leg] for leg in batch if leg != missing}
            with pytest.raises(KeyError, match=f"no leg '{missing}'"):
                objective(replace(batch, legs=rest))
        if needs.reference:
            with pytest.raises(ValueError, match="reference"):
                objective(map_legs(batch, lambda leg: replace(leg, ref_logps=None)))
        for known in PER_ROW:
            if getattr(needs, known):
                with pytest.raises(ValueError, match=f"the rows have no {known} here"):
                    objective(replace(batch, **{known: None}))
        for missing in needs.numbers:
            with pytest.raises(ValueError, match=f"the rows have no score '{missing}' here"):
                objective(replace(batch, scores={key: batch.scores[key] for key in needs.numbers if key != missing}))
        for field, kind in (("extras", ""), ("values", "value ")):
            for missing in getattr(needs, field):
                rest = {key: each for key, each in getattr(batch[needs.legs[0]], field).items() if key != missing}
                with pytest.raises(ValueError, match=f"this leg has no {kind}'{missing}'"):
                    objective(map_legs(batch, lambda leg, field=field, rest=rest: replace(leg, **{field: rest})))
        if isinstance(objective, Coupled):
            for missing in ("step", "place"):
                with pytest.raises(ValueError, match=r"give it batch\.step and batch\.place"):
                    objective(replace(batch, **{missing: None}))


@pytest.mark.slow
@every_objective
def test_what_was_not_declared_is_not_read(name: str):
    """A further leg, a reference, labels, ratios, scores, extras, values, a step: undeclared, and full of NaN."""
    for objective in variants(name):
        batch = make_batch(objective, seed=6)
        needs = objective.needs
        first = batch[needs.legs[0]]
        nan = torch.full_like(first.logps, math.nan)
        per_row = torch.full((4,), math.nan, dtype=torch.float64)
        more = replace(batch, legs={"undeclared": replace(first, logps=nan), "gold": replace(first, logps=nan)})
        more = replace(
            more, legs={**more.legs, **batch.legs}, scores={"chosen": per_row, "humour": per_row, **batch.scores}
        )
        if not needs.labels:
            more = replace(more, labels=torch.tensor([True, False, True, True]))
        if needs.density_ratio is None:
            more = replace(more, density_ratio=per_row)
        if not isinstance(objective, Coupled):
            more = replace(more, step={"policy": per_row}, place=torch.arange(4))
        undeclared = dict.fromkeys(("log_sum_p2", "ref_kl", "number_value", "number_mean"), math.nan)

        def spoil(leg: Any, undeclared: dict[str, float] = undeclared, per_row: Tensor = per_row) -> Any:
            extras = {key: torch.full_like(leg.logps, value) for key, value in undeclared.items()}
            return replace(leg, extras={**extras, **leg.extras}, values={"undeclared": per_row, **leg.values})

        more = map_legs(more, spoil)
        counts, output, expected = batch.counts(), objective(more), objective(batch)
        assert torch.equal(output.loss(counts), expected.loss(counts))
        assert output.metrics == expected.metrics, "metrics say the same, and of the same legs"
        if not needs.reference:
            more = map_legs(more, lambda leg: replace(leg, ref_logps=torch.full_like(leg.logps, math.nan)))
            assert torch.equal(objective(more).loss(counts), expected.loss(counts))


@pytest.mark.slow
@every_objective
def test_token_weights_act_on_likelihood_terms_only(name: str):
    """Weights change the loss on the legs that the objective declares for them, and nothing on others."""
    for objective in variants(name):
        batch = make_batch(objective, seed=11)
        assert set(objective.needs.likelihood) <= set(objective.needs.legs)
        for leg in batch:
            weight = torch.linspace(0.1, 0.9, batch[leg].logps.numel(), dtype=torch.float64)
            weighted = replace(batch[leg], weight=weight.reshape(batch[leg].logps.shape))
            output = objective(replace(batch, legs={**batch.legs, leg: weighted}))
            same = torch.equal(output.loss(batch.counts()), objective(batch).loss(batch.counts()))
            assert same == (leg not in objective.needs.likelihood), leg


def assert_constants_get_no_gradient(objective: Objective, batch: LegBatch) -> None:
    """Not even where somebody forgot to compute them without one."""
    inputs = inputs_of(batch)
    attached = replace(
        map_legs(
            with_inputs(batch, {name: values.clone().requires_grad_() for name, values in inputs.items()}),
            lambda leg: replace(
                leg,
                ref_logps=None if leg.ref_logps is None else leg.ref_logps.clone().requires_grad_(),
                extras={
                    key: values.clone().requires_grad_() if key in ("number_value", "log_sum_p2") else values
                    for key, values in leg.extras.items()
                },
            ),
        ),
        scores={key: values.clone().requires_grad_() for key, values in batch.scores.items()},
        step=None
        if batch.step is None
        else {
            key: values.clone().requires_grad_() if values.is_floating_point() else values
            for key, values in batch.step.items()
        },
    )
    objective(attached).loss(attached.counts()).backward()
    differentiable = {id(values) for values in inputs_of(attached).values()}
    for key, values in tensors_of(attached).items():
        if values.requires_grad and id(values) not in differentiable:
            assert values.grad is None or not values.grad.any(), f"a gradient flows into {key}"
    assert any(values.grad is not None for values in inputs_of(attached).values())


@pytest.mark.slow
@every_case
def test_constants_get_no_gradient(name: str, weighted: bool):
    """Reference, scores, targets' values, what a weight is made of, what the step knows of other rows."""
    for objective in variants(name):
        assert_constants_get_no_gradient(objective, make_batch(objective, seed=7, weighted=weighted))


def assert_metrics_carry_no_graph(objective: Objective, batch: LegBatch) -> None:
    counts = batch.counts()
    inputs = {name: values.clone().requires_grad_() for name, values in inputs_of(batch).items()}
    output = objective(with_inputs(batch, inputs))
    assert output.metrics
    for key, metric in output.metrics.items():
        assert re.fullmatch(r"[a-z_]+/[a-z_]+", key), f"metric names look like rewards/margins, not {key!r}"
        assert not metric.total.requires_grad, key
        assert metric.total.shape == (), key
        assert metric.count > 0, key
    assert output.terms
    for key, term in output.terms.items():
        assert term.values.shape == (batch.rows,), f"{key}: one number per row"
        assert term.total.requires_grad, key
        assert term.per in counts, key


@pytest.mark.slow
@every_case
def test_metrics_carry_no_graph_and_have_counts(name: str, weighted: bool):
    for objective in variants(name):
        assert_metrics_carry_no_graph(objective, make_batch(objective, seed=8, weighted=weighted))


@every_case
def test_nothing_it_is_given_is_edited(name: str, weighted: bool):
    objective = build(name)
    batch = make_batch(objective, seed=9, weighted=weighted)
    before = {key: values.clone() for key, values in tensors_of(batch).items()}
    loss_and_grad(objective, batch)
    after_a_step(objective, batch)
    assert_close(tensors_of(batch), before, rtol=0, atol=0, equal_nan=True)


@every_objective
def test_state_carries_no_graph_and_keeps_its_shape(name: str):
    """What is remembered must not keep last step's graph alive, and a checkpoint's keys are always the same."""
    objective = build(name)
    if isinstance(objective, Stateful):
        batch = make_batch(objective, seed=12)
        batch = map_legs(batch, lambda leg: replace(leg, logps=leg.logps.requires_grad_()))
        observed = objective.observe(batch)
        state = objective.update(batch.state, observed)
        assert not any(value.requires_grad for value in (*observed.values(), *state.values()))
        assert {key: (value.shape, value.dtype) for key, value in state.items()} == {
            key: (value.shape, value.dtype) for key, value in objective.init_state().items()
        }
        later = loss_and_grad(objective, replace(batch, state=state))[0]
        assert later != loss_and_grad(objective, batch)[0], "a state without effect need not be kept"


@every_objective
def test_what_a_step_is_told_carries_no_graph(name: str):
    """One number per row, so that gathering a step keeps no graph alive."""
    objective = build(name)
    if isinstance(objective, Coupled):
        batch = make_batch(objective, seed=15)
        batch = map_legs(batch, lambda leg: replace(leg, logps=leg.logps.requires_grad_()))
        for key, values in objective.step_pass(batch).items():
            assert values.shape == (batch.rows,), key
            assert not values.requires_grad, key


@every_objective
def test_a_step_without_rows_leaves_a_finite_state(name: str):
    objective = build(name)
    if isinstance(objective, Stateful):
        batch = make_batch(objective, seed=14)
        state = objective.update(batch.state, objective.observe(rows_of(batch, slice(0, 0))))
        assert all(value.isfinite() for value in state.values())


@every_objective
def test_float32_agrees_with_float64(name: str):
    """Training computes in float32; nothing in a formula may lose more than rounding."""
    objective = build(name)
    for later in (False, True):
        batch = make_batch(objective, seed=10, dtype=torch.float32, later=later)
        loss, grad = loss_and_grad(objective, batch)
        double_loss, double_grad = loss_and_grad(objective, in_float64(batch))
        assert loss.dtype == torch.float32
        assert_close(loss.double(), double_loss, **FP32_ROUNDING)
        for key, slopes in grad.items():
            assert_close(slopes.double(), double_grad[key], **FP32_ROUNDING)


# (9)


def test_every_key_is_in_the_table():
    """A new objective, or a new key, has to say here what its values may be."""
    there = {(name, field.name) for name in OBJECTIVES for field in fields(OBJECTIVES[name])}
    assert set(KEYS) == there


@every_objective
def test_recipe_to_objective_to_recipe_is_the_identity(name: str):
    for objective in variants(name):
        recipe = json.loads(json.dumps({"name": OBJECTIVES.name_of(objective), **asdict(objective)}))
        assert recipe.pop("name") == name
        # As the reader of recipes does: what a field wants to be a tuple is written as a list.
        again = OBJECTIVES[name](**{key: tuple(v) if isinstance(v, list) else v for key, v in recipe.items()})
        assert again == objective
        assert json.loads(json.dumps(asdict(again))) == recipe


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "key", "value"),
    [(name, key, value) for (name, key), values in KEYS.items() for value in values.refused],
)
def test_values_out_of_range_are_refused_by_name(name: str, key: str, value: object):
    with pytest.raises(ValueError, match=rf"^{key} must be .*got {re.escape(repr(value))}$"):
        build(name, **{key: value})


@pytest.mark.parametrize(
    ("name", "config"), [(name, config) for name, values in TOGETHER.items() for config in configs(values)]
)
def test_values_that_exclude_each_other_are_refused_by_name(name: str, config: dict[str, Any]):
    for key, value in config.items():
        build(name, **{key: value})
    with pytest.raises(ValueError, match=f"^{next(iter(config))} "):
        build(name, **config)


@pytest.mark.slow
@every_objective
def test_idle_keys_have_no_effect(name: str):
    """What ``idle`` names is a key, has a reason, and may take any other value without changing the loss."""
    for objective in variants(name):
        if not hasattr(objective, "idle"):
            continue
        batch = make_batch(objective, seed=13)
        for key, reason in objective.idle().items():
            assert reason.strip()
            for value in KEYS[name, key].allowed:
                other = replace(objective, **{key: value})
                assert torch.equal(loss_and_grad(other, batch)[0], loss_and_grad(objective, batch)[0]), key


@every_objective
def test_objectives_are_frozen_and_keys_are_checked(name: str):
    objective = build(name)
    for field in fields(OBJECTIVES[name]):
        with pytest.raises(FrozenInstanceError):
            setattr(objective, field.name, None)
    with pytest.raises(TypeError, match="no_such_key"):
        build(name, no_such_key=1)


# (10)


@every_objective
def test_docstring_has_formula_and_source(name: str):
    cls = OBJECTIVES[name]
    assert re.match(r"loss\S* = ", formula(cls)), "the first indented block is the formula"
    assert re.search(r"arXiv:\d{4}\.\d{5}|doi:\S+|https://\S+", source(cls)), "References: with something to look up"


@every_objective
def test_every_key_has_a_docstring(name: str):
    cls = OBJECTIVES[name]
    docs = field_docs(cls)
    for field in fields(cls):
        assert docs.get(field.name, "").strip(), f"write a docstring under {name}.{field.name}"


@every_objective
def test_there_are_vectors_with_their_provenance(name: str):
    path = vectors_of(name)
    assert path.is_file(), f"add {path}: numbers of another implementation"
    vectors = json.loads(path.read_text(encoding="utf-8"))
    assert vectors["cases"]
    assert vectors["source"].strip()
    assert vectors["versions"]
    assert (VECTORS.parents[1] / vectors["made_by"]).is_file() or (path.parent / vectors["made_by"]).is_file()
