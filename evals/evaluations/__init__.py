"""Every evaluation, by registering it."""

from evals.evaluations import (  # noqa: F401
    generations,
    memorisation,
    pairs,
    pass_at_k,
    retention,
    win_rate,
)
