"""Every metric that results may hold, and what it means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from evals import (
    agreement,
    arena,
    bradley_terry,
    ches,
    controlled,
    generation_measures,
    idealised,
    labelled,
    membership,
    memorisation,
    passing,
    ranking,
    retention,
    reward_bench,
    reward_model,
    style_control,
    wildbench,
    win_rate,
    worlds,
)
from evals.ranking import Metric


class _Metrics(Mapping[str, Metric]):
    """Metrics by name; ``name@8`` is ``name`` of eight answers."""

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self._metrics = metrics

    def __getitem__(self, name: str) -> Metric:
        return self._metrics[name.partition("@")[0]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._metrics)

    def __len__(self) -> int:
        return len(self._metrics)


METRICS: Mapping[str, Metric] = _Metrics(
    {
        **ranking.METRICS,
        **labelled.METRICS,
        **reward_model.METRICS,
        **reward_bench.METRICS,
        **worlds.METRICS,
        **idealised.METRICS,
        **ches.METRICS,
        **win_rate.METRICS,
        **wildbench.METRICS,
        **arena.METRICS,
        **bradley_terry.METRICS,
        **generation_measures.METRICS,
        **passing.METRICS,
        **style_control.METRICS,
        **controlled.METRICS,
        **agreement.METRICS,
        **memorisation.METRICS,
        **membership.METRICS,
        **retention.METRICS,
    }
)
