"""What a pair's rewards are, by hand."""

from __future__ import annotations

import pytest

from objectives import LegBatch
from objectives.pairs import pair_of
from tests.objectives.batches import make_rows


def test_rewards_per_token_by_hand():
    """β = 0.5: sums −3 of two tokens and −12 of three give 0.5 · −1.5 and 0.5 · −4, and a margin of 0.5 · 2.5."""
    batch = LegBatch(legs={"chosen": make_rows([[-1.0, -2.0]]), "rejected": make_rows([[-3.0, -4.0, -5.0]])})
    pair = pair_of(batch, 0.5, reference=False, per_token=True)
    assert pair.chosen.tolist() == [pytest.approx(-0.75)]
    assert pair.rejected.tolist() == [pytest.approx(-2.0)]
    assert pair.margin.tolist() == [pytest.approx(1.25)]
    whole = pair_of(batch, 0.5, reference=False)
    assert whole.chosen.tolist() == [pytest.approx(-1.5)]
    assert whole.rejected.tolist() == [pytest.approx(-6.0)]
