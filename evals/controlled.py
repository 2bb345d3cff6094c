"""Win rates in which more than length is held fixed: the style of the answers, the difficulty of the instructions.

win_rate/style_controlled              σ(θ) at equal style, from the verdicts          (``evals.style_control``)
arena/style_controlled                 the same from Arena-Hard's games
win_rate/length_controlled_joint       mean of σ(b + ψ_i), ψ and b from one fit over ten models or more
                                                                                       (``evals.difficulty``)
win_rate/length_controlled_difficulty  AlpacaEval 2's regression with a ψ that was frozen before
                                                                                       (``evals.length_control``)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data.files import write_atomically
from evals.arena import expanded
from evals.bootstrap import SEED
from evals.difficulty import ENOUGH, RIDGE, fit_difficulties
from evals.length_control import difficulties, length_controlled
from evals.measured import Measured, kept_prompts
from evals.ranking import Metric
from evals.style_control import at_equal_style, differences, style_of
from evals.verdicts import Verdicts

METRICS: Mapping[str, Metric] = {
    "win_rate/style_controlled": Metric("As win_rate/raw, were length and markdown alike", "share", "higher"),
    # Without a better way: with every model that is added ψ is another one, so that runs can't be compared by it.
    "win_rate/length_controlled_joint": Metric(
        "As win_rate/length_controlled, with the difficulty of instructions from a joint fit over all models", "share"
    ),
    "win_rate/length_controlled_difficulty": Metric(
        "As win_rate/length_controlled, with difficulties of instructions that were fitted before", "share", "higher"
    ),
}
"""Every metric of this module that is in no other."""
FEWEST = 10
"""Prompts for each coefficient of a style-controlled win rate, at least (Peduzzi et al. 1996,
doi:10.1016/S0895-4356(96)00236-3, of logistic regressions)."""
DRAWS = 1000
"""Of the joint fit's bootstrap: of fewer, percentiles lie too close together (200 cover 94 %)."""
VERSION = 1
"""Of a file of difficulties."""
Texts = Sequence[tuple[str, str]]
"""The model's and the baseline's answer of every pair, as judges see them."""


# ---- style ----


def by_style(verdicts: Verdicts, texts: Texts, features: Sequence[str], tokens: Callable[[str], int]) -> Measured:
    """The win rate at equal style, from verdicts as they are: a pair is a game with a score in [0, 1].

    Args:
        verdicts: of one judge.
        texts: of the same pairs.
        features: of ``style_control.FEATURES``.
        tokens: counts those of an answer.
    Raises:
        ValueError: too few prompts, or a regression without a maximum.
    """
    keep = np.isfinite(verdicts.share)
    rows = np.flatnonzero(keep)
    return _styled("win_rate/style_controlled", verdicts, texts, rows, verdicts.share[keep], features, tokens)


def by_style_of_games(
    verdicts: Verdicts, texts: Texts, features: Sequence[str], tokens: Callable[[str], int]
) -> Measured:
    """The same from the games of both orders, clear verdicts being three games, as Arena-Hard has it.

    Args:
        verdicts: of a judge that was shown both orders.
        texts: of the same pairs.
        features: of ``style_control.FEATURES``.
        tokens: counts those of an answer.
    Raises:
        ValueError: as ``by_style``.
    """
    assert verdicts.games is not None
    rows: list[int] = []
    scores: list[float] = []
    for row, ((as_a, as_b), same) in enumerate(zip(verdicts.games, verdicts.identical, strict=True)):
        if same:
            own = [0.5, 0.5]
        elif as_a is not None and as_b is not None:
            own = expanded(as_b, as_a)
        else:
            continue
        rows += [row] * len(own)
        scores += own
    return _styled(
        "arena/style_controlled", verdicts, texts, np.array(rows, dtype=int), np.array(scores), features, tokens
    )


def _styled(
    metric: str,
    verdicts: Verdicts,
    texts: Texts,
    rows: np.ndarray,
    scores: np.ndarray,
    features: Sequence[str],
    tokens: Callable[[str], int],
) -> Measured:
    prompts = [verdicts.prompts[row] for row in rows.tolist()]
    needed = FEWEST * (len(features) + 1)
    if len(set(prompts)) < needed:
        raise ValueError(
            f"{len(set(prompts))} prompts have a verdict, and the model with {len(features)} features of style is "
            f"{len(features) + 1} coefficients, which take {needed} prompts ({FEWEST} each); judge more, or name fewer "
            "features in style_control"
        )
    counted = [[style_of(text, tokens(text)) for text in side] for side in zip(*texts, strict=True)]
    own, base = ({name: np.array([each[name] for each in side]) for name in side[0]} for side in counted)
    style = differences(own, base, features)[rows]
    estimate, weights = at_equal_style(scores, style, prompts, features=features)
    return Measured(
        estimates={metric: estimate},
        n_dropped=len(verdicts) - len(set(rows.tolist())),
        extra={"style_features": list(features), "style_weights": weights},
    )


# ---- difficulty ----


@dataclass(frozen=True, slots=True, kw_only=True)
class Difficulty:
    """ψ of instructions, frozen: what later win rates against the same baseline by the same judge are corrected for."""

    baseline: str
    """As results describe it."""
    judge: str
    judge_template: str
    models: list[str]
    """Whose verdicts it was fitted to."""
    ridge: float
    psi: dict[str, float]
    """By the prompt's id."""
    version: int = VERSION

    @property
    def fingerprint(self) -> str:
        """Of ψ: win rates with another one are not comparable."""
        return xxhash.xxh3_64_hexdigest(json.dumps(sorted(self.psi.items())).encode())

    def write(self, path: Path) -> None:
        """Writes the file, complete or not at all."""
        write_atomically(path, json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> Difficulty:
        """What ``write`` wrote.

        Raises:
            ValueError: in one sentence, what is wrong with the file.
        """
        way_out = "a win_rate with difficulty: joint writes one"
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path} can't be read ({error.strerror}); {way_out}") from None
        except ValueError:
            raise ValueError(f"{path} is not JSON; {way_out}") from None
        known = {each.name for each in fields(cls)}
        if not isinstance(body, dict) or body.get("version") != VERSION or set(body) != known:
            raise ValueError(f"{path} is no file of difficulties of version {VERSION}; {way_out}")
        psi = body["psi"]
        numbers = isinstance(psi, dict) and all(
            isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            for value in psi.values()
        )
        if not numbers or not psi:
            raise ValueError(f"psi in {path} must map ids of prompts to finite numbers; {way_out}")
        return cls(**{**body, "psi": {str(key): float(value) for key, value in psi.items()}})


def jointly(matches: Sequence[Verdicts]) -> tuple[Measured, dict[str, float]]:
    """The first match's model at equal length, from one regression over all models; and ψ of every prompt.

    Args:
        matches: of one judge, each another model's against the same baseline.
    Raises:
        ValueError: fewer than ``ENOUGH`` models, or see ``fit_difficulties``.
    """
    names = [match.model for match in matches]
    if len(names) < ENOUGH:
        raise ValueError(
            f"{len(names)} models have verdicts against {matches[0].baseline}, and ψ takes {ENOUGH} or more: from "
            "fewer it says more of the models than of instructions"
        )
    kept = [np.isfinite(match.share) for match in matches]
    found = fit_difficulties(
        [match.model for match, keep in zip(matches, kept, strict=True) for _ in range(int(keep.sum()))],
        [str(p) for match, keep in zip(matches, kept, strict=True) for p in kept_prompts(match.prompts, keep)],
        1 + np.concatenate([match.share[keep] for match, keep in zip(matches, kept, strict=True)]),
        np.concatenate([match.length_model[keep] for match, keep in zip(matches, kept, strict=True)]),
        np.concatenate([match.length_base[keep] for match, keep in zip(matches, kept, strict=True)]),
        draws=DRAWS,
    )
    told: dict[str, Any] = {
        "models": {name: round(each.value, 6) for name, each in found.win_rate.items()},
        "length": found.length[names[0]],
        "quality": found.quality[names[0]],
        "spread_of_difficulty": float(np.std(list(found.psi.values()))),
        "ridge": RIDGE,
        "draws": DRAWS,
        "seed": SEED,
    }
    measured = Measured(
        estimates={"win_rate/length_controlled_joint": found.win_rate[names[0]]},
        n_dropped=int((~kept[0]).sum()),
        extra={"joint": told},
    )
    return measured, dict(found.psi)


def with_difficulty(verdicts: Verdicts, known: Difficulty, name: str) -> Measured:
    """The length-controlled win rate with the instructions' ψ as a third feature; see ``length_control``.

    Args:
        verdicts: of one judge, against the baseline that ψ is of.
        known: ψ.
        name: of its file, for messages.
    Raises:
        ValueError: a prompt without ψ, or see ``length_controlled``.
    """
    missing = sum(prompt not in known.psi for prompt in verdicts.prompts)
    if missing:
        raise ValueError(
            f"{missing} of {len(verdicts)} prompts have no difficulty in {name}, which was fitted to {len(known.psi)} "
            "others; evaluate on the prompts it was fitted to"
        )
    psi = difficulties(verdicts.prompts, known.psi)
    found = length_controlled(
        verdicts.share + 1, verdicts.length_model, verdicts.length_base, verdicts.prompts, difficulty=psi
    )
    told = {"weights": list(found.weights), "C": found.C, "kkt_residual": found.kkt_residual}
    return Measured(
        estimates={"win_rate/length_controlled_difficulty": found.estimate},
        n_dropped=found.raw.n_dropped,
        extra={"difficulty": known.fingerprint, "difficulty_models": len(known.models), "length_controlled": told},
    )
