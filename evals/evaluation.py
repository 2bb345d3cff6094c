"""What an evaluation is: a registered dataclass whose fields are its keys, called with what is evaluated.

    evals: [ranking, {name: ches, edit_similarity: true}, {name: win_rate, baseline: …, sampling: {temperature: 0.7}}]

``needs`` says what has to be there, so that what is missing is refused before a weight is read; ``check`` looks at the
rest that can be known beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from objectives.registry import Registry

if TYPE_CHECKING:
    from evals.context import Context
    from evals.generations_file import Generation
    from evals.results import Result
    from evals.run_settings import Job
    from evals.scores import Scores

EVALS = Registry("evaluation")
"""Evaluations by the name that recipes call them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalNeeds:
    """What has to be there."""

    pairs: bool = False
    """Rows with a chosen and a rejected response."""
    reference: bool = False
    """A model to compare the policy with."""
    states: bool = False
    """Hidden states of the reference (without one, of the policy), reduced to numbers in the pass over the pairs."""
    reward_model: bool = False
    """A model with a scalar head instead of a language model's."""
    samples: bool = False
    """Responses drawn from the policy."""
    columns: tuple[str, ...] = ()
    """Numbers of the rows, of ``objectives.columns.COLUMNS``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What an evaluation leaves."""

    results: Sequence[Result]
    scores: Sequence[Scores] = ()
    """Of every prompt, for paired comparisons."""
    generations: Sequence[Generation] = ()
    """Answers with what was found of them, for the browser of responses."""
    warnings: Sequence[str] = field(default_factory=tuple)
    """What a reader has to know: said at once, and kept in the report."""


@runtime_checkable
class Evaluation(Protocol):
    """One kind of measurement."""

    @property
    def needs(self) -> EvalNeeds:
        """What has to be there."""
        ...

    def check(self, job: Job) -> None:
        """Refuses settings that can't work, before anything expensive starts.

        Raises:
            RecipeError: one sentence on what is wrong.
        """
        ...

    def __call__(self, context: Context) -> Found:
        """Measures.

        Raises:
            RunError: it could not be measured; what the others found stays.
        """
        ...


def describe(evaluation: Any) -> dict[str, Any]:
    """The settings of an evaluation, as results carry them."""
    import dataclasses

    return {"name": EVALS.name_of(evaluation), **dataclasses.asdict(evaluation)}
