"""Token weights: laws for all that are registered, and goldfish, TALR, FLOW and DFT against numbers of others.

How they are put together and applied to a batch is in ``test_weighting``; what holds for weights of rows, in
``test_sample_weights``.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import FrozenInstanceError, asdict, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from objectives import TOKEN_WEIGHTS, AdaptiveWeight, Leg, LegBatch, MaskWeight, SampleWeight, TokenWeight
from objectives.registry import field_docs, formula, source
from objectives.sample_weights import LinUpper
from objectives.sft import SFT
from objectives.token_weights import DFT, FLOW, TABLE_SIZE, TALR, Goldfish, goldfish_table, median
from tests.objectives import transcriptions_weights as transcriptions
from tests.objectives.batches import (
    FP64_ROUNDING,
    SIX_PLACES,
    TRANSCRIPTION,
    loss_and_grad,
    make_leg,
    make_rows,
    ragged,
    rows_of,
    with_columns,
    with_junk,
)
from tests.objectives.test_conformance import NOT_A_NUMBER, Values, configs
from tests.support import VECTORS

every_weight = pytest.mark.parametrize("name", TOKEN_WEIGHTS.names())
masks = [name for name in TOKEN_WEIGHTS.names() if isinstance(TOKEN_WEIGHTS[name](), MaskWeight)]
adaptive = [name for name in TOKEN_WEIGHTS.names() if isinstance(TOKEN_WEIGHTS[name](), AdaptiveWeight)]
sampled = [name for name in TOKEN_WEIGHTS.names() if isinstance(TOKEN_WEIGHTS[name](), SampleWeight)]
relative = [name for name in adaptive if TOKEN_WEIGHTS[name].over != "token"]
"""Those with a temperature that is estimated."""
every_mask = pytest.mark.parametrize("name", masks)
every_adaptive = pytest.mark.parametrize("name", adaptive)
every_relative = pytest.mark.parametrize("name", relative)
seeds = st.integers(0, 1000)

LEGS = Values(allowed=((), ("gold",)), refused=())

SAMPLED = {
    "temperature": Values(allowed=(1e-300, 0.4, 1e6), refused=(0.0, -1.0, *NOT_A_NUMBER)),
    "warmup_steps": Values(allowed=(0, 1000), refused=(-1,)),
    "legs": LEGS,
}
KEYS: dict[tuple[str, str], Values] = {
    **{(name, key): values for name in ("lin_upper", "quadratic", "extremes") for key, values in SAMPLED.items()},
    ("dft", "legs"): LEGS,
    ("flow", "legs"): LEGS,
    ("goldfish", "k"): Values(allowed=(2, 4, 128), refused=(1, 0, -3)),
    ("goldfish", "h"): Values(allowed=(1, 4, 13), refused=(0, -1)),
    ("goldfish", "strategy"): Values(allowed=("hash", "static"), refused=("hash-table", "seeded_random", "")),
    ("goldfish", "start"): Values(allowed=(0, 1), refused=(-1, 4, 5)),
    ("goldfish", "legs"): LEGS,
    ("talr", "min_weight"): Values(allowed=(1e-50, 0.01, 1), refused=(0.0, -0.1, 1.01, *NOT_A_NUMBER)),
    ("talr", "min_tau"): Values(allowed=(1e-300, 1e-6, 0.5), refused=(0.0, -1.0, *NOT_A_NUMBER)),
    ("talr", "legs"): LEGS,
}
"""Every key of every token weight, with what a recipe may and may not say."""


def variants(name: str) -> list[Any]:
    """The weight under its defaults and with every combination of allowed values."""
    allowed = {key: values.allowed for (weight, key), values in KEYS.items() if weight == name}
    return [TOKEN_WEIGHTS[name](), *(TOKEN_WEIGHTS[name](**config) for config in configs(allowed))]


def leg_of(seed: int, rows: int = 4, **options: Any) -> Leg:
    generator = torch.Generator().manual_seed(seed)
    return make_leg(generator=generator, rows=rows, width=6, reference=True, **options)


def alone(leg: Leg) -> LegBatch:
    return LegBatch(legs={"gold": leg})


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# Laws of registration.


def test_the_registry_is_not_empty():
    assert sorted([*masks, *adaptive, *sampled]) == sorted(TOKEN_WEIGHTS.names())
    assert {"flow", "goldfish", "talr", "dft", "lin_upper", "quadratic", "extremes"} <= set(TOKEN_WEIGHTS.names())


def test_every_key_is_in_the_table():
    assert set(KEYS) == {(name, field.name) for name in TOKEN_WEIGHTS for field in fields(TOKEN_WEIGHTS[name])}


@every_weight
def test_docstrings_have_formula_source_and_keys(name: str):
    cls = TOKEN_WEIGHTS[name]
    assert re.match(r"weight_[ti] = ", formula(cls)), "the first indented block is the formula"
    assert re.search(r"arXiv:\d{4}\.\d{5}", source(cls)), "References: with something to look up"
    docs = field_docs(cls)
    for field in fields(cls):
        assert docs.get(field.name, "").strip(), f"write a docstring under {name}.{field.name}"


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [(name, key, value) for (name, key), values in KEYS.items() for value in values.refused],
)
def test_values_out_of_range_are_refused_by_name(name: str, key: str, value: object):
    with pytest.raises(ValueError, match=rf"^{key} must be .*got {re.escape(repr(value))}$"):
        TOKEN_WEIGHTS[name](**{key: value})


@every_weight
def test_recipe_to_weight_to_recipe_is_the_identity(name: str):
    for weight in variants(name):
        recipe = json.loads(json.dumps(asdict(weight)))
        assert TOKEN_WEIGHTS[name](**{**recipe, "legs": tuple(recipe["legs"])}) == weight


@every_weight
def test_weights_are_frozen_and_keys_are_checked(name: str):
    for field in fields(TOKEN_WEIGHTS[name]):
        with pytest.raises(FrozenInstanceError):
            setattr(TOKEN_WEIGHTS[name](), field.name, None)
    with pytest.raises(TypeError, match="no_such_key"):
        TOKEN_WEIGHTS[name](no_such_key=1)


@every_weight
def test_there_are_vectors_with_their_provenance(name: str):
    vectors = json.loads((VECTORS / "weights" / f"{name}.json").read_text(encoding="utf-8"))
    assert vectors["cases"]
    assert vectors["source"].strip()
    assert vectors["versions"]
    assert (VECTORS.parents[1] / vectors["made_by"]).is_file()


# Laws of masks.


def sequence(seed: int, length: int, vocabulary: int = 50_000) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, vocabulary, length)


@every_mask
@given(seed=seeds, length=st.integers(0, 30), start=st.integers(0, 30))
def test_masks_are_one_boolean_per_response_token(name: str, seed: int, length: int, start: int):
    """For any integers that ids are stored as, also read-only ones; equal ids always give equal masks."""
    tokens, start = sequence(seed, length), min(start, length)
    tokens.flags.writeable = False
    for weight in variants(name):
        kept = weight.keep(tokens, start)
        assert kept.dtype == bool
        assert kept.shape == (length - start,)
        for dtype in (np.uint16, np.int32, np.uint32):
            assert np.array_equal(weight.keep(tokens.astype(dtype), start), kept)


@every_mask
@given(seed=seeds, length=st.integers(1, 40), cut=st.integers(0, 40))
def test_masks_do_not_look_ahead(name: str, seed: int, length: int, cut: int):
    """What follows decides nothing, so a truncated response loses the same tokens."""
    tokens, start = sequence(seed, length), length // 3
    cut = min(max(cut, start), length)
    for weight in variants(name):
        assert np.array_equal(weight.keep(tokens[:cut], start), weight.keep(tokens, start)[: cut - start])


@every_mask
def test_idle_keys_change_no_mask(name: str):
    tokens = sequence(1, 60)
    for weight in variants(name):
        for key, reason in weight.idle().items():
            assert reason.strip()
            for value in KEYS[name, key].allowed:
                assert np.array_equal(replace(weight, **{key: value}).keep(tokens, 5), weight.keep(tokens, 5)), key


# Laws of adaptive weights.


def taus(weight: AdaptiveWeight, leg: Leg) -> list[Tensor]:
    """Its own rows', and the extremes of what a state may hold."""
    return [weight.tau(weight.losses(leg)), weight.tau(torch.zeros(1, dtype=torch.float64)), number(math.inf)]


@pytest.mark.slow
@every_adaptive
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_adaptive_weights_are_positive_and_at_most_one(name: str, dtype: torch.dtype):
    """Also for certain tokens, for those that are all but excluded, and whatever the limits: a zero changes counts."""
    for weight in variants(name):
        for scale in (0.0, 1e-30, 1.0, 1e3, 1e5):
            leg = leg_of(1, dtype=dtype, scale=scale)
            mixed = torch.tensor([0.0, -1e5, -1e-30, -1.0, 0.0, -1e5], dtype=dtype).expand(4, 6)
            for each in (leg, replace(leg, logps=mixed, ref_logps=mixed.flip(0, 1))):
                for tau in taus(weight, each):
                    values = weight(each, tau)
                    assert values.dtype == dtype
                    assert (values > 0).all(), (weight, tau)
                    assert (values <= 1).all(), (weight, tau)
                    for key, metric in weight.metrics(each, tau).items():
                        assert metric.total.isfinite(), key


@every_relative
def test_an_infinite_temperature_weighs_nothing(name: str):
    """The state before the first step: every weight is exactly 1, not only nearly."""
    leg = leg_of(2, scale=1e5)
    assert (TOKEN_WEIGHTS[name]()(leg, number(math.inf)) == 1).all()


@every_adaptive
@given(seed=seeds, junk=st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 0.0]))
def test_masked_places_change_nothing(name: str, seed: int, junk: float):
    weight, batch = TOKEN_WEIGHTS[name](), alone(leg_of(seed, dtype=torch.float32))
    leg, spoiled = batch["gold"], with_junk(batch, junk)["gold"]
    assert torch.equal(weight.losses(spoiled), weight.losses(leg))
    tau = weight.tau(weight.losses(leg))
    assert torch.equal(weight(spoiled, tau), weight(leg, tau))
    assert weight.metrics(spoiled, tau) == weight.metrics(leg, tau)


@every_adaptive
@given(seed=seeds, extra=st.integers(1, 40))
def test_padding_columns_change_nothing(name: str, seed: int, extra: int):
    weight, batch = TOKEN_WEIGHTS[name](), alone(leg_of(seed))
    leg, wide = batch["gold"], with_columns(batch, extra)["gold"]
    assert_close(weight.losses(wide), weight.losses(leg), **FP64_ROUNDING)
    tau = weight.tau(weight.losses(leg))
    assert_close(weight(wide, tau)[:, :6], weight(leg, tau), **FP64_ROUNDING)
    for key, metric in weight.metrics(leg, tau).items():
        assert_close(weight.metrics(wide, tau)[key].total, metric.total, **FP64_ROUNDING)
        assert weight.metrics(wide, tau)[key].count == metric.count


@every_adaptive
@given(seed=seeds, cut=st.integers(0, 6), order=st.permutations(range(6)))
def test_rows_may_be_split_and_permuted(name: str, seed: int, cut: int, order: list[int]):
    """Losses of microbatches are concatenated, in any order; weights of a row depend on it and on τ alone."""
    weight, leg = TOKEN_WEIGHTS[name](), leg_of(seed, rows=6)

    chosen = (slice(0, cut), slice(cut, 6), torch.tensor(order))
    parts = [rows_of(alone(leg), index)["gold"] for index in chosen]
    together = torch.cat([weight.losses(part) for part in parts[:2]])
    tau = weight.tau(weight.losses(leg))
    for losses in (together, weight.losses(parts[2])):
        assert_close(weight.tau(losses), tau, **FP64_ROUNDING)
    assert_close(torch.cat([weight(part, tau) for part in parts[:2]]), weight(leg, tau), **FP64_ROUNDING)
    assert_close(weight(parts[2], tau), weight(leg, tau)[torch.tensor(order)], **FP64_ROUNDING)


@every_relative
def test_rows_without_tokens_have_no_part_in_the_median(name: str):
    weight, leg = TOKEN_WEIGHTS[name](), leg_of(3)
    cut = replace(leg, mask=leg.mask & torch.tensor([[True], [False], [True], [False]]))
    assert torch.equal(weight.losses(cut), weight.losses(leg)[[0, 2]])
    nothing = replace(leg, mask=torch.zeros_like(leg.mask))
    assert weight.losses(nothing).shape == (0,)
    assert weight.tau(weight.losses(nothing)).item() == math.inf
    assert weight(nothing, number(0.5)).isfinite().all()
    for metric in weight.metrics(nothing, number(0.5)).values():
        assert metric.total.isfinite()


@every_adaptive
def test_weights_carry_no_graph(name: str):
    """Nor do the numbers that τ is made of, and metrics."""
    leg = leg_of(4)
    leg = replace(leg, logps=leg.logps.requires_grad_(), ref_logps=leg.ref_logps.requires_grad_())
    weight = TOKEN_WEIGHTS[name]()
    tau = weight.tau(weight.losses(leg))
    assert not tau.requires_grad
    assert not weight(leg, tau).requires_grad
    for key, metric in weight.metrics(leg, tau).items():
        assert not metric.total.requires_grad, key


# Goldfish.


def dropped(response: list[int], prompt: tuple[int, ...] = (99,), **config: Any) -> list[int]:
    """Which response tokens are dropped, counted from 0."""
    kept = Goldfish(**config).keep(np.array([*prompt, *response]), len(prompt))
    return np.flatnonzero(~kept).tolist()


COUNTING, REPEATING = list(range(11, 23)), [3, 5, 7] * 4


def cases(name: str) -> list[Any]:
    found = json.loads((VECTORS / "weights" / f"{name}.json").read_text(encoding="utf-8"))["cases"]
    return [pytest.param(case, id=case["name"]) for case in found]


@pytest.mark.parametrize("case", cases("goldfish"))
def test_goldfish_vector(case: dict[str, Any]):
    """Masks of the authors' code, of the response alone."""
    kept = Goldfish(**case["config"]).keep(np.array(case["tokens"]), case["prompt_length"])
    assert kept.tolist() == case["keep"]


def test_static_by_hand():
    """Every fourth of twelve targets, which are the tokens after the sequence's first; the prompt's count as well.

    After a prompt of three the response's tokens are targets 2, 3, …: 4 and 8 stand at 2 and 6, 3 and 7 at 1 and 5.
    """
    assert dropped(COUNTING, strategy="static") == [0, 4, 8]
    assert dropped(COUNTING, strategy="static", start=3) == [3, 7, 11]
    assert dropped(COUNTING, (97, 98, 99), strategy="static") == [2, 6, 10]
    assert dropped(COUNTING, (97, 98, 99), strategy="static", start=3) == [1, 5, 9]


def test_the_table():
    """Equal on every machine, because it is always drawn on the CPU."""
    assert goldfish_table().shape == (TABLE_SIZE,)
    assert goldfish_table().dtype == np.float32
    assert goldfish_table()[:4].tolist() == pytest.approx([0.233684, 0.441264, 0.741148, 0.909272], **SIX_PLACES)
    assert goldfish_table() is goldfish_table()


def test_hash_by_hand():
    """Windows of four out of 11 … 22: 11·12·13·14 = 24024 and so on; two keys have values below 1/4."""
    keys = [math.prod(range(first, first + 4)) for first in range(11, 20)]
    assert keys == [24024, 32760, 43680, 57120, 73440, 93024, 116280, 143640, 175560]
    values = [0.075672, 0.533683, 0.725924, 0.521747, 0.251484, 0.353359, 0.222519, 0.640540, 0.933870]
    assert goldfish_table()[keys].tolist() == pytest.approx(values, **SIX_PLACES)
    assert dropped(COUNTING, h=4) == [3, 9]
    assert dropped(COUNTING, h=3) == [6, 10]


def test_the_product_does_not_know_the_order():
    """All windows of 3, 5, 7, 3, 5, 7, … have the key 105, whose value is 0.840851: none is dropped."""
    assert goldfish_table()[105] == pytest.approx(0.840851, **SIX_PLACES)
    assert dropped(REPEATING, h=3) == dropped(REPEATING, h=4) == []


def test_the_window_holds_the_token_itself():
    """With h = 1 a token's own id decides: id 0 (0.233684) is dropped for k ≤ 4, ids 1, 2 and 3 are not."""
    assert dropped([1, 0, 2, 3, 0], h=1, k=4) == [1, 4]
    assert dropped([1, 0, 2, 3, 0], h=1, k=5) == []


def test_a_window_with_id_zero_is_dropped():
    """Its product is 0. From the third token on every window of three holds the 0 in the middle until it has left."""
    without = dropped([8, 9, 10, 11, 12, 13], h=3, k=4)
    assert set(dropped([8, 9, 0, 11, 12, 13], h=3, k=4)) >= {2, 3, 4}
    assert not {2, 3, 4} <= set(without)


@given(
    seed=seeds,
    length=st.integers(0, 60),
    prompt=st.integers(0, 20),
    k=st.sampled_from([2, 3, 4, 32]),
    h=st.sampled_from([1, 3, 4, 13]),
    vocabulary=st.sampled_from([8, 50_000, 200_000]),
)
def test_hash_is_what_the_authors_compute(seed: int, length: int, prompt: int, k: int, h: int, vocabulary: int):
    """Products of int64 wrap around, which 13 ids of a common vocabulary do; also by torch's own product."""
    tokens = np.random.default_rng(seed).integers(0, vocabulary, prompt + length)
    kept = Goldfish(k=k, h=h).keep(tokens, prompt)
    ids = tokens.tolist()
    table = goldfish_table()
    assert kept.tolist() == transcriptions.goldfish_hash_int64(ids, k=k, h=h, table=table)[prompt:]
    expected = torch.ones(len(ids), dtype=torch.bool)
    if len(ids) > h:
        keys = torch.tensor(ids[1:]).unfold(0, h, 1).prod(dim=-1) % TABLE_SIZE
        expected[h:] = torch.from_numpy(table)[keys] >= 1 / k
    assert kept.tolist() == expected[prompt:].tolist()


def test_exact_products_would_give_another_mask():
    tokens = sequence(1, 400)
    kept = Goldfish(h=13).keep(tokens, 1).tolist()
    assert kept != transcriptions.goldfish_hash(tokens.tolist(), k=4, h=13, table=goldfish_table())[1:]


@given(seed=seeds, prompt=st.integers(1, 30), k=st.sampled_from([2, 3, 4]), start=st.integers(0, 1))
def test_static_is_what_the_authors_compute(seed: int, prompt: int, k: int, start: int):
    tokens = sequence(seed, prompt + 20)
    theirs = transcriptions.goldfish_static(tokens.tolist(), k=k, start=start)
    assert Goldfish(strategy="static", k=k, start=start).keep(tokens, prompt).tolist() == theirs[prompt:]


@given(seed=seeds, h=st.sampled_from([1, 4, 13]), first=st.integers(1, 30), second=st.integers(1, 30))
def test_a_passage_loses_the_same_tokens_wherever_it_stands(seed: int, h: int, first: int, second: int):
    """After another prompt and at another offset, but for the tokens whose window still reaches what is before."""
    passage = sequence(seed, 80)
    masks_of_passage = []
    for prompt_seed, length in ((seed + 1, first), (seed + 2, second)):
        before = sequence(prompt_seed, length)
        # The prompt ends in the passage's middle of the sequence, or before it: it makes no difference.
        for start in (length, length // 2):
            kept = Goldfish(h=h).keep(np.concatenate([before, passage]), start)
            masks_of_passage.append(kept[length - start :][h - 1 :])
    for other in masks_of_passage[1:]:
        assert np.array_equal(other, masks_of_passage[0])
    assert not masks_of_passage[0].all()


def test_a_window_spans_the_prompt():
    """The fourth token of a sequence has a window of four only with the first three, which are the prompt's."""
    tokens = [99, *COUNTING]
    kept = Goldfish(h=4).keep(np.array(tokens), 4)
    assert np.flatnonzero(~kept).tolist() == [0, 6]  # those numbered 3 and 9 where the response begins with 11


@pytest.mark.parametrize("length", range(14))
def test_sequences_shorter_than_the_window_keep_everything(length: int):
    """13 ids leave 12 targets, one fewer than the window; even id 0 is then kept."""
    assert Goldfish(h=13).keep(np.zeros(length, dtype=np.int64), 0).all()
    assert Goldfish(h=13).keep(np.zeros(14, dtype=np.int64), 0).tolist() == [True] * 13 + [False]


@pytest.mark.parametrize("k", [3, 4, 32])
def test_one_token_in_k_is_dropped(k: int):
    """At h = 13, over 40,000 random ids; standard error of a share of 1/4 is 0.002."""
    kept = Goldfish(k=k, h=13).keep(sequence(2, 40_000, 32_000), 1)
    assert (~kept).mean() == pytest.approx(1 / k, abs=0.01)


def test_the_loss_is_a_mean_over_what_is_kept():
    """Losses 1, 2, 0.5, 0.25, 3, 1.5, 0.75, 2.5 without the first and the fifth: 7.5/6 = 1.25; of all, 11.5/8."""
    losses = [1, 2, 0.5, 0.25, 3, 1.5, 0.75, 2.5]
    leg = make_rows([[-loss for loss in losses]])
    kept = Goldfish(strategy="static").keep(np.arange(9), 1)
    assert np.flatnonzero(~kept).tolist() == [0, 4]
    masked = replace(leg, weight=torch.from_numpy(kept).double()[None])
    assert loss_and_grad(SFT(), alone(masked))[0].item() == pytest.approx(1.25, rel=1e-14)
    assert loss_and_grad(SFT(), alone(leg))[0].item() == 1.4375


# TALR, FLOW and DFT.


def applied(weight: AdaptiveWeight, leg: Leg, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and slopes of supervised fine-tuning with these weights, computed with a graph through all of it."""
    leg = replace(leg, logps=leg.logps.detach().clone().requires_grad_())
    batch = alone(replace(leg, weight=weight(leg, tau)))
    loss = SFT()(batch).loss(batch.counts())
    (slopes,) = torch.autograd.grad(loss, leg.logps)
    return loss.detach(), slopes


THREE_ROWS = [[-0.1, -0.2, -2.0], [-0.05, -1.0], [-3.0, -0.5, -0.7, -0.2]]


def test_talr_by_hand():
    """Mean losses 2.3/3, 1.05/2 and 4.4/4, median τ = 0.766667; weight exp(−loss/τ); nine tokens. Plain: 0.861111."""
    leg = make_rows(THREE_ROWS)
    losses = TALR().losses(leg)
    assert losses.tolist() == pytest.approx([2.3 / 3, 0.525, 1.1])
    tau = TALR().tau(losses)
    assert tau.item() == pytest.approx(2.3 / 3)
    weights = [0.877714, 0.770381, 0.073631, 0.936864, 0.271349, 0.019980, 0.520912, 0.401301, 0.770381]
    assert TALR()(leg, tau)[leg.mask].tolist() == pytest.approx(weights, **SIX_PLACES)
    loss, slopes = applied(TALR(), leg, tau)
    assert loss.item() == pytest.approx(0.162520, **SIX_PLACES)
    assert slopes[leg.mask].tolist() == pytest.approx([-weight / 9 for weight in weights], **SIX_PLACES)
    assert loss_and_grad(SFT(), alone(leg))[0].item() == pytest.approx(0.861111, **SIX_PLACES)


def test_talr_floors():
    """τ = 0.5: a token of 10 nats would weigh e⁻²⁰ and weighs 0.01. Rows known by heart leave τ at its limit."""
    leg = make_rows([[-10.0, -0.5]])
    assert TALR()(leg, number(0.5)).tolist() == [[0.01, pytest.approx(math.exp(-1))]]
    assert TALR(min_weight=1.0)(leg, number(0.5)).tolist() == [[1.0, 1.0]]
    by_heart = make_rows([[0.0, 0.0], [0.0]])
    assert TALR(min_tau=0.25).tau(TALR().losses(by_heart)).item() == 0.25
    assert (TALR()(by_heart, TALR().tau(TALR().losses(by_heart))) == 1).all()


def test_talr_metrics_by_hand():
    """τ = 1, five tokens of probability 1, 1/2, 1/4, 0.19 and e⁻¹⁰: so their weights, but for a last one of 0.01."""
    leg = make_rows([[0.0, -math.log(2)], [-math.log(4), math.log(0.19), -10.0]])
    metrics = {key: (metric.total.item(), metric.count) for key, metric in TALR().metrics(leg, number(1.0)).items()}
    assert metrics == {
        "talr/weight": (pytest.approx(1.95), 5),
        "talr/at_floor": (1.0, 5),
        "talr/easy_tokens": (3.0, 5),
        "talr/tau": (5.0, 5),
    }
    assert "talr/tau" not in TALR().metrics(leg, number(math.inf))


def test_flow_by_hand():
    """Initial losses 0.8, 1.5, 0.4, 2.0, 1.1 per token, median 1.1: one weight per row, e⁻¹ for the median row."""
    initial = [[-0.8], [-1.5, -1.5], [-0.1, -0.7], [-2.0], [-1.1, -1.1, -1.1]]
    leg = make_rows([[-1.0] * len(row) for row in initial], initial)
    tau = FLOW().tau(FLOW().losses(leg))
    assert tau.item() == pytest.approx(1.1)
    weights = FLOW()(leg, tau)
    expected = [0.483225, 0.255729, 0.695144, 0.162321, 0.367879]
    for row, value in enumerate(expected):
        assert weights[row][leg.mask[row]].tolist() == pytest.approx([value] * len(initial[row]), **SIX_PLACES)
    metric = FLOW().metrics(leg, tau)["flow/weight"]
    assert (metric.total.item(), metric.count) == (pytest.approx(sum(expected), abs=3e-6), 5)
    loss, slopes = applied(FLOW(), leg, tau)
    tokens = sum(map(len, initial))
    weighted = sum(weight * len(row) for weight, row in zip(expected, initial, strict=True))
    assert loss.item() == pytest.approx(weighted / tokens, abs=1e-6)
    assert slopes[1, 0].item() == pytest.approx(-0.255729 / tokens, **SIX_PLACES)


def test_flow_looks_at_the_reference_only():
    leg = leg_of(5)
    moved = replace(leg, logps=leg.logps * 3)
    assert torch.equal(FLOW()(moved, number(0.7)), FLOW()(leg, number(0.7)))
    with pytest.raises(ValueError, match="flow weighs rows by the reference's log-probs, and there are none"):
        FLOW().losses(replace(leg, ref_logps=None))
    with pytest.raises(ValueError, match="reference"):
        FLOW()(replace(leg, ref_logps=None), number(0.7))


def test_dft_by_hand():
    """Tokens of probability 1, 1/2, 1/4 and e⁻¹⁰: weights are these, and Σ p·(−log p)/4 = (0 + .3466 + .3466 + …)/4."""
    logps = [[0.0, -math.log(2)], [-math.log(4), -10.0]]
    leg = make_rows(logps)
    assert DFT()(leg, number(1.0)).flatten().tolist() == pytest.approx([1, 0.5, 0.25, math.exp(-10)])
    loss, slopes = applied(DFT(), leg, number(1.0))
    assert loss.item() == pytest.approx((math.log(2) / 2 + math.log(4) / 4 + 10 * math.exp(-10)) / 4)
    assert slopes.flatten().tolist() == pytest.approx([-1 / 4, -1 / 8, -1 / 16, -math.exp(-10) / 4])
    metric = DFT().metrics(leg, number(1.0))["dft/weight"]
    assert (metric.total.item(), metric.count) == (pytest.approx(1.75 + math.exp(-10)), 4)


@given(seed=seeds, rows=st.integers(1, 6))
def test_dft_is_what_the_paper_says(seed: int, rows: int):
    """And has no temperature: whatever it is given, no other number comes out."""
    leg = leg_of(seed, rows=rows)
    logps = ragged(leg.logps, leg)
    for tau in (1.0, 0.3, math.inf):
        loss, slopes = applied(DFT(), leg, number(tau))
        expected_loss, expected_slopes = transcriptions.weighted_nll(logps, transcriptions.dft(logps))
        assert loss.item() == pytest.approx(expected_loss, rel=1e-11)
        assert_close(slopes[leg.mask], flat(expected_slopes), **TRANSCRIPTION)


def test_an_even_median_is_the_mean_of_the_middle_two():
    """torch.median takes the lower: 0.525 in place of 0.645833."""
    assert median(torch.tensor([2.3 / 3, 0.525], dtype=torch.float64)).item() == pytest.approx(0.645833, **SIX_PLACES)
    assert median(number(3.0)[None]).item() == 3.0
    assert median(torch.tensor([4.0, 1.0, 3.0, 2.0])).item() == 2.5
    assert median(torch.tensor([])).item() == math.inf


@given(st.lists(st.floats(0, 100), min_size=1, max_size=9))
def test_median_is_what_its_definition_says(values: list[float]):
    ours = median(torch.tensor(values, dtype=torch.float64)).item()
    assert ours == pytest.approx(transcriptions.median(values), rel=1e-15)


def read(case: dict[str, Any]) -> Leg:
    arrays = {key: torch.tensor(values, dtype=torch.float64) for key, values in case["legs"]["response"].items()}
    return Leg(
        logps=arrays["logps"],
        mask=arrays["mask"].bool(),
        tokens=torch.zeros_like(arrays["mask"], dtype=torch.int64),
        ref_logps=arrays.get("initial_logps"),
    )


@pytest.mark.parametrize(
    ("weight", "case"),
    [
        *(pytest.param(TALR(min_weight=p.values[0]["config"]["floor"]), *p.values, id=p.id) for p in cases("talr")),
        *(pytest.param(FLOW(), *p.values, id=f"flow-{p.id}") for p in cases("flow")),
        *(pytest.param(DFT(), *p.values, id=f"dft-{p.id}") for p in cases("dft")),
    ],
)
def test_adaptive_vector(weight: TALR | FLOW | DFT, case: dict[str, Any]):
    leg, tau = read(case), number(case["state"]["temperature"])
    assert_close(weight.tau(weight.losses(leg)), tau, **FP64_ROUNDING)
    expected = torch.tensor(case["weight"], dtype=torch.float64).reshape(len(leg.mask), -1).expand_as(leg.logps)
    assert_close(weight(leg, tau)[leg.mask], expected[leg.mask], rtol=1e-10, atol=1e-12)
    loss, slopes = applied(weight, leg, tau)
    assert_close(loss, number(case["loss"]), rtol=1e-10, atol=1e-12)
    assert_close(slopes, torch.tensor(case["grad"]["response"], dtype=torch.float64), rtol=1e-10, atol=1e-12)


@given(seed=seeds, rows=st.integers(1, 6), floor=st.sampled_from([1e-3, 0.01, 0.3]))
def test_talr_is_what_the_paper_says(seed: int, rows: int, floor: float):
    leg = leg_of(seed, rows=rows)
    logps = ragged(leg.logps, leg)
    temperature = transcriptions.talr_temperature(logps)
    weights = transcriptions.talr(logps, temperature=temperature, floor=floor)
    weight = TALR(min_weight=floor)
    tau = weight.tau(weight.losses(leg))
    assert tau.item() == pytest.approx(temperature, rel=1e-12)
    assert_close(weight(leg, tau)[leg.mask], flat(weights), **TRANSCRIPTION)
    loss, slopes = applied(weight, leg, tau)
    expected_loss, expected_slopes = transcriptions.weighted_nll(logps, weights)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-11)
    assert_close(slopes[leg.mask], flat(expected_slopes), **TRANSCRIPTION)


@given(seed=seeds, rows=st.integers(1, 6))
def test_flow_is_what_the_paper_says(seed: int, rows: int):
    leg = leg_of(seed, rows=rows)
    initial = ragged(leg.ref_logps, leg)
    temperature = transcriptions.flow_temperature(initial)
    per_row = transcriptions.flow(initial, temperature=temperature)
    weights = [[weight] * len(row) for weight, row in zip(per_row, initial, strict=True)]
    tau = FLOW().tau(FLOW().losses(leg))
    assert tau.item() == pytest.approx(temperature, rel=1e-12)
    assert_close(FLOW()(leg, tau)[leg.mask], flat(weights), **TRANSCRIPTION)
    loss, slopes = applied(FLOW(), leg, tau)
    expected_loss, expected_slopes = transcriptions.weighted_nll(ragged(leg.logps, leg), weights)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-11)
    assert_close(slopes[leg.mask], flat(expected_slopes), **TRANSCRIPTION)


def flat(rows: transcriptions.Ragged) -> Tensor:
    return torch.tensor(list(itertools.chain.from_iterable(rows)), dtype=torch.float64)


def test_protocols_tell_the_kinds_apart():
    """A mask has no temperature, and an adaptive weight cannot drop."""
    kinds: list[TokenWeight] = [Goldfish(), TALR(), FLOW(), DFT(), LinUpper()]
    assert [isinstance(weight, MaskWeight) for weight in kinds] == [True, False, False, False, False]
    assert [isinstance(weight, AdaptiveWeight) for weight in kinds] == [False, True, True, True, False]
    assert [isinstance(weight, SampleWeight) for weight in kinds] == [False, False, False, False, True]
    assert (TALR.over, FLOW.over, DFT.over) == ("step", "dataset", "token")
