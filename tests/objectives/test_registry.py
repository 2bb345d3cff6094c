"""The registry answers, whatever it is asked; ``python -m objectives`` shows what it holds."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from objectives import OBJECTIVES, REGULARIZERS, RELABELERS, REWARD_TRANSFORMS, TOKEN_WEIGHTS, Registry
from objectives.__main__ import main
from objectives.dpo import DPO
from objectives.registry import defaults, did_you_mean, field_docs, formula, source
from tests.support import REPOSITORY


@dataclass(frozen=True)
class Sample:
    """A sample.

        loss = a + b
             + c

    Prose, after which nothing belongs to the formula.

        not = this

    References:
        Somebody 2020,
        arXiv:2001.00001.
    """

    first: float
    """What the first
    one does."""
    second: int = 3
    """What the second one does."""
    undocumented: str = ""


def test_duplicates_are_refused():
    registry = Registry("objective")
    registry.register("sample")(Sample)
    with pytest.raises(ValueError, match="objective 'sample' is registered twice"):
        registry.register("sample")(Sample)
    assert registry.names() == ["sample"]


def test_only_dataclasses_are_filed():
    with pytest.raises(AssertionError, match="must be a dataclass"):
        Registry("objective").register("text")(str)


def test_near_names_are_suggested():
    with pytest.raises(ValueError, match=r"unknown objective 'dop'; did you mean 'dpo'\? \(known: .*dpo.*sft.*\)"):
        OBJECTIVES["dop"]


def test_far_names_get_the_list_without_a_guess():
    with pytest.raises(ValueError, match=r"unknown objective 'zebra' \(known: ") as caught:
        OBJECTIVES["zebra"]
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(("theirs", "ours"), [("sigmoid", "dpo"), ("cdpo", "dpo"), ("nll", "sft")])
def test_other_peoples_names_are_answered_with_ours(theirs: str, ours: str):
    with pytest.raises(ValueError, match=f"unknown objective '{theirs}': it is called '{ours}' here"):
        OBJECTIVES[theirs]
    assert theirs not in OBJECTIVES


def test_a_foreign_name_for_something_we_lack_is_just_unknown():
    """The answer never sends anybody to a name that is not there either."""
    registry = Registry("objective", elsewhere={"theirs": "ours"})
    with pytest.raises(ValueError, match=r"unknown objective 'theirs' \(known: none\)"):
        registry["theirs"]


def test_an_empty_suggestion_is_empty():
    assert did_you_mean("dop", []) == ""
    assert did_you_mean("dop", ["dpo"]) == "; did you mean 'dpo'?"


def test_a_registry_is_a_sorted_collection():
    registry = Registry("objective")
    registry.register("second")(Sample)
    registry.register("first")(DPO)
    assert list(registry) == registry.names() == ["first", "second"]
    assert "first" in registry
    assert "third" not in registry
    assert registry["first"] is DPO
    assert registry.name_of(Sample(first=1.0)) == "second"


def test_documentation_is_read_off_the_class():
    assert field_docs(Sample) == {"first": "What the first one does.", "second": "What the second one does."}
    assert defaults(Sample) == {"first": "required", "second": 3, "undocumented": ""}
    assert formula(Sample) == "loss = a + b\n+ c"
    assert source(Sample) == "Somebody 2020, arXiv:2001.00001."


def test_listing_shows_every_objective(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0
    shown = capsys.readouterr().out
    for name in OBJECTIVES:
        assert f"{name}\n    {formula(OBJECTIVES[name]).splitlines()[0]}" in shown
    assert "needs    chosen + rejected, reference\n" in shown
    assert "needs    completion, labels, reference\n" in shown
    assert "beta=0.1" in shown
    assert "arXiv:2305.18290" in shown


def test_show_prints_one_in_full(capsys: pytest.CaptureFixture[str]):
    assert main(["show", "dpo"]) == 0
    shown = capsys.readouterr().out
    assert "log σ(m)" in shown
    for key, value in defaults(DPO).items():
        assert f"{key} (default {value!r}): {field_docs(DPO)[key]}" in shown


def test_listing_shows_token_weights_and_relabelers_in_sections_of_their_own(capsys: pytest.CaptureFixture[str]):
    """As a recipe names them."""
    assert main([]) == 0
    shown = capsys.readouterr().out
    for section, registry in {"token_weights": TOKEN_WEIGHTS, "relabel": RELABELERS}.items():
        _, _, part = shown.partition(f"# {section}\n")
        for name in registry:
            assert f"\n{name}\n    {formula(registry[name]).splitlines()[0]}" in part


@pytest.mark.parametrize(("name", "section"), [("kto", "objective"), ("talr", "token_weights")])
def test_show_names_the_section_of_a_recipe(capsys: pytest.CaptureFixture[str], name: str, section: str):
    assert main(["show", name]) == 0
    assert f"Keys (section {section}):" in capsys.readouterr().out


def test_show_answers_other_peoples_names(capsys: pytest.CaptureFixture[str]):
    assert main(["show", "sigmoid"]) == 2
    assert "unknown objective 'sigmoid': it is called 'dpo' here" in capsys.readouterr().err


def test_show_answers_a_misspelling(capsys: pytest.CaptureFixture[str]):
    assert main(["show", "dop"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "unknown name 'dop'; did you mean 'dpo'?" in captured.err


@pytest.mark.slow
def test_the_command_itself():
    """Once as users run it: exit status 2, one line on stderr, no traceback."""
    ran = subprocess.run(
        [sys.executable, "-m", "objectives", "show", "dop"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        check=False,
    )
    assert ran.returncode == 2
    assert ran.stderr.splitlines() == [ran.stderr.strip()]
    assert "did you mean 'dpo'?" in ran.stderr


@pytest.mark.parametrize("registry", [TOKEN_WEIGHTS, RELABELERS, REWARD_TRANSFORMS, REGULARIZERS], ids=lambda r: r.kind)
def test_every_registry_says_what_it_has(registry):
    """Also one that has nothing yet."""
    with pytest.raises(ValueError, match=rf"unknown {registry.kind} 'nosuch' \(known: ") as caught:
        registry["nosuch"]
    assert (", ".join(registry.names()) or "none") in str(caught.value)
