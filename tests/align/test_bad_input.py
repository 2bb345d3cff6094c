"""What a user gets wrong: one sentence each, naming the key, file or row and the way out, before the model is loaded
wherever that is possible.

Every case runs ``align.train.main`` in a folder with a model (``./model``), pairs (``rows.jsonl``) and, where it asks
for one, a finished run with checkpoints (``run``).
"""

from __future__ import annotations

import dataclasses
import errno
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer

from align import model as models
from align import saving
from align.errors import RecipeError
from align.keys import NAMED
from align.recipe import read_recipe
from align.sections import SECTIONS
from align.train import main
from align.trainer import ObjectiveTrainer
from objectives.registry import defaults
from tests.align.bad_input.case import BASE, Case, change_weights, recipe, write
from tests.align.bad_input.files import DATA, MODELS, OUTPUT, RESUME
from tests.align.bad_input.parts import MODIFIERS, PARTS, REFERENCES, REGULARIZERS, REWARD_MODELS
from tests.align.bad_input.ranges import RANGES
from tests.align.bad_input.recipes import CONTRADICTIONS, NAMES, OBJECTIVES, RECIPES, TRL, VALUES
from tests.align.bad_input.shapes import SHAPES
from tests.align.runs import pairs, tiny_model, write_rows
from tests.support import REPOSITORY

TABLE = {
    "recipe": RECIPES,
    "objective": OBJECTIVES,
    "trl": TRL,
    "value": VALUES,
    "contradiction": CONTRADICTIONS,
    "name": NAMES,
    "data": DATA,
    "model": MODELS,
    "output": OUTPUT,
    "resume": RESUME,
    "parts": PARTS,
    "modifier": MODIFIERS,
    "reference": REFERENCES,
    "regularizer": REGULARIZERS,
    "reward model": REWARD_MODELS,
    "range": RANGES,
    "shapes": SHAPES,
}


# ---- running them ----


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, rows, a cache and a finished run."""
    folder = tmp_path_factory.mktemp("template")
    tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl", pairs())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ALIGN_CACHE", str(folder / "cache"))
        assert main(command("--save_strategy epoch")) == 0
    assert {path.name for path in (folder / "run").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a copy of the template's model and rows, with the template's cache."""
    shutil.copytree(template / "model", tmp_path / "model")
    shutil.copy(template / "rows.jsonl", tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGN_CACHE", str(template / "cache"))
    monkeypatch.setattr("evals.hub.get_token", lambda: None)
    return tmp_path


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that were loaded."""
    seen: list[Any] = []
    original = models.load_weights

    def load(*args: Any, **kwargs: Any) -> Any:
        seen.append(None)  # counts as loaded even where loading fails
        seen[-1] = original(*args, **kwargs)
        return seen[-1]

    monkeypatch.setattr(models, "load_weights", load)
    return seen


def command(words: str = "", file: str | None = None) -> list[str]:
    given = shlex.split(words)
    if file is not None:
        Path("recipe.yaml").write_text(file)
        return given if "--config" in given else ["--config", "recipe.yaml", *given]
    same = {"--objective.name": {"--objective.name", "--objective"}}
    base = [word for key, value in BASE.items() if not same.get(key, {key}) & set(given) for word in (key, value)]
    return [*base, *given]


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that says what is wrong."""
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0].removeprefix("error: ")


def assert_says(told: str, parts: list[str]) -> None:
    at = 0
    for part in parts:
        found = told.find(part, at)
        assert found >= 0, f"{part!r} is not in {told[at:]!r}"
        at = found + len(part)


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(c, id=f"{kind}: {c.name}") for kind, cs in TABLE.items() for c in cs])
def test_one_sentence(
    case: Case, folder: Path, template: Path, loaded: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    if case.trained:
        shutil.copytree(template / "run", "run")
    if isinstance(case.rows, list):
        write_rows(Path("rows.jsonl"), case.rows)
    elif case.rows is not None:
        write("rows.jsonl", case.rows)()
    case.arrange()
    assert main(command(case.words, case.file)) == 2
    assert_says(sentence(capsys), case.says)
    assert bool(loaded) == case.model_loaded


def test_the_table_is_long_enough() -> None:
    names = [(kind, case.name) for kind, cases in TABLE.items() for case in cases]
    assert len(names) == len(set(names)) >= 40


@pytest.mark.slow
def test_the_exit_status_reaches_the_shell(folder: Path) -> None:
    words = [sys.executable, str(REPOSITORY / "align" / "train.py"), *command("--lerning_rate 1e-6")]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == "error: unknown key --lerning_rate; did you mean 'learning_rate'?\n"


ODD = (
    *("", "null", "true", "nan", "-inf", "1e400", "-1", "0", "9" * 30, "1.5", "x", "[]", "[[1]]", "{}", "{a: [1]}"),
    *("${x}", "???", "2024-01-01", "'", "a: b: c", "!!python/object:x y", "\x00", "# c", "1:30", ">", "*", "@"),
)
KEYS = [
    *(f"{section}.{field.name}" for section, cls in SECTIONS.items() for field in dataclasses.fields(cls)),
    *("objective", "objective.name", "objective.beta", "objective.weight", "objective.0.beta", "objective.x.y"),
    *("lora", "data", "data.columns.prompt", "data.datasets.0.weight", "train.", ".", "", "train..seed"),
]


def refusal(words: list[str]) -> str:
    try:
        read_recipe(None, words)
    except RecipeError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_no_value_of_a_key_ends_in_a_traceback(key: str) -> None:
    base = [f"{name}={value}" for name, value in BASE.items() if not name.endswith(key.rpartition(".")[2] or "?")]
    assert not any("\n" in refusal([*base, f"--{key}={value}"]) for value in ODD)


NAMED_KEYS = [(kind, name) for kind, registry in NAMED.items() for name in registry.names()]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), NAMED_KEYS, ids=lambda each: each)
def test_no_value_of_an_entry_s_key_ends_in_a_traceback(kind: str, name: str) -> None:
    """Nor in a sentence that does not name the key, or the section where it is about several keys."""
    base = [f"{key}={value}" for key, value in BASE.items() if kind != "objective" or "objective" not in key]
    for key in defaults(NAMED[kind][name]):
        for value in ODD:
            told = refusal([*base, f"--{kind}={{name: {name}}}", f"--{kind}.{key}={value}"])
            assert "\n" not in told
            assert not told or kind in told, (key, value)


class Loads(Exception):  # noqa: N818  # no fault: the run went on
    """Raised in the place of loading a model."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "words", "note"),
    [
        (
            recipe("rows_per_step: 4", "num_train_epochs: 3"),
            "--max_steps 2",
            "train.num_train_epochs = 3 has no effect: train.max_steps decides",
        ),
        (
            recipe("save_strategy: 'no'", "save_steps: 3"),
            "--save_strategy epoch",
            "train.save_steps = 3 has no effect: train.save_strategy is not steps",
        ),
        (
            recipe("eval_share: 0", "eval_share: 0.2"),
            "--eval_dataset_name rows.jsonl",
            "data.eval_share = 0.2 has no effect: data.eval_dataset_name gives the eval set",
        ),
        (
            recipe("rows_per_step: 4", "warmup_steps: 2"),
            "--lr_scheduler_type constant",
            "train.warmup_steps = 2 has no effect: this train.lr_scheduler_type does not warm up",
        ),
        (
            recipe("name: dpo", "name: dpo, beta: 0.3"),
            "--objective sft --objective.leg chosen",
            "objective.beta = 0.3: sft has no such key",
        ),
        (
            recipe(more="reference: {model: initial}"),
            "--objective sft --objective.leg chosen",
            "reference has no effect: sft needs no reference model",
        ),
    ],
    ids=["max_steps", "save_strategy", "eval_dataset_name", "lr_scheduler_type", "objective", "reference"],
)
def test_a_key_that_the_command_line_makes_idle_is_told_and_the_run_goes_on(
    file: str, words: str, note: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise Loads

    monkeypatch.setattr(models, "load_weights", load)
    with pytest.raises(Loads):
        main(command(words, file))
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert notes[0].startswith(f"note: {note}")


def test_text_on_the_command_line_stays_text() -> None:
    """``--eos_token [END]`` was read as a list and ``--output_dir 7`` as a number."""
    read = read_recipe(None, command("--eos_token [END] --model_revision 1e5 --output_dir 7 --dataset_config null"))
    assert read.model.eos_token == "[END]"
    assert read.model.model_revision == "1e5"
    assert read.train.output_dir == "7"
    assert read.data.dataset_config is None


@pytest.mark.slow
def test_a_tracker_that_is_not_installed(
    folder: Path, loaded: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("align.assemble.get_available_reporting_integrations", list)
    assert main(command("--report_to wandb")) == 2
    assert_says(sentence(capsys), ["train.report_to: wandb is not installed", "leave it out"])
    assert not loaded


@pytest.mark.slow
def test_a_package_that_an_optimizer_lacks(
    folder: Path, loaded: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacking(*args: Any) -> Any:
        raise ImportError("You need to install `bitsandbytes`.")

    monkeypatch.setattr("align.assemble.Trainer.get_optimizer_cls_and_kwargs", lacking)
    assert main(command("--optim adamw_8bit")) == 2
    assert_says(sentence(capsys), ["train.optim adamw_8bit", "install `bitsandbytes`", "adamw_torch"])
    assert not loaded


# ---- disks ----


@pytest.mark.slow
def test_no_space_for_what_the_run_will_write(
    folder: Path, loaded: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert main(command("--save_strategy epoch")) == 2
    assert_says(sentence(capsys), ["run has 1000 bytes left", "need about", "choose another output_dir"])
    assert not loaded


def test_no_room_for_the_cache(
    folder: Path, loaded: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ALIGN_CACHE", "rows.jsonl/cache")
    assert main(command()) == 2
    assert_says(sentence(capsys), ["could not write rows.jsonl/cache", "Not a directory", "set ALIGN_CACHE"])
    assert not loaded


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        RuntimeError("basic_ios::clear: iostream error"),
    ],
    ids=["system", "safetensors", "torch", "torch at the end"],
)
def test_a_disk_that_fills_up_while_a_checkpoint_is_written(
    error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Former checkpoints stay, half a one does not, and the run can go on from them."""
    words = "--save_strategy steps --save_steps 1"
    save = torch.save

    def fill_up(what: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-3" in str(path):
            Path(path).write_bytes(b"half")
            raise error
        save(what, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fill_up)
        assert main(command(words)) == 2
    assert_says(sentence(capsys), ["no space left in run", "free some", "--resume_from_checkpoint last"])
    assert [path.name for path in saving.checkpoints(Path("run"))] == ["checkpoint-1", "checkpoint-2"]
    assert not Path("run", saving.PARTIAL).exists()
    assert not Path("run/checkpoint-3").exists()
    assert main(command(f"{words} --resume_from_checkpoint last")) == 0


@pytest.mark.slow
def test_a_disk_that_fills_up_at_the_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(ObjectiveTrainer, "save_model", full)
    assert main(command()) == 2
    assert_says(sentence(capsys), ["no space left in run", "free some", "start again with --overwrite_output_dir"])


@pytest.mark.slow
def test_overwriting_leaves_what_no_run_wrote(folder: Path, template: Path) -> None:
    """A former version deleted the whole folder."""
    shutil.copytree(template / "run", "run")
    Path("run/thesis.txt").write_text("mine")
    assert main(command("--overwrite_output_dir --max_steps 1", recipe())) == 0
    assert Path("run/thesis.txt").read_text() == "mine"
    assert saving.checkpoints(Path("run")) == []


# ---- losses that are no numbers ----

MARK = "\u00e9"
"""A letter of one row only, whose tokens can be poisoned."""


def poison(embedding: torch.Tensor) -> None:
    tokens = AutoTokenizer.from_pretrained("model")(MARK)["input_ids"]
    embedding[tokens] = torch.nan


def mark_row(row: int) -> None:
    rows = pairs()
    rows[row]["prompt"] += MARK
    write_rows(Path("rows.jsonl"), rows)


@pytest.mark.slow
def test_a_loss_that_is_no_number_names_the_row_and_updates_nothing(
    folder: Path, loaded: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mark_row(5)
    before: list[torch.Tensor] = []
    step = ObjectiveTrainer.training_step

    def poisoned_after_the_first(self: ObjectiveTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1:
            poison(loaded[0].get_input_embeddings().weight.data)
        before[:] = [parameter.detach().clone() for parameter in loaded[0].parameters()]
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ObjectiveTrainer, "training_step", poisoned_after_the_first)
    assert main(command("--learning_rate 1e-3")) == 2
    told = sentence(capsys)
    assert_says(told, ["the loss is nan at step", "in rows.jsonl, row 5; nothing was updated", "check these rows"])
    assert "row 4" not in told
    for stored, parameter in zip(before, loaded[0].parameters(), strict=True):
        torch.testing.assert_close(stored, parameter.data, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
def test_weights_that_fail_for_one_row_are_found_in_the_first_step(
    folder: Path, loaded: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    mark_row(5)
    change_weights(lambda weights: poison(weights["model.embed_tokens.weight"]))()
    assert main(command("--objective sft --objective.leg chosen --rows_per_step 8 --max_grad_norm 0")) == 2
    assert_says(sentence(capsys), ["the loss is nan", "rows.jsonl, row 5", "nothing was updated"])
    stored = load_file("model/model.safetensors")["lm_head.weight"]
    assert torch.equal(stored, loaded[0].lm_head.weight.data)


@pytest.mark.slow
def test_a_reference_that_is_no_number_names_the_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark_row(5)
    change_weights(lambda weights: poison(weights["model.embed_tokens.weight"]))()
    assert main(command()) == 2
    assert_says(sentence(capsys), ["the reference's log-probs", "'chosen'", "not finite in rows.jsonl, row 5", "leave"])
