"""Would the tests notice? Breaks each objective in small ways and counts how many breaks the tests catch.

    make mutants              or: python -m launch.bench.mutants [--only dpo,links] [--share 0.2]

A mutant is one change in one place of a formula: a sign flipped, + for −, a mask or weight left out, a mean for a sum,
a value detached or no longer detached, a bound or a constant changed. Each runs in a process of its own, against the
tests of the objectives alone (vectors, transcriptions, cases by hand, the ten laws), which stop at the first failure.
``docs/mutants.md`` lists what survived; a mutant that computes the same numbers (a clamp nothing reaches) is a survivor
too, and stands there with its line.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import multiprocessing
import os
import random
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["torch", "numpy", "pytest", "hypothesis.strategies", "transformers", "jaxtyping"])
"""A process for each mutant, without the seconds that imports take."""
LONGEST = 900.0
"""Seconds after which a mutant's tests are ended."""
DOCUMENT = ROOT / "docs" / "mutants.md"
MODULES = (
    *("absolute", "bco", "beta_dpo", "coverage", "dpo", "kto", "links", "modifiers", "number_tokens", "pairs"),
    *("reference_free", "reward_aware", "reward_model", "rpo", "sample_weights", "sft", "sorting", "symbolic", "tdpo"),
    *("token_weights", "tpo"),
)
FORMULAS = (
    "__call__",
    "_losses",
    "losses",
    "reward",
    "factor",
    "slope",
    "weight",
    "row_weights",
    "prepare",
    "step_pass",
)
FORMULAS += ("observe", "update", "beta_of", "pair_of", "smoothed", "_output", "_weights", "_rho", "_strength", "tau")
FORMULAS += ("bernoulli_kl", "row_losses", "median", "_moments", "_targets", "_policy_margin", "_rank", "_shift")
LOGGED = ("further", "metrics", "found", "rewards", "factor", "errors")
"""Names of what is only logged."""
SWAPS = {"sum_logps": "mean_logps", "mean_logps": "sum_logps", "nll": "mean_nll", "mean_nll": "nll", "sum": "mean"}


@dataclass(frozen=True)
class Mutant:
    """One change."""

    module: str
    line: int
    what: str
    source: str


def mutants(module: str) -> Iterator[Mutant]:
    """Every small change of the formulas in a module."""
    text = (ROOT / "objectives" / f"{module}.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    places = [
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name in FORMULAS
        for node in _formula_nodes(function)
    ]
    for number, node in enumerate(places):
        for change in _changes(node):
            again = copy.deepcopy(tree)
            same = [
                other
                for function in ast.walk(again)
                if isinstance(function, ast.FunctionDef) and function.name in FORMULAS
                for other in _formula_nodes(function)
            ][number]
            what = _apply(again, same, change)
            if change == "detach logratio" and _without_slope(tree, node):
                continue
            if what is not None:
                yield Mutant(module, getattr(node, "lineno", 0), what, ast.unparse(ast.fix_missing_locations(again)))


def _without_slope(tree: ast.AST, node: ast.AST) -> bool:
    """Whether no gradient goes through a place anyhow: it is detached further on, or only compared."""
    for parent in ast.walk(tree):
        detached = isinstance(parent, ast.Attribute) and parent.attr == "detach"
        if (detached or isinstance(parent, ast.Compare)) and any(child is node for child in ast.walk(parent)):
            return True
    return False


def _formula_nodes(function: ast.FunctionDef) -> list[ast.AST]:
    """Expressions of a function, without its metrics: what is only logged is not the loss."""
    found: list[ast.AST] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Mean.of", "Mean", "preference_metrics"):
            return
        if isinstance(node, ast.keyword) and node.arg in ("metrics", "count"):
            return
        found.append(node)
        for child in ast.iter_child_nodes(node):
            visit(child)

    for statement in function.body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # its docstring
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) in LOGGED:
            continue
        visit(statement)
    return found


def _changes(node: ast.AST) -> list[str]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        return ["swap the sign"]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult | ast.Div):
        return ["swap * and /"]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return [] if isinstance(node.operand, ast.Constant) else ["drop the minus"]  # −1 is a dimension
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        name = node.func.attr
        if name in SWAPS:
            return [f"{name} → {SWAPS[name]}"]
        if name in ("detach", "clamp"):
            return [f"drop {name}"]
        if name in ("logratio",):
            return ["logratio → sum_logps", "detach logratio"]
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.where", "masked_sum"):
        return ["drop the mask"]
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return ["another constant"] if node.value not in (-1,) else []
    return []


def _apply(tree: ast.AST, node: ast.AST, change: str) -> str | None:
    """Changes the node within the tree; None where the change makes no sense there."""
    before = ast.unparse(node)
    new: ast.AST | None = None
    if isinstance(node, ast.BinOp) and change == "swap the sign":
        node.op = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
    elif isinstance(node, ast.BinOp):
        node.op = ast.Div() if isinstance(node.op, ast.Mult) else ast.Mult()
    elif isinstance(node, ast.UnaryOp):
        new = node.operand
    elif isinstance(node, ast.Constant):
        if _is_index(tree, node):
            return None
        node.value = node.value + 1 if node.value != 0.5 else 1.0  # type: ignore[operator]
    elif isinstance(node, ast.Call) and change == "drop the mask":
        if ast.unparse(node.func) == "masked_sum":
            new = ast.parse(f"({ast.unparse(node.args[0])}).sum(dim=-1)", mode="eval").body
        else:
            new = node.args[1]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if change.startswith("drop"):
            new = node.func.value
        elif change == "detach logratio":
            new = ast.parse(f"{before}.detach()", mode="eval").body
        else:
            node.func.attr = change.split(" → ")[1]
    if new is not None and not _replace(tree, node, new):
        return None
    return f"`{' '.join(before.split())[:70]}`: {change}"


def _is_index(tree: ast.AST, node: ast.AST) -> bool:
    """Whether a constant is an index, a dimension or a default: changing those breaks shapes, not formulas."""
    for parent in ast.walk(tree):
        if isinstance(parent, ast.Subscript) and any(child is node for child in ast.walk(parent.slice)):
            return True
        if isinstance(parent, ast.keyword) and parent.arg in ("dim", "min", "max") and parent.value is node:
            return parent.arg == "dim"
    return False


def _replace(tree: ast.AST, old: ast.AST, new: ast.AST) -> bool:
    for parent in ast.walk(tree):
        for key, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, key, new)
                return True
            if isinstance(value, list) and any(item is old for item in value):
                value[[item is old for item in value].index(True)] = new
                return True
    return False


class _Changed(SourceFileLoader):
    """A module whose code is another than its file's."""

    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self.source = source

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.source, self.path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    """Finds the one module of a mutant."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != f"objectives.{self.mutant.module}":
            return None
        file = str(ROOT / "objectives" / f"{self.mutant.module}.py")
        return spec_from_file_location(fullname, file, loader=_Changed(fullname, file, self.mutant.source))


def _exit_code(mutant: Mutant | None, module: str) -> int:
    """pytest's, of the tests of a module, in a process where the package has not been imported yet."""
    if mutant is not None:
        sys.meta_path.insert(0, _Finder(mutant))
    os.chdir(ROOT)
    # Before pytest's own hooks are there, which would find the file.
    importlib.import_module("objectives")
    importlib.import_module(f"objectives.{module}")
    options = [
        "-o",
        "addopts=",
        "-x",
        "-q",
        "--assert=plain",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",
        "-k",
        _names(module),
    ]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        return int(pytest.main([*options, *_files(module)]))


def caught(mutant: Mutant) -> bool:
    """Whether the tests fail on it; those that do not end count as caught."""
    child = START.Process(target=_end_with, args=(mutant, mutant.module))
    child.start()
    child.join(LONGEST)
    if child.is_alive():
        child.kill()
        child.join()
    if child.exitcode == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise SystemExit(f"no test matches {_names(mutant.module)!r}")
    return child.exitcode != 0


def _end_with(mutant: Mutant | None, module: str) -> None:
    os._exit(_exit_code(mutant, module))


def unchanged_passes(module: str) -> bool:
    """Whether the tests pass on the module as it is: else every mutant would be caught."""
    child = START.Process(target=_end_with, args=(None, module))
    child.start()
    child.join()
    return child.exitcode == 0


def _names(module: str) -> str:
    """What selects the tests of a module's entries in files that test all of them."""
    text = (ROOT / "objectives" / f"{module}.py").read_text(encoding="utf-8")
    entries = [line.split('"')[1] for line in text.splitlines() if ".register(" in line]
    return " or ".join([*entries, f"test_{module}"]) if entries else ""


def _files(module: str) -> list[str]:
    """Fast and telling ones first."""
    folder = ROOT / "tests" / "objectives"
    own = [folder / f"test_{module}.py"]
    every = ["test_vectors.py", "test_modifier_vectors.py", "test_token_weights.py", "test_weighting.py"]
    every += ["test_modifiers.py", "test_conformance.py"]
    paths = dict.fromkeys(path for path in [*own, *(folder / name for name in every)] if path.is_file())
    return [str(path.relative_to(ROOT)) for path in paths]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the check; returns 0 if at least 95 % were caught."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="modules of objectives, with commas between")
    parser.add_argument("--share", type=float, default=1.0, help="of the mutants of each module, drawn at random")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants tested at a time")
    options = parser.parse_args(arguments)
    modules = [name for name in options.only.split(",") if name] or list(MODULES)
    every = [mutant for module in modules for mutant in mutants(module)]
    drawn = [mutant for mutant in every if random.Random(f"{mutant.module}/{mutant.what}").random() < options.share]
    os.environ["OMP_NUM_THREADS"] = "1"
    survivors: list[Mutant] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        looked_at = [module for module in modules if any(mutant.module == module for mutant in drawn)]
        for module, passes in zip(looked_at, pool.map(unchanged_passes, looked_at), strict=True):
            if not passes:
                raise SystemExit(f"the tests of objectives/{module}.py fail as it is")
        for number, (mutant, found) in enumerate(zip(drawn, pool.map(caught, drawn), strict=True), start=1):
            if not found:
                survivors.append(mutant)
                print(f"survived: objectives/{mutant.module}.py line {mutant.line}, {mutant.what}", flush=True)
            if number % 20 == 0:
                print(f"{number} of {len(drawn)}, {len(survivors)} survived", flush=True)
    share = 1 - len(survivors) / max(len(drawn), 1)
    print(f"caught {len(drawn) - len(survivors)} of {len(drawn)} mutants ({share:.1%}), of {len(every)} there are")
    if not options.only:
        sample = "" if options.share == 1 else f", a random {options.share:.0%} of {len(every)}"
        lines = [
            "# Mutants",
            "",
            f"`make mutants` broke the objectives in {len(drawn)} small ways{sample}; the tests caught {share:.1%}. "
            "Survivors:",
            "",
            *(f"* objectives/{each.module}.py, line {each.line}: {each.what}" for each in survivors),
        ]
        DOCUMENT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0 if share >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
