"""The installed TRL, called live: its losses are still those on record, and differ from ours where they are known to.

Recorded vectors say what TRL gave when they were made. Here it is asked again, so that a release that changes a formula
is noticed; another version than the recorded one is skipped. The differences are asserted as such, each with its
reason: should one of these tests fail after an update of TRL, a fault may be mended there, and a docstring of ours out
of date.

``tests.vectors.make`` has the scripts; importing them takes TRL, so that they are imported inside tests.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from objectives import MODIFIERS, LegBatch, Objective, modified, with_own_step
from tests.objectives.batches import SIX_PLACES, build, loss_and_grad, make_rows, map_legs, map_tensors, rows_of
from tests.vectors.reading import contents, matrix

pytestmark = pytest.mark.oracle

SCRIPTS = {
    "trl_dpo": ("dpo", "sft"),
    "trl_kto": ("apo_zero_unpaired", "kto"),
    "trl_modifiers": ("modifiers/f_divergence", "modifiers/ld_dpo", "modifiers/wpo"),
    "trl_pairs": (
        *("aot", "aot_unpaired", "apo_down", "apo_zero", "bco_pair", "discopop", "dpo_norm", "exo"),
        *("hinge", "ipo", "nca", "robust", "sppo"),
    ),
    "trl_reference_free": ("alpha_po", "cpo", "orpo", "simpo"),
    "trl_reward": ("bradley_terry", "margin_bt"),
    "trl_tpo": ("tpo", "tpo_l"),
}
"""The files that the installed TRL makes. ``bco``, ``bco_pair_shifted`` and ``irpo`` are older releases'."""


def imported(monkeypatch: pytest.MonkeyPatch, script: str) -> ModuleType:
    recorded = contents("dpo")["versions"]["trl"]
    try:
        installed = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("TRL is not installed")
    if installed != recorded:
        pytest.skip(f"vectors were recorded with TRL {recorded}, installed is {installed}")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    return importlib.import_module(f"tests.vectors.make.{script}")


@pytest.fixture
def trl(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The losses of the installed TRL on prescribed log-probs."""
    return imported(monkeypatch, "trl_stand_in")


@pytest.fixture
def small(trl: ModuleType) -> dict[str, Any]:
    """Two pairs whose numbers are round enough to follow by eye."""
    return importlib.import_module("tests.vectors.make.writing").SMALL


@pytest.mark.slow
def test_dynamic_fine_tuning_of_trl_gives_what_is_on_record(trl: ModuleType):
    for case in contents("weights/dft")["cases"]:
        response = case["legs"]["response"]
        rows = [row[: sum(mask)] for row, mask in zip(response["logps"], response["mask"], strict=True)]
        loss, slopes = trl.dft(rows)
        assert loss == pytest.approx(case["loss"], rel=1e-12)
        for found, on_record in zip(slopes, case["grad"]["response"], strict=True):
            assert found == pytest.approx(on_record[: len(found)], rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_trl_gives_what_is_on_record(script: str, monkeypatch: pytest.MonkeyPatch):
    files = imported(monkeypatch, script).files()
    assert sorted(files) == sorted(SCRIPTS[script])
    for name, cases in files.items():
        on_record = {case["name"]: case for case in contents(name)["cases"]}
        assert list(on_record) == [case["name"] for case in cases]
        for case in cases:
            record = on_record[case["name"]]
            assert {**case, "loss": 0, "grad": 0} == {**record, "loss": 0, "grad": 0}
            assert case["loss"] == pytest.approx(record["loss"], rel=1e-12, abs=1e-14)
            assert set(case["grad"]) == set(record["grad"])
            for leg, slopes in case["grad"].items():
                assert_close(matrix(slopes), matrix(record["grad"][leg]), rtol=1e-12, atol=1e-14)


def batch_of(legs: dict[str, Any], dtype: torch.dtype = torch.float64) -> LegBatch:
    made = {}
    for name, arrays in legs.items():
        extras = {"log_sum_p2": make_rows(arrays["log_sum_p2"]).logps} if "log_sum_p2" in arrays else {}
        made[name] = replace(make_rows(arrays["logps"], arrays.get("ref_logps")), extras=extras)

    def cast(_: str, values: Tensor) -> Tensor:
        return values.to(dtype) if values.is_floating_point() else values

    return map_legs(LegBatch(legs=made), lambda leg: map_tensors(leg, cast))


def ours(objective: Objective, legs: dict[str, Any], dtype: torch.dtype = torch.float64) -> float:
    """Our loss; it and every gradient is a number."""
    loss, grad = loss_and_grad(objective, with_own_step(objective, batch_of(legs, dtype)))
    assert loss.isfinite()
    assert all(slopes.nan_to_num().equal(slopes) for slopes in grad.values())
    return loss.item()


def under(modifier: str, objective: str, config: dict[str, Any], **keys: Any) -> Objective:
    changed, refusals = modified(objective, build(objective, **config), [(modifier, MODIFIERS[modifier](**keys))])
    assert refusals == {}
    return changed


def halves(legs: dict[str, Any]) -> list[dict[str, Any]]:
    rows = len(legs["chosen"]["logps"])
    parts = slice(0, rows // 2), slice(rows // 2, rows)
    return [{name: {key: rows[part] for key, rows in leg.items()} for name, leg in legs.items()} for part in parts]


def ours_in_halves(objective: Objective, legs: dict[str, Any]) -> float:
    """The sum of the shares of two microbatches in one step."""
    batch = with_own_step(objective, batch_of(legs))
    rows = batch.rows
    parts = [rows_of(batch, slice(0, rows // 2)), rows_of(batch, slice(rows // 2, rows))]
    return sum(objective(part).loss(batch.counts()).item() for part in parts)


@pytest.mark.slow
def test_sigmoid_of_trl_ignores_label_smoothing(trl: ModuleType, small: dict[str, Any]):
    """Since 0.29: ε has no effect there, where cDPO would cost 0.709279."""
    plain, smoothed = (trl.dpo(small, loss_type="sigmoid", beta=0.1, label_smoothing=eps)[0] for eps in (0.0, 0.1))
    assert plain == smoothed
    assert ours(build("dpo", beta=0.1, label_smoothing=0.1), small) == pytest.approx(0.709279, **SIX_PLACES)
    assert smoothed == pytest.approx(0.713029, **SIX_PLACES)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_sorts_of_trl_are_within_a_microbatch(trl: ModuleType, name: str):
    """TRL sorts what one device holds at a time, so that the loss of a step depends on how it is split.

    Ours sorts the step, and equals TRL's where the step is one microbatch.
    """
    legs = sums([-3.0, -9.0, -1.0, -5.0], [-4.0, -2.0, -7.0, -8.0], [-5.0, -2.0, -6.0, -1.0], [-3.0, -3.0, -2.0, -9.0])
    whole = trl.dpo(legs, loss_type=name, beta=0.1)[0]
    split = sum(trl.dpo(half, loss_type=name, beta=0.1)[0] for half in halves(legs)) / 2
    assert abs(whole - split) > 1e-3
    objective = build(name, beta=0.1)
    assert ours(objective, legs) == pytest.approx(whole, rel=1e-12)
    assert ours_in_halves(objective, legs) == pytest.approx(whole, rel=1e-12)


def sums(chosen: list[float], rejected: list[float], ref_chosen: list[float], ref_rejected: list[float]) -> Any:
    """Pairs of one token each."""
    values = {"chosen": (chosen, ref_chosen), "rejected": (rejected, ref_rejected)}
    return {name: {"logps": [[x] for x in a], "ref_logps": [[x] for x in b]} for name, (a, b) in values.items()}


def of_sft(trl: ModuleType) -> Callable[[Any], float]:
    return lambda legs: trl.dpo(legs, loss_type="sft", beta=0.1)[0]


def of_cpo(trl: ModuleType) -> Callable[[Any], float]:
    return lambda legs: trl.cpo(legs, loss_type="sigmoid", beta=0.1, cpo_alpha=1.0)[0]


def of_orpo(trl: ModuleType) -> Callable[[Any], float]:
    return lambda legs: trl.orpo(legs, beta=0.1)[0]


@pytest.mark.parametrize(
    ("theirs", "name", "config"),
    [
        (of_sft, "sft", {"leg": "chosen"}),
        (of_cpo, "cpo", {"beta": 0.1, "cpo_alpha": 1.0}),
        (of_orpo, "orpo", {"beta": 0.1}),
    ],
    ids=["sft", "cpo", "orpo"],
)
def test_likelihoods_of_trl_are_means_over_a_microbatch(
    trl: ModuleType, small: dict[str, Any], theirs: Any, name: str, config: dict[str, Any]
):
    """Responses of 3 and 2 tokens with an NLL of 3 and 2.25, in microbatches of one row.

    Per token of the step 5.25/5 = 1.05, as a mean over microbatches (1 + 1.125)/2 = 1.0625. The preference terms are
    means over rows, and add up.
    """
    loss = theirs(trl)
    whole, split = loss(small), sum(map(loss, halves(small))) / 2
    assert split - whole == pytest.approx(0.0125, rel=1e-9)
    objective = build(name, **config)
    needed = {leg: small[leg] for leg in objective.needs.legs}
    assert ours(objective, needed) == pytest.approx(whole, rel=1e-12)
    assert ours_in_halves(objective, needed) == pytest.approx(whole, rel=1e-12)


def test_orpo_of_trl_learns_the_prompt(trl: ModuleType, small: dict[str, Any]):
    """Its NLL covers all that is attended to. Where a prompt has one token, which nothing predicts, TRL's is ours.

    Two prompt tokens of −4 and −2 in both rows, beside five response tokens of −5.25 in all: 17.25/9, not 5.25/5.
    """
    loss = ours(build("orpo", beta=0.1), {name: {"logps": leg["logps"]} for name, leg in small.items()})
    assert loss == pytest.approx(1.124321, **SIX_PLACES)
    assert trl.orpo(small, beta=0.1)[0] == pytest.approx(loss, rel=1e-12)
    with_prompt = trl.orpo(small, beta=0.1, prompt=[[-4.0, -2.0], [-4.0, -2.0]])[0]
    assert with_prompt - loss == pytest.approx(17.25 / 9 - 5.25 / 5, rel=1e-12)


def test_alpha_po_of_trl_is_nan_where_the_probability_underflows(trl: ModuleType):
    """TRL takes exp(a) to the power −α, which is ∞ once exp(a) is 0; ∞ − ∞ follows.

    In single precision that is from −104 on, summed or per token. e^(−α·a), taken directly, is about 10¹¹ there.
    """
    legs = sums([-500.0], [-510.0], [0.0], [0.0])
    summed = {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 0.0, "alpha": 0.25}
    assert math.isnan(trl.cpo(legs, **summed, dtype=torch.float32)[0])
    legs = sums([-105.0], [-110.0], [0.0], [0.0])
    per_token = {"loss_type": "simpo", "beta": 2.5, "cpo_alpha": 0.0, "simpo_gamma": 0.1, "alpha": 0.25}
    assert math.isnan(trl.cpo(legs, **per_token, dtype=torch.float32)[0])
    assert math.isfinite(trl.cpo(legs, **per_token)[0])
    free = {name: {"logps": leg["logps"]} for name, leg in legs.items()}
    objective = build("alpha_po", beta=2.5, alpha=0.25, gamma=0.1)
    ours(objective, free, torch.float32)
    assert ours(objective, free) == pytest.approx(trl.cpo(legs, **per_token)[0], rel=1e-12)


WEIGHTS = {"chosen": [[-1.0, -1.5, -1.25], [-1.75, -1.0]], "rejected": [[-1.0, -1.0], [-1.5, -1.25, -2.0, -0.75]]}
"""log Σ p² of the small pairs: W is e^(0.25 + 0) and e^(0.25 + 0.375)."""

W = math.exp(0.25), math.exp(0.625)


def weighted(small: dict[str, Any]) -> dict[str, Any]:
    return {name: {**leg, "log_sum_p2": WEIGHTS[name]} for name, leg in small.items()}


def test_hinge_of_trl_cannot_be_weighted(trl: ModuleType, small: dict[str, Any]):
    """It multiplies in place what relu needs for its gradient."""
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        trl.dpo(weighted(small), loss_type="hinge", beta=0.1, use_weighting=True)
    loss = ours(under("wpo", "hinge", {"beta": 0.1}, clamp=False), weighted(small))
    assert loss == pytest.approx((W[0] * 0.95 + W[1] * 1.125) / 2, rel=1e-12)


def test_sft_of_trl_cannot_be_weighted(trl: ModuleType, small: dict[str, Any]):
    """It multiplies in place one number that is expanded to a row each.

    Here a likelihood term beside a preference is weighed row by row, and a likelihood alone has no pairs to weigh.
    """
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        trl.dpo(weighted(small), loss_type="sft", beta=0.1, use_weighting=True)
    loss = ours(under("wpo", "irpo", {"beta": 0.1, "alpha": 1.0}, clamp=False), weighted(small))
    assert loss == pytest.approx(1.136850 + (W[0] * 3 + W[1] * 2.25) / 5, **SIX_PLACES)
    _, refusals = modified("sft", build("sft"), [("wpo", MODIFIERS["wpo"]())])
    assert set(refusals) == {"wpo"}


def test_weights_of_trl_have_no_limit(trl: ModuleType, small: dict[str, Any]):
    """Here both are above 1, where the authors' code and TRL up to 0.28 leave the loss as it is."""
    legs = weighted(small)
    theirs = trl.dpo(legs, loss_type="sigmoid", beta=0.1, use_weighting=True)[0]
    assert theirs == pytest.approx(1.136850, **SIX_PLACES)
    assert ours(under("wpo", "dpo", {"beta": 0.1}, clamp=False), legs) == pytest.approx(theirs, rel=1e-12)
    assert ours(under("wpo", "dpo", {"beta": 0.1}), legs) == pytest.approx(0.713029, **SIX_PLACES)


def test_discopop_of_trl_overflows(trl: ModuleType):
    """For β·d < −88 e^−m is ∞ in single precision where the gate is 0. The loss there is the logistic one, 100."""
    legs = sums([-200.0], [-100.0], [-100.0], [-100.0])
    assert math.isnan(trl.dpo(legs, loss_type="discopop", beta=1.0, dtype=torch.float32)[0])
    loss = ours(build("discopop", beta=1.0), legs, torch.float32)
    assert loss == pytest.approx(100.0, rel=1e-6)
    assert loss == pytest.approx(trl.dpo(legs, loss_type="discopop", beta=1.0)[0], rel=1e-6)


def test_forward_kl_of_trl_overflows(trl: ModuleType):
    """e^−r is ∞ in single precision from r = −89 on, and the difference of two such scores is NaN."""
    legs = sums([-200.0], [-210.0], [-100.0], [-100.0])
    options = {"loss_type": "sigmoid", "beta": 0.1, "f_divergence_type": "forward_kl"}
    assert math.isnan(trl.dpo(legs, **options, dtype=torch.float32)[0])
    ours(under("f_divergence", "dpo", {"beta": 0.1}, divergence="forward_kl"), legs, torch.float32)


def test_bco_pair_of_trl_has_no_shift(trl: ModuleType, small: dict[str, Any]):
    """It was lost in 0.29. Rewards of the small pairs have the mean 0.00625."""
    theirs = trl.dpo(small, loss_type="bco_pair", beta=0.1)[0]
    assert theirs == pytest.approx(1.405864, **SIX_PLACES)
    objective = build("bco_pair", beta=0.1)
    batch = batch_of(small)
    state = objective.update(objective.init_state(), objective.observe(batch))
    loss, _ = loss_and_grad(objective, replace(batch, state=state))
    assert loss.item() == pytest.approx(1.405855, **SIX_PLACES)
    assert loss.item() != pytest.approx(theirs, **SIX_PLACES)
    assert ours(build("bco_pair", beta=0.1, shift="none"), small) == pytest.approx(theirs, rel=1e-12)
