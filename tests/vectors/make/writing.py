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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

VECTORS = Path(__file__).resolve().parents[1]

Ragged = list[list[float]]
Legs = dict[str, dict[str, Ragged]]
Result = tuple[float, dict[str, Ragged]]
"""A loss, and its gradient with respect to the policy log-probs of each leg."""

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


def logits_of(logps: Tensor, mask: Tensor, label: Tensor) -> Tensor:
    """Logits over two tokens, ids 0 and 1, whose log-softmax at ``label`` is ``logps``: (row, token, 2).

    The other token gets log(1 − p), so the normaliser is 1 and its gradient vanishes. Uniform where ``mask`` is 0.
    """
    inside = torch.where(mask.bool(), logps, math.log(0.5))
    # log(1 − p), from p's far side where p is near 1
    other = torch.where(inside > -math.log(2), torch.log(-torch.expm1(inside)), torch.log1p(-torch.exp(inside)))
    zero_first = torch.stack([inside, other], dim=-1)
    return torch.where(label.bool()[..., None], zero_first.flip(-1), zero_first)


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

    def __init__(self, answer: Callable[[dict[str, Tensor]], Tensor]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, **inputs: Tensor) -> SimpleNamespace:
        log_probs = self.answer(inputs)
        nothing = torch.zeros_like(log_probs)
        return SimpleNamespace(log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())


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
) -> dict[str, object]:
    """One entry of a vector file; legs are padded with 0 up to each leg's longest row, and ``mask`` says where.

    ``rest`` (labels, density_ratio, state) is written as it is. Raises if ``check``, the transcription's result on the
    same numbers, is not ``result``.
    """
    assert_same(name, result, check)
    loss, grad = result
    written = {}
    for leg, arrays in legs.items():
        width = max(map(len, arrays["logps"]))
        written[leg] = {key: padded(rows, width).tolist() for key, rows in arrays.items()}
        written[leg]["mask"] = mask_of(arrays["logps"], width).tolist()
    gradient = {leg: padded(grad[leg], max(map(len, grad[leg]))).tolist() for leg in legs}
    return {"name": name, "how": how, "config": dict(config), **rest, "legs": written, "loss": loss, "grad": gradient}


def assert_same(name: str, result: Result, check: Result) -> None:
    """The transcription has the same loss to one part in 10¹¹ and the same gradients."""
    if not math.isclose(result[0], check[0], rel_tol=1e-11):
        raise AssertionError(f"{name}: loss {result[0]!r}, transcription {check[0]!r}")
    for leg, rows in check[1].items():
        for found, expected in zip(result[1][leg], rows, strict=True):
            for a, b in zip(found, expected, strict=True):
                if not math.isclose(a, b, rel_tol=1e-11, abs_tol=1e-14):
                    raise AssertionError(f"{name}: gradient of {leg} {a!r}, transcription {b!r}")


def write(name: str, source: str, made_by: str, cases: list[dict[str, object]], packages: Sequence[str]) -> None:
    """Writes one line per row of an array, so that a changed number is a changed line."""
    versions = {package: importlib.metadata.version(package) for package in packages}
    contents = {"source": source, "made_by": made_by, "versions": versions, "cases": cases}
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
