"""What the scripts beside this one share: batches, stand-ins for models, and how a vector file is written.

Run a script as a module from the root of the repository, ``python -m tests.vectors.make.trl_tpo``.
"""

from __future__ import annotations
import __future__

import ast
import importlib.metadata
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

VECTORS = Path(__file__).resolve().parents[1]

Ragged = list[list[float]]
Legs = dict[str, dict[str, Ragged]]
Result = tuple[float, dict[str, Ragged]]
"""A loss, and its gradient: by the policy log-probs under a leg's name, by other numbers per token under leg/name."""

Heads = dict[str, dict[str, list[float]]]
"""Outputs of a scalar head, one per row: by leg, then by name."""

OfHeads = tuple[float, dict[str, list[float]]]
"""A loss, and its gradient by each of those, under leg/name."""

Case = dict[str, Any]
"""One entry of a vector file."""

PAIR = ("chosen", "rejected")

IGNORED = -100
"""The label of what is not to be learned."""

SMALL: Legs = {
    "chosen": {
        "logps": [[-0.5, -1.0, -1.5], [-2.0, -0.25]],
        "ref_logps": [[-0.75, -1.25, -1.0], [-1.5, -0.5]],
    },
    "rejected": {
        "logps": [[-1.25, -0.75], [-0.5, -1.0, -2.0, -0.5]],
        "ref_logps": [[-1.0, -0.5], [-0.75, -1.5, -1.75, -1.0]],
    },
}
"""Two pairs whose numbers are round enough to follow by eye."""

SMALL_GOLD: Ragged = [[-0.25, -0.75, -0.5], [-1.0, -1.5]]


def random_rows(generator: torch.Generator, lengths: Sequence[int]) -> Ragged:
    """Log-probs of about −1, rounded to four places and never 0."""
    return [
        [round(min(x, -1e-4), 4) for x in torch.empty(n).exponential_(generator=generator).neg().tolist()]
        for n in lengths
    ]


def random_leg(generator: torch.Generator, rows: int, *, reference: bool) -> dict[str, Ragged]:
    """Rows of 1 to 9 tokens."""
    lengths = torch.randint(1, 10, (rows,), generator=generator).tolist()
    return {key: random_rows(generator, lengths) for key in (("logps", "ref_logps") if reference else ("logps",))}


def padded(rows: Ragged, width: int) -> Tensor:
    return torch.tensor([row + [0.0] * (width - len(row)) for row in rows], dtype=torch.float64)


def mask_of(rows: Ragged, width: int) -> Tensor:
    return torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


def ragged(values: Tensor, like: Ragged) -> Ragged:
    return [row[: len(pattern)].tolist() for row, pattern in zip(values, like, strict=True)]


def both_legs(values: Tensor, legs: Legs) -> dict[str, Ragged]:
    """Numbers per token of chosen rows and, below them, of rejected ones."""
    return {name: ragged(part, legs[name]["logps"]) for name, part in zip(PAIR, values.chunk(2), strict=True)}


def pair_arrays(legs: Legs) -> list[Ragged]:
    """Policy log-probs of both legs, then the reference's: what transcriptions of pairwise losses take."""
    return [legs[name][key] for key in ("logps", "ref_logps") for name in PAIR]


def pairs(generator: torch.Generator, rows: int, *, scale: float = 1.0) -> Legs:
    """Pairs of 1 to 9 tokens; with a ``scale`` above 1 the policy has moved that much further from the reference."""
    legs: Legs = {name: random_leg(generator, rows, reference=True) for name in PAIR}
    for leg in legs.values():
        leg["logps"] = [[round(scale * x, 4) for x in row] for row in leg["logps"]]
    return legs


def one_row_at_a_time(function: Callable[..., Result], legs: Legs, **options: Any) -> Result:
    """The mean over rows of the loss of each row alone."""
    rows = len(next(iter(legs.values()))["logps"])
    total = 0.0
    grad: dict[str, Ragged] = {}
    for i in range(rows):
        alone = {name: {key: [values[i]] for key, values in leg.items()} for name, leg in legs.items()}
        loss, slopes = function(alone, **options)
        total += loss / rows
        for name, (row,) in slopes.items():
            grad.setdefault(name, []).append([slope / rows for slope in row])
    return total, grad


@contextmanager
def in_double() -> Iterator[None]:
    """What code makes or casts in single precision is double inside: new tensors, ``.float()``, ``torch.float32``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with (
            mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
            mock.patch.object(torch, "float32", torch.float64),
        ):
            yield
    finally:
        torch.set_default_dtype(before)


def logits_of(logps: Tensor, mask: Tensor, label: Tensor) -> Tensor:
    """Logits over two tokens, ids 0 and 1, whose log-softmax at ``label`` is ``logps``: (row, token, 2).

    The other token gets log(1 − p), so the normaliser is 1 and its gradient vanishes. Uniform where ``mask`` is 0.
    """
    inside = torch.where(mask.bool(), logps, math.log(0.5))
    # log(1 − p), from p's far side where p is near 1
    other = torch.where(inside > -math.log(2), torch.log(-torch.expm1(inside)), torch.log1p(-torch.exp(inside)))
    zero_first = torch.stack([inside, other], dim=-1)
    return torch.where(label.bool()[..., None], zero_first.flip(-1), zero_first)


def logits_and_labels(logps: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """One prompt token in front, and a last position that predicts nothing; every token has id 0."""
    at_tokens = logits_of(logps, mask, torch.zeros_like(mask))
    logits = torch.cat([at_tokens, torch.zeros_like(at_tokens[:, :1])], dim=1)
    ignored = torch.full_like(mask[:, :1], IGNORED)
    return logits, torch.cat([ignored, torch.where(mask.bool(), 0, IGNORED)], dim=1)


def slopes_through(by_logits: Tensor, logits: Tensor, features: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
    """The gradient by numbers that code makes inside: from its gradient by the logits they come from.

    Position by position, ``by_logits`` must be a combination of the features' own gradients; its coefficients are
    the gradient by them.

    Args:
        by_logits: gradient of a loss by the logits: (row, token, vocabulary).
        logits: leaves of the graph.
        features: one number per position each, a function of the logits at that position: (row, token).
        mask: where to look: (row, token).
    Returns:
        For each feature the gradient by it, (row, token), 0 outside ``mask``.
    """
    own = [torch.autograd.grad(each.sum(), logits, retain_graph=True)[0] for each in features]
    basis = torch.stack(own, dim=-1)[mask.bool()]
    target = by_logits[mask.bool()][..., None]
    assert torch.linalg.matrix_rank(basis).min() == len(features), "their gradients are not independent everywhere"
    found = torch.linalg.lstsq(basis, target).solution
    torch.testing.assert_close(basis @ found, target, rtol=1e-11, atol=1e-14)
    slopes = [torch.zeros_like(each).detach() for each in features]
    for number, each in enumerate(slopes):
        each[mask.bool()] = found[:, number, 0]
    return slopes


class PrescribedLogits(torch.nn.Module):
    """Stands where a language model would: whatever the input, these are its logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, *_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits)


class PrescribedLogps(torch.nn.Module):
    """Stands where a language model with a fused head would: the log-probs of its tokens, one after the other call."""

    is_gradient_checkpointing = False

    def __init__(self, answer: Callable[[dict[str, Tensor]], Tensor], **further: Tensor) -> None:
        super().__init__()
        self.answer = answer
        self.further = further

    def forward(self, **inputs: Tensor) -> SimpleNamespace:
        log_probs = self.answer(inputs)
        nothing = torch.zeros_like(log_probs)
        return SimpleNamespace(
            log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool(), **self.further
        )


ALONE = SimpleNamespace(
    device="cpu",
    process_index=0,
    is_main_process=True,
    use_distributed=False,
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, **_: x,
    pad_across_processes=lambda x, **_: x,
)
"""Stands where an accelerator of one process would."""


def case(
    name: str,
    how: str,
    config: Mapping[str, object],
    legs: Legs,
    result: Result,
    check: Result,
    **rest: object,
) -> Case:
    """One entry of a vector file; legs are padded with 0 up to each leg's longest row, and ``mask`` says where.

    Numbers per token that a leg has beside ``logps``, ``ref_logps`` and ``weight`` are its extras; one that is NaN is
    written as null. ``rest`` (labels, scores, state, …) is written as it is. Raises if ``check``, the transcription's
    result on the same numbers, is not ``result``.
    """
    assert_same(name, result, check)
    loss, grad = result
    written = {}
    for leg, arrays in legs.items():
        width = max(map(len, arrays["logps"]))
        written[leg] = {key: without_nan(padded(rows, width).tolist()) for key, rows in arrays.items()}
        written[leg]["mask"] = mask_of(arrays["logps"], width).tolist()
    gradient = {key: padded(rows, max(map(len, rows))).tolist() for key, rows in grad.items()}
    return {"name": name, "how": how, "config": dict(config), **rest, "legs": written, "loss": loss, "grad": gradient}


def case_of_heads(
    name: str, how: str, config: Mapping[str, object], heads: Heads, result: OfHeads, check: OfHeads, **rest: object
) -> Case:
    """The same for losses that read outputs of a scalar head: ``legs`` has ``values`` and nothing per token.

    A score that is NaN, in ``rest``, is written as null.
    """
    assert set(result[1]) == set(check[1]) == {f"{leg}/{key}" for leg, values in heads.items() for key in values}
    assert_same(name, *((loss, {key: [row] for key, row in grad.items()}) for loss, grad in (result, check)))
    legs = {leg: {"values": values} for leg, values in heads.items()}
    if "scores" in rest:
        scores: Any = rest["scores"]
        rest["scores"] = {key: without_nan([values])[0] for key, values in scores.items()}
    loss, grad = result
    return {"name": name, "how": how, "config": dict(config), **rest, "legs": legs, "loss": loss, "grad": grad}


def random_values(generator: torch.Generator, rows: int, *, scale: float = 2.0) -> list[float]:
    """Outputs of a head around 0, rounded to four places."""
    return [round(scale * x, 4) for x in torch.randn(rows, generator=generator, dtype=torch.float64).tolist()]


def without_nan(rows: Ragged) -> list[list[float | None]]:
    return [[None if math.isnan(x) else x for x in row] for row in rows]


def assert_same(name: str, result: Result, check: Result) -> None:
    """The transcription has the same loss to one part in 10¹¹ and the same gradients."""
    if not math.isclose(result[0], check[0], rel_tol=1e-11):
        raise AssertionError(f"{name}: loss {result[0]!r}, transcription {check[0]!r}")
    for leg, rows in check[1].items():
        for found, expected in zip(result[1][leg], rows, strict=True):
            for a, b in zip(found, expected, strict=True):
                if not math.isclose(a, b, rel_tol=1e-11, abs_tol=1e-14):
                    raise AssertionError(f"{name}: gradient of {leg} {a!r}, transcription {b!r}")


def assert_six_places(found: float, expected: float) -> None:
    """What is found rounds to a number that is known to six places."""
    if not abs(found - expected) < 5.1e-7:
        raise AssertionError(f"{found!r}, known is {expected}")


def write(name: str, source: str, made_by: str, cases: list[Case], packages: Sequence[str], **rest: object) -> None:
    """Writes one line per row of an array, so that a changed number is a changed line.

    ``rest`` (the objective, where the file has another name) is written as it is.
    """
    versions = {package: importlib.metadata.version(package) for package in packages}
    contents = {"source": source, "made_by": made_by, "versions": versions, **rest, "cases": cases}
    text = re.sub(r"\[[^\[\]{}]*\]", lambda row: json.dumps(json.loads(row[0])), json.dumps(contents, indent=1))
    path = VECTORS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


def excerpt(path: Path, name: str, scope: dict[str, Any], *, methods: Sequence[str] = ()) -> Any:
    """One function or class of a source file, compiled alone, for files whose imports are not at hand.

    ``scope`` holds the global names it uses. With ``methods``, only these of the class are kept, and no base class.
    Type hints are not evaluated.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (found,) = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name]
    if isinstance(found, ast.ClassDef) and methods:
        found.bases = []
        found.body = [node for node in found.body if isinstance(node, ast.FunctionDef) and node.name in methods]
    flags = __future__.annotations.compiler_flag
    exec(compile(ast.Module([found], []), str(path), "exec", flags=flags, dont_inherit=True), scope)
    return scope[name]
