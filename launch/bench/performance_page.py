"""Writes ``docs/performance.md``, its plots and the README's table from ``docs/performance.json``.

make bench          measures, then writes the page
python -m launch.bench.performance_page
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from launch.bench.vs_trl import TABLE, Setup, averages_means

MARKS = ("<!-- measured: begin -->", "<!-- measured: end -->")
README_MARKS = ("<!-- speed: begin -->", "<!-- speed: end -->")
DOCS = Path(__file__).resolve().parents[2] / "docs"
NAMES = {"ours": "ours", "trl-best": "TRL at its best", "trl": "TRL at its defaults"}
KEPT = "trl-kept"
"""TRL with activations kept, and else at its defaults: all rows of a step at once."""
LEGEND = {**NAMES, KEPT: "TRL without checkpointing"}
COLOURS = {"ours": "#0f7b8a", "trl-best": "#b0713a", "trl": "#8a8f98", KEPT: "#7b5ea7"}
CASES = {
    "hh": "pairs, long prompts and short responses",
    "long": "pairs, short prompts and long responses",
    "turns": "pairs, several turns",
    "tpo": "triples (TPO)",
    "unpaired": "single labelled responses",
}
WIDTH, ROW, LEFT, RIGHT = 760, 16, 250, 90
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#24292f}.q{fill:#6a7079}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.q{fill:#9aa3ad}}"
)


def label(setup: Setup) -> str:
    """A comparison in a few words."""
    rows = f", {setup.steps * setup.batch} rows" if setup.whole else ""
    return f"{setup.case}, {setup.shape}{', LoRA' if setup.lora else ''}{rows}"


def bars(title: str, unit: str, groups: Sequence[tuple[str, dict[str, tuple[float, float, float]]]]) -> str:
    """Horizontal bars with whiskers, one group a comparison.

    Args:
        title: what is drawn.
        unit: after each number.
        groups: label, and by side median, least and most.
    """
    most = max(high for _, sides in groups for _, _, high in sides.values()) or 1.0
    parts, y = [], 34
    scale = (WIDTH - LEFT - RIGHT) / most
    for name, sides in groups:
        parts.append(
            f'<text x="{LEFT - 10}" y="{y + ROW * len(sides) / 2 + 4:.0f}" text-anchor="end">{escape(name)}</text>'
        )
        for side, (median, low, high) in sides.items():
            middle = y + ROW / 2
            parts.append(
                f'<rect x="{LEFT}" y="{y + 2}" width="{median * scale:.1f}" height="{ROW - 4}" rx="2" '
                f'fill="{COLOURS[side]}"/>'
            )
            if high > low:
                parts.append(
                    f'<path d="M{LEFT + low * scale:.1f} {middle}H{LEFT + high * scale:.1f}" stroke="currentColor" '
                    'class="q" stroke-width="1"/>'
                )
            number = f"{median:,.0f}" if median >= 100 else f"{median:.2f}" if median < 10 else f"{median:.1f}"
            parts.append(f'<text class="q" x="{LEFT + high * scale + 6:.1f}" y="{middle + 4}">{number}{unit}</text>')
            y += ROW
        y += 12
    shown = [side for side in LEGEND if any(side in sides for _, sides in groups)]
    legend = "".join(
        f'<rect x="{10 + 185 * i}" y="6" width="10" height="10" rx="2" fill="{COLOURS[side]}"/>'
        f'<text x="{25 + 185 * i}" y="15">{LEGEND[side]}</text>'
        for i, side in enumerate(shown)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" role="img" '
        f'aria-label="{escape(title)}"><style>{STYLE}</style>{legend}{"".join(parts)}</svg>\n'
    )


def plots(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """One plot for each claim, by file name."""

    def spread(side: dict[str, Any]) -> tuple[float, float, float]:
        median, low, high = side["rows_per_second"]
        return median, low, high

    def exact(value: float) -> tuple[float, float, float]:
        return value, value, value

    def groups(chosen: Sequence[dict[str, Any]], value: Any) -> list[Any]:
        return [
            (label(Setup(**each["setup"])), {name: value(each["sides"][name]) for name in NAMES}) for each in chosen
        ]

    steps = [each for each in results if not each["setup"]["whole"]]
    whole = [each for each in results if each["setup"]["whole"]]
    drawn = {"steps.svg": ("Rows per second in steps", "", groups(steps, spread))}
    if whole:
        drawn["whole_runs.svg"] = ("Rows per second in whole runs", "", groups(whole, spread))
    memory = groups(steps, lambda side: exact(side["peak_mib"]))
    for (_, sides), each in zip(memory, steps, strict=True):
        sides[KEPT] = exact(all_at_once(each)["peak_mib"])
    drawn["memory.svg"] = ("Peak memory", " MiB", memory)
    drawn["padding.svg"] = (
        "Positions that hold no token",
        " %",
        groups(steps, lambda side: exact(100 * side["padding"])),
    )
    drawn["first_step.svg"] = ("Start to first step", " s", groups(steps, lambda side: exact(side["first_step"])))
    return {name: bars(*content) for name, content in drawn.items() if content[2]}


def all_at_once(result: dict[str, Any]) -> dict[str, Any]:
    """TRL's try without checkpointing that took all rows of a step at once."""
    return max(result["tried"], key=lambda run: run["micro"])


def memory_table(results: Sequence[dict[str, Any]]) -> list[str]:
    """Peak memory against TRL's, activations checkpointed and kept."""
    lines = [
        "| | ours | TRL, checkpointed, all rows of a step at once | kept, all rows at once | kept, its fastest |",
        "|---|---|---|---|---|",
    ]
    for each in results:
        ours, sides = each["sides"]["ours"]["peak_mib"], each["sides"]
        others = (sides["trl"]["peak_mib"], all_at_once(each)["peak_mib"], sides["trl-best"]["peak_mib"])
        cells = (f"{other:,.0f} MiB: ours is {ours / other:.0%}" for other in others)
        lines.append(f"| {label(Setup(**each['setup']))} | {ours:,.0f} MiB | {' | '.join(cells)} |")
    return lines


def table(results: Sequence[dict[str, Any]]) -> list[str]:
    """All numbers."""
    lines = [
        "| | | rows/s, median [least, most] | useful tokens/s | padding | peak memory | first step | ours is faster |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in results:
        setup, sides = Setup(**each["setup"]), each["sides"]
        ours = sides["ours"]["rows_per_second"][0]
        for name in NAMES:
            side = sides[name]
            median, low, high = side["rows_per_second"]
            more = f" ({each['micro']} at a time)" if name == "trl-best" else ""
            cells = (
                label(setup) if name == "ours" else "",
                NAMES[name] + more,
                f"{median:.2f} [{low:.2f}, {high:.2f}]",
                f"{side['useful_tokens_per_second']:,.0f}",
                f"{side['padding']:.1%}",
                f"{side['peak_mib']:,.0f} MiB",
                f"{side['first_step']:.0f} s",
                "" if name == "ours" else f"{ours / median:.1f} times",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def summary(results: Sequence[dict[str, Any]]) -> str:
    """How much faster and smaller we are in every comparison, as Markdown."""
    lines = [
        "| | rows/s | faster than TRL's defaults | than TRL at its best | memory of TRL's defaults "
        "| of TRL without checkpointing |",
        "|---|---|---|---|---|---|",
    ]
    for each in results:
        setup, sides = Setup(**each["setup"]), each["sides"]
        rate, peak = sides["ours"]["rows_per_second"][0], sides["ours"]["peak_mib"]
        faster = [f"{rate / sides[side]['rows_per_second'][0]:.1f} times" for side in ("trl", "trl-best")]
        name = f"{CASES[setup.case]}, {label(setup).partition(', ')[2]}{', whole run' if setup.whole else ''}"
        smaller = [f"{peak / sides['trl']['peak_mib']:.0%}", f"{peak / all_at_once(each)['peak_mib']:.0%}"]
        lines.append(f"| {' | '.join([name, f'{rate:.2f}', *faster, *smaller])} |")
    return "\n".join(lines)


INTRO = """Same model, same rows in the same order, same global batch, same optimizer, float32, sides taking turns in
one run: `make bench` ({machine}; {versions};
{dates}). TRL at its best has a precomputed reference, no activation
checkpointing, and as many rows at a time as were fastest when tried. Nothing is written unless all sides computed the
same losses: {apart}.
Medians are over two rounds, of the steps after the first two: few, and the machine is noisy, so look at the spread.
Useful tokens are response tokens plus prompts once. Rows that do not fit the model's 1,024 positions (512 for
stories260k) are left out for all. Ours is what the command line does, which on CPUs keeps freed memory; that alone was
an eighth of a 135m step (docs/log.md), and TRL leaves it to the user."""
WHOLE_RUNS = """One epoch, from the start of the process to its end: imports, preparation,
reference, steps, saving. Ours and TRL at its best have the reference of all rows before the first step;
TRL's defaults pay for it in every step, and so take their first one sooner."""
PICTURES = {
    "memory.svg": "Peak memory",
    "padding.svg": "Positions that hold no token, in percent",
    "first_step.svg": "From the start of the process to the end of the first step",
}


def apart(results: Sequence[dict[str, Any]]) -> str:
    """How far losses of the sides were apart."""
    same: list[float] = []
    split: list[float] = []
    for each in results:
        (split if averages_means(Setup(**each["setup"]), each["micro"]) else same).append(each["losses_apart"])
    told = [f"the largest difference was {max(same):.1g}"] if same else []
    if split:
        told += [f"TPO's was {max(split):.1g} where TRL averages means over tokens over its microbatches"]
    return "; ".join(told)


def measured(found: dict[str, Any]) -> str:
    """What the benchmark says, as Markdown.

    Args:
        found: what ``vs_trl --into`` wrote.
    """
    results = found["results"]
    steps, whole = ([each for each in results if each["setup"]["whole"] is kind] for kind in (False, True))
    named = {each["setup"]["case"] for each in results}
    dates = sorted({each["date"] for each in results})
    parts = [
        INTRO.format(**found, apart=apart(results), dates=" and ".join(dict.fromkeys((*dates[:1], *dates[-1:])))),
        "",
    ]
    parts += [f"* **{name}**: {CASES[name]}" for name in CASES if name in named]
    parts += ["", "## Optimizer steps", "", "![Rows per second](plots/steps.svg)", "", *table(steps), ""]
    if whole:
        parts += ["## Whole runs", "", WHOLE_RUNS, ""]
        parts += ["![Rows per second](plots/whole_runs.svg)", "", *table(whole), ""]
    parts += ["## Memory, padding, first step", ""]
    for name, title in PICTURES.items():
        parts += [f"{title}:", "", f"![{title}](plots/{name})", ""]
        parts += [*memory_table(steps), ""] if name == "memory.svg" else []
    known = {str(Setup(**each["setup"])) for each in results}
    missing = [str(setup) for setup in TABLE if str(setup) not in known]
    if missing:
        parts += [f"`make bench` also measures, and nobody has yet: {'; '.join(missing)}.", ""]
    return "\n".join(parts)


def between(page: Path, marks: tuple[str, str], text: str) -> None:
    """Puts ``text`` between two marks of a page; what stands around them is left as it is."""
    before, _, rest = page.read_text(encoding="utf-8").partition(marks[0])
    _, _, after = rest.partition(marks[1])
    page.write_text(f"{before}{marks[0]}\n{text}\n{marks[1]}{after}", encoding="utf-8")


def write(docs: Path = DOCS) -> None:
    """Puts plots and tables into ``docs`` and the README above it."""
    found = json.loads((docs / "performance.json").read_text(encoding="utf-8"))
    (docs / "plots").mkdir(exist_ok=True)
    for name, drawing in plots(found["results"]).items():
        (docs / "plots" / name).write_text(drawing, encoding="utf-8")
    between(docs / "performance.md", MARKS, measured(found))
    between(docs.parent / "README.md", README_MARKS, summary(found["results"]))


if __name__ == "__main__":
    write()
