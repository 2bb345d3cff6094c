"""Mixtures: weights, names, who sees what, and the state of stateful parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from objectives import Leg, LegBatch, Mean, Needs, Objective, Output, Stateful, Term, mixture
from objectives.bco import BCO
from objectives.dpo import DPO
from objectives.kto import KTO
from objectives.sft import SFT
from objectives.tpo import TPO
from tests.objectives.batches import FP64_ROUNDING, loss_and_grad, make_batch, rows_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Centred:
    """Test only: mean over rows of (log π(chosen) − c)², with c the running mean of log π(chosen)."""

    keep: float = 0.5

    needs: ClassVar[Needs] = Needs(legs=("chosen",))
    step0: ClassVar[None] = None

    def __call__(self, batch: LegBatch) -> Output:
        off = batch["chosen"].sum_logps() - batch.state["centre"]
        return Output(terms={"centred": Term(values=(off**2), per="row")}, metrics={"off/chosen": Mean.of(off)})

    def init_state(self) -> Mapping[str, Tensor]:
        return {"centre": torch.zeros((), dtype=torch.float64)}

    def observe(self, batch: LegBatch) -> Mapping[str, Tensor]:
        sums = batch["chosen"].sum_logps().detach()
        return {"total": sums.sum(), "rows": torch.tensor(float(len(sums)), dtype=torch.float64)}

    def update(self, state: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        fresh = observed["total"] / observed["rows"]
        return {"centre": self.keep * state["centre"] + (1 - self.keep) * fresh}


@dataclass(frozen=True, slots=True, kw_only=True)
class Nosy:
    """Test only: keeps nothing and remembers what it was shown."""

    seen: list[LegBatch]
    needs: ClassVar[Needs] = Needs(legs=("gold",))
    step0: ClassVar[float] = 0.0

    def __call__(self, batch: LegBatch) -> Output:
        self.seen.append(batch)
        return Output(terms={"nothing": Term(values=0 * batch["gold"].sum_logps(), per="row")})


def parts_loss(objective: Objective, batch: LegBatch) -> Tensor:
    return loss_and_grad(objective, batch)[0]


def test_weights_are_used_as_they_are():
    """0.8 · dpo + 2 · sft: not normalised, and each term over its own count."""
    both = mixture([("dpo", DPO(), 0.8), ("sft", SFT(leg="chosen"), 2.0)])
    batch = make_batch(both, seed=1, rows=5, weighted=True)
    loss, grad = loss_and_grad(both, batch)
    dpo_loss, dpo_grad = loss_and_grad(DPO(), batch)
    chosen_only = LegBatch(legs={"chosen": batch["chosen"]})
    sft_loss, sft_grad = loss_and_grad(SFT(leg="chosen"), chosen_only)
    assert_close(loss, 0.8 * dpo_loss + 2.0 * sft_loss, **FP64_ROUNDING)
    assert_close(grad["chosen"], 0.8 * dpo_grad["chosen"] + 2.0 * sft_grad["chosen"], **FP64_ROUNDING)
    assert_close(grad["rejected"], 0.8 * dpo_grad["rejected"], **FP64_ROUNDING)


def test_a_mixture_of_one_is_the_objective():
    one = mixture([("dpo", DPO(beta=0.3), 1.0)])
    batch = make_batch(one, seed=2)
    assert one.needs == DPO.needs
    assert one.step0 == pytest.approx(math.log(2))
    assert list(one(batch).terms) == ["preference"]
    assert torch.equal(parts_loss(one, batch), parts_loss(DPO(beta=0.3), batch))


def test_needs_are_the_union_in_order_of_first_mention():
    three = mixture([("sft", SFT(leg="chosen"), 1.0), ("dpo", DPO(), 1.0), ("sft", SFT(leg="gold"), 1.0)])
    assert three.needs == Needs(legs=("chosen", "rejected", "gold"), reference=True, likelihood=("chosen", "gold"))
    assert mixture([("sft", SFT(), 1.0)]).needs == Needs(legs=("gold",), reference=False, likelihood=("gold",))


def test_step0_is_the_weighted_sum_where_every_part_has_one():
    pair = mixture([("dpo", DPO(), 0.5), ("dpo", DPO(beta=2.0), 3.0)])
    assert pair.step0 == pytest.approx(3.5 * math.log(2))
    at_reference = make_batch(pair, seed=3, at_reference=True)
    assert parts_loss(pair, at_reference).item() == pytest.approx(pair.step0, rel=1e-12)
    assert mixture([("dpo", DPO(), 1.0), ("sft", SFT(), 1.0)]).step0 is None


def test_the_first_part_keeps_a_shared_name_and_later_ones_get_theirs_in_front():
    """Neither of two like-named terms may swallow the other, and dashboards find the first where they look for it."""
    pair = mixture([("dpo", DPO(beta=0.1), 1.0), ("dpo", DPO(beta=1.0), 1.0), ("sft", SFT(leg="gold"), 1.0)])
    assert list(pair.parts) == ["dpo", "dpo.2", "sft"]
    batch = make_batch(pair, seed=4)
    output = pair(batch)
    assert set(output.terms) == {"preference", "dpo.2/preference", "likelihood"}
    assert {"rewards/margins", "dpo.2/rewards/margins", "logps/gold"} <= set(output.metrics)
    expected = [parts_loss(DPO(beta=beta), batch) for beta in (0.1, 1.0)]
    for key, value in zip(("preference", "dpo.2/preference"), expected, strict=True):
        assert_close(output.terms[key].value(batch.counts()), value, **FP64_ROUNDING)


def test_a_third_of_a_name_gets_the_number_three():
    parts = mixture([("sft", SFT(), 1.0), ("sft", SFT(leg="chosen"), 2.0), ("sft", SFT(), 3.0)])
    assert dict(parts.weights) == {"sft": 1.0, "sft.2": 2.0, "sft.3": 3.0}


def test_a_part_sees_only_what_it_declared():
    seen: list[LegBatch] = []
    both = mixture([("dpo", DPO(), 1.0), ("centred", Centred(), 1.0), ("nosy", Nosy(seen=seen), 1.0)])
    batch = make_batch(both, seed=5)
    assert batch["gold"].ref_logps is not None
    both(batch)
    (shown,) = seen
    assert list(shown) == ["gold"]
    assert shown["gold"].ref_logps is None
    assert dict(shown.state) == {}
    assert torch.equal(shown["gold"].logps, batch["gold"].logps)


def test_labels_and_density_ratios_are_seen_where_they_are_declared():
    """Not by the part that declared neither, and the ratio only by the one with an encoder."""
    parts = [("kto", KTO(), 1.0), ("bco", BCO(prompt_encoder="policy"), 1.0), ("bco", BCO(), 1.0)]
    both = mixture([*parts, ("sft", SFT(), 1.0)])
    batch = make_batch(both, seed=8)
    assert batch.labels is not None
    assert batch.density_ratio is not None
    known = {name: (both.view(name, batch).labels, both.view(name, batch).density_ratio) for name in both.parts}
    assert known["kto"] == (batch.labels, None)
    assert known["bco"] == (batch.labels, batch.density_ratio)
    assert known["bco.2"] == (batch.labels, None)
    assert known["sft"] == (None, None)


def test_needs_unite_labels_encoder_and_likelihood():
    four = mixture(
        [
            ("tpo", TPO(), 1.0),
            ("kto", KTO(), 1.0),
            ("bco", BCO(prompt_encoder="policy"), 1.0),
            ("bco", BCO(prompt_encoder="policy"), 1.0),
        ]
    )
    assert four.needs == Needs(
        legs=("chosen", "rejected", "gold", "completion", "mismatched"),
        reference=True,
        labels=True,
        density_ratio="policy",
        likelihood=("gold",),
    )
    without = mixture([("tpo", TPO(alpha=0.0), 1.0), ("dpo", DPO(), 1.0)])
    assert without.needs == Needs(legs=("chosen", "rejected"), reference=True)


def test_two_prompt_encoders_are_refused():
    """A row has one density ratio."""
    two = mixture([("bco", BCO(prompt_encoder="policy"), 1.0), ("bco", BCO(prompt_encoder="some/encoder"), 1.0)])
    with pytest.raises(ValueError, match="all objectives must take one prompt encoder, got 'policy', 'some/encoder'"):
        _ = two.needs


def test_a_weighted_list_of_two_with_state():
    """0.5 · kto + 2 · bco over two steps: each with its own state, both from the same rows."""
    both = mixture([("kto", KTO(), 0.5), ("bco", BCO(), 2.0)])
    batch = make_batch(both, seed=9, rows=5)
    assert set(batch.state) == {"kto/kl", "bco/reward_total", "bco/reward_count"}
    own = {"kto": KTO().init_state(), "bco": BCO().init_state()}
    for _ in range(2):
        losses = {name: parts_loss(part, replace(batch, state=own[name])) for name, part in both.parts.items()}
        assert_close(parts_loss(both, batch), 0.5 * losses["kto"] + 2.0 * losses["bco"], **FP64_ROUNDING)
        output = both(batch)
        assert set(output.terms) == {"preference", "bco/preference"}
        assert {"rewards/threshold", "bco/rewards/threshold", "kl/mismatched"} <= set(output.metrics)
        for name, part in both.parts.items():
            own[name] = dict(part.update(own[name], part.observe(replace(batch, state=own[name]))))
        batch = replace(batch, state=both.update(batch.state, both.observe(batch)))
        flat = {f"{name}/{key}": value for name, state in own.items() for key, value in state.items()}
        assert_close(dict(batch.state), flat, **FP64_ROUNDING)
    assert batch.state["bco/reward_count"] == 10


def test_a_mixture_of_one_asks_for_what_its_part_misses():
    """The error is the part's own."""
    one = mixture([("bco", BCO(prompt_encoder="policy"), 1.0)])
    batch = make_batch(one, seed=10)
    for known in ("labels", "density_ratio"):
        with pytest.raises(ValueError, match=f"the rows have no {known} here; the objective must declare it in Needs"):
            one(replace(batch, **{known: None}))


def two_memories() -> tuple[LegBatch, object]:
    both = mixture([("dpo", DPO(), 1.0), ("centred", Centred(keep=0.5), 1.0), ("centred", Centred(keep=0.0), 2.0)])
    logps = torch.tensor([[-1.0], [-3.0]], dtype=torch.float64)
    leg = Leg(
        logps=logps,
        ref_logps=logps.clone(),
        mask=torch.ones(2, 1, dtype=torch.bool),
        tokens=torch.zeros(2, 1, dtype=torch.int64),
    )
    return LegBatch(legs={"chosen": leg, "rejected": leg}, state=both.init_state()), both


def test_states_are_kept_apart():
    """Log-probs −1 and −3, mean −2; one part keeps half of its old centre 0, the other nothing.

    first step:  both centres 0:       (1 + 9)/2 = 5, weights 1 and 2          → 15 + log 2
    afterwards:  centres −1 and −2:    (0 + 4)/2 = 2 and (1 + 1)/2 = 1          → 2 + 2·1 + log 2
    then again:  centres −1.5 and −2
    """
    batch, both = two_memories()
    assert isinstance(both, Stateful)
    assert {key: value.item() for key, value in batch.state.items()} == {"centred/centre": 0, "centred.2/centre": 0}
    assert parts_loss(both, batch).item() == pytest.approx(15 + math.log(2))

    observed = both.observe(batch)
    assert {key: value.item() for key, value in observed.items()} == {
        "centred/total": -4.0,
        "centred/rows": 2.0,
        "centred.2/total": -4.0,
        "centred.2/rows": 2.0,
    }
    state = both.update(batch.state, observed)
    assert {key: value.item() for key, value in state.items()} == {"centred/centre": -1.0, "centred.2/centre": -2.0}
    assert parts_loss(both, LegBatch(legs=batch.legs, state=state)).item() == pytest.approx(4 + math.log(2))

    again = both.update(state, both.observe(batch))
    assert {key: value.item() for key, value in again.items()} == {"centred/centre": -1.5, "centred.2/centre": -2.0}


def test_state_changes_only_through_update():
    """Formula and ``observe`` are pure: a step may be split, repeated or evaluated without trace."""
    batch, both = two_memories()
    both(batch)
    both.observe(batch)
    assert all(value == 0 for value in batch.state.values())


def test_what_is_observed_adds_up_over_microbatches():
    both = mixture([("centred", Centred(), 1.0), ("dpo", DPO(), 1.0)])
    batch = make_batch(both, seed=6, rows=5)
    parts = [both.observe(rows_of(batch, index)) for index in (slice(0, 2), slice(2, 2), slice(2, 5))]
    for key, value in both.observe(batch).items():
        assert_close(sum(part[key] for part in parts), value, **FP64_ROUNDING)


def test_stateless_mixtures_have_no_state():
    plain = mixture([("dpo", DPO(), 1.0)])
    batch = make_batch(plain, seed=7)
    assert plain.init_state() == {}
    assert plain.observe(batch) == {}
    assert plain.update({}, {}) == {}
