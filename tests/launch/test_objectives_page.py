"""The page on objectives is what docstrings and recipes say, and names nothing that is not there."""

from __future__ import annotations

import re

import pytest

from launch.objectives_page import PAGE, SECTIONS, TROUBLE, page


@pytest.mark.slow
def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make docs`"


@pytest.mark.slow
def test_every_entry_has_a_heading_and_every_link_leads_to_one():
    text = page()
    headings = set(re.findall(r"^### (\w+)$", text, flags=re.MULTILINE))
    assert {name for _, registry, _ in SECTIONS.values() for name in registry.names()} == headings
    assert set(re.findall(r"\]\(#(\w+)\)", text)) <= headings
    assert {name for _, _, names in TROUBLE for name in names} <= headings


@pytest.mark.slow
def test_every_entry_names_a_recipe():
    """Reward transforms have none of their own: they act on scores of any recipe."""
    text = page().partition("## Reward transforms")[0]
    parts = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    assert [part.split("\n")[0] for part in parts if "*Recipe:*" not in part] == []
