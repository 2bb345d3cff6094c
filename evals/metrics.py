"""Every metric that results may hold, and what it means."""

from __future__ import annotations

from collections.abc import Mapping

from evals import labelled, ranking, reward_model, worlds
from evals.ranking import Metric

METRICS: Mapping[str, Metric] = {
    **ranking.METRICS,
    **labelled.METRICS,
    **reward_model.METRICS,
    **worlds.METRICS,
}
