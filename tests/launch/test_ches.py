"""What the CHES benchmark draws and trains, and what it shows on the embedded policy."""

from __future__ import annotations

import random

import numpy as np
import pytest

from launch.bench import ches
from launch.bench.ches import Setting, displaced, drawn, fifths_by, ln_ches, other_digit_anywhere


def test_one_digit_pairs_differ_in_one_token():
    made = drawn("one_digit", "train", 30, seed=3)
    places = set()
    for row in range(30):
        chosen, rejected = made.legs["chosen"][row], made.legs["rejected"][row]
        assert len(chosen) == len(rejected)
        (place,) = np.flatnonzero(chosen != rejected)
        places.add(int(place) / len(chosen) > 0.5)
    assert places == {False, True}, "early and late digits are changed"
    text = "7 + 5 = 12."
    assert len({other_digit_anywhere(text, random.Random(seed)) for seed in range(300)}) == 4 * 9


def test_fifths_are_in_order_and_of_one_size():
    found = fifths_by(np.array([5.0, 1, 4, 2, 3, 10, 9, 8, 7, 6, 11]))
    assert [rows.tolist() for rows in found] == [[1, 3], [4, 2], [0, 9], [8, 7], [6, 5]]


@pytest.mark.slow
def test_a_step_is_a_whole_batch_however_it_is_split(monkeypatch: pytest.MonkeyPatch):
    """Runs that differ in nothing but their pairs: neither microbatches nor the order of rows change one."""
    made = drawn("one_digit", "train", 10, seed=3)
    setting = Setting(steps=2)
    (whole,) = displaced(made, [made], setting)
    monkeypatch.setattr(ches, "POSITIONS", 200)
    (split,) = displaced(made.take(np.arange(10)[::-1]), [made], setting)
    assert np.abs(whole).max() > 0.05, "something is learnt"
    np.testing.assert_allclose(split, whole, atol=5e-3)  # Adam's first steps are signs, which rounding may turn


@pytest.mark.slow
def test_pairs_of_low_ches_displace_less_than_pairs_of_high_ches():
    """Of the world's usual pairs, the lowest fifth by LN-CHES against the highest, each trained on alone.

    Looked at are the same held-out chosen responses; ``python -m launch.bench.ches`` found 3.4 and 2.4 nats.
    """
    differences = []
    for seed in (0, 1):
        asked, held = drawn("usual", "train", 100, seed), drawn("usual", "held_out", 30, seed)
        lowest, *_, highest = (asked.take(rows) for rows in fifths_by(ln_ches(asked)))
        low, high = (float(displaced(each, [held], Setting())[0].mean()) for each in (lowest, highest))
        assert high < -1, "the highest fifth displaces"
        differences.append(low - high)
    assert np.mean(differences) > 1.5
