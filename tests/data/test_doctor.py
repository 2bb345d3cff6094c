"""What the data doctor finds on planted rows, counted by hand, and on real rows, counted by a few other lines."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedModel

from data.__main__ import main
from data.clean import write_clean
from data.doctor import examine
from data.doctor_text import told
from data.errors import DataError
from data.filters import ExactDuplicates, LengthRatio
from data.findings import LIMITS, Diagnosis, Finding, graded
from data.sources import Source
from data.tokens import TokenPolicy
from data.traits import asked, echoes
from objectives.rows import Row
from objectives.stats import clustered_wilson
from tests.data.byte_level import byte_level
from tests.data.planted import pairs, write
from tests.data.preparing import a_spec
from tests.equivalence.worlds import save_model
from tests.support import REPOSITORY

pytest.importorskip("rensa", reason="near duplicates take the package rensa")

A, B, C, D = pairs(4)
SWAPPED = {**A, "chosen": A["rejected"], "rejected": A["chosen"]}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))


def found(spec, tokenizer=None, **options):
    diagnosis = examine(spec, tokenizer, **options)
    return {each.check: each for each in diagnosis.findings}


def check(path, rows, tokenizer=None, **options):
    changes = {
        name: options.pop(name) for name in ("eval", "legs", "labels", "policy", "eval_share") if name in options
    }
    return found(a_spec(write(path, rows), **changes), tokenizer, **options)


# Rows


def test_a_dataset_without_a_fault_is_fine(tmp_path):
    diagnosis = examine(a_spec(write(tmp_path / "a.jsonl", pairs(40))))
    assert {each.verdict for each in diagnosis.findings} == {"fine"}
    assert diagnosis.worst == "fine"
    assert diagnosis.rows == 40
    assert [(each["rows"], each["without_use"], each["format"]) for each in diagnosis.sources] == [(40, 0, "paired")]


@pytest.mark.parametrize(
    ("name", "rows", "number", "examples"),
    [
        ("exact_duplicates", [A, B, A], 1, [2]),
        ("same_answers", [A, {**A, "rejected": " else"}, B], 1, [1]),
        ("near_duplicates", [A, B, {**A, "prompt": A["prompt"].upper()}], 1, [2]),
        ("identical_pairs", [A, {**B, "rejected": f"{B['chosen'].upper()} "}], 1, [1]),
        ("contradictions", [A, B, SWAPPED], 2, [0, 2]),
        ("echo", [{**A, "rejected": f"{A['prompt']} hm"}, B], 1, [0]),
        ("replacement_characters", [A, {**B, "chosen": "caf\ufffd"}], 1, [1]),
        ("mojibake", [{**A, "chosen": "cafÃ© â€œouiâ€\x9d"}, {**B, "chosen": "café “oui” São"}], 1, [0]),
        ("control_characters", [A, {**B, "chosen": "a\x07b"}, {**C, "chosen": "a\tb\r\nc"}], 1, [1]),
        (
            "html",
            [A, {**B, "chosen": "a<br/>b"}, {**C, "chosen": "1 &lt; 2"}, {**D, "chosen": "1 < 2 > 0 & x"}],
            2,
            [1, 2],
        ),
        ("special_tokens", [A, {**B, "prompt": "hi<|im_end|>"}], 1, [1]),
        ("dropped", [A, B, {**C, "chosen": C["rejected"]}, {**D, "rejected": " "}], 2, [2, 3]),
    ],
)
def test_a_planted_fault_is_counted_and_named(tmp_path, name, rows, number, examples):
    each = check(tmp_path / "a.jsonl", rows)[name]
    assert each.rows == number
    assert each.value == pytest.approx(number / (len(rows)))
    assert list(each.examples) == [f"{tmp_path / 'a.jsonl'}, row {i}" for i in examples]
    assert each.verdict != "fine"
    assert each.key


def test_verdicts_follow_the_limits():
    """exact_duplicates: a remark up to 1 %, a warning up to 20 %, a fault above."""
    assert [graded("exact_duplicates", rows, 1000) for rows in (0, 1, 10, 11, 200, 201)] == [
        *("fine", "remark", "remark", "warning", "warning", "fault")
    ]
    assert graded("shared_prompts", 1, 10**6) == "fault"
    assert graded("near_duplicates", 10, 10) == "warning", "never a fault"
    assert all(each.why and 0 <= each.warning <= each.fault for each in LIMITS.values())


def test_prompts_shared_with_the_evaluation_set(tmp_path):
    held = Source(dataset_name=str(write(tmp_path / "held.jsonl", [C, {**A, "chosen": " other"}])))
    each = check(tmp_path / "a.jsonl", [A, B, A], eval=held)["shared_prompts"]
    assert (each.verdict, each.rows, each.n) == ("fault", 2, 3)
    assert "shared_with_eval" in each.key
    assert check(tmp_path / "a.jsonl", [A, B])["shared_prompts"].verdict == "fine", "held out by prompt"


def test_length_bias_is_clustered_by_prompt(tmp_path):
    """Three prompts; of 6 pairs the longer one wins 4: 2 of 2, 2 of 3 and 0 of 1."""
    wins = {"p": [1, 1], "q": [1, 1, 0], "r": [0]}
    rows = [
        {"prompt": f"{prompt}{'?' * 20}", "chosen": f" {i}" + "x" * (9 if win else 2), "rejected": " 1234"}
        for prompt, each in wins.items()
        for i, win in enumerate(each)
    ]
    each = check(tmp_path / "a.jsonl", rows)["length_bias"]
    expected = clustered_wilson([1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 2])
    assert each.value == pytest.approx(4 / 6)
    assert (each.low, each.high) == pytest.approx((expected.low, expected.high))
    assert (each.rows, each.n) == (4, 6)
    assert "chosen is +3.7" in each.text, "(4 · 6 − 2 · 1) / 6: 11 or 4 characters against 5"


def test_longer_always_wins(tmp_path):
    rows = [{**each, "chosen": each["chosen"] * 2} for each in pairs(60)]
    each = check(tmp_path / "a.jsonl", rows)["length_bias"]
    assert each.verdict == "warning"
    assert each.text.startswith("longer wins 100.0% of 60 pairs")


def test_scores_and_those_the_wrong_way_round(tmp_path):
    values = [(1, 0), (0, 2), (3, 3), (4, 1)]
    rows = [{**row, "score_chosen": a, "score_rejected": b} for row, (a, b) in zip((A, B, C, D), values, strict=True)]
    each = check(tmp_path / "a.jsonl", rows)["scores"]
    assert each.text.startswith("8 scores from 0 to 4, quartiles 0.75, 1.5, 3; of 4 scored pairs 1 are ties, and in 1")
    assert (each.verdict, each.rows, each.n) == ("fault", 1, 4)


def test_labels_of_one_kind_and_of_few(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": f" c{i}", "label": i > 0} for i in range(20)]
    options = {"legs": ("completion",), "labels": True}
    each = check(tmp_path / "a.jsonl", rows, **options)["labels"]
    assert (each.verdict, each.value, each.rows) == ("warning", 0.95, 1)
    assert each.low < 0.95 < each.high
    assert check(tmp_path / "b.jsonl", rows[1:], **options)["labels"].verdict == "fault"


def test_overlap_with_an_evaluation_set(tmp_path):
    against = write(tmp_path / "test.jsonl", [{"q": f"{B['prompt']} and more of it here"}])
    each = check(tmp_path / "a.jsonl", [A, B, C], against=[str(against)])["overlap"]
    assert (each.verdict, each.rows) == ("fault", 1)
    assert "13 words in a row" in each.text


def test_several_datasets_are_told_apart(tmp_path):
    first, second = write(tmp_path / "a.jsonl", [A, B]), write(tmp_path / "b.jsonl", [A, C, C])
    each = found(a_spec(first, second))["exact_duplicates"]
    assert each.by_source == {str(first): 0, str(second): 2}


def test_the_recipe_s_own_filters_come_first(tmp_path):
    path = write(tmp_path / "a.jsonl", [A, B, A])
    own = found(a_spec(path, filters=(ExactDuplicates(),)))
    assert own["exact_duplicates"].rows == 0
    assert "1 × filter exact_duplicates" in own["dropped"].text


@pytest.mark.parametrize(
    ("prompt", "asks"),
    [
        ("what is it?", "what is it?"),
        ("\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:", " three\n\n"),
        (({"role": "system", "content": "s"}, {"role": "user", "content": "u"}), "u"),
    ],
)
def test_what_was_asked(prompt, asks):
    assert asked(prompt) == asks


def test_an_echo_is_no_coincidence():
    """Short prompts are begun by chance; white space does not hide an echo."""
    assert not echoes(Row(prompt="I am", responses={"chosen": "I am fine"}))
    assert echoes(Row(prompt="Tell me about cats", responses={"chosen": " Tell me\n about cats. They"}))
    assert not echoes(Row(prompt="Tell me about cats", responses={"chosen": "Well. Tell me about cats"}))


# Tokens


def test_what_is_cut_and_pairs_that_are_cut_alike(tmp_path):
    """One token per byte and max_length 40: of a prompt of 10 and responses of 35 bytes, 30 tokens stay."""
    rows = [
        {"prompt": "0123456789", "chosen": "a" * 34 + "x", "rejected": "a" * 34 + "y"},
        {"prompt": "012345678x", "chosen": "b" * 35, "rejected": "c" * 10},
        {"prompt": "012345678y", "chosen": "d" * 10, "rejected": "e" * 10},
    ]
    own = check(tmp_path / "a.jsonl", rows, byte_level(), policy=TokenPolicy(max_length=40), eval_share=0.0)
    assert (own["truncation"].rows, own["truncation"].n) == (1, 2)
    assert "1 × chosen (6 tokens)" in own["truncation"].text, "35 bytes and the end token"
    assert own["truncation"].examples == (f"{tmp_path / 'a.jsonl'}, row 1",)
    assert (own["cut_differences"].rows, own["cut_differences"].verdict) == (1, "fault")
    assert own["cut_differences"].examples == (f"{tmp_path / 'a.jsonl'}, row 0",)
    assert own["dropped"].rows == 1
    assert own["length_bias_tokens"].n == 2


def test_a_prompt_that_is_no_prefix(tmp_path):
    rows = [{"prompt": "ab", "chosen": "c1", "rejected": "c2"}, {"prompt": "xx", "chosen": "c1", "rejected": "c2"}]
    each = check(tmp_path / "a.jsonl", rows, byte_level(merges=[("b", "c")]), eval_share=0.0)["boundaries"]
    assert (each.rows, each.verdict) == (1, "warning")


def test_a_beginning_that_is_there_twice_and_a_tokenizer_s_own_tokens(tmp_path):
    rows = [{**A, "prompt": "<s>" + A["prompt"]}, B]
    own = check(tmp_path / "a.jsonl", rows, byte_level(adds_bos=True), eval_share=0.0)
    assert own["beginnings"].rows == 1
    assert own["special_tokens"].rows == 1


def test_ends_that_a_template_writes_twice_or_not_at_all(tmp_path):
    talk = [{"prompt": f"q{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(4)]
    rows = [
        {"prompt": [{"role": "user", "content": row["prompt"]}]}
        | {leg: [{"role": "assistant", "content": row[leg]}] for leg in ("chosen", "rejected")}
        for row in talk
    ]
    for end, removed, added in (("</s></s>", 8, 0), ("", 0, 8), ("</s>", 0, 0)):
        template = "{% for m in messages %}[{{ m['content'] }}]" + end + "{% endfor %}"
        own = check(tmp_path / "a.jsonl", rows, byte_level(template=template), eval_share=0.0)["ends"]
        assert own.text.startswith(f"{removed} responses have something after their end token")
        assert f"{added} get an end token" in own.text
        assert (own.verdict == "fine") == (not removed and not added)


def test_data_that_no_run_could_use_is_a_fault(tmp_path):
    each = check(tmp_path / "a.jsonl", [A, B], byte_level(), legs=("gold",))
    assert each["preparation"].verdict == "fault"
    assert "gold" in each["preparation"].text


# The file


def test_the_file_reads_back_and_holds_what_it_says(tmp_path):
    diagnosis = examine(a_spec(write(tmp_path / "a.jsonl", [A, B, A])), byte_level(), command="x")
    diagnosis.write(tmp_path / "doctor.json")
    raw = json.loads((tmp_path / "doctor.json").read_text())
    assert raw["version"] == 1
    assert (raw["dataset"], raw["rows"], raw["command"]) == (str(tmp_path / "a.jsonl"), 3, "x")
    keys = {"check", "verdict", "text", "key", "value", "low", "high", "n", "rows", "examples"}
    assert all(keys <= each.keys() for each in raw["findings"])
    assert {"length_chosen", "length_rejected", "tokens_chosen"} <= raw["distributions"].keys()
    for each in raw["distributions"].values():
        assert len(each["edges"]) == len(each["counts"]) + 1
    assert sum(raw["distributions"]["length_chosen"]["counts"]) == 3
    assert "transformers" in raw["versions"]
    assert Diagnosis.read(tmp_path / "doctor.json").as_json() == raw


@pytest.mark.parametrize("text", ["", "[]", '{"version": 9}', '{"version": 1}', "nonsense"])
def test_a_file_that_is_no_diagnosis(tmp_path, text):
    (tmp_path / "doctor.json").write_text(text)
    with pytest.raises(DataError, match=r"doctor\.json"):
        Diagnosis.read(tmp_path / "doctor.json")


def test_nothing_that_is_not_a_number_gets_in():
    with pytest.raises(AssertionError):
        Finding(check="x", verdict="fine", text="", value=float("nan"))


# The command


def test_the_command_tells_writes_and_ends_with_a_status(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [A, B, A, *pairs(30, seed=7)])
    words = ["check", "--dataset_name", str(path), "--output", str(tmp_path / "d.json"), "--write", str(tmp_path / "c")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "WARNING exact_duplicates: 1 of 33 rows (3.0%)" in said
    assert "not looked at: tokens, templates and truncation" in said
    assert f"{path}, row 2" in said.replace("\n          ", " ")
    assert "train.jsonl: 32 of 33 rows" in said
    assert Diagnosis.read(tmp_path / "d.json").command.startswith("python -m data check --dataset_name")
    before = {each.name: each.read_bytes() for each in (tmp_path / "c").iterdir()}
    assert main(words) == 0
    assert {each.name: each.read_bytes() for each in (tmp_path / "c").iterdir()} == before, "the same bytes"
    assert sorted(before) == ["manifest.json", "train.jsonl"]
    assert [each for each in tmp_path.iterdir() if each.name.startswith(".c.")] == []
    assert main(["check", "--dataset_name", str(write(path, [A, B, SWAPPED]))]) == 1


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        (None, [], "no such file"),
        ([A], ["--drop", "echo"], "--drop has no effect without --write"),
        ([A], ["--ngram", "8"], "--ngram has no effect without --against"),
        ([A], ["--no_near", "--shingle", "5"], "have no effect with --no_near"),
        ([A], ["--threshold", "0.2"], "threshold must be in [0.5, 1]"),
        ([A], ["--write", "OUT", "--drop", "ecoh"], "--drop ecoh: unknown filter 'ecoh'; did you mean 'echo'?"),
        ([A], ["--write", "OUT", "--drop", "overlap"], "--drop overlap: against must be a list of files"),
        ([A], ["--write", "OUT", "--drop", "shared_prompts"], "filter shared_with_eval has no effect"),
        ([A], ["--max_lenght", "3"], "unknown key --max_lenght"),
        ([A], ["--learning_rate", "3"], "'train' says nothing about a dataset alone"),
        ([A], ["--eos_token", "x"], "without --model_name_or_path"),
        ([A], ["--against", "none.jsonl"], "no such file"),
        ([{"text": "x"}], [], "expected prompt + chosen + rejected"),
        ([A], ["--write", "FULL"], "the folder holds other files"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, rows, options, says):
    path = tmp_path / "a.jsonl" if rows is None else write(tmp_path / "a.jsonl", rows)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    places = {"OUT": str(tmp_path / "out"), "FULL": str(tmp_path / "full")}
    assert main(["check", "--dataset_name", str(path), *(places.get(word, word) for word in options)]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_a_dataset(capsys):
    assert main(["check"]) == 2
    assert "give --config RECIPE or --dataset_name FILE" in capsys.readouterr().err


def test_a_recipe_s_data_with_its_tokenizer_and_no_weights(tmp_path, capsys, monkeypatch):
    save_model(tmp_path / "model")
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    path = write(tmp_path / "a.jsonl", [A, B, *pairs(30, seed=7), A])
    (tmp_path / "r.yaml").write_text(
        f"model: {{model_name_or_path: {tmp_path / 'model'}}}\ndata: {{dataset_name: {path}, max_length: 100}}\n"
        f"objective: {{name: dpo}}\ntrain: {{output_dir: {tmp_path / 'run'}}}\n"
    )
    words = ["check", "--config", str(tmp_path / "r.yaml"), "--eval_share", "0", "--filter", "exact_duplicates"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "1 × filter exact_duplicates" in said.replace("\n          ", " ")
    assert "truncation: max_length 100 cuts" in said
    assert "not looked at" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_help_lists_the_filters():
    done = subprocess.run(
        [sys.executable, "-m", "data", "check", "--help"], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0
    assert "near_duplicates" in done.stdout


# What comes from data stays data


NASTY = [
    {"prompt": "<script>alert('x')</script> \u202e why?", "chosen": " \x1b[31mred</p>", "rejected": " a\u2028b\u0000c"},
    {"prompt": "{rows} {0} %s 👩‍👩‍👧 \u0301", "chosen": " {n}", "rejected": " \\u2028"},
]


def test_nasty_text_survives(tmp_path, capsys):
    path = write(tmp_path / "<b>{rows}.jsonl", [*NASTY, *NASTY, A])
    diagnosis = examine(a_spec(path), byte_level())
    assert diagnosis.findings
    diagnosis.write(tmp_path / "doctor.json")
    assert Diagnosis.read(tmp_path / "doctor.json").as_json() == diagnosis.as_json()
    assert "{rows}" in told(diagnosis, tokens=True)
    manifest = write_clean(a_spec(path, filters=(ExactDuplicates(),)), tmp_path / "clean")
    assert manifest["files"][0]["rows_kept"] == 3
    kept = (tmp_path / "clean" / "train.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in kept if line] == [*NASTY, A]


def test_a_name_cannot_speak_to_the_terminal(tmp_path):
    path = write(tmp_path / "a\x1b[31m.jsonl", [A, A])
    assert "\x1b" not in told(examine(a_spec(path)), tokens=False)


# Writing


def test_what_is_written_is_in_the_format_it_came_in(tmp_path):
    """Columns that nobody reads, null values and other names stay; the evaluation set is written as it is."""
    rows = [{"question": f"{i}?", "better": f" {i}", "worse": " no", "id": None, "more": [{"a": i}]} for i in range(4)]
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    path = write(tmp_path / "a.jsonl", [*rows, rows[1], {"question": "x"}])
    held = write(tmp_path / "h.jsonl", [rows[0], rows[0]])
    sources = [Source(dataset_name=str(each), columns=columns) for each in (path, held)]
    spec = a_spec(path, train=(sources[0],), eval=sources[1], filters=(ExactDuplicates(),))
    manifest = write_clean(spec, tmp_path / "clean", command="c")
    read = lambda name: [json.loads(line) for line in (tmp_path / "clean" / name).read_text().splitlines()]  # noqa: E731
    assert read("train.jsonl") == rows
    assert read("eval.jsonl") == [rows[0], rows[0]]
    train, evaluated = manifest["files"]
    assert (train["rows_read"], train["rows_kept"], evaluated["rows_kept"]) == (6, 4, 2)
    assert train["left"] == [
        {"row": f"{path}, row 4", "why": "filter exact_duplicates: the same as an earlier row"},
        {"row": f"{path}, row 5", "why": "no chosen"},
    ]
    assert json.loads((tmp_path / "clean" / "manifest.json").read_text()) == manifest
    assert manifest["filters"] == [{"name": "exact_duplicates"}]


def test_nothing_is_left_of_a_write_that_fails(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [A, B])
    write_clean(a_spec(path), tmp_path / "clean")
    before = {each.name: each.read_bytes() for each in (tmp_path / "clean").iterdir()}
    monkeypatch.setattr("data.clean.versions", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_clean(a_spec(write(path, [A])), tmp_path / "clean")
    assert {each.name: each.read_bytes() for each in (tmp_path / "clean").iterdir()} == before
    assert [each for each in tmp_path.iterdir() if each.name.startswith(".clean")] == []


# Real data


def lines(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.slow
def test_hh_harmless(shared):
    """Against counts by other means: split transcripts, compare lengths, search."""
    path = shared / "data" / "hh_harmless.jsonl.gz"
    usable = []
    for row in lines(path):
        (first, a), (second, b) = (row[leg].rsplit("\n\nAssistant:", 1) for leg in ("chosen", "rejected"))
        if first == second and a.strip() and b.strip() and a.strip() != b.strip():
            usable.append((first, a, b))
    own = found(a_spec(path), near=False)
    assert own["dropped"].rows == 1800 - len(usable)
    longer = [1.0 if len(a) > len(b) else 0.5 if len(a) == len(b) else 0.0 for _, a, b in usable]
    bias = own["length_bias"]
    assert bias.n == len(usable)
    assert bias.value == pytest.approx(float(np.mean(longer)))
    assert bias.rows == longer.count(1.0)
    assert bias.verdict == "remark", "shorter wins, by little"
    assert own["exact_duplicates"].rows == len(usable) - len(set(usable))
    echoed = 0
    for first, a, b in usable:
        question = " ".join(first.rsplit("Human:", 1)[1].split())
        echoed += len(question) >= 12 and any(" ".join(text.split()).startswith(question) for text in (a, b))
    assert own["echo"].rows == echoed
    markup = re.compile(r"<(br|p|b|i|a|li|ul|div|pre|h[1-6])\b[^<>]*>|&(amp|lt|gt|quot);")
    assert own["html"].rows == sum(bool(markup.search(" ".join(row))) for row in usable)


@pytest.mark.slow
def test_alpaca_eval_scored(shared):
    path = shared / "data" / "alpaca_eval_scored.jsonl.gz"
    rows = lines(path)
    own = found(a_spec(path), near=False)
    values = sorted(each["score"] for row in rows for each in row["responses"] if each["text"].strip())
    assert own["scores"].n == len(values)
    assert own["scores"].value == pytest.approx(float(np.median(values)))
    assert own["formats"].n + own["dropped"].rows == len(rows) == 600


@pytest.mark.slow
def test_a_million_rows_would_fit(tmp_path):
    """What is kept of a row is about a hundred bytes, whatever it holds."""
    from tests.data.planted import survey

    rows = survey(write(tmp_path / "a.jsonl", pairs(2000))).traits
    size = sum(getattr(rows, name).nbytes for name in rows.__dataclass_fields__)
    assert size / 2000 < 150


def test_length_ratio_mends_the_bias(tmp_path):
    rows = [*pairs(20), *({**row, "chosen": row["chosen"] * 6} for row in pairs(20, seed=3))]
    path = write(tmp_path / "a.jsonl", rows)
    assert found(a_spec(path))["length_bias"].verdict == "warning"
    assert found(a_spec(path, filters=(LengthRatio(),)))["length_bias"].verdict == "fine"
