"""Losses from logic: the compiler against the paper's table, programs against the losses they are said to be."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from objectives import OBJECTIVES, LegBatch, Objective
from objectives.programs import KNOWN, UNREGISTERED, VARIABLES, Program, compared, explained, parse, relation
from objectives.symbolic import Symbolic
from tests.objectives.batches import FP64_ROUNDING, SIX_PLACES, loss_and_grad, make_batch, make_rows
from tests.support import REPOSITORY

CPO = {"program": "rejected -> chosen", "condition": "chosen or rejected", "addition": "chosen and rejected"}
TABLE = {
    "CE": ({"program": "chosen"}, 1.203973),
    "CPO": (CPO, 0.510826),
    "ORPO": ({"program": "rejected -> chosen", "condition": "chosen xor rejected"}, 0.459532),
    "unCPO": ({"program": "rejected -> chosen"}, 0.150823),
    "cCPO": ({"program": "rejected -> chosen", "condition": "chosen or rejected"}, 0.382992),
    "CEUnl": ({"program": "chosen and not rejected"}, 1.427116),
    "DPO": (
        {
            "program": "(rejected and ref_chosen) -> (chosen and ref_rejected)",
            "condition": "(chosen and ref_rejected) or (rejected and ref_chosen)",
            "addition": "chosen and ref_rejected and rejected and ref_chosen",
        },
        0.389465,
    ),
}
"""P(chosen) = 0.3, P(rejected) = 0.2, under the reference 0.25 and 0.35."""


def one_token(chosen: float, rejected: float, ref_chosen: float = 0.25, ref_rejected: float = 0.35) -> LegBatch:
    def leg(policy: float, reference: float):
        return make_rows([[math.log(policy)]], [[math.log(reference)]])

    return LegBatch(legs={"chosen": leg(chosen, ref_chosen), "rejected": leg(rejected, ref_rejected)})


def test_by_hand():
    """``rejected -> chosen`` without condition: false only where rejected holds and chosen does not.

    down = 0.2 · 0.7 = 0.14, up = 1 − 0.14 = 0.86, so loss = −log σ(log(0.86/0.14)) = −log 0.86 = 0.1508228897.
    """
    loss, grad = loss_and_grad(Symbolic(program="rejected -> chosen"), one_token(0.3, 0.2))
    assert loss.item() == pytest.approx(-math.log(0.86), rel=1e-12)
    # d/dlog p_w of −log(1 − p_l·(1 − p_w)) = −p_l·p_w/0.86; by log p_l it is p_l·(1 − p_w)/0.86.
    assert grad["chosen"].item() == pytest.approx(-0.06 / 0.86, rel=1e-12)
    assert grad["rejected"].item() == pytest.approx(0.14 / 0.86, rel=1e-12)


@pytest.mark.parametrize(("keys", "expected"), TABLE.values(), ids=TABLE)
def test_the_papers_table(keys: dict[str, str], expected: float):
    assert loss_and_grad(Symbolic(**keys), one_token(0.3, 0.2))[0].item() == pytest.approx(expected, **SIX_PLACES)


@pytest.mark.parametrize(
    ("keys", "rho"),
    [
        (CPO, 0.5),
        (TABLE["ORPO"][0], 0.706193),
        (TABLE["cCPO"][0], 0.958675),
        (TABLE["unCPO"][0], 1.806636),
        (TABLE["CE"][0], -0.541325),
        (TABLE["CEUnl"][0], -0.915898),
    ],
)
def test_rho_of_log_probs(keys: dict[str, str], rho: float):
    """Chosen −1, rejected −1.5 nats."""
    batch = one_token(math.exp(-1.0), math.exp(-1.5))
    assert Symbolic(**keys)(batch).metrics["program/rho"].total.item() == pytest.approx(rho, **SIX_PLACES)


def counted(keys: dict[str, str], probabilities: dict[str, float]) -> tuple[float, float]:
    """Up and down by adding up the probabilities of all worlds, one by one."""
    program = Program(**keys)
    up = down = 0.0
    for values in itertools.product((False, True), repeat=len(VARIABLES)):
        world = dict(zip(VARIABLES, values, strict=True))
        mass = math.prod(probabilities[name] if world[name] else 1 - probabilities[name] for name in VARIABLES)
        holds, condition, addition = (
            parse(text)[0](world) for text in (program.program, program.condition, program.addition)
        )
        up += mass * (condition and (holds or addition))
        down += mass * (condition and (not holds or addition))
    return up, down


@pytest.mark.slow
@given(values=st.lists(st.floats(0.01, 0.99), min_size=4, max_size=4), name=st.sampled_from(sorted(TABLE)))
def test_counting_is_adding_up_worlds(values: list[float], name: str):
    keys = TABLE[name][0]
    up, down = counted(keys, dict(zip(VARIABLES, values, strict=True)))
    chosen, rejected, ref_chosen, ref_rejected = values
    loss, _ = loss_and_grad(Symbolic(**keys), one_token(chosen, rejected, ref_chosen, ref_rejected))
    assert loss.item() == pytest.approx(-math.log(up / (up + down)), rel=1e-9)


# ---- what registered losses are said to be ----

PLAIN = {
    "sft": {"per": "row", "leg": "chosen"},
    "ipo": {"reduction": "sum"},
    "tpo": {"alpha": 0.0},
    "tpo_l": {"alpha": 0.0, "gamma": 0.0},
    "cpo": {"cpo_alpha": 0.0},
    "simpo": {"gamma": 0.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_a_known_program_is_the_loss_it_is_said_to_be(name: str):
    """Loss and gradient of the compiled program are those of the registered loss, on random batches."""
    known = KNOWN[name]
    registered: Objective = OBJECTIVES[name](**PLAIN.get(name, {}))
    beta = {"sft": 1.0, "orpo": 1.0}.get(name) or registered.beta
    keys = {"program": known.program.program, "condition": known.program.condition, "addition": known.program.addition}
    # The registered hinge is β times max(0, 1/β − ρ).
    scale, own = (1 / beta, 1 / beta) if known.link == "hinge" else (1.0, beta)
    compiled = Symbolic(**keys, link=known.link, reduction=known.reduction, beta=own)
    for seed in range(5):
        batch = make_batch(OBJECTIVES["dpo"](), seed=seed)
        outputs = [objective(batch).terms for objective in (compiled, registered)]
        part = "preference" if "preference" in outputs[1] else "likelihood"
        loss, expected = outputs[0]["preference"].total, outputs[1][part].total * scale
        assert_close(loss, expected, rtol=1e-7, atol=1e-9)


def test_every_known_program_is_of_a_registered_loss():
    assert set(KNOWN) <= set(OBJECTIVES.names())


# ---- relations ----

PROGRAMS = {name: known.program for name, known in KNOWN.items()} | dict(UNREGISTERED)


@pytest.mark.slow
@given(
    values=st.lists(st.floats(0.01, 0.99), min_size=4, max_size=4),
    names=st.tuples(st.sampled_from(sorted(PROGRAMS)), st.sampled_from(sorted(PROGRAMS))),
)
def test_a_relation_holds_for_all_probabilities(values: list[float], names: tuple[str, str]):
    probabilities = dict(zip(VARIABLES, values, strict=True))

    def loss(program: Program) -> float:
        up, down = counted(
            {"program": program.program, "condition": program.condition, "addition": program.addition}, probabilities
        )
        return -math.log(up / (up + down))

    first, second = (PROGRAMS[name] for name in names)
    found = relation(first, second)
    assert relation(second, first) == {"stronger": "weaker", "weaker": "stronger"}.get(found, found)
    if found == "equal":
        assert loss(first) == pytest.approx(loss(second), rel=1e-9)
    elif found == "stronger":
        assert loss(first) >= loss(second) - 1e-9


def test_unrelated_programs_are_larger_by_turns():
    """What is called unknown is: each of ORPO and CPO is the larger one somewhere."""
    assert relation(KNOWN["orpo"].program, KNOWN["cpo"].program) == "unknown"
    orpo, cpo = (Symbolic(**TABLE[name][0]) for name in ("ORPO", "CPO"))
    signs = {
        bool(loss_and_grad(orpo, batch)[0] > loss_and_grad(cpo, batch)[0])
        for batch in (one_token(0.3, 0.2), one_token(0.2, 0.3))
    }
    assert signs == {True, False}


def test_relations_in_words():
    assert (
        compared("cCPO", "unCPO") == "cCPO is stronger (larger) than unCPO, wherever both take the same probabilities."
    )
    assert compared("rpo", "dpo").startswith("rpo is equal to dpo")
    assert "unknown as they stand (logistic of sums and squared of sums)" in compared("dpo", "ipo")
    assert compared("kto", "dpo") == "kto and dpo: unknown. No program of kto was verified."
    assert explained("kto") == "kto: unknown. No program of it was verified."
    assert "stronger than cCPO, unCPO" in explained("orpo")


# ---- the language ----


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("chosen -> rejected -> ref_chosen", "chosen -> (rejected -> ref_chosen)"),
        ("not chosen and rejected", "(!chosen) & rejected"),
        ("chosen or rejected and ref_chosen", "chosen | (rejected & ref_chosen)"),
        ("chosen xor rejected or ref_chosen", "(chosen ^ rejected) | ref_chosen"),
        ("chosen and rejected xor ref_chosen", "(chosen & rejected) ^ ref_chosen"),
        ("chosen or rejected -> ref_chosen", "~(chosen | rejected) | ref_chosen"),
        ("chosen <-> rejected -> ref_chosen", "chosen <-> (rejected -> ref_chosen)"),
        ("not not chosen", "chosen"),
        ("TRUE -> chosen", "chosen or false"),
    ],
)
def test_how_words_bind(text: str, same: str):
    first, second = parse(text)[0], parse(same)[0]
    for values in itertools.product((False, True), repeat=4):
        world = dict(zip(VARIABLES, values, strict=True))
        assert first(world) == second(world)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "it ends too early"),
        ("chosen ->", "it ends too early"),
        ("(chosen", "a bracket is not closed"),
        ("chosen rejected", "'rejected' does not belong there"),
        ("choosen", "'choosen' is no variable (known: chosen, rejected, ref_chosen, ref_rejected)"),
        ("chosen ? rejected", "'?' does not belong there"),
        ("chosen = rejected", "'=' does not belong there"),
    ],
)
def test_what_is_no_formula_is_told(text: str, sentence: str):
    with pytest.raises(ValueError, match="is no formula") as caught:
        Symbolic(program=text)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"program": "chosen or not chosen"}, "program 'chosen or not chosen' can't fail under condition 'true'"),
        ({"program": "chosen and not chosen"}, "can't hold"),
        ({"program": "chosen", "condition": "false"}, "can't hold under condition 'false'"),
        ({"program": "ref_chosen -> ref_rejected"}, "nothing of it depends on the policy"),
        ({"program": "ref_rejected -> chosen", "reference": True}, "reference subtracts what this program already"),
    ],
)
def test_programs_without_sense_are_refused(keys: dict[str, object], sentence: str):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Symbolic(**keys)


def test_subtracting_the_reference_swaps_up_and_down():
    """ρ − ρ_ref: at π_θ = π_ref every program costs log 2; CPO's with the reference subtracted is DPO."""
    batch = make_batch(OBJECTIVES["dpo"](), seed=1)
    with_reference = Symbolic(**CPO, reference=True, reduction="sum", beta=0.1)
    assert_close(
        with_reference(batch).terms["preference"].total,
        OBJECTIVES["dpo"]()(batch).terms["preference"].total,
        rtol=1e-7,
        atol=1e-9,
    )


def test_sums_make_programs_with_complements_one():
    """Under sums of many log-probs 1 − π is 1 in floating point: ORPO's program is CPO's."""
    rows = make_rows([[-3.0] * 20], [[-3.0] * 20])
    batch = LegBatch(legs={"chosen": rows, "rejected": make_rows([[-3.1] * 20], [[-3.0] * 20])})
    sums = [Symbolic(**TABLE[name][0], reduction="sum")(batch).terms["preference"].total for name in ("ORPO", "CPO")]
    means = [Symbolic(**TABLE[name][0])(batch).terms["preference"].total for name in ("ORPO", "CPO")]
    assert_close(sums[0], sums[1], **FP64_ROUNDING)
    assert not torch.isclose(means[0], means[1], rtol=1e-3)


@pytest.mark.slow
def test_explain_on_the_command_line():
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "objectives", "explain", *words],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            check=False,
        )

    assert "(rejected and ref_chosen) -> (chosen and ref_rejected)" in run("dpo").stdout
    assert run("orpo", "cCPO").stdout.startswith("orpo is stronger")
    wrong = run("dop")
    assert (wrong.returncode, "did you mean 'dpo'?" in wrong.stderr) == (2, True)
