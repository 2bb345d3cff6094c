"""One reference, three sources: the same numbers, and a cache that is found exactly when it may be."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from align import build, logps_store
from align import model as models
from align.checks import Check
from align.logps_store import LogpsStore, StoredLogps, response_keys
from align.reference import ReferenceKey, find_cached
from align.train import main
from data.store import Ragged, TokenTable
from tests.equivalence.runs import built, recipe_for
from tests.equivalence.test_resume import KEYS, after_a_crash, command, lines
from tests.equivalence.worlds import save_model

# The reference is computed in bins of other shapes than the policy's: float32 sums in another order.
FLOAT32_TRAJECTORY = {"rtol": 1e-4, "atol": 2e-5}

RECIPES = Path(__file__).resolve().parents[2] / "launch" / "recipes"

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("plain_runs")]


def same_numbers(first: Path, second: Path) -> None:
    for a, b in zip(lines(first), lines(second), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            # Shares of responses that moved by nothing at all are decided by rounding at step 0.
            if not (a["step"] == 0 and key.startswith(("eval/displacement", "eval/rewards"))):
                np.testing.assert_allclose(a[key], b[key], err_msg=f"{a['step']} {key}", **FLOAT32_TRAJECTORY)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["--reference.source=cached"], ["--reference.source=live"]),
        (["--lora.r=4", "--reference.source=cached"], ["--lora.r=4", "--reference.source=adapter_off"]),
        (["--lora.r=4", "--reference.source=cached"], ["--lora.r=4", "--reference.source=live"]),
        (["--lora.r=4", "--reference.model=base"], ["--lora.r=4", "--reference.model=initial"]),
    ],
    ids=["full-live", "lora-adapter-off", "lora-live", "base-is-initial"],
)
def test_sources_agree(folder: Path, one: list[str], other: list[str]):
    assert main(command(folder, "one", *one)) == 0
    assert main(command(folder, "other", *other)) == 0
    same_numbers(folder / "one", folder / "other")
    assert lines(folder / "one")[-1]["eval/loss"] < 0.69


def test_another_model_as_reference(folder: Path):
    """A named reference gives the same cached and live, and no log 2 at step 0."""
    save_model(folder / "other", seed=5)
    for name, source in (("cached", "cached"), ("live", "live")):
        keys = [f"--reference.model={folder / 'other'}", f"--reference.source={source}"]
        assert main(command(folder, name, *keys)) == 0
    same_numbers(folder / "cached", folder / "live")
    assert abs(lines(folder / "cached")[0]["eval/loss"] - 0.693147) > 1e-3


def test_an_adapter_to_go_on_from_is_its_own_reference(folder: Path):
    """initial means the policy as it starts, adapter included; base means the model under it."""
    assert main(command(folder, "first", "--lora.r=4")) == 0
    adapter = f"--adapter_name_or_path={folder / 'first'}"
    assert main(command(folder, "second", adapter)) == 0
    assert lines(folder / "second")[0]["eval/loss"] == pytest.approx(0.693147, abs=1e-5)
    assert main(command(folder, "third", adapter, "--reference.model=base")) == 0
    first = lines(folder / "first")[-1]
    assert lines(folder / "third")[0]["eval/loss"] == pytest.approx(first["eval/loss"], abs=1e-5)


def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the bins that reference passes compute."""
    from align import reference

    computed: list[int] = []
    original = reference._score_bin

    def counting(batches, scorer, rows):
        computed.append(len(rows))
        return original(batches, scorer, rows)

    monkeypatch.setattr(reference, "_score_bin", counting)
    return computed


@pytest.mark.parametrize(
    "change",
    [
        "--learning_rate=0.5",
        "--objective.beta=0.9",
        "--rows_per_step=4",
        "--weight_decay=0.1",
        "--token_budget=900",
    ],
)
def test_a_sweep_reads_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch, change: str):
    """What a log-prob does not depend on is not in its key: a few rows are verified, none is computed anew."""
    assert main(command(folder, "one")) == 0
    computed = forwards(monkeypatch)
    key = change.removeprefix("--").split("=")[0].split(".")[-1]
    assert main(command(folder, "two", change, **{key: None})) == 0
    assert sum(computed) <= 8  # four of either split


def key_of(folder: Path, *keys: str) -> tuple[str, list[str]]:
    """Where a run with these keys looks: the folder of the reference, and the keys of its rows there, in any order."""
    recipe = recipe_for(folder, folder / "model", folder / "pairs.jsonl", *keys)
    run = built(recipe)
    assert run.startup.key is not None
    table = run.trainer.batches.table
    of_rows = [np.sort(response_keys(table.prompts, leg), axis=0).tobytes().hex() for leg in table.legs.values()]
    return str(run.startup.key.folder), of_rows


def other_weights(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    save_model(folder / "model", seed=1)  # in place
    return []


def an_adapter(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    assert main(command(folder, "trained", "--lora.r=4")) == 0
    return ["--adapter_name_or_path", str(folder / "trained")]


def other_rows(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    rows = folder / "pairs.jsonl"
    rows.write_text(rows.read_text().replace("cat", "dog"))
    return []


def other_template(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    (folder / "template.jinja").write_text("{% for message in messages %}{{ message['content'] }}\n{% endfor %}")
    return ["--as_chat", "true", "--chat_template", str(folder / "template.jinja")]


def other_tokenizer(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """In which two letters have each other's numbers."""
    shutil.copytree(folder / "model", folder / "tokenizer")
    path = folder / "tokenizer" / "tokenizer.json"
    stored = json.loads(path.read_text())
    vocabulary = stored["model"]["vocab"]
    vocabulary["a"], vocabulary["t"] = vocabulary["t"], vocabulary["a"]
    path.write_text(json.dumps(stored))
    return ["--tokenizer_name_or_path", str(folder / "tokenizer")]


def separate_path(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    def separate(*_: object) -> tuple[bool, Check]:
        return False, Check(check="responses share their prompt", passed=True, detail="not wanted")

    patch.setattr(build, "choose_path", separate)
    return []


def keys(*words: str) -> Callable[[Path, pytest.MonkeyPatch], list[str]]:
    return lambda folder, patch: list(words)


OF_THE_REFERENCE, OF_ROWS = (True, False), (False, True)
INGREDIENTS = {
    "weights": (other_weights, OF_THE_REFERENCE),
    "adapter": (an_adapter, OF_THE_REFERENCE),
    "dtype": (keys("--dtype", "bfloat16"), OF_THE_REFERENCE),
    "kernel": (keys("--attn_implementation", "eager"), OF_THE_REFERENCE),
    "path": (separate_path, OF_THE_REFERENCE),
    "rows": (other_rows, OF_ROWS),
    "truncation": (keys("--max_length", "45"), OF_ROWS),
    "chat": (keys("--as_chat", "true"), OF_ROWS),
    "template": (other_template, OF_ROWS),
    "tokenizer": (other_tokenizer, OF_ROWS),
    "neither": (keys("--seed", "7", "--learning_rate", "0.1"), (False, False)),
}
"""What changes an ingredient and gives the keys that go with it, and which part of the key it changes."""


@pytest.mark.parametrize(("change", "parts"), INGREDIENTS.values(), ids=INGREDIENTS)
def test_every_ingredient_of_the_key_changes_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[..., list[str]], parts: tuple[bool, bool]
):
    before = key_of(folder, *(["--as_chat", "true"] if change is other_template else []))
    after = key_of(folder, *change(folder, monkeypatch))
    assert tuple(one != other for one, other in zip(before, after, strict=True)) == parts


def test_an_adapter_that_does_nothing_yet_has_its_base_s_key(folder: Path):
    full = key_of(folder)
    assert key_of(folder, "--lora.r", "4") == full
    assert key_of(folder, "--lora.r", "4", "--seed", "9") == full


def test_an_interrupted_pass_goes_on_where_it_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from align import startup

    original = startup.fill_cache

    def dies(*arguments):
        seen = []

        def stop(done: int, total: int) -> None:
            seen.append(done)
            if done < total:
                raise KeyboardInterrupt

        original(*arguments[:5], stop, 1)

    monkeypatch.setattr(startup, "fill_cache", dies)
    assert main(command(folder, "run")) == 130
    monkeypatch.setattr(startup, "fill_cache", original)
    computed = forwards(monkeypatch)
    assert main(command(folder, "run", "--overwrite_output_dir")) == 0
    assert 0 < sum(computed) < 48
    monkeypatch.setenv("ALIGN_CACHE", str(folder / "fresh"))
    assert main(command(folder, "fresh-run")) == 0
    same_numbers(folder / "run", folder / "fresh-run")


def a_table(*rows: tuple[list[int], list[int], list[int]]) -> TokenTable:
    prompts, chosen, rejected = zip(*rows, strict=True)
    return TokenTable(Ragged.of(prompts), {"chosen": Ragged.of(chosen), "rejected": Ragged.of(rejected)})


def test_damaged_parts_are_computed_again(tmp_path: Path):
    table = a_table(([7], [1, 2, 3], [9]), ([7], [4], [9]), ([8], [5, 6], [9]))
    stored, store = StoredLogps.of(table, "chosen"), LogpsStore(tmp_path)
    store.write(stored.keys[[0, 2]], np.array([3, 2]), np.array([-1, -2, -3, -4, -5], dtype=np.float32))
    again = StoredLogps.of(table, "chosen")
    store.fill([again])
    assert again.done.tolist() == [True, False, True]
    assert again.ragged()[2].tolist() == [-4, -5]
    part = next(tmp_path.glob("part-*.safetensors"))
    part.write_bytes(part.read_bytes()[:-3])
    again = StoredLogps.of(table, "chosen")
    store.fill([again])
    assert not again.done.any()
    assert not part.exists()


@pytest.mark.parametrize("name", ["keys", "values"])
def test_parts_of_a_disk_that_fails_for_a_moment_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """They were deleted as damaged; and one that another process deleted between two readings ended the run."""
    table = a_table(([7], [1, 2, 3], [9]))
    stored, store = StoredLogps.of(table, "chosen"), LogpsStore(tmp_path)
    store.write(stored.keys, np.array([3]), np.array([-1, -2, -3], dtype=np.float32))
    read, readings = logps_store._read, []

    def fails(path: Path, wanted: str) -> np.ndarray:
        readings.append(wanted)
        # Values are read when the part is looked at and again when they are taken.
        if wanted == name and (name == "keys" or readings.count(name) == 2):
            raise OSError(errno.EIO, "Input/output error")
        return read(path, wanted)

    monkeypatch.setattr(logps_store, "_read", fails)
    store.fill([stored])
    assert not stored.done.any()
    monkeypatch.undo()
    store.fill([stored])
    assert stored.done.all()


def test_the_key_of_a_response_sees_its_prompt_and_where_it_ends():
    """And nothing else: neither the other responses, nor the row's place, nor the type that ids are stored in."""
    table = a_table(([1, 2], [3], [4]), ([1], [2, 3], [4]), ([1, 2], [3], [5]), ([1, 2, 3], [4], [4]))
    keys = [bytes(key) for key in response_keys(table.prompts, table.legs["chosen"])]
    assert keys[0] == keys[2]
    assert len(set(keys)) == 3
    wide = Ragged(table.prompts.values.astype(np.int64), table.prompts.offsets)
    assert np.array_equal(response_keys(wide, table.legs["chosen"]), response_keys(table.prompts, table.legs["chosen"]))


def test_responses_are_found_whatever_table_they_come_in(tmp_path: Path):
    """Rows in another order, on another leg, with other rows between; not with another prompt or boundary."""
    store = LogpsStore(tmp_path)
    first = a_table(([7, 8], [1, 2], [3]), ([7], [8, 1], [3, 4]))
    for number, leg in enumerate(first.legs):
        stored = StoredLogps.of(first, leg)
        values = np.arange(len(stored.values), dtype=np.float32) - 10 * number
        store.write(stored.keys, np.diff(stored.offsets), values)
    second = a_table(([7], [3, 4], [1]), ([7, 8], [3], [1, 2]), ([7], [8, 1, 2], [8, 1]), ([9], [1, 2], [3]))
    found = {leg: StoredLogps.of(second, leg) for leg in second.legs}
    store.fill(found.values())
    assert found["chosen"].done.tolist() == [True, True, False, False]
    assert found["rejected"].done.tolist() == [False, True, True, False]
    assert found["chosen"].ragged()[0].tolist() == [-9, -8]
    assert found["chosen"].ragged()[1].tolist() == [-10]
    assert found["rejected"].ragged()[1].tolist() == [0, 1]
    assert found["rejected"].ragged()[2].tolist() == [2, 3]


def test_a_row_that_is_there_twice_is_computed_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    computed = forwards(monkeypatch)
    rows = (folder / "pairs.jsonl").read_text().splitlines()
    (folder / "pairs.jsonl").write_text("\n".join([*rows, *rows[:20]]) + "\n")
    assert main(command(folder, "run", eval_share=0)) == 0
    assert sum(computed) == 48


def test_a_subset_or_another_split_computes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Also under another objective with the same responses: each is found by what it is."""
    assert main(command(folder, "one")) == 0
    computed = forwards(monkeypatch)
    changes = (["--max_rows=30"], ["--eval_share=0.3", "--seed=7"], ["--objective=kto", "--beta=0.2"])
    for number, words in enumerate(changes):
        assert main(command(folder, f"other{number}", *words, **({"eval_share": None} if number == 1 else {}))) == 0
    mismatched = 48  # which KTO draws, and nobody has scored
    assert sum(computed) <= 8 * len(changes) + 2 * mismatched


SWEEP = ("dpo", "ipo", "apo_zero", "cal_dpo", "discopop", "dpop", "exo", "hinge", "robust", "sppo")


def test_ten_recipes_over_one_dataset_compute_the_reference_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """As they are shipped, each with its own objective, learning rate and schedule."""
    computed = forwards(monkeypatch)
    for name in SWEEP:
        own = dict.fromkeys(KEYS, None) | {"eval_share": 0.2, "rows_per_step": 24}
        words = [word for word in command(folder, name, **own) if "objective" not in word]
        assert main(["--config", str(RECIPES / f"{name}.yaml"), *words]) == 0
        assert json.loads((folder / name / "results.json").read_text())
    verified = 8 * len(SWEEP)  # four rows of either split, in every run
    assert 48 <= sum(computed) <= 48 + verified


def shift(folder: Path, nats: float) -> None:
    """What another model could have left under this one's key."""
    for part in (folder / "cache" / "reference").rglob("part-*.safetensors"):
        arrays = load_file(part)
        save_file(arrays | {"values": arrays["values"] - np.float32(nats)}, part)


def refused(folder: Path, said: str) -> str:
    """The rest of the sentence, which begins with what differs."""
    (told,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert f"delete {folder / 'cache' / 'reference'}/" in told
    return told.removeprefix("error: cached reference log-probs differ from the reference ")


@pytest.mark.parametrize("found", [["--max_rows=48"], ["--max_rows=30"]], ids=["all", "some"])
def test_a_cache_that_disagrees_with_its_reference_stops_the_run(
    folder: Path, capsys: pytest.CaptureFixture, found: list[str]
):
    """Also where it has some of the rows only: what was found there used to be trusted."""
    assert main(command(folder, "one", *found)) == 0
    shift(folder, 1)
    assert main(command(folder, "two")) == 2
    assert refused(folder, capsys.readouterr().err).startswith("by 1 nats in a token")


def test_another_checkpoint_of_the_same_model_shows_on_average(folder: Path, capsys: pytest.CaptureFixture):
    """In bfloat16 single tokens may be off by a nat; all of them by a fifth is another model."""
    save_model(folder / "other", seed=5)
    keys = [f"--reference.model={folder / 'other'}", "--dtype=bfloat16"]
    for name in ("one", "two"):
        assert main(command(folder, name, *keys)) == 0
    shift(folder, 0.2)
    assert main(command(folder, "three", *keys)) == 2
    assert "by 0.2 on average" in refused(folder, capsys.readouterr().err)


@pytest.mark.parametrize("reference", ["adapter-off", "other"])
def test_a_resumed_run_verifies_where_it_can(folder: Path, capsys: pytest.CaptureFixture, reference: str):
    """It can with an adapter to switch off, or another model that is there anyway; a policy that moved on can't."""
    save_model(folder / "other", seed=5)
    keys = ["--lora.r=4"] if reference == "adapter-off" else [f"--reference.model={folder / 'other'}"]
    assert main(command(folder, "run", *keys)) == 0
    after_a_crash(folder / "run", step=5)
    shift(folder, 1)
    assert main(command(folder, "run", *keys, "--resume_from_checkpoint=last")) == 2
    assert refused(folder, capsys.readouterr().err).startswith("by 1 nats in a token")


def test_no_second_model_is_loaded_for_the_initial_policy(folder: Path, monkeypatch: pytest.MonkeyPatch):
    loaded = []
    original = models.load_weights
    monkeypatch.setattr(models, "load_weights", lambda *a, **k: loaded.append(1) or original(*a, **k))
    assert main(command(folder, "one")) == 0
    assert len(loaded) == 1


def test_cached_values_equal_the_plain_model(folder: Path):
    """Brute force: the reference's own forward, sequence by sequence."""
    assert main(command(folder, "run", eval_share=0)) == 0
    recipe = recipe_for(folder, folder / "model", folder / "pairs.jsonl")
    run = built(recipe)
    table = run.trainer.batches.table
    assert isinstance(run.startup.key, ReferenceKey)
    stored = find_cached(run.startup.key, table)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    for leg, logps in stored.items():
        assert logps.done.all()
        for row in (0, 7, 47):
            ids = torch.from_numpy(np.concatenate([table.prompts[row], table.legs[leg][row]])).long()[None]
            start = len(table.prompts[row])
            with torch.no_grad():
                scored = torch.log_softmax(model(input_ids=ids).logits[0, start - 1 : -1], -1)
            wanted = scored.gather(-1, ids[0, start:, None])[:, 0].numpy()
            np.testing.assert_allclose(logps.ragged()[row], wanted, rtol=1e-4, atol=1e-5)
    assert json.loads((folder / "run" / "checks.json").read_text())[0]["passed"]
