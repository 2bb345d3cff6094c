"""Writes ``docs/support.md``: which objective runs on which engine, with which adapter, reference and precision.

    python -m launch.support_page            writes it
    python -m launch.support_page --check    says whether it is up to date

Nothing in the table is written down: every combination is put to what refuses recipes at the start of a run, reading
(``align.contradictions``) and launching (``align.support``).
"""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from align.errors import RecipeError
from align.recipe import read_recipe
from align.support import ENGINES, reason
from launch.pages import ROOT, write_or_check
from launch.recipes import training_recipes

PAGE = ROOT / "docs" / "support.md"
ADAPTERS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "LoRA": {"lora": {"r": 8}},
    "QLoRA, 4 bits": {"lora": {"r": 8}, "model": {"load_in_4bit": True}},
    "QLoRA, 8 bits": {"lora": {"r": 8}, "model": {"load_in_8bit": True}},
}
SOURCES = ("cached", "adapter_off", "live")
PRECISIONS = ("float32", "bfloat16")
HEAD = """# What goes with what

Every row below was put to the code that refuses recipes at the start of a run; what is refused there is refused with
the reason given here, and nothing is ignored. `python -m launch.support_page` writes this page.

✓ runs; a number names the reason below. Engines: `single` is one process, `ddp` keeps a copy on each, `zero1` to
`zero3` are DeepSpeed's, `fsdp2` PyTorch's; offloading is the same engine with its shards in host memory, and several
machines are the same engine with more processes (`launch/accelerate/`). Both precisions, float32 and bfloat16, go with
all of it. Optimizers with 8-bit state (`adamw_8bit`, `paged_adamw_8bit`, …) go with `single` and `ddp`.

The trajectory of one process is asserted on two CPU processes of every engine, with a pairwise cover of objectives,
adapters, references, checkpointing, tied and untied heads, empty and uneven bins:
`pytest -m "slow or all" tests/equivalence/test_engines.py`.
"""


def outcomes(path: Path) -> dict[tuple[str, str, str], str | None]:
    """By adapter, reference and engine: None where the recipe runs, else why not."""
    found: dict[tuple[str, str, str], str | None] = {}
    for adapter in ADAPTERS:
        for source in SOURCES:
            by_precision = [_outcome(path, adapter, source, precision) for precision in PRECISIONS]
            if by_precision[0] != by_precision[1]:
                raise AssertionError(
                    f"{path.name}: precisions differ for {adapter}, {source}; the page says they don't"
                )
            found |= {(adapter, source, engine): why for engine, why in by_precision[0].items()}
    return found


def _outcome(path: Path, adapter: str, source: str, precision: str) -> dict[str, str | None]:
    tree: dict[str, Any] = yaml.safe_load(path.read_text())
    tree.pop("lora", None)
    own = dict(tree.get("reference") or {})
    tree["reference"] = {**own, "source": source}
    if adapter == "all weights" and own.get("model") == "base":
        tree["reference"].pop("model")
    for section, keys in ADAPTERS[adapter].items():
        tree[section] = {**tree.get(section, {}), **keys}
    tree["model"]["dtype"] = precision
    with tempfile.TemporaryDirectory() as temporary:
        changed = Path(temporary) / path.name
        changed.write_text(yaml.safe_dump(tree))
        try:
            recipe = read_recipe(changed)
        except RecipeError as error:
            return dict.fromkeys(ENGINES, _sentence(str(error)))
    return {engine: reason(recipe, engine) for engine in ENGINES}


def _sentence(message: str) -> str:
    """Of a refusal, without the names of this recipe."""
    return message.partition(": ")[2] if message.startswith(("objective:", "modifiers:", "regularizers:")) else message


def page() -> str:
    """The whole page."""
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    kept: dict[tuple[Any, ...], dict[tuple[str, str, str], str | None]] = {}
    for path in training_recipes():
        found = outcomes(path)
        # A reference beside objectives that need none has no effect: which source makes no difference.
        if all("needs no reference model" in str(why) for why in found.values()):
            found = _without_reference(path)
        key = tuple((*place, why if why is None else _general(why)) for place, why in found.items())
        groups[key].append(path.stem)
        kept.setdefault(key, found)
    reasons: dict[str, int] = {}
    lines = [HEAD]
    for key, names in sorted(groups.items(), key=lambda item: -len(item[1])):
        lines += [f"\n## {', '.join(f'`{name}`' for name in names)}\n", *_table(kept[key], reasons)]
    lines += ["\n## Reasons\n", *(f"{number}. {why}" for why, number in reasons.items())]
    return "\n".join(lines) + "\n"


def _without_reference(path: Path) -> dict[tuple[str, str, str], str | None]:
    tree: dict[str, Any] = yaml.safe_load(path.read_text())
    tree.pop("lora", None)
    tree.pop("reference", None)
    found: dict[tuple[str, str, str], str | None] = {}
    for adapter, sections in ADAPTERS.items():
        changed = dict(tree)
        for section, keys in sections.items():
            changed[section] = {**changed.get(section, {}), **keys}
        with tempfile.TemporaryDirectory() as temporary:
            file = Path(temporary) / path.name
            file.write_text(yaml.safe_dump(changed))
            try:
                recipe = read_recipe(file)
                found |= {(adapter, "none", engine): reason(recipe, engine) for engine in ENGINES}
            except RecipeError as error:
                found |= {(adapter, "none", engine): _sentence(str(error)) for engine in ENGINES}
    return found


def _general(why: str) -> str:
    """A reason without the name of the objective it begins with."""
    return why if " " not in why else why.partition(" ")[2]


def _table(found: dict[tuple[str, str, str], str | None], reasons: dict[str, int]) -> Iterator[str]:
    yield f"| trained | reference | {' | '.join(ENGINES)} |"
    yield f"|{'---|' * (len(ENGINES) + 2)}"
    for adapter, source in dict.fromkeys((place[0], place[1]) for place in found):
        whys = [found[adapter, source, engine] for engine in ENGINES]
        cells = ["✓" if why is None else str(reasons.setdefault(why, len(reasons) + 1)) for why in whys]
        yield f"| {adapter} | {source} | {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes or checks the page; returns the exit status."""
    return write_or_check("launch.support_page", __doc__, PAGE, page, arguments)


if __name__ == "__main__":
    sys.exit(main())
