"""What is said to go together does, and what is not is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from align import support
from align.recipe import read_recipe
from align.train import main
from launch import support_page
from tests.equivalence.test_engines import COVER, ENGINES, STANDARD
from tests.equivalence.test_resume import command


@pytest.mark.slow
def test_the_page_is_up_to_date():
    assert support_page.PAGE.read_text(encoding="utf-8") == support_page.page()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_what_engines_are_tested_with_is_supported(engine: str, tmp_path: Path):
    refused = [
        case.name
        for case in (*STANDARD, *COVER)
        if support.reason(read_recipe(None, case.words(tmp_path, tmp_path / "run")), engine.removeprefix("cpu_"))
    ]
    assert len(refused) <= 2, refused


@pytest.mark.parametrize(
    ("environment", "words", "says"),
    [
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
            [],
            ["launched with fsdp1", "set fsdp_version: 2"],
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
            ['--regularizers=[{"name":"l2_init"}]'],
            ["launched with zero2", "which DeepSpeed has used up", "fsdp2.yaml"],
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
            ["--lora.r=4", "--load_in_4bit"],
            ["launched with fsdp2", "quantized weights can't be divided", "zero2.yaml"],
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            ["--optim=adamw_8bit"],
            ["launched with zero3", "blocks of 8 bits", "adamw_torch_fused"],
        ),
        ({}, ["--load_in_4bit"], ["load_in_4bit and load_in_8bit freeze weights and need a lora section"]),
        ({}, ["--load_in_4bit", "--load_in_8bit", "--lora.r=4"], ["exclude each other"]),
        ({}, ["--bnb_4bit_quant_type=fp4"], ["model.bnb_4bit_quant_type has no effect: model.load_in_4bit is false"]),
    ],
    ids=["fsdp1", "zero-penalty", "fsdp-4bit", "zero-8bit-adam", "4bit-full", "4-and-8", "idle"],
)
def test_what_is_not_in_the_table_is_refused_at_the_start(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environment: dict[str, str],
    words: list[str],
    says: list[str],
):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert main(command(folder, "run", *words)) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert all(part in error for part in says), error
    assert not (folder / "run").exists()
