"""Parts of reports by themselves: what is counted, drawn, embedded and left out."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from evals import pair_plots
from evals.__main__ import main
from evals.compare import read_run
from evals.doctor_section import doctor
from evals.generations_file import Generation, write_generations
from evals.length_plots import Sample, counted, ridges
from evals.pair_columns import PairColumns, columns
from evals.pair_plots import ches_against_displacement, difficulty_by_rightness, flow
from evals.pair_rows import PairRow, write_pairs
from evals.prompt_data import escaped, prompt_data
from evals.report import write_report
from evals.report_results import groups
from evals.response_lengths import response_lengths
from evals.result_plots import idealised, idealised_points
from evals.results import Result, Results
from evals.scores import Scores, write_scores
from evals.win_table import against_baselines, all_against_all


def result(metric, value, *, low=None, high=None, split="test", extra=None, step=9, n=100):
    return Result(
        metric=metric,
        dataset="acme/asked",
        split=split,
        n=n,
        clusters=n,
        value=value,
        stderr=None if low is None else 0.05,
        low=low,
        high=high,
        interval="wilson",
        step=step,
        extra=extra or {},
    )


def answer(prompt, text, *, model="dpo", step=9, tokens=5, scores=None):
    return Generation(
        dataset="acme/asked",
        split="test",
        step=step,
        model=model,
        prompt_id=prompt,
        prompt=f"ask {prompt}",
        sample=0,
        text=text,
        finish_reason="stop",
        tokens=tokens,
        scores=scores or {},
    )


def pair(number, *, step=9, split="test", chosen="good", **numbers):
    return PairRow(
        dataset="acme/asked",
        split=split,
        step=step,
        row=f"row {number}",
        prompt_id=f"p{number}",
        prompt=f"ask p{number}",
        chosen=chosen,
        rejected="bad",
        numbers={name: float(value) for name, value in numbers.items()},
    )


def of(**numbers):
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in numbers.items()}
    return PairColumns(dataset="acme/asked", split="test", step=9, numbers=arrays)


def titles(drawing):
    return re.findall(r"<title>(.*?)</title>", drawing)[1:]  # the first is the whole's


# What is embedded


def test_nothing_embedded_can_end_its_element():
    body = {"text": "</script><!--<script> & \u2028\u2029 \ud83d \x00 é"}
    text = escaped(body)
    assert not re.search("[<>&\u2028\u2029\x00\ud800-\udfff]", text)
    assert json.loads(text) == {
        "text": "</script><!--<script> & \u2028\u2029 \ufffd \x00 é".replace("\ud83d", "\ufffd")
    }


def test_what_does_not_fit_is_counted_and_answers_come_first(tmp_path):
    write_pairs(tmp_path, [pair(i, chosen="x" * 3000) for i in range(50)], dataset="acme/asked", split="test", step=9)
    write_generations(tmp_path, [answer("p7", "y" * 3000), answer("p900", "z")])
    found = prompt_data([("dpo", tmp_path)], most_bytes=20_000)
    assert found is not None
    shown = [prompt["key"] for prompt in json.loads(found.json)["prompts"]]
    assert (found.total, found.with_answers, found.prompts) == (51, 2, len(shown))
    assert {"p7", "p900"} < set(shown)
    assert 4 <= len(shown) <= 7
    again = prompt_data([("dpo", tmp_path)], most_bytes=20_000)
    assert again is not None
    assert again.json == found.json
    everything = prompt_data([("dpo", tmp_path)])
    assert everything is not None
    assert everything.prompts == everything.total == 51
    assert prompt_data([("dpo", tmp_path / "nothing")]) is None


def test_a_page_says_what_it_left_out(tmp_path, monkeypatch):
    write_pairs(tmp_path, [pair(i, chosen="x" * 3000) for i in range(50)], dataset="acme/asked", split="test", step=9)
    assert "of which" not in write_report(tmp_path).read_text()
    monkeypatch.setattr("evals.report.prompt_data", lambda runs: prompt_data(runs, most_bytes=20_000))
    assert "50 prompts, of which 5 are in this page" in write_report(tmp_path).read_text()


def test_the_same_answer_of_two_runs_is_shown_once_and_another_under_the_run_s_name(tmp_path):
    for name, told, score in (("a", "same", 0.25), ("b", "same", 0.75), ("c", "other", 0.5)):
        write_generations(tmp_path / name, [answer("p1", told, model="sft", scores={"judge": score, "long": 1.0})])
    found = prompt_data([(name, tmp_path / name) for name in "abc"])
    assert found is not None
    body = json.loads(found.json)
    (prompt,) = body["prompts"]
    assert body["models"] == ["sft", "sft (c)"]
    assert [(a["text"], a["scores"]) for a in prompt["answers"]] == [
        ("same", {"judge": 0.25, "long": 1.0, "judge (b)": 0.75}),
        ("other", {"judge": 0.5, "long": 1.0}),
    ]


def test_models_whose_paths_end_alike_stay_apart_and_paths_and_tokens_stay_out(tmp_path):
    token = "hf_" + "aB3dE6gH9j" * 3
    models = ("/home/me/one/final", "/home/me/two/final")
    write_generations(tmp_path, [answer("p1", f"my {token}", model=model) for model in models])
    found = prompt_data([("run", tmp_path)])
    assert found is not None
    assert json.loads(found.json)["models"] == ["final", "final (2)"]
    assert "/home/me" not in found.json
    assert token not in found.json


# Pairs


def test_columns_are_of_the_last_step_of_each_split(tmp_path):
    rows = [pair(1, step=0, ches=1), pair(1, ches=2), pair(2, ches=3, difficulty=4), pair(1, split="other", ches=5)]
    test, other = columns(rows)
    assert (test.step, test.n, other.n) == (9, 2, 1)
    assert test.numbers["ches"].tolist() == [2.0, 3.0]
    assert np.isnan(test.numbers["difficulty"][0])
    assert set(other.numbers) == {"ches"}
    assert columns([pair(1)]) == []


def test_every_pair_lies_in_one_hexagon_and_in_the_nearest():
    rng = np.random.default_rng(0)
    n = 4000
    change = rng.normal(0, 5, n)
    drawing = ches_against_displacement(of(ln_ches=rng.normal(0, 1, n), policy_chosen=change, ref_chosen=np.zeros(n)))
    assert drawing is not None
    assert sum(int(text.split()[0]) for text in titles(drawing) if re.fullmatch(r"\d+ pairs", text)) == n
    wide, tall = math.sqrt(3) * pair_plots.HEXAGON, 1.5 * pair_plots.HEXAGON
    centres = {(c, r): ((c + r % 2 / 2) * wide, r * tall) for c in range(-2, 12) for r in range(-2, 12)}
    for x, y in rng.uniform(0, 80, (300, 2)):
        nearest = min(centres, key=lambda cell: math.dist(centres[cell], (x, y)))
        assert pair_plots._cell(x, y, wide, tall) == nearest


def test_few_pairs_are_dots_and_medians_are_those_of_tenths():
    """Of 100 pairs whose change is their rank, tenths have medians 4.5, 14.5, …"""
    ranks = np.arange(100.0)
    drawing = ches_against_displacement(of(ln_ches=ranks, policy_chosen=ranks, ref_chosen=np.zeros(100)))
    assert drawing is not None
    assert drawing.count('class="pair c0"') == 100
    medians = [float(m) for m in re.findall(r"median ([\d.]+) nats", drawing)]
    assert medians == [4.5 + 10 * i for i in range(10)]
    # Of ten values the second lowest and highest hold the median of 97.9 % of samples, the narrowest above 95 %.
    assert "median 4.5 nats, 95 % [1, 8], 10 pairs" in drawing
    assert ches_against_displacement(of(ln_ches=ranks)) is None
    assert ches_against_displacement(of(ln_ches=[1, 2], policy_chosen=[1, 2], ref_chosen=[1, 2])) is None


def test_difficulty_counts_right_and_wrong():
    """c = ref_rejected − ref_chosen: −2, −2, 1, 5; the policy ranks the first, the third, and half of the last."""
    drawing = difficulty_by_rightness(
        of(
            ref_chosen=[0, 0, 0, 0],
            ref_rejected=[-2, -2, 1, 5],
            policy_chosen=[1, 0, 1, 0],
            policy_rejected=[0, 1, 0, 0],
        )
    )
    assert drawing is not None
    counted_ = {
        kind: sum(float(t.split(": ")[1].split()[0]) for t in titles(drawing) if t.endswith(kind))
        for kind in ("right", "wrong")
    }
    assert counted_ == {"right": 2.5, "wrong": 1.5}
    assert difficulty_by_rightness(of(ches=[1.0])) is None


@pytest.mark.parametrize("value", [0.0, -3.0, 1e9])
def test_pairs_that_are_all_alike_can_be_drawn(value):
    alike = np.full(2000, value)
    pairs = of(ln_ches=alike, policy_chosen=alike, policy_rejected=alike, ref_chosen=alike, ref_rejected=0 * alike)
    for drawing in (ches_against_displacement(pairs), difficulty_by_rightness(pairs)):
        assert drawing is not None
        assert not re.search(r"\b(nan|inf)\b", drawing)


# Results


def test_the_flow_says_its_shares():
    shares = {"right_to_right": 0.4, "right_to_wrong": 0.1, "wrong_to_right": 0.2, "wrong_to_wrong": 0.3}
    found = {
        f"flow/{name}": result(f"flow/{name}", value, low=value - 0.05, high=value + 0.05)
        for name, value in shares.items()
    }
    drawing = flow(found)
    assert drawing is not None
    assert titles(drawing) == [
        "right to right: 40.0 % [35.0, 45.0]",
        "right to wrong: 10.0 % [5.0, 15.0]",
        "wrong to right: 20.0 % [15.0, 25.0]",
        "wrong to wrong: 30.0 % [25.0, 35.0]",
    ]
    assert flow({name: each for name, each in found.items() if "wrong_to_wrong" not in name}) is None


def test_the_ideal_over_beta_comes_with_limits_where_they_were_measured():
    own = result("ranking/accuracy", 0.6, low=0.5, high=0.7)
    median = result("ranking/idealised", 0.8, extra={"betas": [1.0, 0.1], "per_beta": [0.7, 0.9]})
    found = {"ranking/accuracy": own, "ranking/idealised": median}
    assert [(p.x, p.value, p.low) for p in idealised_points(found)] == [(0.1, 0.9, None), (1.0, 0.7, None)]
    assert idealised(found) is not None
    measured = {
        f"ranking/idealised@{beta}": result("x", value, low=value - 0.1, high=value + 0.1)
        for beta, value in ((0.1, 0.91), (1.0, 0.71))
    }
    assert [(p.value, p.low) for p in idealised_points(found | measured)] == [
        (0.91, pytest.approx(0.81)),
        (0.71, pytest.approx(0.61)),
    ]
    assert idealised({"ranking/accuracy": own}) is None


def test_results_nobody_knows_are_shown_by_the_part_before_the_slash():
    known, unknown = (
        result("ranking/accuracy", 0.6, low=0.5, high=0.7),
        result("odd/thing", 3.0, low=2.0, high=4.0, extra={"judge": "j", "n_dropped": 0}),
    )
    found = groups([known, unknown])
    assert [group.name for group in found] == ["ranking", "odd"]
    ((where, (row,)),) = found[1].parts
    assert (where, row.label, row.extras) == ("", "", [("judge", "j")])
    assert row.bar is not None


def test_win_rates_against_baselines():
    extra = [{"baseline": name, "judge": "acme/judge"} for name in ("acme/a", "acme/b")]
    table = against_baselines(
        [
            result("win_rate/raw", 0.9, low=0.8, high=0.95, split="test vs acme/a", extra=extra[0]),
            result("win_rate/raw", 0.2, step=1, split="test vs acme/a", extra=extra[0]),
            result("win_rate/raw", 0.45, low=0.4, high=0.52, split="test vs acme/b", extra=extra[1]),
            result("judge/win_rate", 0.4, low=0.35, high=0.45, split="test vs acme/b", extra=extra[1]),
        ]
    )
    assert table is not None
    assert table.columns == ["win rate", "both orders"]
    assert [(name, about) for name, about, _ in table.rows] == [
        ("acme/a", "judge acme/judge"),
        ("acme/b", "judge acme/judge"),
    ]
    cells = [
        [cell and (cell.value, cell.interval, cell.beyond, cell.shade) for cell in cells] for _, _, cells in table.rows
    ]
    assert cells == [
        [("90.0 %", "[80.0, 95.0]", "▲", 4), None],
        [("45.0 %", "[40.0, 52.0]", "", 0), ("40.0 %", "[35.0, 45.0]", "▼", -1)],
    ]
    assert against_baselines([result("ranking/accuracy", 0.6)]) is None


def judged(folder, share, prompts=40, baseline="acme/sft", model="m"):
    """A run that wins a share of its prompts against a baseline."""
    folder.mkdir()
    by_prompt = {f"p{i}": float(i < share * prompts) for i in range(prompts)}
    measured = result("win_rate/raw", share, low=share - 0.1, high=share + 0.1, extra={"baseline": baseline}, n=prompts)
    Results(run={"model": model}, results=[measured]).write(folder / "results.json")
    write_scores(
        folder, [Scores(metric="win_rate/raw", dataset="acme/asked", split="test", step=9, by_prompt=by_prompt)]
    )
    return read_run(folder)


@pytest.mark.slow
def test_all_against_all_fills_in_what_was_never_played(tmp_path):
    """75 % and 50 % against one baseline imply 75 % against each other: log-odds log 3 and 0."""
    runs = [judged(tmp_path / "a", 0.75), judged(tmp_path / "b", 0.5)]
    (table,) = all_against_all(runs, {runs[0].name: "a", runs[1].name: "b"})
    assert table.columns == ["a", "b", "acme/sft"]
    shown = [[cell and (cell.value, cell.fitted) for cell in cells] for _, _, cells in table.rows]
    assert shown == [
        [None, ("75.0 %", True), ("75.0 %", False)],
        [("25.0 %", True), None, ("50.0 %", False)],
        [("25.0 %", False), ("50.0 %", False), None],
    ]
    assert "never judged against each other" in table.notes[0]


@pytest.mark.slow
def test_a_baseline_that_is_a_run_is_that_run(tmp_path):
    runs = [judged(tmp_path / "a", 0.75, baseline="acme/base"), judged(tmp_path / "b", 0.5, model="acme/base")]
    (table,) = all_against_all(runs, {runs[0].name: "a", runs[1].name: "b"})
    assert table.columns == ["a", "b", "acme/sft"]
    assert [cell and cell.value for cell in table.rows[0][2]] == [None, "75.0 %", "75.0 %"]


# Lengths and the doctor


def test_lengths_are_in_tokens_where_they_were_counted(tmp_path):
    numbers = {"length_chosen": 3, "length_rejected": 4}
    write_pairs(tmp_path, [pair(1, step=0, **numbers), pair(1, **numbers)], dataset="acme/asked", split="test", step=9)
    answers = [
        answer("p1", "abcd", step=0, tokens=1),
        answer("p1", "abcdef"),
        answer("p1", "abc", model="server", tokens=0),
    ]
    write_generations(tmp_path, answers)
    found = {
        unit: [(s.name, s.values.tolist()) for s in each] for unit, each in response_lengths([("", tmp_path)]).items()
    }
    assert found == {
        "tokens": [("chosen", [3.0]), ("rejected", [4.0]), ("dpo", [5.0])],
        "characters": [("server", [3.0])],
    }


@pytest.mark.parametrize("values", [[5.0], [7.0, 7.0, 7.0], [1.0, 2.0, 4000.0], [0.0, 1e6]])
def test_any_lengths_can_be_drawn(values):
    drawing = ridges([Sample(name="a", values=np.array(values))], x_name="tokens", title="Lengths")
    assert drawing is not None
    assert "nan" not in drawing
    assert f"median {np.median(values):g}"[:10] in drawing.replace("\u202f", "")
    assert ridges([Sample(name="a", values=np.array([]))], x_name="tokens", title="Lengths") is None


def test_the_doctor_s_findings_come_worst_first():
    found = doctor(
        {
            "version": 1,
            "findings": [
                {"check": "a", "verdict": "fine", "text": "Good."},
                {"check": "b", "verdict": "fault", "value": 0.5, "low": 0.4, "high": 0.6, "n": 20, "rows": [1, 2, 3]},
                {"check": "c", "verdict": "warning", "value": "many", "rows": 4, "examples": [{"row": 1}, 2]},
            ],
            "distributions": {
                "length_chosen": {"edges": [0, 1, 2], "counts": [5, 0]},
                "broken": {"edges": [0], "counts": [1]},
            },
        }
    )
    assert found is not None
    assert [(f.check, f.value, f.rows, f.examples) for f in found.findings] == [
        ("b", "0.5 [0.4, 0.6] of 20", "3", ()),
        ("c", "many", "4", ("row: 1", "2")),
        ("a", "", "", ()),
    ]
    assert found.counts == (("fault", 1), ("warning", 1), ("fine", 1))
    assert [figure.title for figure in found.figures] == ["length chosen"]
    assert doctor({}) is None
    assert counted({"edges": [1, 1], "counts": [3]}, name="x", title="x") is None


# The command


def test_an_evaluation_alone_is_reported(tmp_path, capsys):
    Results(run={"model": "acme/m"}, results=[result("ranking/accuracy", 0.6, low=0.5, high=0.7)]).write(
        tmp_path / "results.json"
    )
    output = tmp_path / "page.html"
    assert main(["report", str(tmp_path), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"wrote {output}\n"
    page = output.read_text()
    assert "Evaluation of <b>acme/m</b>" in page
    assert "evaluation report" in page
    assert 'id="prompt-data"' not in page
    assert not (tmp_path / "report.html").exists()


def test_what_can_t_be_reported_is_one_sentence(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1


# Colours


MACHADO = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}
"""Machado, Oliveira and Fernandes 2009, doi:10.1109/TVCG.2009.113, severity 1, on linear RGB."""


def lab(rgb):
    """CIELAB under D65 of linear RGB."""
    xyz = (
        np.array(
            [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
        )
        @ rgb
    )
    f = np.cbrt(np.clip(xyz / [0.95047, 1.0, 1.08883], 1e-6, None))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("eyes", [None, *MACHADO])
def test_colours_of_lines_stay_apart_for_all_eyes(mode, eyes):
    css = (Path(pair_plots.__file__).parent / "templates" / "report.css").read_text()
    found = [re.findall(rf"--c{i}: #(\w{{6}})", css)[mode] for i in range(6)]
    srgb = np.array([[int(c[j : j + 2], 16) / 255 for j in (0, 2, 4)] for c in found])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = linear if eyes is None else np.clip(linear @ np.array(MACHADO[eyes]).T, 0, 1)
    apart = {(i, j): float(np.linalg.norm(lab(seen[i]) - lab(seen[j]))) for i, j in itertools.combinations(range(6), 2)}
    assert min(apart.values()) > 12, apart
