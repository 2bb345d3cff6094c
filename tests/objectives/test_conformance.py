"""The ten laws, over everything that is registered: a new objective gets all of them by being there.

The laws cannot see a flipped sign or a wrong constant; the anchors can (a case by hand, vectors of another
implementation, a transcription of the paper).
"""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import FrozenInstanceError, asdict, dataclass, fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from objectives import OBJECTIVES, Objective, Stateful
from objectives.registry import field_docs, formula, source
from tests.objectives.batches import (
    FP32_ROUNDING,
    FP64_ROUNDING,
    PER_ROW,
    after_a_step,
    build,
    in_float64,
    loss_and_grad,
    make_batch,
    map_known,
    map_legs,
    map_tensors,
    rows_of,
    with_columns,
    with_junk,
    with_logps,
)
from tests.support import VECTORS

every_objective = pytest.mark.parametrize("name", OBJECTIVES.names())
weighted_or_not = pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
seeds = st.integers(0, 1000)


@dataclass(frozen=True, kw_only=True)
class Values:
    """What a recipe may and may not say for one key."""

    allowed: tuple[Any, ...]
    refused: tuple[Any, ...]


NOT_A_NUMBER = (math.nan, math.inf, -math.inf)
POSITIVE = Values(allowed=(1e-2, 5), refused=(0.0, -0.1, *NOT_A_NUMBER))
NOT_NEGATIVE = Values(allowed=(0.0, 0.05), refused=(-0.01, *NOT_A_NUMBER))
SMOOTHING = Values(allowed=(0.0, 0.1, 0.49), refused=(-0.01, 0.5, 1.0, *NOT_A_NUMBER))

KEYS: dict[tuple[str, str], Values] = {
    ("bco", "beta"): POSITIVE,
    ("bco", "shift"): Values(allowed=("mean", "balanced"), refused=("median", "")),
    ("bco", "prompt_encoder"): Values(allowed=(None, "policy"), refused=("", "  ")),
    ("bco", "min_density_ratio"): Values(allowed=(0.0, 0.5), refused=(-0.1, *NOT_A_NUMBER)),
    ("bco", "max_density_ratio"): Values(allowed=(0.5, 10.0), refused=(0.49, -1.0, *NOT_A_NUMBER)),
    ("bco", "prompt_sample_size"): Values(allowed=(1, 1024), refused=(0, -1)),
    ("dpo", "beta"): Values(allowed=(1e-3, 0.1, 5), refused=(0.0, -0.1, *NOT_A_NUMBER)),
    ("dpo", "label_smoothing"): SMOOTHING,
    ("irpo", "beta"): POSITIVE,
    ("irpo", "alpha"): POSITIVE,
    ("irpo", "form"): Values(allowed=("token", "sequence"), refused=("cumulative", "row", "")),
    ("kto", "beta"): POSITIVE,
    ("kto", "desirable_weight"): Values(allowed=(1, 1.33), refused=(0.0, -1.0, *NOT_A_NUMBER)),
    ("kto", "undesirable_weight"): Values(allowed=(1, 1.33), refused=(0.0, -1.0, *NOT_A_NUMBER)),
    ("rpo", "beta"): POSITIVE,
    ("rpo", "eta"): Values(allowed=(0.005, 0.2), refused=(0.0, -0.1, *NOT_A_NUMBER)),
    ("rpo", "form"): Values(allowed=("cumulative", "average"), refused=("token", "sum", "")),
    ("sft", "leg"): Values(allowed=("gold", "chosen"), refused=("rejected", "prompt", "")),
    ("tpo", "beta"): POSITIVE,
    ("tpo", "alpha"): NOT_NEGATIVE,
    ("tpo", "label_smoothing"): SMOOTHING,
    ("tpo", "link"): Values(allowed=("sigmoid", "hinge", "ipo"), refused=("logistic", "Sigmoid", "")),
    ("tpo_l", "beta"): Values(allowed=(0.01, 10), refused=(0.0, -0.1, *NOT_A_NUMBER)),
    ("tpo_l", "gamma"): Values(allowed=(0.0, 1.6), refused=(-0.1, *NOT_A_NUMBER)),
    ("tpo_l", "alpha"): NOT_NEGATIVE,
    ("tpo_l", "label_smoothing"): SMOOTHING,
}
"""Every key of every objective. The bounds come from the papers, not from the classes."""

TOGETHER: dict[str, dict[str, tuple[Any, ...]]] = {
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


# (1)


@every_objective
@weighted_or_not
def test_gradients_are_finite_differences(name: str, weighted: bool):
    for seed, objective in enumerate(variants(name)):
        batch = make_batch(objective, seed=seed, rows=3, weighted=weighted, later=seed % 2 == 1)
        logps = [batch[leg].logps.clone().requires_grad_() for leg in batch]

        def loss(*logps: torch.Tensor, objective: Objective = objective, batch=batch) -> torch.Tensor:
            return objective(with_logps(batch, dict(zip(batch, logps, strict=True)))).loss(batch.counts())

        assert torch.autograd.gradcheck(loss, logps, fast_mode=False)
        assert any(slope.abs().sum() > 0 for slope in loss_and_grad(objective, batch)[1].values())


# (2)


@every_objective
@weighted_or_not
@given(seed=seeds, later=st.booleans(), junk=st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 0.0]))
def test_masked_places_change_nothing(name: str, weighted: bool, seed: int, later: bool, junk: float):
    """Bit for bit: what the model says about padding is never read."""
    objective = build(name)
    batch = make_batch(objective, seed=seed, weighted=weighted, dtype=torch.float32, later=later)
    expected_loss, expected_grad = loss_and_grad(objective, batch)
    spoiled = with_junk(batch, junk)
    loss, grad = loss_and_grad(objective, spoiled)
    assert torch.equal(loss, expected_loss)
    for leg in batch:
        assert torch.equal(grad[leg], expected_grad[leg])
        assert (grad[leg][~batch[leg].mask] == 0).all()
    for key, metric in objective(spoiled).metrics.items():
        assert torch.equal(metric.total, objective(batch).metrics[key].total), key
    assert spoiled.counts() == batch.counts()
    if isinstance(objective, Stateful):
        for key, value in objective.observe(spoiled).items():
            assert torch.equal(value, objective.observe(batch)[key]), key


# (3)


@every_objective
@weighted_or_not
@given(seed=seeds, later=st.booleans(), cuts=st.lists(st.integers(0, 6), min_size=1, max_size=3))
def test_microbatches_add_up(name: str, weighted: bool, seed: int, later: bool, cuts: list[int]):
    """Loss, gradient, counts and metrics; a part may be empty or of one label, and differ in rows and in tokens."""
    objective = build(name)
    batch = make_batch(objective, seed=seed, rows=6, weighted=weighted, later=later)
    edges = [0, *sorted(cuts), 6]
    parts = [rows_of(batch, slice(start, end)) for start, end in itertools.pairwise(edges)]
    whole_loss, whole_grad = loss_and_grad(objective, batch)
    shares = [loss_and_grad(objective, part, batch.counts()) for part in parts]

    assert_close(sum(loss for loss, _ in shares), whole_loss, **FP64_ROUNDING)
    for leg in batch:
        assert_close(torch.cat([grad[leg] for _, grad in shares]), whole_grad[leg], **FP64_ROUNDING)
    for unit, count in batch.counts().items():
        assert sum(part.counts()[unit] for part in parts) == count
    for key, metric in objective(batch).metrics.items():
        assert metric.count > 0, key  # the batch has both labels; a part need not
        each = [objective(part).metrics[key] for part in parts]
        assert_close(sum(m.total for m in each), metric.total, **FP64_ROUNDING)
        assert sum(m.count for m in each) == metric.count
    if isinstance(objective, Stateful):
        for key, value in objective.observe(batch).items():
            assert_close(sum(objective.observe(part)[key] for part in parts), value, **FP64_ROUNDING)


# (4)


@every_objective
@weighted_or_not
@given(seed=seeds, later=st.booleans(), order=st.permutations(range(5)))
def test_rows_may_be_permuted(name: str, weighted: bool, seed: int, later: bool, order: list[int]):
    objective = build(name)
    batch = make_batch(objective, seed=seed, rows=5, weighted=weighted, later=later)
    index = torch.tensor(order)
    loss, grad = loss_and_grad(objective, batch)
    permuted_loss, permuted_grad = loss_and_grad(objective, rows_of(batch, index))
    assert_close(permuted_loss, loss, **FP64_ROUNDING)
    for leg in batch:
        assert_close(permuted_grad[leg], grad[leg][index], **FP64_ROUNDING)


# (5)


@every_objective
@weighted_or_not
@given(seed=seeds, later=st.booleans(), extra=st.integers(1, 40))
def test_padding_columns_change_nothing(name: str, weighted: bool, seed: int, later: bool, extra: int):
    """Up to rounding only: a longer sum may be added up in another order."""
    objective = build(name)
    batch = make_batch(objective, seed=seed, weighted=weighted, later=later)
    wide = with_columns(batch, extra)
    loss, grad = loss_and_grad(objective, batch)
    wide_loss, wide_grad = loss_and_grad(objective, wide)
    assert wide.counts() == batch.counts()
    assert_close(wide_loss, loss, **FP64_ROUNDING)
    for leg in batch:
        width = batch[leg].logps.shape[1]
        assert_close(wide_grad[leg][:, :width], grad[leg], **FP64_ROUNDING)
        assert (wide_grad[leg][:, width:] == 0).all()
    if isinstance(objective, Stateful):
        for key, value in objective.observe(wide).items():
            assert_close(value, objective.observe(batch)[key], **FP64_ROUNDING)


# (6)


def assert_finite(objective: Objective, batch: Any) -> None:
    loss, grad = loss_and_grad(objective, batch)
    assert loss.isfinite(), loss
    for leg, slopes in grad.items():
        assert slopes.isfinite().all(), leg
    for key, metric in objective(batch).metrics.items():
        assert metric.total.isfinite(), key
    if isinstance(objective, Stateful):
        for key, value in objective.update(batch.state, objective.observe(batch)).items():
            assert value.isfinite(), key


@every_objective
@weighted_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_finite_everywhere(name: str, weighted: bool, dtype: torch.dtype):
    """At the reference, and where policy or reference all but excludes a response: up to 10⁵ nats a token."""
    for objective in variants(name):
        options = {"seed": 3, "dtype": dtype, "weighted": weighted}
        assert_finite(objective, make_batch(objective, at_reference=True, **options))
        assert_finite(objective, make_batch(objective, at_reference=True, later=True, **options))
        for scale in (0.0, 1e-30, 1e3, 1e5):
            extreme = make_batch(objective, scale=scale, **options)
            assert_finite(objective, extreme)
            assert_finite(objective, after_a_step(objective, extreme))
            # Each leg in turn certain under the policy, so that margins go to both extremes.
            for leg in extreme:
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


@every_objective
@weighted_or_not
@given(seed=seeds, rows=st.integers(1, 5))
def test_step0_is_what_it_says(name: str, weighted: bool, seed: int, rows: int):
    for objective in variants(name):
        if objective.step0 is not None:
            batch = make_batch(objective, seed=seed, rows=rows, weighted=weighted, at_reference=True)
            loss, _ = loss_and_grad(objective, batch)
            assert loss.item() == pytest.approx(objective.step0, rel=1e-12)


@every_objective
def test_step0_is_given_where_it_exists(name: str):
    """None is for losses that depend on the data even where the policy is the reference."""
    for objective in variants(name):
        if objective.step0 is None:
            batches = [make_batch(objective, seed=seed, rows=5, at_reference=True) for seed in range(8)]
            assert len({round(loss_and_grad(objective, batch)[0].item(), 9) for batch in batches}) > 1, objective


# (8)


@every_objective
def test_what_was_declared_is_asked_for_by_name(name: str):
    """What data or trainer failed to supply is a clear error, not a wrong number."""
    for objective in variants(name):
        batch = make_batch(objective, seed=5)
        assert tuple(batch) == objective.needs.legs
        objective(batch)  # nothing beyond what is declared is in the batch, and nothing beyond it is read
        for missing in batch:
            rest = {leg: batch[leg] for leg in batch if leg != missing}
            with pytest.raises(KeyError, match=f"no leg '{missing}'"):
                objective(replace(batch, legs=rest))
        if objective.needs.reference:
            with pytest.raises(ValueError, match="reference"):
                objective(map_legs(batch, lambda leg: replace(leg, ref_logps=None)))
        for known in PER_ROW:
            if getattr(objective.needs, known):
                with pytest.raises(ValueError, match=f"the rows have no {known} here"):
                    objective(replace(batch, **{known: None}))


@every_objective
def test_what_was_not_declared_is_not_read(name: str):
    """A further leg, a reference, labels or density ratios where none are declared, full of NaN."""
    for objective in variants(name):
        batch = make_batch(objective, seed=6)
        first = batch[objective.needs.legs[0]]
        nan = replace(first, logps=torch.full_like(first.logps, math.nan))
        more = replace(batch, legs={"undeclared": nan, "gold": nan, **batch.legs})
        if not objective.needs.labels:
            more = replace(more, labels=torch.tensor([True, False, True, True]))
        if objective.needs.density_ratio is None:
            more = replace(more, density_ratio=torch.full((4,), math.nan, dtype=torch.float64))
        counts, output, expected = batch.counts(), objective(more), objective(batch)
        assert torch.equal(output.loss(counts), expected.loss(counts))
        assert output.metrics == expected.metrics, "metrics say the same, and of the same legs"
        if not objective.needs.reference:
            more = map_legs(more, lambda leg: replace(leg, ref_logps=torch.full_like(leg.logps, math.nan)))
            assert torch.equal(objective(more).loss(counts), expected.loss(counts))


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


@every_objective
@weighted_or_not
def test_the_reference_gets_no_gradient(name: str, weighted: bool):
    """Even where somebody forgot to compute it without one."""
    objective = build(name)
    batch = make_batch(objective, seed=7, weighted=weighted)

    def attach(key: str, values: torch.Tensor) -> torch.Tensor:
        return values.clone().requires_grad_() if key in ("logps", "ref_logps") else values

    attached = map_legs(batch, lambda leg: map_tensors(leg, attach))
    objective(attached).loss(attached.counts()).backward()
    for leg in attached:
        assert attached[leg].ref_logps is None or attached[leg].ref_logps.grad is None
    assert any(attached[leg].logps.grad is not None for leg in attached)


@every_objective
@weighted_or_not
def test_metrics_carry_no_graph_and_have_counts(name: str, weighted: bool):
    objective = build(name)
    batch = make_batch(objective, seed=8, weighted=weighted)
    batch = map_legs(batch, lambda leg: replace(leg, logps=leg.logps.requires_grad_()))
    output = objective(batch)
    assert output.metrics
    for key, metric in output.metrics.items():
        assert re.fullmatch(r"[a-z_]+/[a-z_]+", key), f"metric names look like rewards/margins, not {key!r}"
        assert not metric.total.requires_grad, key
        assert metric.total.shape == (), key
        assert metric.count > 0, key
    assert output.terms
    for key, term in output.terms.items():
        assert term.total.requires_grad, key
        assert term.per in batch.counts(), key


@every_objective
@weighted_or_not
def test_nothing_it_is_given_is_edited(name: str, weighted: bool):
    objective = build(name)
    batch = make_batch(objective, seed=9, weighted=weighted)
    before = map_legs(batch, lambda leg: map_tensors(leg, lambda _, values: values.clone()))
    before = replace(map_known(before, torch.clone), state={key: value.clone() for key, value in batch.state.items()})
    loss_and_grad(objective, batch)
    after_a_step(objective, batch)
    for key in PER_ROW:
        assert_close(getattr(batch, key), getattr(before, key))
    assert_close(dict(batch.state), dict(before.state))
    for leg in batch:
        map_tensors(batch[leg], lambda key, values, leg=leg: assert_close(values, getattr(before[leg], key)) or values)


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
        for leg in batch:
            assert_close(grad[leg].double(), double_grad[leg], **FP32_ROUNDING)


# (9)


def test_every_key_is_in_the_table():
    """A new objective, or a new key, has to say here what its values may be."""
    there = {(name, field.name) for name in OBJECTIVES for field in fields(OBJECTIVES[name])}
    assert set(KEYS) == there


@every_objective
def test_recipe_to_objective_to_recipe_is_the_identity(name: str):
    for objective in variants(name):
        recipe = json.loads(json.dumps({"name": OBJECTIVES.name_of(objective), **asdict(objective)}))
        assert recipe["name"] == name
        again = OBJECTIVES[recipe.pop("name")](**recipe)
        assert again == objective
        assert asdict(again) == recipe


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
    path = VECTORS / f"{name}.json"
    assert path.is_file(), f"add {path.name}: numbers of another implementation"
    vectors = json.loads(path.read_text(encoding="utf-8"))
    assert vectors["cases"]
    assert vectors["source"].strip()
    assert vectors["versions"]
    assert (VECTORS.parents[1] / vectors["made_by"]).is_file()
