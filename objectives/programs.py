"""Programs: propositional formulas about what a model says, and the losses they stand for.

A model's predictions are independent coin tosses: ``chosen`` is true with probability π_θ(chosen|x), ``ref_chosen``
with π_ref(chosen|x), and so on. A preference structure is three formulas: a **program** P that should hold, a
**condition** C that limits where it is looked at, and an **addition** A of worlds that count for both sides:

    up = worlds of (P or A) and C        down = worlds of (not P or A) and C

A loss compares the probability of ``up`` with that of ``down``; which worlds are in which is all there is to it.

    python -m objectives explain dpo            the program of a registered loss
    python -m objectives explain dpo cpo        and how two of them relate

References:
    Richardson et al. 2024, arXiv:2412.17696 (semantics and table; re-derived by enumeration, see the tests).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product

VARIABLES = ("chosen", "rejected", "ref_chosen", "ref_rejected")

World = tuple[bool, ...]
"""A truth value for each of ``VARIABLES``."""
Formula = Callable[[Mapping[str, bool]], bool]

_TOKEN = re.compile(r"\s*(<->|->|[()!~&|^]|[A-Za-z_]+|$|.)")
_WORDS = {"not": "!", "~": "!", "and": "&", "or": "|", "xor": "^"}


def parse(text: str) -> tuple[Formula, frozenset[str]]:
    """A formula and the variables in it.

    ``not`` (``!``, ``~``), ``and`` (``&``), ``xor`` (``^``), ``or`` (``|``), ``->`` (to the right) and ``<->`` bind in
    this order, the first most tightly; ``true``, ``false`` and ``VARIABLES`` are atoms.

    Raises:
        ValueError: the text is no formula; says where.
    """
    return _Parser(text).formula()


class _Parser:
    """Recursive descent, one method per level of binding."""

    def __init__(self, text: str) -> None:
        words = [match.group(1) for match in _TOKEN.finditer(text)]
        self.text, self.at = text, 0
        self.tokens = [_WORDS.get(word.lower(), word) for word in words if word] + [""]
        self.names: set[str] = set()

    def formula(self) -> tuple[Formula, frozenset[str]]:
        parsed = self._both_ways()
        if self.tokens[self.at]:
            raise self._error(f"{self.tokens[self.at]!r} does not belong there")
        return parsed, frozenset(self.names)

    def _error(self, what: str) -> ValueError:
        return ValueError(f"{self.text!r} is no formula: {what}; write e.g. 'rejected -> chosen'")

    def _take(self, *tokens: str) -> str | None:
        token = self.tokens[self.at]
        if token not in tokens:
            return None
        self.at += 1
        return token

    def _both_ways(self) -> Formula:
        left = self._implies()
        while self._take("<->"):
            left = _of(left, self._implies(), lambda a, b: a == b)
        return left

    def _implies(self) -> Formula:
        left = self._level("|", lambda: self._level("^", lambda: self._level("&", self._not)))
        return _of(left, self._implies(), lambda a, b: not a or b) if self._take("->") else left

    def _level(self, operator: str, lower: Callable[[], Formula]) -> Formula:
        left = lower()
        while self._take(operator):
            left = _of(left, lower(), _JOINS[operator])
        return left

    def _not(self) -> Formula:
        if self._take("!"):
            inner = self._not()
            return lambda world: not inner(world)
        if self._take("("):
            inner = self._both_ways()
            if not self._take(")"):
                raise self._error("a bracket is not closed")
            return inner
        return self._atom()

    def _atom(self) -> Formula:
        token = self.tokens[self.at]
        self.at += 1
        if token.lower() in ("true", "false"):
            constant = token.lower() == "true"
            return lambda world: constant
        if token in VARIABLES:
            self.names.add(token)
            return lambda world: world[token]
        what = f"{token!r} is no variable (known: {', '.join(VARIABLES)})" if token else "it ends too early"
        raise self._error(what)


def _or(left: bool, right: bool) -> bool:
    return left or right


def _and(left: bool, right: bool) -> bool:
    return left and right


def _xor(left: bool, right: bool) -> bool:
    return left != right


_JOINS = {"|": _or, "^": _xor, "&": _and}


def _of(left: Formula, right: Formula, join: Callable[[bool, bool], bool]) -> Formula:
    return lambda world: join(left(world), right(world))


@dataclass(frozen=True)
class Program:
    """A preference structure."""

    program: str
    """P: what should hold."""
    condition: str = "true"
    """C: where it is looked at."""
    addition: str = "false"
    """A: worlds that count for both sides, where C holds."""

    def __post_init__(self) -> None:
        for side, worlds in (("hold", self.up), ("fail", self.down)):
            if not worlds:
                raise ValueError(f"program {self.program!r} can't {side} under condition {self.condition!r}")

    @cached_property
    def variables(self) -> tuple[str, ...]:
        """Those that occur, in the order of ``VARIABLES``."""
        names = frozenset[str]().union(*(parse(text)[1] for text in (self.program, self.condition, self.addition)))
        return tuple(name for name in VARIABLES if name in names)

    @cached_property
    def up(self) -> tuple[World, ...]:
        """Worlds, as values of ``variables``, that count for the program."""
        return tuple(self._worlds(self.variables, want=True))

    @cached_property
    def down(self) -> tuple[World, ...]:
        """Worlds that count against it."""
        return tuple(self._worlds(self.variables, want=False))

    def _worlds(self, variables: tuple[str, ...], *, want: bool) -> Iterator[World]:
        holds, condition, addition = (parse(text)[0] for text in (self.program, self.condition, self.addition))
        for values in product((False, True), repeat=len(variables)):
            world = dict(zip(variables, values, strict=True))
            if condition(world) and (holds(world) == want or addition(world)):
                yield values

    def over(self, variables: tuple[str, ...]) -> tuple[frozenset[World], frozenset[World]]:
        """``up`` and ``down`` as worlds of more variables than occur."""
        return frozenset(self._worlds(variables, want=True)), frozenset(self._worlds(variables, want=False))


def relation(first: Program, second: Program) -> str:
    """How two losses relate wherever both take the same probabilities and the same falling link: ``equal``,
    ``stronger`` (the first is at least the second, everywhere), ``weaker``, or ``unknown``.

    If up(1) ⊆ up(2) and down(1) ⊇ down(2), then up(1)/down(1) ≤ up(2)/down(2) whatever the probabilities, and the first
    loss is the larger one.
    """
    variables = tuple(name for name in VARIABLES if name in (*first.variables, *second.variables))
    (up, down), (other_up, other_down) = first.over(variables), second.over(variables)
    if (up, down) == (other_up, other_down):
        return "equal"
    if up <= other_up and down >= other_down:
        return "stronger"
    if up >= other_up and down <= other_down:
        return "weaker"
    return "unknown"


@dataclass(frozen=True)
class Known:
    """What a registered loss corresponds to; the tests hold it against the loss itself."""

    program: Program
    link: str
    """``logistic``, ``squared`` or ``hinge``."""
    reduction: str
    """``sum`` or ``mean``: how a response's log-prob becomes the probability in the program."""
    part: str = ""
    """What of the loss this is, where it is not all of it."""


PREFERENCE = Program("rejected -> chosen", "chosen or rejected", "chosen and rejected")
DPO_PROGRAM = Program(
    "(rejected and ref_chosen) -> (chosen and ref_rejected)",
    "(chosen and ref_rejected) or (rejected and ref_chosen)",
    "chosen and ref_rejected and rejected and ref_chosen",
)
ODDS = Program("rejected -> chosen", "chosen xor rejected")

KNOWN: Mapping[str, Known] = {
    "sft": Known(Program("chosen"), "logistic", "sum", "per row (per: row, leg: chosen)"),
    "dpo": Known(DPO_PROGRAM, "logistic", "sum", "without label_smoothing"),
    "ipo": Known(DPO_PROGRAM, "squared", "sum", "with reduction: sum"),
    "hinge": Known(DPO_PROGRAM, "hinge", "sum", "divided by β"),
    "cpo": Known(PREFERENCE, "logistic", "sum", "the preference term, with link: sigmoid"),
    "simpo": Known(PREFERENCE, "logistic", "mean", "with gamma: 0"),
    "tpo": Known(PREFERENCE, "logistic", "sum", "the preference term, with link: sigmoid"),
    "tpo_l": Known(PREFERENCE, "logistic", "mean", "the preference term, with gamma: 0"),
    "orpo": Known(ODDS, "logistic", "mean", "the odds term"),
    "rpo": Known(DPO_PROGRAM, "logistic", "sum", "the preference term"),
    "irpo": Known(DPO_PROGRAM, "logistic", "sum", "the preference term"),
    "dpo_norm": Known(DPO_PROGRAM, "logistic", "mean"),
}
"""Programs of registered losses, by name; a loss that is not here has none that was verified."""

UNREGISTERED: Mapping[str, Program] = {
    "cCPO": Program("rejected -> chosen", "chosen or rejected"),
    "unCPO": Program("rejected -> chosen"),
    "CEUnl": Program("chosen and not rejected"),
}
"""Losses of the paper that have no name here; ``symbolic`` trains with them."""


def explained(name: str) -> str:
    """The program of a registered loss, in words, and how it relates to the others."""
    known = KNOWN.get(name)
    if known is None:
        return f"{name}: unknown. No program of it was verified."
    program = known.program
    lines = [
        f"{name}{f' ({known.part})' if known.part else ''}",
        f"    program    {program.program}",
        f"    condition  {program.condition}",
        f"    addition   {program.addition}",
        f"    link       {known.link}, of ρ = log P(up) − log P(down)",
        f"    takes      each response's {known.reduction} of token log-probs as its log-probability",
        "",
        f"    {'  '.join(program.variables)}",
    ]
    up, down = set(program.up), set(program.down)
    for world in product((True, False), repeat=len(program.variables)):
        side = {(True, True): "both", (True, False): "up", (False, True): "down"}.get((world in up, world in down), "–")
        cells = (f"{'T' if value else 'F':{len(key)}}" for key, value in zip(program.variables, world, strict=True))
        lines.append(f"    {'  '.join(cells)}  {side}")
    lines.append("")
    others = {key: other.program for key, other in KNOWN.items() if key != name} | dict(UNREGISTERED)
    for kind in ("equal", "stronger", "weaker"):
        names = [key for key, other in others.items() if relation(program, other) == kind]
        same = "the same worlds as" if kind == "equal" else f"{kind} than"
        if names:
            lines.append(f"    {same} {', '.join(names)}")
    return "\n".join(lines)


def compared(first: str, second: str) -> str:
    """How two losses relate, in a sentence."""
    programs = {name: known.program for name, known in KNOWN.items()} | dict(UNREGISTERED)
    for name in (first, second):
        if name not in programs:
            return f"{first} and {second}: unknown. No program of {name} was verified."
    found = relation(programs[first], programs[second])
    if found == "unknown":
        return f"{first} and {second}: unknown. Neither set of worlds contains the other; which is larger depends."
    bound = {"equal": "equal to", "stronger": "stronger (larger) than", "weaker": "weaker (smaller) than"}[found]
    terms = {name: (known.link, known.reduction) for name, known in KNOWN.items()}
    if first in terms and second in terms and terms[first] != terms[second]:
        ways = " and ".join(f"{link} of {reduction}s" for link, reduction in (terms[first], terms[second]))
        return (
            f"{first} and {second}: unknown as they stand ({ways}). With one falling link on the same probabilities "
            f"{first} would be {bound} {second}."
        )
    return f"{first} is {bound} {second}, wherever both take the same probabilities."
