"""Every metric that results may hold, and what it means."""

from __future__ import annotations

from collections.abc import Mapping

from evals import (
    agreement,
    arena,
    ches,
    idealised,
    labelled,
    memorisation,
    ranking,
    retention,
    reward_model,
    wildbench,
    win_rate,
    worlds,
)
from evals.ranking import Metric

METRICS: Mapping[str, Metric] = {
    **ranking.METRICS,
    **labelled.METRICS,
    **reward_model.METRICS,
    **worlds.METRICS,
    **idealised.METRICS,
    **ches.METRICS,
    **win_rate.METRICS,
    **wildbench.METRICS,
    **arena.METRICS,
    **agreement.METRICS,
    **memorisation.METRICS,
    **retention.METRICS,
}
