"""A comparison of runs as text: a table of values, and one sentence for each pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePath

from evals.compare import Compared, Comparison, better_way
from evals.summary import show, show_interval, unit_of

MOST_PROMPTS = 1_000_000
"""More than this is called out of reach."""


def rendered(comparison: Comparison) -> str:
    """The whole of it."""
    names = short_names([run.name for run in comparison.runs])
    parts = [_table(comparison, names), *_sentences(comparison, names), legend(comparison)]
    return "\n\n".join(parts) + "\n"


def short_names(names: Sequence[str]) -> dict[str, str]:
    """The last part of each path, or as much of it as tells the runs apart."""
    paths = [PurePath(name.removesuffix("/results.json")) for name in names]
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        short = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(short)) == len(short):
            return dict(zip(names, short, strict=True))
    return {name: name for name in names}


def _table(comparison: Comparison, names: dict[str, str]) -> str:
    lines: list[str] = []
    for dataset, split in dict.fromkeys(key[1:] for key in comparison.keys):
        rows = [["", *names.values()]]
        for metric in [key[0] for key in comparison.keys if key[1:] == (dataset, split)]:
            found = [run.results.get((metric, dataset, split)) for run in comparison.runs]
            cells = [
                "—" if r is None else f"{show(metric, r.value)} {show_interval(metric, r.low, r.high)}" for r in found
            ]
            rows.append([metric, *cells])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines += [*([""] if lines else []), f"{dataset}, {split}"]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
    return "\n".join(lines)


def _sentences(comparison: Comparison, names: dict[str, str]) -> Iterator[str]:
    several = len({key[1:] for key in comparison.keys}) > 1
    for title, members in grouped(comparison):
        yield "\n".join([f"{title}:", *(f"  {sentence(each, names, several)}" for each in members)])


def grouped(comparison: Comparison) -> list[tuple[str, list[Compared]]]:
    """Pairs of runs by what can be said of them; groups without any are absent."""
    groups = (
        ("Better, beyond chance", [each for each in comparison.pairs if each.better is not None]),
        ("Can't be said", [each for each in comparison.pairs if each.better is None and each.refused is None]),
        ("Not compared", [each for each in comparison.pairs if each.refused is not None]),
    )
    return [(title, members) for title, members in groups if members]


def sentence(each: Compared, names: dict[str, str], several: bool) -> str:
    """What is known of one pair of runs on one metric.

    Args:
        each: the pair.
        names: what to call the runs.
        several: whether to say on which split, for there are several.
    """
    first, second = names[each.first], names[each.second]
    on = f"{each.metric}{f' ({each.dataset}, {each.split})' if several else ''}"
    if each.refused is not None:
        return f"{first} and {second} on {on}: {each.refused}."
    assert each.difference is not None
    # What is claimed is told from the side of the better run.
    turned = each.better == each.second
    difference, low, high = each.difference, each.low, each.high
    if turned:
        difference, low, high = -difference, None if high is None else -high, None if low is None else -low
    interval = f" {show_interval(each.metric, low, high)}" if low is not None else ""
    notes = "".join(f"; {note}" for note in each.notes)
    told = (
        f"{_points(each.metric, difference)}{interval}, p = {_p(each.p_value)}, corrected {_p(each.p_corrected)} "
        f"({each.test}){notes}"
    )
    if each.better is not None:
        word = "better than" if better_way(each.metric) else "higher than"
        return f"{names[each.better]} is {word} {first if turned else second} on {on}: {told}."
    return f"{first} and {second} on {on}: {told}. {_needed(each)}"


def _needed(each: Compared) -> str:
    if each.smallest is None:
        return "All prompts differ alike; evaluate on more."
    shown = _points(each.metric, each.smallest).lstrip("+")
    if each.needed is None or each.needed > MOST_PROMPTS:
        return f"There is no difference in sight; {each.prompts} prompts would show one of {shown}."
    if each.prompts is not None and each.needed <= each.prompts:
        return f"It is near the limit of what {each.prompts} prompts show ({shown})."
    return f"To show one this size needs about {_about(each.needed)} prompts; {each.prompts} would show {shown}."


def legend(comparison: Comparison) -> str:
    """How differences, intervals and p-values are to be read."""
    tests = sum(each.p_value is not None for each in comparison.pairs)
    how = "Holm" if comparison.correction == "holm" else "Benjamini-Hochberg"
    level = f"{comparison.level:g}"
    text = (
        f"Differences are of the first named minus the other, with 95 % limits; p-values of all {tests} tests are "
        f"corrected together ({how}), and claims are made at {level}. Prompts needed are for a power of 80 % at "
        f"{level}/{max(tests, 1)}."
    )
    if comparison.left_out:
        text += f"\nMeasured too, compared only if named with --metric: {', '.join(comparison.left_out)}."
    return text


def _points(metric: str, difference: float) -> str:
    """A difference in the unit of its metric: that of two shares is in percentage points."""
    unit = unit_of(metric)
    if unit in ("share", "points"):
        return f"{100 * difference:+.1f} pp".replace("-", "−")
    text = show(metric, difference, signed=True)
    return f"{text} {unit}" if unit else text


def _p(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:.3f}" if value >= 0.001 else "under 0.001"


def _about(number: int) -> str:
    digits = max(0, len(str(number)) - 2)
    return f"{-(-number // 10**digits) * 10**digits:,}".replace(",", "\u202f")
