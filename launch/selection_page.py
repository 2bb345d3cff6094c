"""Writes ``docs/selection.md`` and its plots from what was measured, with verdicts that are computed from intervals.

make selection                                measures, then writes the page
python -m launch.selection_page [--check]     writes the page
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import selection_verdicts as verdicts
from launch.line_plots import Line, Panel, plot
from launch.pages import ROOT, write_or_check
from launch.selection_verdicts import FLAT, Verdict, falls, rises, shown, word

PAGE, NUMBERS, PLOTS = ROOT / "docs" / "selection.md", ROOT / "docs" / "selection.json", ROOT / "docs" / "plots"
SHORT = {
    "best_of_n": "best of N",
    "majority": "majority",
    "weighted_majority": "weighted vote",
    "best_of_majority": "best of majority",
    "soft_best_of_n": "soft best of N",
}
COLOURS = {name: number for number, name in enumerate(SHORT)}
CHAINS, START, RUNS = 5, 1, (3, 0, 2)
"""Colours of QAlign, of the policy that everything starts from, and of runs by seed."""


def plots(parts: Mapping[str, Any]) -> dict[str, str]:
    """One plot for each claim, by file name."""
    drawn: dict[str, str] = {}
    if "rounds" in parts:
        drawn["selection_rounds.svg"] = _rounds_plot(parts["rounds"])
    if "pass_at_k" in parts:
        drawn["selection_pass_at_k.svg"] = _pass_plot(parts["pass_at_k"])
    if "curves" in parts:
        part = parts["curves"]
        for name, key, x, x_name, log in (
            ("selection_by_samples.svg", "by_samples", part["n"], "samples N", True),
            ("selection_by_answers.svg", "by_answers", part["k"], "answers handed in, k", False),
        ):
            panels = [
                Panel(
                    title=f"error of the reward: {error} ({found['size']:g})",
                    x=x,
                    lines=[Line(name=SHORT[s], points=p, colour=COLOURS[s]) for s, p in found[key].items()],
                )
                for error, found in part["errors"].items()
            ]
            drawn[name] = plot(f"Accuracy by {x_name}", panels, x_name=x_name, y_name="accuracy", log=log)
    if "qalign" in parts:
        drawn["selection_qalign.svg"] = _chains_plot(parts["qalign"])
    return drawn


def _run(number: int) -> int:
    return RUNS[number % len(RUNS)]


def _rounds_plot(part: Mapping[str, Any]) -> str:
    panels = []
    ks = list(part["runs"][0]["rounds"][0]["pass_at"])
    for k in (ks[0], ks[-1]):
        lines = [
            Line(name=f"seed {run['seed']}", points=[each["pass_at"][k] for each in run["rounds"]], colour=_run(number))
            for number, run in enumerate(part["runs"])
        ]
        title = "accuracy (pass@1)" if k == "1" else f"pass@{k}"
        panels.append(Panel(title=title, x=range(len(part["runs"][0]["rounds"])), lines=lines))
    return plot("Accuracy and pass@k after each round", panels, x_name="round", y_name="share of problems")


def _pass_plot(part: Mapping[str, Any]) -> str:
    lines = [Line(name="start", points=part["start"], colour=START)]
    lines += [
        Line(name=f"aligned, seed {run['seed']}", points=run["values"], colour=_run(number))
        for number, run in enumerate(part["runs"])
    ]
    panel = Panel(title="unbiased pass@k", x=part["k"], lines=lines)
    return plot("Pass@k", [panel], x_name="samples k", y_name="share of problems", log=True, panel_width=520)


def _chains_plot(part: Mapping[str, Any]) -> str:
    panels = []
    for error, found in part["errors"].items():
        lines = []
        for name, points in found["by_tokens"].items():
            rule, _, beta = name.partition(", ")
            dashed = beta == f"β {part['betas'][-1]:g}" and len(part["betas"]) > 1
            short = "QAlign" if rule == "qalign" else SHORT[rule]
            named = f"{short} {beta}" if rule == "qalign" else f"weighted {beta}" if beta else short
            lines.append(Line(name=named, points=points, colour=COLOURS.get(rule, CHAINS), dashed=dashed))
        title = f"error of the reward: {error} ({found['size']:g})"
        panels.append(Panel(title=title, x=part["budgets"], lines=lines))
    return plot("Accuracy by generated tokens", panels, x_name="generated tokens", y_name="accuracy", log=True)


# ---- words ----


def page(found: Mapping[str, Any]) -> str:
    """The whole page, of as many parts as were measured."""
    parts = found["parts"]
    dates = sorted({part["date"] for part in parts.values()})
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    claimed = {name: list(judge(parts[name])) for name, (judge, _) in SECTIONS.items() if name in parts}
    every = [verdict for listed in claimed.values() for verdict in listed]
    lines = [
        "# Rounds, selection and QAlign, measured",
        "",
        "<!-- Written by `python -m launch.selection_page` from docs/selection.json; edit nothing here. -->",
        "",
        *_paragraph(
            "On the embedded world: short word problems, and a policy of 0.9 million parameters that answers about "
            "half of them rightly at temperature 1. `make selection` measures it again (last time on "
            f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; {versions})."
        ),
        "",
        *_paragraph(
            "Intervals are 95 %, with problems as clusters; differences are paired by problem. They say "
            "how well a number "
            "is known over problems, not how much another seed would change it, which is why there are rounds with "
            f"{_count(parts)}. A claim *shows* where the whole interval of its difference is on the "
            "claimed side of zero, "
            f"in every seed. *Stays flat* means that the whole interval is within ±{FLAT:g}, *does not "
            "fall* that it is "
            f"above −{FLAT:g}. Of {len(every)} claims {sum(verdict.shows for verdict in every)} show."
        ),
    ]
    for name, (_, section) in SECTIONS.items():
        if name in parts:
            lines += ["", *section(parts[name]), "", *_table(claimed[name])]
    return "\n".join(lines) + "\n"


def _paragraph(text: str) -> list[str]:
    return textwrap.wrap(text, 118, break_long_words=False, break_on_hyphens=False)


def _count(parts: Mapping[str, Any]) -> str:
    runs = len(parts["rounds"]["runs"]) if "rounds" in parts else 0
    return f"{runs} seeds" if runs != 1 else "one seed only"


def _table(claims: Iterable[Verdict]) -> list[str]:
    rows = [f"| {each.claim} | {each.numbers} | {'yes' if each.shows else '**no**'} |" for each in claims]
    return ["| claim | difference | shows |", "|---|---|---|", *rows]


def _rounds(part: Mapping[str, Any]) -> list[str]:
    how = ", ".join(f"{key} {value}" for key, value in part["training"].items())
    ks = list(part["runs"][0]["rounds"][0]["pass_at"])
    lines = [
        "## Rounds of online DPO",
        "",
        *_paragraph(
            f"`python -m align.rounds` with launch/recipes/dpo.yaml ({how}): {part['problems']} problems, "
            f"{part['samples']} samples of each in every round, pairs of a right and a wrong answer. Judged by "
            f"{part['held_out']} problems whose numbers no round trains on, {part['held_out_samples']} samples each."
        ),
        "",
        "![Accuracy by round](plots/selection_rounds.svg)",
        "",
        f"| seed | round | accuracy | since the start | {' | '.join(f'pass@{k}' for k in ks)} |",
        f"|---|---|---|---|{'---|' * len(ks)}",
    ]
    for run in part["runs"]:
        for number, each in enumerate(run["rounds"]):
            change = shown(each["change"], signed=True) if number else ""
            passed = " | ".join(f"{each['pass_at'][k]['value']:.3f}" for k in ks)
            lines.append(f"| {run['seed']} | {number} | {shown(each['accuracy'])} | {change} | {passed} |")
    return lines


def _pass(part: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Pass@k before and after",
        "",
        *_paragraph(
            f"The chance that one of k samples is right, unbiased, on {part['problems']} problems "
            f"({part['samples']['start']} samples each of the start, {part['samples']['aligned']} of each "
            "aligned policy, "
            "which is the one after the last round)."
        ),
        "",
        "![Pass@k](plots/selection_pass_at_k.svg)",
        "",
        f"| policy | {' | '.join(f'k = {k}' for k in part['k'])} |",
        f"|---|{'---|' * len(part['k'])}",
        f"| start | {' | '.join(shown(each) for each in part['start'])} |",
    ]
    for run in part["runs"]:
        changes = [f"{shown(each, signed=True)} {word(each)}" for each in run["changes"]]
        lines.append(f"| seed {run['seed']}, difference | {' | '.join(changes)} |")
    return lines


def _curves(part: Mapping[str, Any]) -> list[str]:
    distinct = part["distinct_answers"]
    lines = [
        "## Selection by number of samples, under rewards that err",
        "",
        *_paragraph(
            "The reward is 1 for a right answer and 0 for a wrong one, plus an error that belongs to the "
            "answer: size · t, "
            "with t of Student's distribution with 2 degrees of freedom, drawn once for each problem and answer. So a "
            "rare wrong answer can be rated above every other, and more samples find more such answers "
            f"(arXiv:2510.03199). {part['problems']} problems, {part['samples']} samples of each, with "
            f"{distinct['median']:g} different answers in the median and {distinct['most']} at most; "
            f"α = {part['alpha']:g}, which any single sample passes up to N = {1 / part['alpha']:g}; other settings "
            "are defaults. best_of_n is exact, others are means over "
            f"{part['subsets']} random subsets."
        ),
        "",
        "![Accuracy by number of samples](plots/selection_by_samples.svg)",
        "",
        "| error | reward ranks the right answer above a wrong one | strategy | best N | N = 1 | "
        f"N = {part['n'][-1]} | last against best N |",
        "|---|---|---|---|---|---|---|",
    ]
    for error, found in part["errors"].items():
        for number, (name, points) in enumerate(found["by_samples"].items()):
            best = max(range(len(points)), key=lambda i: points[i]["value"])
            ranked = found["ranks_right_first"]
            told = f"{error} ({found['size']:g}) | {shown(ranked) if ranked else ''}" if not number else " | "
            lines.append(
                f"| {told} | {name} | {part['n'][best]} | {points[0]['value']:.3f} | {shown(points[-1])} | "
                f"{shown(found['since_peak'][name], signed=True)} |"
            )
    lines += [
        "",
        *_paragraph(
            "The last column chooses the best N on one half of the problems and measures on the other, "
            "both ways, so that "
            "a lucky N is no fall."
        ),
        "",
        *_paragraph(
            f"With k answers handed in of which one has to be right, at N = {part['n'][-1]} (best of N "
            "then ranks answers "
            "by their mean reward):"
        ),
        "",
        "![Accuracy by number of answers](plots/selection_by_answers.svg)",
        "",
        f"| best_of_majority against best of N | {' | '.join(f'k = {k}' for k in part['k'])} |",
        f"|---|{'---|' * len(part['k'])}",
    ]
    for error, found in part["errors"].items():
        cells = [f"{shown(each, signed=True)} {word(each)}" for each in found["gate_by_answers"]]
        lines.append(f"| error {error} | {' | '.join(cells)} |")
    return lines


def _chains(part: Mapping[str, Any]) -> list[str]:
    budget = part["budgets"][-1]
    lines = [
        "## QAlign at equal numbers of generated tokens",
        "",
        *_paragraph(
            f"Chains of {part['steps']} proposals on {part['problems']} problems under the same rewards "
            "(arXiv:2504.03790), answers by a vote over the states that a budget pays for, rejected "
            "proposals paid for as "
            "well. Selections get as many samples as the budget pays for on average: "
            f"{budget} tokens are up to {part['samples_at_most']} samples, or up to {part['states_at_most']} states. "
            "Dashed lines are of the larger β."
        ),
        "",
        "![Accuracy by generated tokens](plots/selection_qalign.svg)",
        "",
        f"| error | chain | accepted | accuracy at {budget} tokens | higher than | no difference seen from | "
        "lower than |",
        "|---|---|---|---|---|---|---|",
    ]
    for error, found in part["errors"].items():
        for name, others in found["against"].items():
            chosen: list[Callable[[Mapping[str, Any]], bool]] = [rises, lambda c: not rises(c) and not falls(c), falls]
            cells = [", ".join(other for other, c in others.items() if test(c)) or "–" for test in chosen]
            value = shown(found["by_tokens"][name][-1])
            lines.append(f"| {error} | {name} | {found['accepted'][name]:.0%} | {value} | {' | '.join(cells)} |")
    return lines


SECTIONS: Mapping[str, tuple[Callable[[Any], Iterable[Verdict]], Callable[[Any], list[str]]]] = {
    "rounds": (verdicts.of_rounds, _rounds),
    "pass_at_k": (verdicts.of_pass_at_k, _pass),
    "curves": (verdicts.of_curves, _curves),
    "qalign": (verdicts.of_chains, _chains),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes or checks the page and its plots; returns the exit status."""
    found = json.loads(NUMBERS.read_text(encoding="utf-8"))
    status = write_or_check("launch.selection_page", __doc__, PAGE, lambda: page(found), arguments)
    drawings = {PLOTS / name: drawing for name, drawing in plots(found["parts"]).items()}
    if "--check" in (sys.argv[1:] if arguments is None else arguments):
        old = [path.name for path, drawing in drawings.items() if not _same(path, drawing)]
        if old:
            print(f"{', '.join(old)}: out of date: run `python -m launch.selection_page`")
        return status or int(bool(old))
    for path, drawing in drawings.items():
        path.write_text(drawing, encoding="utf-8")
    return status


def _same(path: Path, drawing: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == drawing


if __name__ == "__main__":
    sys.exit(main())
