"""Every engine gives the trajectory of one process: DDP, ZeRO-1, ZeRO-2, ZeRO-3 and FSDP2, on two CPU processes.

Tolerance: all computes in float32. Two processes add their gradients in another order than one process adds its
microbatches, which leaves relative differences of 1e-7 a step; AdamW divides by the root of the second moment, so that
a weight whose gradient is nearly zero may move differently by as much as the learning rate. Twenty steps at 1e-3 carry
that to 1e-5 in losses; a wrong factor, a lost microbatch or a count per process is off by a tenth and more.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from align import export, support
from align.recipe import read_recipe
from tests.equivalence.runs import write_rows
from tests.equivalence.test_resume import same_lines
from tests.equivalence.worlds import WORDS, save_model
from tests.support import REPOSITORY

TOLERANCE = {"rtol": 3e-4, "atol": 3e-5}
ROUNDED_TOLERANCE = {"rtol": 3e-2, "atol": 3e-2}
"""In bfloat16, which has three digits, and where engines keep other things in it."""
WEIGHTS = 2e-4
"""How far a weight may be off after twenty steps at a learning rate of 1e-3."""
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--main_process_port=0")
IN_TURN = "tests.equivalence.in_turn"
ENGINES = ("cpu_ddp", "cpu_zero1", "cpu_zero2", "cpu_zero3", "cpu_fsdp2")
KEYS = {
    "rows_per_step": 7,  # does not divide by two processes, nor the rows by it: bins and the last step are uneven
    "token_budget": 260,  # a few rows: several microbatches a step
    "max_steps": 20,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "eval_share": 0.2,
}
OBJECTIVES = {
    "dpo": '[{"name":"dpo","beta":0.5},{"name":"sft","leg":"chosen","weight":0.5}]',
    "tpo": '[{"name":"tpo","beta":0.5}]',
    "bco": '[{"name":"bco","beta":0.5,"prompt_encoder":"policy"}]',
    "kto": '[{"name":"kto","beta":0.5}]',
    "sft": '[{"name":"sft","leg":"gold"}]',
    "aot": '[{"name":"aot","beta":0.5}]',
    "tdpo": '[{"name":"tdpo","beta":0.5}]',
    "bradley_terry": '[{"name":"bradley_terry"}]',
}
MOVING = '--modifiers=[{"name":"tr_dpo","sync_steps":5,"sync_alpha":0.5}]'
QUANTIZED, ROUNDED = "--model.load_in_4bit=true", "--model.dtype=bfloat16"
AVERAGED = '--regularizers=[{"name":"wise_ft"}]'
PENALISED = '--regularizers=[{"name":"l2_init","coef":10.0}]'
WEIGHTED = '--token_weights=[{"name":"goldfish","k":3,"legs":["gold"]},{"name":"talr","legs":["gold"]}]'


@dataclass(frozen=True, kw_only=True)
class Case:
    """One recipe, on a model of one kind."""

    objective: str
    lora: bool = False
    source: str = "cached"
    model: str = "tied"
    more: tuple[str, ...] = ()
    logits_per_chunk: int | None = None
    resumes_at: int = 0
    """Step at which a copy of the case with ``more`` but for its last word crashes, and goes on; 0 for a whole run."""

    @property
    def name(self) -> str:
        """Of its folder."""
        kind = "lora" if self.lora else "full"
        return "-".join(
            [self.objective, kind, self.source, self.model, *("".join(filter(str.isalnum, m)) for m in self.more)]
        )

    @property
    def straight(self) -> Case:
        """The run that never stopped."""
        return replace(self, more=self.more[:-1], resumes_at=0) if self.resumes_at else self

    def words(self, folder: Path, output: Path) -> list[str]:
        """Of the command line."""
        words = [f"--objective={OBJECTIVES[self.objective]}", f"--model_name_or_path={folder / self.model}"]
        words += [f"--dataset_name={folder / 'rows.jsonl'}", f"--output_dir={output}"]
        words += [f"--{key}={value}" for key, value in KEYS.items()]
        words += ["--lora.r=4", "--lora.lora_alpha=8"] if self.lora else []
        words += [f"--reference.source={self.source}"] if self.objective not in ("sft", "tpo", "bradley_terry") else []
        return [*words, *([WEIGHTED] if self.objective == "sft" else []), *self.more]


SAVES, AGAIN = ("--save_strategy=steps", "--save_steps=8", "--save_total_limit=3"), "--resume_from_checkpoint=last"
LATER = "--async_save=true"
STANDARD = (
    # Five positions a chunk, so that processes have different numbers of them.
    Case(objective="dpo", logits_per_chunk=1500, more=SAVES),
    Case(objective="bco", lora=True, model="untied", more=(*SAVES, LATER)),
    Case(objective="dpo", logits_per_chunk=1500, more=(*SAVES, AGAIN), resumes_at=8),
    Case(objective="bco", lora=True, model="untied", more=(*SAVES, LATER, AGAIN), resumes_at=16),
)
"""What ``make test`` asks of every engine."""
CHECKPOINTING, ONE_ROW = "--gradient_checkpointing=true", "--rows_per_step=1"
COVER = (
    Case(objective="dpo", lora=True, source="adapter_off", more=(CHECKPOINTING,)),
    Case(objective="dpo", source="live", model="untied"),
    Case(objective="tpo", model="untied", more=(CHECKPOINTING,), logits_per_chunk=1500),
    Case(objective="tpo", lora=True, more=(ONE_ROW,)),
    Case(objective="bco", source="live", more=(CHECKPOINTING,)),
    Case(objective="kto", lora=True, source="live", logits_per_chunk=1500),
    Case(objective="kto", model="untied", more=(ONE_ROW,)),
    Case(objective="kto", lora=True, source="adapter_off", model="untied"),
    Case(objective="sft", more=(CHECKPOINTING,), logits_per_chunk=1500),
    Case(objective="sft", lora=True, model="untied"),
    Case(objective="aot", source="live", more=(CHECKPOINTING,), logits_per_chunk=1500),
    Case(objective="aot", lora=True, source="adapter_off", model="untied"),
    Case(objective="aot", model="untied"),
    Case(objective="bco", lora=True, source="adapter_off", logits_per_chunk=1500),
    Case(objective="tdpo", source="live", model="untied"),
    Case(objective="dpo", source="live", more=(MOVING,)),
    Case(objective="dpo", more=(AVERAGED,)),
    Case(objective="dpo", more=(PENALISED,)),
    Case(objective="dpo", lora=True, model="wide", more=(QUANTIZED,)),
    Case(objective="dpo", more=(ROUNDED,)),
    Case(objective="dpo", lora=True, more=(ROUNDED,)),
    Case(objective="bradley_terry", lora=True),
)
"""Pairs of everything else, for ``make test-all``. With one row a step the other process has an empty bin."""


def save_rows(path: Path, number: int = 48) -> Path:
    """Pairs with a gold response, of unequal lengths."""
    rng = random.Random(0)

    def sentence() -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 9)))

    return write_rows(
        path,
        [
            {
                "prompt": f"{i} {sentence()}:", "chosen": f" {sentence()}.", "rejected": f" {sentence()}!",
                "gold": f" {sentence()};",
            }
            for i in range(number)
        ],
    )  # fmt: skip


def launch(folder: Path, engine: str, cases: tuple[Case, ...], which: str = "standard") -> Path:
    """Runs the cases in turn; their runs are in the folder that is returned."""
    runs = folder / f"{which}-{engine}"
    runs.mkdir()
    listed = [
        {
            "name": case.name, "words": case.words(folder, runs / case.name),
            "cache": str(runs / f"cache-{case.straight.name}"),
            "logits_per_chunk": case.logits_per_chunk,
            "crashed": case.resumes_at
            and {"run": str(runs / case.straight.name), "copy": str(runs / case.name), "step": case.resumes_at},
        }
        for case in cases
    ]  # fmt: skip
    (runs / "cases.json").write_text(json.dumps(listed))
    done = subprocess.run(
        [*LAUNCH, f"--config_file=launch/accelerate/{engine}.yaml", "-m", IN_TURN, str(runs / "cases.json")],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    for case in cases:
        for rank in range(1 if engine == "single" else 2):
            found = json.loads((runs / f"{case.name}.{rank}.json").read_text())
            said = [line for line in done.stderr.splitlines() if "error:" in line]
            assert found == {"status": 0, "processes": 1 if engine == "single" else 2}, (case, said)
    return runs


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path, case: Case) -> dict[str, torch.Tensor]:
    if case.lora:
        return load_file(run / "adapter_model.safetensors")
    # Engines write tied weights once or twice: what counts is what is read.
    return AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32).state_dict()


def compare(case: Case, found: Path, wanted: Path) -> None:
    """Metrics of every step and the weights at the end."""
    tolerance = ROUNDED_TOLERANCE if ROUNDED in case.more else TOLERANCE
    mine, one = lines(found / case.name), lines(wanted / case.name)
    assert len(one) > 20
    assert [line["step"] for line in mine] == [line["step"] for line in one]
    for a, b in zip(mine, one, strict=True):
        assert a.keys() == b.keys()
        for key in b:
            counted = ROUNDED in case.more and ("accurac" in key or "ranking" in key)  # ties fall either way
            if not key.startswith("time/") and not counted:
                message = f"{case.name}, step {b['step']}, {key}"
                np.testing.assert_allclose(a[key], b[key], err_msg=message, **tolerance)
    if ROUNDED in case.more:
        return
    own, others = weights(found / case.name, case), weights(wanted / case.name, case)
    assert own.keys() == others.keys()
    for name, tensor in others.items():
        torch.testing.assert_close(
            own[name].float(), tensor.float(), rtol=0, atol=WEIGHTS, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    save_model(folder / "tied", tie_word_embeddings=True)
    save_model(folder / "untied", tie_word_embeddings=False)
    save_model(folder / "wide", hidden_size=64, intermediate_size=128)  # bitsandbytes packs rows of 64 on CPUs
    save_rows(folder / "rows.jsonl")
    return folder


@pytest.fixture(scope="module")
def one(world: Path) -> Path:
    return launch(world, "single", STANDARD)


@pytest.fixture(scope="module")
def one_of_all(world: Path) -> Path:
    return launch(world, "single", COVER, "all")


@pytest.mark.all
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_equal_one_process_in_every_combination(engine: str, world: Path, one_of_all: Path):
    recipes = {case: read_recipe(None, case.words(world, world / "none")) for case in COVER}
    cases = tuple(
        case for case, recipe in recipes.items() if support.reason(recipe, engine.removeprefix("cpu_")) is None
    )
    assert len(COVER) - len(cases) < 3
    found = launch(world, engine, cases, "all")
    for case in cases:
        compare(case, found, one_of_all)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_equal_one_process(engine: str, world: Path, one: Path):
    found = launch(world, engine, STANDARD)
    for case in STANDARD:
        compare(case, found, one)
        if case.resumes_at:
            exactly_the_same(found / case.name, found / case.straight.name, case)
    for case in STANDARD[:2]:
        checkpoint = found / case.name / "checkpoint-20"
        assert export.main([str(checkpoint), str(checkpoint / "exported")]) == 0
        exported, trained = weights(checkpoint / "exported", case), weights(found / case.name, case)
        assert exported.keys() == trained.keys()
        assert all(torch.equal(exported[name], tensor) for name, tensor in trained.items())


def exactly_the_same(resumed: Path, straight: Path, case: Case) -> None:
    """Bit for bit: what is stored is all there is to know."""
    same_lines(resumed, straight)
    others = weights(straight, case)
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights(resumed, case).items())
