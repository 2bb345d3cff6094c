"""The page on promises: its verdicts follow from its numbers, and no recipe is missing."""

from __future__ import annotations

import re

import pytest

from launch.bench.promises import ABOUT, BESIDE, DOCUMENT, verdict, without_interval
from launch.recipes import training_recipes
from objectives.stats import Estimate


def estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value=value, stderr=0.1, low=low, high=high, n=40, clusters=40, interval="wilson")


@pytest.mark.parametrize(
    ("before", "after", "rises", "said"),
    [
        (0.15, estimate(0.30, 0.18, 0.45), True, "yes"),
        (0.15, estimate(0.25, 0.14, 0.40), True, "not shown"),
        (0.15, estimate(0.15, 0.07, 0.29), True, "**no**"),
        (0.17, estimate(0.07, 0.05, 0.09), False, "yes"),
        (0.17, estimate(0.16, 0.10, 0.20), False, "not shown"),
        (0.17, estimate(0.30, 0.20, 0.40), False, "**no**"),
    ],
)
def test_a_promise_is_kept_where_the_interval_leaves_out_the_start(
    before: float, after: Estimate, rises: bool, said: str
):
    assert verdict(before, after, rises=rises) == said


def test_verdicts_of_the_page_follow_from_its_numbers():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert "\n".join(("# Promises", "", *ABOUT, "")) in text
    assert "\n".join(("## Beside DPO", "", *BESIDE, "")) in text
    rows = re.findall(
        r"^\| \[(\w+)\]\(.+\) \| (.+) \| (.+) \| (.+) \|$", text.partition("## Beside DPO")[0], re.MULTILINE
    )
    assert [name for name, *_ in rows] == [path.stem for path in training_recipes()]
    for name, promise, numbers, said in rows:
        before, after, *ends = map(float, re.findall(r"-?\d+\.\d+", numbers))
        rises = "falls" not in promise
        moved = without_interval(after > before if rises else after < before)
        assert said == (verdict(before, estimate(after, *ends), rises=rises) if ends else moved), name
