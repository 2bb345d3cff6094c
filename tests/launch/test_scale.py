"""The page on scale is made from its numbers, and its formulas agree with what is known otherwise."""

from __future__ import annotations

import json

import pytest

from launch import scale_page
from launch.scale_page import MODELS, communication, memory


def test_the_page_is_up_to_date():
    assert scale_page.PAGE.read_text(encoding="utf-8") == scale_page.page()


def test_a_step_takes_one_small_sum_of_ours():
    """As it was measured on every engine."""
    for engine, numbers in json.loads(scale_page.NUMBERS.read_text())["engines"].items():
        operations = {name: count for name, count in numbers["operations_per_step"].items() if count}
        assert operations == ({} if engine == "single" else {"all_reduce": 1.0}), engine
        assert sum(numbers["bytes_per_step"].values()) <= 64


def test_whole_fine_tuning_takes_sixteen_bytes_a_weight():
    """4 of weights, 4 of gradients, 8 of two moments (Rajbhandari et al. 2019, arXiv:1910.02054, have 16 as well)."""
    model = MODELS[1]
    beside = memory(model, "ddp", 1) - 16 * model.parameters
    assert 0 < beside < 10e9
    assert memory(model, "fsdp2", 64) - beside == pytest.approx(
        16 * model.parameters / 64 + 4 * model.parameters / model.layers, rel=1e-6
    )


def test_sharded_weights_travel_once_a_pass():
    """ZeRO-3 sends half as much again as replicas do in bfloat16 (arXiv:1910.02054, section 7.2.2)."""
    model = MODELS[1]
    in_bfloat16 = 4 * model.parameters  # an all-reduce of gradients: reduce-scatter and all-gather
    assert communication(model, "zero3", 1) == pytest.approx(1.5 * in_bfloat16)
