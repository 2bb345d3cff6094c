"""Win rates at equal style and with difficulties of instructions, against the functions they are made of."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit

from evals.controlled import (
    FEWEST,
    Difficulty,
    by_style,
    by_style_of_games,
    jointly,
    with_difficulty,
)
from evals.difficulty import ENOUGH, fit_difficulties
from evals.length_control import length_controlled
from evals.metrics import METRICS
from evals.style_control import FEATURES, at_equal_style
from evals.verdicts import Verdicts

PLAIN = {"A>>B": 1.0, "A>B": 1.0, "A=B": 0.5, "B>A": 0.0, "B>>A": 0.0}


def words(text: str) -> int:
    return len(text.split())


def played(texts: list[tuple[str, str]], share: Any, model: str = "policy", **more: Any) -> Verdicts:
    n = len(texts)
    fields: dict[str, Any] = {
        "model": model,
        "baseline": "base",
        "prompts": [f"p{i}" for i in range(n)],
        "share": np.asarray(share, dtype=float),
        "reasons": [""] * n,
        "length_model": np.array([len(one) for one, _ in texts]),
        "length_base": np.array([len(two) for _, two in texts]),
        "whole": np.ones(n, dtype=bool),
        "identical": np.zeros(n, dtype=bool),
        "excluded": np.zeros(n, dtype=bool),
        **more,
    }
    return Verdicts(**fields)


def answers(seed: int, n: int, longer: float = 0.0) -> list[tuple[str, str]]:
    """Pairs of answers of many lengths and much or little markdown."""
    rng = np.random.default_rng(seed)

    def one(more: float) -> str:
        lines = ["word " * int(rng.integers(5, 40) * math.exp(more)) for _ in range(int(rng.integers(1, 6)))]
        marked = [f"- {line}" if rng.random() < 0.3 else f"# {line}" if rng.random() < 0.2 else line for line in lines]
        return "\n".join([*marked, "**so** " * int(rng.integers(0, 4))])

    return [(one(longer), one(0.0)) for _ in range(n)]


def relative_length(texts: list[tuple[str, str]]) -> np.ndarray:
    own, base = (np.array([words(text) for text in side]) for side in zip(*texts, strict=True))
    return (own - base) / (own + base)


def test_a_judge_of_length_alone_sees_equals_at_equal_style():
    """Answers twice as long win two games of three, and nothing else decides."""
    texts = answers(0, 400, longer=0.7)
    rng = np.random.default_rng(1)
    share = (rng.random(400) < expit(3 * relative_length(texts))).astype(float)
    verdicts = played(texts, share)
    found = by_style(verdicts, texts, FEATURES, words)
    controlled = found.estimates["win_rate/style_controlled"]
    assert share.mean() > 0.65
    assert controlled.low < 0.5 < controlled.high
    assert controlled.high < share.mean()
    told = found.extra["style_weights"]
    assert told["length"] > 3 * max(abs(told[name]) for name in FEATURES[1:])
    assert (controlled.n, controlled.clusters, found.n_dropped) == (400, 400, 0)
    assert set(found.estimates) <= set(METRICS)


def test_pairs_without_a_verdict_are_left_out_and_features_are_those_named():
    texts = answers(2, 80)
    share = np.where(np.arange(80) % 4 == 0, 0.5, np.arange(80) % 3 > 0)
    share[[3, 10]] = math.nan
    found = by_style(played(texts, share), texts, ("length",), words)
    keep = np.isfinite(share)
    own, weights = at_equal_style(share[keep], relative_length(texts)[keep, None], features=("length",))
    assert found.estimates["win_rate/style_controlled"] == own
    assert found.extra["style_weights"] == weights
    assert found.n_dropped == 2
    assert found.extra["style_features"] == ["length"]


def test_games_are_arena_hard_s():
    """Clear verdicts are three games, equal answers two ties, and a missing order drops the pair."""
    texts = answers(3, 60)
    rng = np.random.default_rng(3)
    letters = list(PLAIN)
    games: list[tuple[str | None, str | None]] = [
        (letters[one], letters[other]) for one, other in rng.integers(len(letters), size=(60, 2))
    ]
    games[5] = (None, "A>B")
    same = np.arange(60) == 7
    share = [math.nan if None in game else (PLAIN[str(game[0])] + 1 - PLAIN[str(game[1])]) / 2 for game in games]
    verdicts = played(texts, share, games=games, identical=same)
    found = by_style_of_games(verdicts, texts, ("length",), words)
    rows: list[int] = []
    scores: list[float] = []
    for row, (first, second) in enumerate(games):
        if row == 5:
            continue
        as_a = [PLAIN[str(first)]] * (3 if ">>" in str(first) else 1)
        as_b = [1 - PLAIN[str(second)]] * (3 if ">>" in str(second) else 1)
        own = [0.5, 0.5] if row == 7 else as_a + as_b
        rows += [row] * len(own)
        scores += own
    style = relative_length(texts)[rows, None]
    theirs, _ = at_equal_style(scores, style, rows, features=("length",))
    got = found.estimates["arena/style_controlled"]
    assert (got.n, got.clusters, found.n_dropped) == (len(rows), 59, 1)
    assert (got.value, got.low) == pytest.approx((theirs.value, theirs.low), abs=1e-9)


def test_too_few_prompts_for_the_coefficients_are_refused():
    """Answers of one prompt are no further prompts."""
    texts = answers(4, 120)
    share = np.random.default_rng(4).random(120)
    with pytest.raises(ValueError, match=r"40 prompts have a verdict, .* 4 features .* take 50 prompts"):
        by_style(played(texts, share, prompts=[f"p{i // 3}" for i in range(120)]), texts, FEATURES, words)
    by_style(played(texts, share, prompts=[f"p{i // 3}" for i in range(120)]), texts, FEATURES[:3], words)
    assert FEWEST == 10
    none = played(texts[:3], [math.nan] * 3, games=[(None, None)] * 3)
    with pytest.raises(ValueError, match="0 prompts have a verdict"):
        by_style_of_games(none, texts[:3], ("length",), words)


def test_style_that_decides_everything_has_no_win_rate():
    texts = answers(5, 60)
    with pytest.raises(ValueError, match="style or models decide every game"):
        by_style(played(texts, relative_length(texts) > 0), texts, ("length",), words)


# ---- difficulty ----


def judged(models: int, prompts: int = 40, seed: int = 0) -> list[Verdicts]:
    """Models of known quality on instructions of known difficulty."""
    rng = np.random.default_rng(seed)
    psi, quality = rng.normal(0, 1.5, prompts), rng.normal(0, 0.5, models)
    found = []
    for i in range(models):
        texts = answers(seed * 100 + i, prompts)
        found.append(played(texts, rng.binomial(8, expit(quality[i] + psi)) / 8, model=f"m{i}"))
    return found


@pytest.mark.slow
def test_the_joint_fit_is_that_of_all_verdicts():
    matches = judged(ENOUGH)
    matches[3].share[4] = math.nan
    measured, psi = jointly(matches)
    rows = [(m, i) for m in matches for i in range(40) if np.isfinite(m.share[i])]
    theirs = fit_difficulties(
        [m.model for m, _ in rows],
        [m.prompts[i] for m, i in rows],
        np.array([1 + m.share[i] for m, i in rows]),
        np.array([m.length_model[i] for m, i in rows]),
        np.array([m.length_base[i] for m, i in rows]),
        draws=1000,
    )
    got = measured.estimates["win_rate/length_controlled_joint"]
    assert (got.value, got.low, got.high) == pytest.approx(
        (theirs.win_rate["m0"].value, theirs.win_rate["m0"].low, theirs.win_rate["m0"].high), abs=1e-9
    )
    assert psi == pytest.approx(theirs.psi)
    assert list(measured.extra["joint"]["models"]) == [f"m{i}" for i in range(ENOUGH)]
    with pytest.raises(ValueError, match="9 models have verdicts against base, and ψ takes 10 or more"):
        jointly(matches[1:])


def frozen(psi: dict[str, float], **changes: Any) -> Difficulty:
    keys: dict[str, Any] = {"baseline": "base (1)", "judge": "gold", "judge_template": "", "models": ["a"]}
    return Difficulty(**{**keys, "ridge": 0.1, "psi": psi, **changes})


@pytest.mark.slow
def test_frozen_difficulties_are_the_third_feature():
    matches = judged(ENOUGH, seed=1)
    _, psi = jointly(matches)
    mine = matches[2]
    found = with_difficulty(mine, frozen(psi), "psi.json")
    theirs = length_controlled(
        mine.share + 1,
        mine.length_model,
        mine.length_base,
        mine.prompts,
        difficulty=[psi[prompt] for prompt in mine.prompts],
    )
    got = found.estimates["win_rate/length_controlled_difficulty"]
    assert (got.value, got.low, got.high) == (theirs.estimate.value, theirs.estimate.low, theirs.estimate.high)
    assert found.extra["difficulty"] == frozen(psi).fingerprint != frozen({**psi, "p0": 9.0}).fingerprint
    assert theirs.weights[1] != 0, "difficulty tells something here"
    with pytest.raises(ValueError, match=r"1 of 40 prompts have no difficulty in psi\.json, which was fitted to 39"):
        with_difficulty(mine, frozen({name: value for name, value in psi.items() if name != "p7"}), "psi.json")


def test_a_file_of_difficulties_reads_back(tmp_path: Path):
    known = frozen({"a" * 32: 0.25, "b" * 32: -1.0})
    known.write(tmp_path / "psi.json")
    assert Difficulty.read(tmp_path / "psi.json") == known


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (None, "can't be read"),
        ("{", "is not JSON"),
        ("[]", "is no file of difficulties of version 1"),
        ({"version": 2}, "is no file of difficulties of version 1"),
        ({"more": 1}, "is no file of difficulties"),
        ({"psi": {"a": "1"}}, "must map ids of prompts to finite numbers"),
        ({"psi": {"a": math.nan}}, "must map ids of prompts to finite numbers"),
        ({"psi": {"a": True}}, "must map ids of prompts to finite numbers"),
        ({"psi": {}}, "must map ids of prompts to finite numbers"),
        ({"psi": [1]}, "must map ids of prompts to finite numbers"),
    ],
)
def test_a_file_that_holds_no_difficulties(tmp_path: Path, change: Any, says: str):
    path = tmp_path / "psi.json"
    if isinstance(change, str):
        path.write_text(change)
    elif change is not None:
        frozen({"a": 1.0}).write(path)
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=says) as error:
        Difficulty.read(path)
    assert str(error.value).endswith("a win_rate with difficulty: joint writes one")
