"""Verifiers: scores that follow from the text alone, with the answer that was found in it."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

from align.bounded import Failed, Pool
from align.errors import RunError
from align.samples import Group, Sample
from align.scorers import SCORERS, Scored, right_answers, without_thoughts
from data.workers import cores
from objectives.checks import require

NO_ANSWER: Mapping[str, float] = {"no answer": 1}
MOST_PROCESSES = 8


def _samples(groups: Sequence[Group]) -> list[Sample]:
    return [sample for group in groups for sample in group.samples]


def _compared(answer: str | None, right: Sequence[str], column: str) -> Scored:
    """1 for one of the right answers, 0 for another or none."""
    if not right:
        return Scored(score=None, answer=answer, reason=f"no right answer in the column {column}")
    if answer is None:
        return Scored(score=0.0, counts=NO_ANSWER)
    return Scored(score=float(answer in right), answer=answer)


@SCORERS.register("exact")
@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    """The response is the right answer, letter by letter.

        score = 1 if text = answer, else 0

    The extracted answer is the whole text, after what the keys do to it and without what was thought before.
    """

    column: str = "answer"
    """Column with the right answer, or with a list of right ones."""
    strip: bool = True
    """Whether white space at both ends makes no difference."""
    case: bool = True
    """Whether upper and lower case make a difference."""

    answers: ClassVar[bool] = True

    def __call__(self, groups: Sequence[Group]) -> list[Scored]:
        """Scores in {0, 1}; None where the column is empty."""
        return [
            _compared(
                self._normal(without_thoughts(sample.text)),
                [self._normal(each) for each in right_answers(sample, self.column)],
                self.column,
            )
            for sample in _samples(groups)
        ]

    def _normal(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text if self.case else text.casefold()


@SCORERS.register("regex")
@dataclass(frozen=True, kw_only=True)
class Regex:
    """The answer is what a pattern finds last.

        score = 1 if the last match's group is the right answer, else 0;    without a column: 1 if there is a match

    What was thought before is not searched. There is no time limit: a pattern with nested repetitions can take forever.
    """

    pattern: str
    """Of Python's ``re``, with one group: the answer. Or with several, of which one is named ``answer``."""
    column: str | None = None
    """Column with the right answer, or with a list of right ones; null compares with nothing."""
    strip: bool = True
    """Whether white space at both ends of an answer makes no difference."""
    case: bool = True
    """Whether upper and lower case make a difference, in the pattern and between answers."""

    answers: ClassVar[bool] = True

    @classmethod
    def example(cls) -> Regex:
        """Finds "Answer: 12"."""
        return cls(pattern=r"Answer:\s*(\S+)")

    def __post_init__(self) -> None:
        try:
            groups = re.compile(self.pattern).groupindex, re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"pattern is no regular expression ({error}), got {self.pattern!r}") from None
        holds = groups[1] == 1 or "answer" in groups[0]
        require("pattern", self.pattern, holds, "a pattern with one group, or with one named answer: (?P<answer>…)")

    def __call__(self, groups: Sequence[Group]) -> list[Scored]:
        """Scores in {0, 1}; None where the column is empty."""
        return [self._scored(sample) for sample in _samples(groups)]

    @cached_property
    def _compiled(self) -> re.Pattern[str]:
        return re.compile(self.pattern, re.NOFLAG if self.case else re.IGNORECASE)

    def _scored(self, sample: Sample) -> Scored:
        group = "answer" if "answer" in self._compiled.groupindex else 1
        found = [match[group] for match in self._compiled.finditer(without_thoughts(sample.text))]
        answer = self._normal(found[-1]) if found and found[-1] is not None else None
        if self.column is not None:
            right = [self._normal(each) for each in right_answers(sample, self.column)]
            return _compared(answer, right, self.column)
        return Scored(score=float(answer is not None), answer=answer, counts=NO_ANSWER if answer is None else {})

    def _normal(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text if self.case else text.casefold()


@SCORERS.register("python")
@dataclass(frozen=True, kw_only=True)
class Python:
    """A function of one's own.

        score = function(prompt=…, text=…, columns=…)

    with the prompt as it stands in the dataset (text or messages), the text of the response, and the columns of the
    prompt's row. It gives a number, true (1), false (0), or None where it can't tell. What it raises is counted by kind
    and the sample has no score.
    """

    function: str
    """``module:function`` or ``path/to/file.py:function``."""

    answers: ClassVar[bool] = False

    @classmethod
    def example(cls) -> Python:
        """Would score by the length of what a function is given."""
        return cls(function="rewards.py:brevity")

    def __post_init__(self) -> None:
        place, _, name = self.function.rpartition(":")
        require("function", self.function, bool(place) and name.isidentifier(), "module:function or file.py:function")

    def fingerprint(self) -> str:
        """Hash of the file that holds the function.

        Raises:
            RunError: it can't be imported.
        """
        try:
            source = inspect.getsourcefile(self._called)
        except TypeError:  # compiled
            source = None
        return hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16] if source else ""

    def __call__(self, groups: Sequence[Group]) -> list[Scored]:
        """Scores in the function's unit.

        Raises:
            RunError: it can't be imported.
        """
        return [self._scored(sample) for sample in _samples(groups)]

    def _scored(self, sample: Sample) -> Scored:
        try:
            value = self._called(prompt=sample.prompt, text=sample.text, columns=dict(sample.columns))
        except Exception as error:
            return Scored(score=None, reason=f"raised {type(error).__name__}: {' '.join(str(error).split())}")
        if value is None:
            return Scored(score=None, reason="the function gave None")
        value = value.item() if type(value).__module__ in ("numpy", "torch") and hasattr(value, "item") else value
        if not isinstance(value, Real):
            return Scored(score=None, reason=f"the function gave no number but {type(value).__name__}: {value!r:.80}")
        return Scored(score=float(value))

    @cached_property
    def _called(self) -> Callable[..., Any]:
        place, _, name = self.function.rpartition(":")
        try:
            module = _file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
            found = getattr(module, name)
        except Exception as error:  # whatever the module does when it is imported
            why = " ".join(str(error).split()) or type(error).__name__
            raise RunError(
                f"python: can't import {self.function!r} ({why}); give module:function or path/to/file.py:function"
            ) from None
        if not callable(found):
            raise RunError(f"python: {self.function!r} is no function but {type(found).__name__}; name a function")
        return found


def _file(path: Path) -> Any:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    name = f"_scorer_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@SCORERS.register("math")
@dataclass(frozen=True, kw_only=True)
class Math:
    r"""The final answer equals the right one, as numbers or as expressions.

        score = 1 if they are equal (1/2, 0.5, \frac{1}{2}), else 0;    without a column: 1 if there is an answer

    The final answer is the last ``\boxed{…}``, else what follows ``####``, else what math-verify finds in the text. A
    response without one is wrong. Decimals are equal to what they are rounded from at six digits; units are passed
    over, and 50% is equal to 50 and to 0.5. See ``align.math_answers``.

    Expressions are evaluated in processes of their own, which are killed at the time limit: 9^9^9^9 can't be
    interrupted in any other way, and a signal would only be received on the main thread.

    References:
        Kydlíček et al., math-verify, github.com/huggingface/Math-Verify.
    """

    column: str | None = "answer"
    """Column with the right answer, as a number or in LaTeX, or with a list of right ones. A worked solution will do
    that ends with \\boxed{…} or with #### and the answer. null compares with nothing: for votes among answers."""
    timeout: float = 5.0
    """Most seconds for one response, > 0."""
    processes: int = 0
    """How many work side by side; 0 is one for each core, eight at most."""

    answers: ClassVar[bool] = True
    free: ClassVar[frozenset[str]] = frozenset({"timeout", "processes"})

    def __post_init__(self) -> None:
        require("timeout", self.timeout, 0 < self.timeout < float("inf"), "> 0 and finite")
        require("processes", self.processes, self.processes >= 0, ">= 0")

    def __call__(self, groups: Sequence[Group]) -> list[Scored]:
        """Scores in {0, 1}; None where the column is empty or a response takes too long."""
        samples = _samples(groups)
        right = [() if self.column is None else tuple(right_answers(sample, self.column)) for sample in samples]
        asked = list(zip(right, (sample.text for sample in samples), strict=True))
        different = [each for each in dict.fromkeys(asked) if each[0] or self.column is None]
        found = dict(zip(different, self._pool.map("checked", different), strict=True))
        return [self._scored(right, found.get((right, text))) for right, text in asked]

    def equal(self, first: str, second: str) -> bool:
        """Whether two answers are equal; not transitive, and false where it can't be told within the time limit."""
        if first == second:
            return True
        (found,) = self._pool.map("equal", [(first, second)])
        return found is True

    def close(self) -> None:
        """Ends the processes."""
        if (pool := vars(self).pop("_pool", None)) is not None:
            pool.close()

    @cached_property
    def _pool(self) -> Pool:
        number = self.processes or min(cores(), MOST_PROCESSES)
        return Pool("align.math_answers", seconds=self.timeout, number=number)

    def _scored(self, right: tuple[str, ...], found: Any) -> Scored:
        if not right and self.column is not None:
            return Scored(score=None, reason=f"no right answer in the column {self.column}")
        if isinstance(found, Failed):
            return Scored(score=None, reason=found.why)
        answer, equal = found
        equal = equal if self.column is not None else answer is not None
        return Scored(score=float(equal), answer=answer, counts=NO_ANSWER if answer is None else {})
