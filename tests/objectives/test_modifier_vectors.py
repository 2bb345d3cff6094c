"""Numbers of other implementations for objectives under a modifier, recorded under ``tests/vectors/modifiers``.

Each case names an objective and a modifier with their keys. Otherwise they are those of ``test_vectors``.
"""

from __future__ import annotations

from typing import Any

import pytest

from objectives import MODIFIERS, modified
from tests.support import REPOSITORY, VECTORS
from tests.vectors.reading import assert_recorded, cases, contents, objective_of

FILES = sorted(path.stem for path in (VECTORS / "modifiers").glob("*.json"))


@pytest.mark.parametrize(
    ("name", "case"), [pytest.param(name, case, id=label) for label, name, case in cases("modifiers")]
)
def test_vector(name: str, case: dict[str, Any]):
    modifier = MODIFIERS[case["modifier"]](**case["modifier_config"])
    objective, refusals = modified(name, objective_of(name, case), [(case["modifier"], modifier)])
    assert refusals == {}
    assert_recorded(objective, case)


@pytest.mark.parametrize("name", FILES)
def test_vectors_have_their_provenance(name: str):
    vectors = contents(f"modifiers/{name}")
    assert vectors["cases"]
    assert vectors["source"].strip()
    assert vectors["versions"]
    assert (REPOSITORY / vectors["made_by"]).is_file()


def test_every_modifier_that_changes_a_formula_has_vectors():
    """``tr_dpo`` moves the reference between steps, and no formula."""
    assert {case["modifier"] for _, _, case in cases("modifiers")} == set(MODIFIERS) - {"tr_dpo"}
