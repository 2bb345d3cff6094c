"""Every metric that results may hold, and what it means."""

from __future__ import annotations

from collections.abc import Mapping

from evals import labelled, ranking, worlds
from evals.ranking import Metric

METRICS: Mapping[str, Metric] = {**ranking.METRICS, **labelled.METRICS, **worlds.METRICS}
