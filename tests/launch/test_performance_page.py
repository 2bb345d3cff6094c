"""The page on speed: what it says is what was measured, and what was written by hand stays."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

from launch.bench import performance_page
from launch.bench.vs_trl import TABLE, Setup, keep

DOCS = Path(__file__).resolve().parents[2] / "docs"


def side(rate: float, memory: float) -> dict[str, object]:
    return {
        "rows_per_second": [rate, 0.9 * rate, 1.2 * rate],
        "useful_tokens_per_second": 100 * rate,
        "padding": 0.25,
        "peak_mib": memory,
        "first_step": 12.0,
    }


def found() -> dict[str, object]:
    sides = {"ours": side(6.0, 1000), "trl": side(1.0, 3000), "trl-best": side(2.0, 2500)}
    setups = [asdict(Setup(case="hh", whole=whole)) for whole in (False, True)]
    tried = [{"micro": micro, "seconds": 1.0, "peak_mib": 1000.0 * micro} for micro in (2, 4)]
    results = [
        {"setup": setup, "micro": 2, "tried": tried, "sides": sides, "date": "d", "losses_apart": 2e-6}
        for setup in setups
    ]
    return {"machine": "m", "versions": "v", "results": results}


def test_tables_plots_and_what_stands_around_them(tmp_path: Path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "performance.json").write_text(json.dumps(found()))
    pages = {docs / "performance.md": performance_page.MARKS, tmp_path / "README.md": performance_page.README_MARKS}
    for page, marks in pages.items():
        page.write_text(f"before\n{marks[0]}\nold\n{marks[1]}\nafter\n")
    performance_page.write(docs)
    for page, marks in pages.items():
        assert page.read_text().startswith(f"before\n{marks[0]}\n|" if page.name == "README.md" else "before\n")
        assert page.read_text().endswith(f"{marks[1]}\nafter\n")
        assert "old\n" not in page.read_text()
    text = (docs / "performance.md").read_text()
    assert "| TRL at its best (2 at a time) | 2.00 [1.80, 2.40] | 200 | 25.0% | 2,500 MiB | 12 s | 3.0 times |" in text
    assert "| TRL at its defaults | 1.00 [0.90, 1.20] | 100 | 25.0% | 3,000 MiB | 12 s | 6.0 times |" in text
    for name in re.findall(r"plots/(\w+\.svg)", text):
        drawn = ElementTree.parse(docs / "plots" / name).iter("{http://www.w3.org/2000/svg}rect")
        assert len(list(drawn)) == 2 * (4 if name == "memory.svg" else 3), "legend and bars"
    line = (
        "pairs, long prompts and short responses, 16m, 48 rows, whole run | 6.00 | 6.0 times | 3.0 times | 33% | 25% |"
    )
    assert f"| {line}" in (tmp_path / "README.md").read_text()
    assert "| 1,000 MiB | 3,000 MiB: ours is 33% | 4,000 MiB: ours is 25% | 2,500 MiB: ours is 40% |" in text
    steps = ElementTree.parse(docs / "plots" / "steps.svg")
    ours, best, defaults = [float(each.attrib["width"]) for each in steps.iter("{http://www.w3.org/2000/svg}rect")][3:]
    assert round(ours / defaults, 1) == 6
    assert round(best / defaults, 1) == 2


def test_where_trl_computes_another_loss_its_distance_is_told_apart():
    def one(case: str, micro: int, losses_apart: float) -> dict[str, object]:
        return {"setup": asdict(Setup(case=case, batch=8)), "micro": micro, "losses_apart": losses_apart}

    whole = [one("hh", 1, 2e-6), one("tpo", 8, 3e-6)]
    assert performance_page.apart(whole) == "the largest difference was 3e-06"
    told = performance_page.apart([*whole, one("tpo", 2, 0.02)])
    assert told.startswith("the largest difference was 3e-06; TPO's was 0.02 where")
    both = performance_page.apart([one("hh", 1, 0.02), one("tpo", 2, 0.02)])
    assert both.startswith("the largest difference was 0.02; TPO's was 0.02 where")


def test_numbers_replace_older_ones_of_the_same_kind(tmp_path: Path):
    path = tmp_path / "performance.json"
    first, second = (asdict(TABLE[i]) for i in (4, 1))
    for setup, micro in ((first, 1), (second, 2), (first, 3)):
        keep(path, {"setup": setup, "micro": micro, "sides": {}})
    results = json.loads(path.read_text())["results"]
    assert [(each["setup"], each["micro"]) for each in results] == [(second, 2), (first, 3)]


def test_the_pages_are_up_to_date(tmp_path: Path):
    copy = tmp_path / "docs"
    copy.mkdir()
    pages = ("docs/performance.json", "docs/performance.md", "README.md")
    for name in pages:
        (tmp_path / name).write_text((DOCS.parent / name).read_text(encoding="utf-8"), encoding="utf-8")
    performance_page.write(copy)
    for name in pages:
        assert (tmp_path / name).read_text() == (DOCS.parent / name).read_text(), "run performance_page"
    for drawing in (copy / "plots").iterdir():
        assert drawing.read_text() == (DOCS / "plots" / drawing.name).read_text(), drawing.name
