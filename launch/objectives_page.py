"""Writes ``docs/objectives.md`` from the docstrings: what there is, what it needs, which recipe runs it.

make docs                                     writes it
python -m launch.objectives_page --check      says whether it is up to date
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from data.shapes import RowsKind, attributes_in
from launch.pages import ROOT, write_or_check
from launch.recipes import training_recipes
from objectives import MODIFIERS, OBJECTIVES, REGULARIZERS, RELABELERS, REWARD_TRANSFORMS, TOKEN_WEIGHTS
from objectives.__main__ import shown
from objectives.registry import Registry, defaults, example, field_docs, formula, source

PAGE = ROOT / "docs" / "objectives.md"

SECTIONS: dict[str, tuple[str, Registry, str]] = {
    "objective": ("Objectives", OBJECTIVES, "`objective:` – one, or a list with weights, whose losses add up."),
    "modifiers": ("Modifiers", MODIFIERS, "`modifiers:` – each changes every objective it makes sense for."),
    "token_weights": (
        "Token and sample weights",
        TOKEN_WEIGHTS,
        "`token_weights:` – of likelihood terms; they multiply.",
    ),
    "regularizers": ("Regularizers", REGULARIZERS, "`regularizers:` – on parameters, not on log-probs."),
    "relabel": ("Relabelers", RELABELERS, "`relabel:` – from one row to new ones, before tokens exist."),
    "reward_transforms": (
        "Reward transforms",
        REWARD_TRANSFORMS,
        "`reward_transforms:` – from the scores of a prompt's responses to new ones, before pairs are made.",
    ),
}

DATA: dict[str, RowsKind] = {
    "pairs: chosen, rejected": RowsKind(frozenset({"chosen", "rejected"})),
    "pairs with scores or a margin": RowsKind(
        frozenset({"chosen", "rejected"}), scores=frozenset({"chosen", "rejected"})
    ),
    "triples: gold, chosen, rejected": RowsKind(frozenset({"chosen", "rejected", "gold"})),
    "several responses with scores": RowsKind(frozenset(), scored=True),
    "one response, thumbs up or down": RowsKind(frozenset({"completion"}), labelled=True),
    "one response": RowsKind(frozenset({"gold"})),
    "pairs of the policy's and the reference's samples: chosen_by": RowsKind(
        frozenset({"chosen", "rejected"}), scores=frozenset({"chosen_by"})
    ),
    "one sample of the policy, and how likely it is preferred: preference": RowsKind(
        frozenset({"gold"}), scores=frozenset({"preference"})
    ),
}
"""What a dataset can offer. What works with it is computed from what objectives declare."""

TROUBLE: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("chosen responses become less likely while margins grow", "hold on to their likelihood",
     ("rpo", "dpop", "cal_dpo", "nca", "irpo", "apo_zero")),
    ("responses become longer", "take length out of the reward, or out of the comparison",
     ("r_dpo", "ld_dpo", "simpo", "dpo_norm")),
    ("labels are noisy", "smooth them, or model the noise", ("dpo", "robust", "ipo", "exo")),
    ("margins grow without end, the policy drifts away", "give margins a target, or watch the divergence",
     ("ipo", "exo", "tdpo", "f_divergence", "hinge")),
    ("chosen responses are no better than what the model says itself", "push the other way", ("apo_down",)),
    ("data is off-policy (another model wrote it)", "weigh it by the policy, or let the reference follow",
     ("wpo", "tr_dpo", "beta_dpo")),
    ("some pairs are clear, others hardly differ", "let the scores say how far apart they belong",
     ("rpo_reward_aware", "mm_dpo", "margin_bt", "scaled_bt")),
    ("good rejected responses are unlearned", "condition on the score", ("reward_augmented",)),
    ("a second model for the reference does not fit into memory and its log-probs can't be cached; or no SFT stage is "
     "wanted", "objectives without a reference",
     ("orpo", "cpo", "simpo", "alpha_po", "tpo")),
    ("there are only single responses with thumbs", "learn from labels", ("bco", "kto", "apo_zero_unpaired")),
    ("supervised tuning forgets old skills", "weigh what is learned, or hold the weights",
     ("talr", "flow", "dft", "l2_init", "wise_ft")),
    ("training text is recited", "never learn some of it", ("goldfish",)),
    ("pass@1 rises and pass@N falls", "train for coverage", ("dco",)),
    ("samples of several rounds come to look alike", "reward what the reference would not say, or the unlikely",
     ("xpo", "unlikeliness")),
    ("preferences go in circles, so that no score explains them", "play against a mixture with the reference",
     ("nash_md",)),
    ("numbers are off by a lot", "make a wrong digit cost by its distance", ("ntl_was", "ntl_mse")),
)  # fmt: skip
"""What goes wrong, what to try, and the names of it."""

NOT_SHOWN = ("reward_augmented", "talr", "flow")
"""Tried here against what it goes wrong with, without showing that it helps: docs/what_each_is_for.md."""


def page() -> str:
    """The whole page."""
    recipes = recipes_by_name()
    numbers = ((len(registry.names()), title.lower()) for title, registry, _ in SECTIONS.values())
    counts = ", ".join(f"{number} {title if number > 1 else title.removesuffix('s')}" for number, title in numbers)
    lines = [
        "# Objectives",
        "",
        "<!-- Written by `make docs` from docstrings and recipes; edit those. -->",
        "",
        f"{counts}. Formulas are as in the code, in nats; σ is the logistic function. `python -m objectives show NAME` "
        "prints an entry, `python -m objectives explain NAME` its program in logic where one is known. What is marked "
        "UNVERIFIED could not be checked against its source. [Add your own](add_your_own.md) in ten minutes.",
        "",
        "## Which data do you have?",
        "",
        "| data | objectives that take it |",
        "|---|---|",
    ]
    of_pairs = [name for name in OBJECTIVES.names() if _serves(next(iter(DATA.values())), name)]
    for number, (kind, rows) in enumerate(DATA.items()):
        names = [name for name in OBJECTIVES.names() if _serves(rows, name)]
        more = number > 0 and set(of_pairs) < set(names)
        listed = [name for name in names if not more or name not in of_pairs]
        lines.append(f"| {kind} | {'those of pairs, and ' if more else ''}{', '.join(map(_link, listed))} |")
    lines += [
        "",
        "Rows are converted where that is possible: scored lists become pairs, triples or labels by `data.rule`, pairs "
        "become labelled rows. `reward_regression` takes the ratings it names.",
        "",
        "## What goes wrong, and what to try",
        "",
        "| what you see | what helps | try |",
        "|---|---|---|",
        *(f"| {seen} | {helps} | {', '.join(map(_tried, names))} |" for seen, helps, names in TROUBLE),
    ]
    for title, registry, how in SECTIONS.values():
        lines += ["", f"## {title}", "", how]
        for name in registry.names():
            lines += _entry(name, registry, recipes.get(name, []))
    return "\n".join(lines).rstrip() + "\n"


def _serves(rows: RowsKind, name: str) -> bool:
    needs = example(OBJECTIVES[name]).needs
    if not rows.scored and not set(attributes_in(needs.numbers)) <= rows.scores:
        return False
    return not rows.missing(needs.legs, labels=needs.labels, scores=needs.numbers)


def _tried(name: str) -> str:
    return _link(name) + (" ([not shown here](what_each_is_for.md))" if name in NOT_SHOWN else "")


def _link(name: str) -> str:
    return f"[{name}](#{name})"


def _entry(name: str, registry: Registry, recipes: list[str]) -> list[str]:
    cls = registry[name]
    summary, paragraphs = prose(cls)
    lines = ["", f"### {name}", "", summary, "", "```text", formula(cls), "```"]
    for paragraph in paragraphs:
        lines += ["", paragraph]
    if registry is OBJECTIVES:
        lines += ["", f"*Needs:* {shown(example(cls).needs)}."]
    docs = field_docs(cls)
    if docs:
        lines += ["", "| key | default | |", "|---|---|---|"]
        lines += [f"| `{key}` | `{value!r}` | {_cell(docs[key])} |" for key, value in defaults(cls).items()]
    where = ", ".join(f"[{recipe}](../launch/recipes/{recipe}.yaml)" for recipe in recipes)
    lines += ["", f"*Source:* {source(cls)}" + (f"  \n*Recipe:* {where}" if where else "")]
    return lines


def prose(cls: Any) -> tuple[str, list[str]]:
    """First sentence of a docstring, and its paragraphs without formula and references, with plain Markdown code."""
    text = inspect.cleandoc(cls.__doc__ or "").partition("References:")[0]
    first, *rest = re.split(r"\n\s*\n", text.strip())
    kept = [" ".join(part.split()) for part in rest if not part.startswith("    ")]
    return _code(" ".join(first.split())), [_code(part) for part in kept]


def _code(text: str) -> str:
    return text.replace("``", "`")


def _cell(text: str) -> str:
    return _code(text).replace("|", "\\|")


def recipes_by_name() -> dict[str, list[str]]:
    """Recipes by the registered names they use, the one of that name first."""
    found: dict[str, list[str]] = {}
    for path in training_recipes():
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        for section in SECTIONS:
            entries = tree.get(section) or []
            for entry in entries if isinstance(entries, list) else [entries]:
                found.setdefault(entry["name"], []).append(path.stem)
    return {name: sorted(stems, key=lambda stem: stem != name)[:3] for name, stems in found.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes or checks the page; returns the exit status."""
    return write_or_check("launch.objectives_page", __doc__, PAGE, page, arguments)


if __name__ == "__main__":
    sys.exit(main())
