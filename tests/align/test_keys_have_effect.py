"""No key of an objective, a token weight, a relabeler or a rule is accepted and ignored: each must change the weights
that come out of two steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align.train import main
from objectives import OBJECTIVES, RELABELERS, TOKEN_WEIGHTS
from objectives.registry import defaults
from tests.equivalence.runs import write_rows
from tests.equivalence.worlds import save_model, save_pairs

pytestmark = pytest.mark.slow

SFT = "--objective=sft"
BASES: dict[str, tuple[str, list[str]]] = {
    "dpo": ("pairs", ["--objective=dpo"]),
    "bco": ("labels", ["--objective=bco"]),
    # All rewards of the first step are zero, so the third is the first that a shift can move.
    "bco, three steps": ("labels", ["--objective=bco", "--max_steps=3"]),
    "bco, encoder": ("labels", ["--objective=bco", "--prompt_encoder=policy"]),
    "kto": ("labels", ["--objective=kto"]),
    "tpo": ("triples", ["--objective=tpo", "--objective.beta=1"]),
    "tpo_l": ("triples", ["--objective=tpo_l"]),
    "rpo": ("pairs", ["--objective=rpo", "--eta=0.5"]),
    "irpo": ("pairs", ["--objective=irpo"]),
    "sft": ("triples", [SFT]),
    "goldfish": ("triples", [SFT, "--token_weights=[{name: goldfish}]"]),
    "goldfish, static": ("triples", [SFT, "--token_weights=[{name: goldfish, strategy: static}]"]),
    "talr": ("triples", [SFT, "--token_weights=[{name: talr}]"]),
    "flow": ("triples", [SFT, "--token_weights=[{name: flow}]"]),
    "two legs": (
        "triples",
        [
            "--objective=[{name: sft}, {name: irpo}]",
            "--token_weights=[{name: goldfish, k: 2}, {name: talr}, {name: flow}]",
        ],
    ),
    "reward_augmented": ("scored pairs", ["--objective=dpo", "--as_chat", "--relabel=[{name: reward_augmented}]"]),
    "scored": ("scored", ["--objective=dpo"]),
    "scored, threshold": ("scored", ["--objective=dpo", "--rule=threshold", "--threshold=0.35"]),
}
"""Rows and keys of the runs that are compared with."""

CHANGES = [
    *[("bco", words) for words in ("--beta=1", "--prompt_encoder=policy")],
    ("bco, three steps", "--shift=balanced"),
    *[("bco, encoder", f"--{w}") for w in ("min_density_ratio=2", "max_density_ratio=0.5", "prompt_sample_size=2")],
    *[("kto", f"--{words}") for words in ("beta=1", "desirable_weight=3", "undesirable_weight=3")],
    *[("tpo", f"--{w}") for w in ("objective.beta=0.1", "alpha=0", "label_smoothing=0.4", "link=hinge", "link=ipo")],
    *[("tpo_l", f"--{words}") for words in ("beta=5", "gamma=0", "alpha=1", "label_smoothing=0.4")],
    *[("rpo", f"--{words}") for words in ("beta=1", "eta=0.1", "objective.form=average")],
    *[("irpo", f"--{words}") for words in ("beta=1", "alpha=0.1", "objective.form=sequence")],
    *[("dpo", "--beta=1"), ("dpo", "--label_smoothing=0.3"), ("sft", "--leg=chosen")],
    *[("goldfish", f"--{words}") for words in ("k=2", "h=3", "strategy=static")],
    ("goldfish, static", "--token_weights.0.start=2"),
    *[("talr", f"--{words}") for words in ("min_weight=0.9", "min_tau=50")],
    *[("two legs", f"--token_weights.{number}.legs=[gold]") for number in range(3)],
    *[("reward_augmented", f"--relabel.0.{w}") for w in ("form=text", "lowest=0", "highest=20", "decimals=0")],
    *[("sft", f"--token_weights={name}") for name in ("goldfish", "talr", "flow")],
    *[("scored", f"--{words}") for words in ("rule=best_vs_random", "margin=0.55")],
    ("scored", "--rule=margin --margin=0.2"),
    ("scored, threshold", "--threshold=0.75"),
]


def save_rows(folder: Path) -> None:
    """The same 24 prompts in every shape."""
    save_pairs(folder / "pairs.jsonl", number=24)
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    shapes: dict[str, Callable[[int, dict[str, Any]], dict[str, Any]]] = {
        "triples": lambda i, row: row | {"gold": f" {'so ' * (i % 5 + 2)}{i * i} it is, and what was there."},
        "scored pairs": lambda i, row: row | {"score_chosen": 5.4 + i / 10, "score_rejected": 1.7 + i / 10},
        "labels": lambda i, row: {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 3 < 2},
        "scored": lambda i, row: {
            "prompt": row["prompt"],
            "responses": [
                {"text": text, "score": score}
                for text, score in zip((row["chosen"], row["rejected"], " no.", f" {i}."), SCORES[i % 2], strict=True)
            ],
        },
    }
    for name, made in shapes.items():
        write_rows(folder / f"{name}.jsonl", [made(i, row) for i, row in enumerate(pairs)])


SCORES = [(0.9, 0.4, 0.5, 0.2), (0.8, 0.3, 0.6, 0.7)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, torch.Tensor]]:
    """Maps a base, and more words, to the weights that its run ends with; every run is made once."""
    folder = tmp_path_factory.mktemp("keys")
    save_model(folder / "model")
    save_rows(folder)
    found: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}

    def run(base: str, *more: str) -> dict[str, torch.Tensor]:
        if (base, *more) in found:
            return found[base, *more]
        rows, words = BASES[base]
        output = folder / f"run-{len(found)}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ALIGN_CACHE", str(folder / "cache"))
            status = main(
                [
                    *(f"--model_name_or_path={folder / 'model'}", f"--dataset_name={folder / rows}.jsonl"),
                    *(f"--output_dir={output}", "--max_steps=2", "--rows_per_step=24", "--token_budget=600"),
                    *("--learning_rate=1e-3", "--eval_share=0", "--save_strategy=no", *words, *more),
                ]
            )
        assert status == 0
        return found.setdefault((base, *more), load_file(output / "model.safetensors"))

    return run


@pytest.mark.parametrize(("base", "words"), CHANGES, ids=str)
def test_a_key_changes_the_weights(base: str, words: str, weights: Callable[..., dict[str, torch.Tensor]]):
    before, after = weights(base), weights(base, *words.split())
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_no_key_was_forgotten():
    """Every key of everything registered is changed above."""
    changed = {part.partition("=")[0].rpartition(".")[2].lstrip("-") for _, words in CHANGES for part in words.split()}
    for registry in (OBJECTIVES, TOKEN_WEIGHTS, RELABELERS):
        for name in registry.names():
            assert set(defaults(registry[name])) <= changed, name


def test_what_should_not_matter_does_not(weights: Callable[..., dict[str, torch.Tensor]]):
    """The comparison above would be no test if two runs alike differed."""
    before, after = weights("bco, encoder"), weights("bco, encoder", "--logging_steps=1")
    assert all(torch.equal(before[name], after[name]) for name in before)
