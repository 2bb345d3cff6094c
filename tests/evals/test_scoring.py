"""The one pass over pairs: against loops over tokens in float64, and against plain forwards of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from align import model as models
from align.scoring import RowScorer
from align.sections import ModelSection
from data.pack import pack
from data.store import TokenTable
from data.tokens import TokenRow
from evals import loading
from evals.ches import of_batch, similarities, sums_of_states
from tests.align.runs import tiny_model
from tests.align.tiny import CONFIGS, float64_throughout, mamba, model_of, random_table

ARCHITECTURES = {
    name: CONFIGS[name] for name in ("llama", "qwen3", "gemma2-window-softcaps", "gpt2", "cohere-scaled-head")
}


@pytest.fixture(scope="module")
def table() -> TokenTable:
    return random_table(rows=6)


def by_loops(model: Any, table: TokenTable) -> dict[str, np.ndarray]:
    """Each response by itself, one token after the other, in float64."""
    found: dict[str, list[float]] = {"ches": [], "ln_ches": [], "last_hidden": []}
    sums: dict[str, list[float]] = {"chosen": [], "rejected": []}
    for row in range(len(table)):
        states, last = {}, {}
        for leg in ("chosen", "rejected"):
            prompt, response = table.prompts[row].tolist(), table.legs[leg][row].tolist()
            with torch.no_grad():
                out = model(input_ids=torch.tensor([prompt + response]), output_hidden_states=True)
            logps = functional.log_softmax(out.logits[0].double(), dim=-1)
            total, added = 0.0, torch.zeros(out.hidden_states[-1].shape[-1], dtype=torch.float64)
            for t, token in enumerate(response):
                predicting = len(prompt) + t - 1
                total += float(logps[predicting, token])
                added += out.hidden_states[-1][0, predicting].double()
                last[leg] = out.hidden_states[-1][0, predicting].double()
            sums[leg].append(total)
            states[leg] = added
        n_chosen, n_rejected = (len(table.legs[leg][row]) for leg in ("chosen", "rejected"))
        plus, minus = states["chosen"], states["rejected"]
        found["ches"].append(float(plus @ minus - plus @ plus))
        found["ln_ches"].append(float(plus @ minus / (n_chosen * n_rejected) - plus @ plus / n_chosen**2))
        found["last_hidden"].append(float(last["chosen"] @ last["rejected"]))
    return {name: np.array(values) for name, values in (found | {f"sum/{leg}": s for leg, s in sums.items()}).items()}


def section(way: str = "auto") -> ModelSection:
    return ModelSection(model_name_or_path="unused", attn_implementation=way)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ARCHITECTURES, "mamba"])
def test_one_pass_equals_loops_over_tokens(table: TokenTable, name: str):
    with float64_throughout():
        model = model_of(mamba() if name == "mamba" else CONFIGS[name]())
        expected = by_loops(model, table)
        scorer = RowScorer(section("eager" if "gemma" in name else "auto"), model, table, torch.float64)
        assert scorer.share == (name != "mamba")
        found = scorer(of_batch)
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=1e-9, atol=1e-9, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["auto", 40])
@pytest.mark.parametrize("way", ["sdpa", "eager", "align_segments"])
def test_batches_and_attention_change_nothing(table: TokenTable, way: str, budget: int | str):
    with float64_throughout():
        model = model_of(CONFIGS["llama"]())
        expected = by_loops(model, table)
        scorer = RowScorer(section(way), model, table, torch.float64, budget)
        told: list[int] = []
        found = scorer(of_batch, lambda done, total: told.append(done))
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=1e-9, atol=1e-9, err_msg=key)
    assert found["length/chosen"].tolist() == table.legs["chosen"].lengths().tolist()
    assert told[-1] == len(table)
    assert len(told) == len(scorer.bins())
    assert sorted(np.concatenate(scorer.bins()).tolist()) == list(range(len(table)))


def test_sums_of_states_by_hand():
    rows = [
        TokenRow(prompt=(5,), legs={"chosen": tokens, "rejected": (7,)}, source="", index=0)
        for tokens in ((3, 4, 5), (6,))
    ]
    batch = pack(TokenTable.of(rows, ("chosen", "rejected")), [1, 0], share=True, counts={})
    states = torch.arange(6, dtype=torch.float64)[:, None] * torch.tensor([1.0, 10.0], dtype=torch.float64)
    sums, last = sums_of_states(states, batch, "chosen")
    # Row 1 has one chosen token, number 0; row 0 three, numbers 1 to 3.
    assert sums.tolist() == [[0.0, 0.0], [6.0, 60.0]]
    assert last.tolist() == [[0.0, 0.0], [3.0, 30.0]]


def test_a_pass_of_batches_is_what_the_paper_makes_of_whole_states(table: TokenTable):
    """``of_batch`` against ``similarities``, which has the published vector."""
    batch = pack(table, [2, 4], share=True, counts={})
    states = torch.randn(int(batch.target.shape[0]), 7, dtype=torch.float64, generator=torch.manual_seed(2))
    found = of_batch(states, batch)
    parts = {}
    for leg in ("chosen", "rejected"):
        sums, last = sums_of_states(states, batch, leg)
        parts[leg] = {"sum": sums.numpy(), "last": last.numpy(), "n": batch.legs[leg].mask.sum(dim=1).numpy()}
    for name, values in similarities(parts["chosen"], parts["rejected"]).items():
        np.testing.assert_allclose(found[name].numpy(), values, rtol=1e-12, err_msg=name)


def test_what_is_loaded_is_frozen(tmp_path: Path):
    section = ModelSection(model_name_or_path=str(tiny_model(tmp_path)))
    with loading.loaded(section, None, models.load_config(section)) as policy:
        assert not policy.training
        assert not any(parameter.requires_grad for parameter in policy.parameters())
