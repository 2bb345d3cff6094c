"""What rounds are judged by: scores of held-out samples, with intervals, and the change since the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align import samples as stored
from align.errors import RunError
from align.score_lines import read_scores
from align.selection_curves import pass_at_k
from objectives.stats import Estimate, mean_with_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One policy on the held-out prompts."""

    round: int
    score: float
    """Mean combined score, each prompt with its mean over samples."""
    low: float
    high: float
    """Of a 95 % interval, clustered by prompt."""
    prompts: int
    samples: int
    unscored: int
    """Samples without a score, which are left out."""
    per_prompt: Mapping[str, float]
    """Mean score by prompt."""
    means: Mapping[str, float]
    """Mean of each scorer."""
    pass_at: Mapping[str, float]
    """Of scorers that say right (1) or wrong (0): the chance that one of k samples is right, unbiased, by k."""

    def as_json(self) -> dict[str, Any]:
        """For files; reads back to this."""
        return asdict(self)

    def gain(self, start: Evaluation) -> Estimate:
        """How much higher than at the start, over prompts that both have."""
        common = [key for key in self.per_prompt if key in start.per_prompt]
        changes = [self.per_prompt[key] - start.per_prompt[key] for key in common]
        return mean_with_interval(changes, common, shares=False)

    def line(self, start: Evaluation) -> str:
        """In a few words."""
        change = self.gain(start)
        return (
            f"score {self.score:.3f} [{self.low:.3f}, {self.high:.3f}], {change.value:+.3f} "
            f"[{change.low:+.3f}, {change.high:+.3f}] since the start"
        )


def evaluate(samples: Path, scores: Path, number: int) -> Evaluation:
    """Estimates from files.

    Args:
        samples: of the held-out prompts.
        scores: of these samples.
        number: of the round.
    Raises:
        RunError: no sample has a score.
    """
    per_prompt: dict[str, float] = {}
    values: list[float] = []
    clusters: list[str] = []
    named: dict[str, list[list[float]]] = {}
    count = unscored = 0
    for group, found in read_scores(scores, stored.read(samples)):
        count += len(found)
        own = [each.score for each in found if each.score is not None]
        unscored += len(found) - len(own)
        if not own:
            continue
        per_prompt[group.prompt_id] = float(np.mean(own))
        values += own
        clusters += [group.prompt_id] * len(own)
        for name in found[0].scores:
            named.setdefault(name, []).append([v for each in found if (v := each.scores[name]) is not None])
    if not values:
        raise RunError(f"{scores}: no held-out sample has a score, so that rounds can't be judged; see its reasons")
    estimate = mean_with_interval(list(per_prompt.values()), list(per_prompt))
    return Evaluation(
        round=number,
        score=estimate.value,
        low=estimate.low,
        high=estimate.high,
        prompts=len(per_prompt),
        samples=count,
        unscored=unscored,
        per_prompt=per_prompt,
        means={name: float(np.mean(np.concatenate(lists))) for name, lists in named.items() if any(lists)},
        pass_at=_pass_at(named),
    )


def _pass_at(named: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, float]:
    for lists in named.values():
        values = {value for each in lists for value in each}
        most = min(map(len, lists))
        if values and values <= {0.0, 1.0} and most:
            ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k <= most]
            return {str(k): float(np.mean([pass_at_k(len(each), int(sum(each)), k) for each in lists])) for k in ks}
    return {}


def table(measured: Sequence[Evaluation]) -> str:
    """Rounds under each other."""
    ks = list(measured[0].pass_at)
    columns = "".join(f"{f'pass@{k}':>9}" for k in ks)
    lines = [f"{'round':<6}{'held-out score':>24}{'change since the start':>28}{columns}"]
    for each in measured:
        change = each.gain(measured[0])
        score = f"{each.score:.3f} [{each.low:.3f}, {each.high:.3f}]"
        gain = f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]" if each is not measured[0] else ""
        lines.append(f"{each.round:<6}{score:>24}{gain:>28}" + "".join(f"{each.pass_at.get(k, 0):>9.3f}" for k in ks))
    return "\n".join(lines)
