r"""Mathematical answers: finding them in a response, writing them in one way, telling whether two are equal.

Reading and comparing are math-verify's. What is done before, because it would read them otherwise: ``1e5`` is a power
of ten and not 1, ``2 1/2`` is five halves and not one, ``50\%`` is a percentage, and a word is not the product of its
letters, which would make "Paris" equal to "pairs".

Evaluating an expression may take forever: call these functions through ``align.bounded``. Nothing else of this project
is imported here, so that its processes start quickly.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

LONGEST = 200
"""Characters of an answer that are looked at as mathematics; what is longer is text."""

_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+"
_FRACTION = r"[-+]?\d+\s*/\s*\d+"
_PLAIN = rf"(?:[-+]?\d+\s+\d+/\d+|{_FRACTION}|(?:{_NUMBER})(?:[eE][-+]?\d+)?)(?:\s*\\?%)?"
_ANNOUNCED = re.compile(
    rf"answer(?:\s+is|\s*:)\s*:?\s*\$?(?P<value>{_PLAIN})\$?(?=[.,;!]?(?:\s|$))|^(?P<alone>{_PLAIN})\.?$", re.IGNORECASE
)
_WORDS = re.compile(r"(?:[^\W\d_]{3,}|no)(?:[ '-][^\W\d_]+)*", re.IGNORECASE)
_UNITS = re.compile(rf"(?P<value>{_FRACTION}|{_NUMBER})\s+[^\W\d_]{{3,}}(?:[ -][^\W\d_]+)*\.?")
_NAMED = {"pi": r"\pi", "infinity": r"\infty", "inf": r"\infty", "oo": r"\infty"}
_SIGNS = {"−": "-", "∞": r"\infty ", "π": r"\pi ", "×": r"\times ", "·": r"\cdot ", "÷": "/", "²": "^2",
          "³": "^3", "°": "", "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ", "**": "^"}  # fmt: skip
_THOUGHTS = re.compile(r"^.*</think>|<think>.*$", re.DOTALL)


def prepare() -> None:
    """Loads what the first answer would wait for."""
    checked(("1/2",), r"The answer is $\frac{x}{2}$.")


def checked(right: tuple[str, ...], text: str) -> tuple[str | None, bool]:
    """The answer of a response, as ``canonical`` writes it, and whether it is one of the right ones.

    Args:
        right: right answers, or worked solutions that end with them.
        text: of the response.
    """
    values = answer_of(text)
    if values is None:
        return None, False
    return canonical(values), any(_verified(answer_of(each, whole=True), values) for each in right)


def equal(first: str, second: str) -> bool:
    """Whether two answers are equal, in whichever order math-verify takes them."""
    one, other = (answer_of(each, whole=True) for each in (first, second))
    return _verified(one, other) or _verified(other, one)


def answer_of(text: str, *, whole: bool = False) -> list[Any] | None:
    """The final answer as math-verify reads it: an expression and the text it was read from, or only a text.

    Args:
        text: a response; what was thought before it is passed over.
        whole: whether it is all answer, unless a part of it is marked as such.
    """
    said = _THOUGHTS.sub("", text).strip()
    marked = boxed(said)
    if marked is None and "####" in said:
        marked = said.rpartition("####")[2].strip().split("\n")[0]
    if marked is None and whole:
        marked = said
    if marked is None and (announced := list(_ANNOUNCED.finditer(said))):
        last = announced[-1]
        corrected = "answer" in said[last.end() :].lower()  # in another form, which math-verify may find
        marked = None if corrected else last["value"] or last["alone"]
    if marked is not None:
        return expression(marked)
    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    return _parsed(said, (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())) or None


def boxed(text: str) -> str | None:
    r"""What the last complete ``\boxed{…}`` or ``\fbox{…}`` holds; None where there is none."""
    for match in reversed(list(re.finditer(r"\\f?boxed?\s*\{", text))):
        depth, start = 1, match.end()
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0) if text[end - 1] != "\\" else 0
            if depth == 0:
                return text[start:end]
    return None


def expression(source: str) -> list[Any] | None:
    """A text that is nothing but an answer, as math-verify reads it; None where it is empty."""
    source = _plain(source)
    if not source:
        return None
    if len(source) > LONGEST or (_WORDS.fullmatch(source) and source.lower() not in _NAMED):
        return [source.casefold()]
    from sympy import Float, Integer, Rational, UnevaluatedExpr

    if percent := re.fullmatch(r"(.+?)\s*(?:\\?%|percent|\\text\{\s*percent\s*\})", source):
        value = expression(percent[1])
        if value is not None and not isinstance(value[0], str):
            return [value[0] * UnevaluatedExpr(Rational(1, 100)), source]
    if units := _UNITS.fullmatch(source):
        source = units["value"]
    if mixed := re.fullmatch(r"([-+]?)(\d+)\s+(\d+)/(\d*[1-9]\d*)", source):
        sign, whole, above, below = mixed.groups()
        value = Integer(whole) + Rational(int(above), int(below))
        return [-value if sign == "-" else value, source]
    if re.fullmatch(rf"(?:{_NUMBER})[eE][-+]?\d{{1,3}}", source):
        return [Rational(source.replace(",", "")), source]
    if re.fullmatch(_NUMBER, source):
        number = source.replace(",", "")
        return [Float(number) if "." in number else Integer(number), source]
    if re.fullmatch(_FRACTION, source) and not re.search(r"/\s*0+$", source):
        return [Rational(*(int(part) for part in source.split("/"))), source]
    from math_verify import LatexExtractionConfig

    source = _NAMED.get(source.lower(), source)
    found = _parsed(rf"\boxed{{{source}}}", (LatexExtractionConfig(boxed_match_priority=0),))
    return found if found and not isinstance(found[0], str) else [source.casefold()]


def canonical(values: list[Any]) -> str:
    """An answer in one way of writing: ``12``, ``1/2``, else LaTeX, which reads back as the same; else its text.

    Decimals become fractions, ``x = 5`` becomes ``5``, and percentages stay percentages, because they may be meant
    either way.
    """
    value, text = values[0], _plain(str(values[-1]))
    if isinstance(value, str):
        return text
    from math_verify.grader import get_pct_val
    from sympy import latex

    if (share := get_pct_val(value)) is not None:
        return f"{canonical([share, str(share)])}\\%"
    try:
        value = _simple(value)
        written = str(value) if getattr(value, "is_Rational", False) else " ".join(latex(value).split())
        return written if len(written) <= LONGEST and _verified(expression(written), [value]) else text
    except Exception:  # sympy fails in many ways on what is hardly mathematics
        return text


def _simple(value: Any) -> Any:
    from math_verify.grader import is_assignment_relation, take_last_relation
    from sympy import Basic, Expr, Float, Rational, simplify

    if is_assignment_relation(value):
        value = take_last_relation(value).rhs
    if isinstance(value, Expr):
        value = value.doit()
    if isinstance(value, Basic):
        value = value.xreplace({each: Rational(Fraction(str(each))) for each in value.atoms(Float)})
    return simplify(value) if isinstance(value, Expr) and not value.is_Rational else value


def _plain(source: str) -> str:
    for sign, written in _SIGNS.items():
        source = source.replace(sign, written)
    source = " ".join(source.split()).removesuffix(".").strip()
    while source[:2] + source[-2:] in (r"\(\)", r"\[\]"):
        source = source[2:-2].strip()
    return source.strip("$").strip()  # of $5$, and of $5 in dollars


def _parsed(text: str, how: tuple[Any, ...]) -> list[Any]:
    _quiet()
    from math_verify import parse

    return parse(text, how, parsing_timeout=None)  # type: ignore[arg-type]


def _verified(right: list[Any] | None, values: list[Any] | None) -> bool:
    _quiet()
    from math_verify import verify

    if not right or not values:
        return False
    if isinstance(right[0], str) or isinstance(values[0], str):
        one, other = (_plain(str(each[-1])).casefold() for each in (right, values))
        return one.replace(" ", "") == other.replace(" ", "")
    return verify(right[:1], values[:1], timeout_seconds=None)


@lru_cache(maxsize=1)
def _quiet() -> None:
    """The library warns of calls without its own time limit; ours is the process's."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
