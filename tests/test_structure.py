"""The shape of the repository: who may import whom, which names are taken, what a wheel holds, what files may say."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.recipe import read_recipe
from align.settings import read_settings
from objectives.registry import defaults
from tests.support import REPOSITORY

MAY_IMPORT = {
    "objectives": set(),
    "data": {"objectives"},
    "align": {"objectives", "data"},
    "evals": {"objectives", "data", "align"},
    "launch": {"objectives", "data", "align", "evals"},
}
"""What the modules of a package may import of ours, besides the package itself. Nobody imports ``launch``."""

ENTRY_POINTS = {"align/train.py", "align/rounds.py", "align/answer.py", "data/__main__.py", "evals/__main__.py"}
"""Where things are put together: inside functions they may import any package but ``launch``."""

RECIPES = sorted((REPOSITORY / "launch" / "recipes").glob("**/*.yaml"))
MODULES = sorted(path for package in MAY_IMPORT for path in (REPOSITORY / package).rglob("*.py"))
every_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())


def test_shapes_are_checked_wherever_they_are_annotated(request: pytest.FixtureRequest):
    checked = request.config.getoption("jaxtyping_packages").split(",")
    for path in MODULES:
        name = path.relative_to(REPOSITORY).with_suffix("").as_posix().replace("/", ".")
        if "from jaxtyping import" in path.read_text() and not name.startswith("launch."):
            assert any(f"{name}.".startswith(f"{each}.") for each in checked), f"{name}: see addopts in pyproject.toml"


def imports(tree: ast.AST, package: str, *, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Top-level name of every import, and whether it stands inside a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (package if node.level else str(node.module).partition(".")[0], inside)
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(node, package, inside=inside or function)


def forbidden(source: str, name: str) -> set[str]:
    """Packages of ours that the module ``name`` imports and may not."""
    package = name.partition("/")[0]
    allowed = {package} | MAY_IMPORT[package]
    everywhere = allowed | (set(MAY_IMPORT) - {"launch"} if name in ENTRY_POINTS else set())
    return {
        imported
        for imported, inside in imports(ast.parse(source), package)
        if imported in {*MAY_IMPORT, "tests"} and imported not in (everywhere if inside else allowed)
    }


@every_module
def test_packages_import_only_what_they_may(path):
    assert forbidden(path.read_text(), path.relative_to(REPOSITORY).as_posix()) == set()


@pytest.mark.parametrize(
    ("source", "name", "found"),
    [
        ("import align.model", "data/a.py", {"align"}),
        ("from evals import x", "align/a.py", {"evals"}),
        ("if True:\n    import data.pack as p", "objectives/a.py", {"data"}),
        ("def f():\n    import evals", "align/a.py", {"evals"}),
        ("import evals", "align/train.py", {"evals"}),
        ("def f():\n    import evals", "align/train.py", set()),
        ("def f():\n    import launch", "align/train.py", {"launch"}),
        ("import tests.support", "launch/a.py", {"tests"}),
        ("from . import pack\nimport datasets, launcher", "data/a.py", set()),
    ],
)
def test_the_walk_sees_what_is_forbidden(source, name, found):
    assert forbidden(source, name) == found


@pytest.mark.slow
def test_no_file_of_align_hides_another_module():
    """``accelerate launch align/train.py`` puts ``align/`` first on the path: ``align/data.py`` would be ``data``."""
    taken = {
        *sys.stdlib_module_names,
        *importlib.metadata.packages_distributions(),
        *(path.name for path in REPOSITORY.iterdir() if (path / "__init__.py").is_file()),
    }
    here = {
        path.stem for path in (REPOSITORY / "align").iterdir() if path.suffix in (".py", "") and path.stem[0] != "_"
    }
    assert here & taken == set()
    assert {"data", "types", "logging", "torch", "tests"} <= taken, "what the names are compared with"


@every_module
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def in_a_new_process(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Without the variables by which the tests themselves find the repository."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_help_works_from_anywhere_and_loads_no_model_library(tmp_path):
    """A run's keys are looked up often; what takes seconds to import is not needed to print them."""
    done = in_a_new_process("-X", "importtime", REPOSITORY / "align" / "train.py", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--train.learning_rate" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "align.recipe" in imported
    # Not torch: objectives are formulas on tensors, and the recipe knows their keys from their classes.
    assert imported & {"transformers", "datasets", "accelerate", "peft", "pandas", "matplotlib"} == set()


@pytest.mark.slow
def test_a_misspelt_key_is_answered_before_any_model_library_is_loaded(tmp_path):
    words = ("--config", RECIPES[0], "--lerning_rate", "1e-6")
    done = in_a_new_process("-X", "importtime", REPOSITORY / "align" / "train.py", *words, cwd=tmp_path)
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert len(said) == 1
    assert said[0].startswith("error: unknown key --lerning_rate")
    assert not re.search(r"\| +(transformers|datasets)$", done.stderr, re.MULTILINE)


# Recipes and the wheel


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_begins_with_its_command_and_can_be_read(path, monkeypatch):
    first = path.read_text().splitlines()[0]
    assert re.fullmatch(r"# (accelerate launch|python|torchrun) .+", first), first
    assert path.relative_to(REPOSITORY).as_posix() in first
    for word in re.findall(r"[\w/.-]+\.(?:py|yaml)", first):
        assert (REPOSITORY / word).is_file(), f"{word} is in the command and not in the repository"
    monkeypatch.chdir(REPOSITORY)  # recipes of rounds name recipes for training
    module = found[1] if (found := re.search(r"-m (align\.\w+|evals run)", first)) else "align.train"
    module = {"evals run": "evals.run"}.get(module, module)
    if module == "align.train":
        read_recipe(path)
    else:
        read_settings(path, [], importlib.import_module(module).SCHEMA)


@pytest.mark.slow
def test_a_wheel_holds_recipes_and_templates(tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel takes setuptools 77 or newer")
    pytest.importorskip("pip", reason="building a wheel takes pip")
    tree = tmp_path / "tree"  # building writes into the source tree
    for path in repository_files():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / path, tree / path)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    done = in_a_new_process("-m", "pip", "wheel", *options, "--wheel-dir", tmp_path, tree, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    data = [p for p in repository_files() if re.match(r"launch/(recipes|accelerate)/.*\.yaml$|evals/templates/", p)]
    wanted = {path.relative_to(REPOSITORY).as_posix() for path in MODULES if "bench" not in path.parts}
    assert {*data, *wanted} - held == set()
    assert not [name for name in held if name.startswith("tests/")]


# What files say


def repository_files() -> list[str]:
    """Every file that is or would be in version control."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a checkout: which files belong to the repository is only known to git")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listed.stdout.split("\0") if name and (REPOSITORY / name).is_file()]


MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|root)/\w")


@pytest.mark.slow
def test_no_file_names_a_place_on_somebodys_machine():
    found = []
    for name in repository_files():
        content = (REPOSITORY / name).read_bytes()
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode().splitlines(), start=1):
            if MACHINE_PATH.search(line):
                found.append(f"{name}:{number}: {line.strip()}")
    assert found == []


def test_what_counts_as_a_place_on_a_machine():
    for place in ("work", "root"):
        assert MACHINE_PATH.search(f"see /{place}/x")
        assert MACHINE_PATH.search(f'"/{place}/x"')
    for text in ("frame/work/x", "https://example.com/root/x", "~/work/x", "a root / work"):
        assert not MACHINE_PATH.search(text)


@pytest.mark.parametrize("name", ["sample", "scores", "pairs", "answer", "rounds"])
def test_help_lists_every_key(name, capsys):
    module = importlib.import_module(f"align.{name}")
    assert module.main(["--help"]) == 0
    said = capsys.readouterr().out
    for section, cls in module.SCHEMA.sections.items():
        assert all(f"--{section}.{key} (" in said for key in defaults(cls))
    for registry in module.SCHEMA.named.values():
        for entry in registry.names():
            assert all(f"{key} (" in said for key in defaults(registry[entry])), entry
