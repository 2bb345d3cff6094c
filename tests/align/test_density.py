"""Density ratios of prompts: the regression by hand, embeddings against plain forwards, encoders, and what they say."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaModel

from align.build import Run
from align.density import _by_row, _policy_embeddings, encoder_embeddings, fit, load_encoder
from align.errors import RunError
from align.train import main
from data.store import Ragged
from data.worlds import POLICY
from tests.equivalence.runs import built, recipe_for, write_rows

pytestmark = pytest.mark.usefixtures("plain_runs")

LOGISTIC = {"rtol": 1e-3, "atol": 1e-3}  # where the solver stops


# ---- the regression ----


def test_fit_by_hand():
    """Three of four rows at +1 are desirable and one of four at −1: f(±1) = ±log 3, so the ratios are 3 and 1/3.

    The penalty on coefficients is nothing beside 16,000 rows, and so many drawn with replacement keep these shares.
    """
    places = np.array([[1.0]] * 4 + [[-1.0]] * 4)
    desirable = np.array([True, True, True, False, False, False, False, True])
    copies = 2000
    coef, intercept, accuracy = fit(
        np.tile(places, (copies, 1)), np.tile(desirable, copies), sample_size=4 * copies, seed=0
    )
    assert coef[0] == pytest.approx(math.log(3), abs=0.05)
    assert intercept == pytest.approx(0.0, abs=0.05)
    assert accuracy == pytest.approx(0.75, abs=0.01)


def test_fit_is_scikit_learn_s_on_the_rows_it_draws():
    rng = np.random.default_rng(0)
    embeddings, desirable = rng.normal(size=(40, 3)), rng.random(40) < 0.7
    embeddings[desirable] += 1.0
    coef, intercept, accuracy = fit(embeddings, desirable, sample_size=9, seed=4)
    again = np.random.default_rng([4, 0xBC0])
    drawn = np.concatenate(
        [again.choice(np.flatnonzero(desirable == label), size=9, replace=True) for label in (True, False)]
    )
    wanted = LogisticRegression(class_weight="balanced", max_iter=1000).fit(embeddings[drawn], desirable[drawn])
    np.testing.assert_allclose(coef, wanted.coef_[0], **LOGISTIC)
    assert intercept == pytest.approx(wanted.intercept_[0], abs=1e-3)
    assert accuracy == wanted.score(embeddings[drawn], desirable[drawn])
    assert fit(embeddings, desirable, sample_size=9, seed=4)[1] == intercept
    assert fit(embeddings, desirable, sample_size=9, seed=5)[1] != intercept


def test_identical_prompts_have_a_ratio_of_one():
    """Whatever the classes' sizes: they are balanced."""
    desirable = np.array([True] * 50 + [False] * 10)
    coef, intercept, accuracy = fit(np.ones((60, 4)), desirable, sample_size=1024, seed=0)
    assert np.exp(np.ones(4) @ coef + intercept) == pytest.approx(1.0, abs=1e-3)
    assert accuracy in (pytest.approx(10 / 60), pytest.approx(50 / 60))


def test_separable_prompts_are_told_apart_by_finite_numbers():
    embeddings = np.concatenate([np.full((20, 2), 3.0), np.full((20, 2), -3.0)])
    desirable = np.arange(40) < 20
    coef, intercept, accuracy = fit(embeddings, desirable, sample_size=1024, seed=0)
    ratios = np.exp(embeddings @ coef + intercept)
    assert accuracy == 1.0
    assert np.isfinite(ratios).all()
    assert (ratios[desirable] > 5).all()
    assert (ratios[~desirable] < 0.2).all()


# ---- embeddings ----


def labelled(number: int = 24) -> list[dict]:
    """Prompts of two kinds, one mostly desirable; some prompts occur twice."""
    rows = []
    for i in range(number):
        kind = "please tell me" if i % 2 else "WHAT IS"
        rows.append(
            {"prompt": f"{kind} {i // 4}:", "completion": f" {i} it is.", "label": (i % 2 == 1) ^ (i % 11 == 0)}
        )
    return rows


def run_of(folder: Path, *keys: str) -> Run:
    rows = write_rows(folder / "rows.jsonl", labelled())
    bco = ["--objective.name", "bco", "--objective.prompt_encoder", "policy", "--token_budget", "150"]
    return built(recipe_for(folder, folder / "model", rows, *bco, *keys))


@pytest.mark.slow
@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
def test_policy_embeddings_are_mean_hidden_states_of_prompts(folder: Path, share: bool):
    run = run_of(folder)
    trainer, table = run.trainer, run.trainer.batches.table
    trainer.model_wrapped = trainer.model
    trainer.batches.share = share
    found = _by_row(table.prompts, lambda prompts: _policy_embeddings(prompts, trainer))
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    for row in range(len(table)):
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor(table.prompts[row].tolist())[None]).last_hidden_state[0]
        np.testing.assert_allclose(found[row], hidden.mean(0).numpy(), rtol=1e-4, atol=1e-5)
    assert len(np.unique(found.round(4), axis=0)) == len({tuple(table.prompts[row]) for row in range(len(table))}) == 12


def test_each_distinct_prompt_is_embedded_once():
    asked: list[int] = []

    def embed(prompts: Ragged) -> np.ndarray:
        asked.append(len(prompts))
        return np.array([[float(prompts[row].sum())] for row in range(len(prompts))])

    prompts = Ragged.of([[1, 2], [5], [1, 2], [7, 7], [5]])
    assert _by_row(prompts, embed)[:, 0].tolist() == [3, 5, 3, 14, 5]
    assert asked == [3]


def save_encoder(folder: Path, kind: str) -> Path:
    """A tiny random encoder that reads with the world's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    torch.manual_seed(1)
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"intermediate_size": 32, "max_position_embeddings": 24}
    model = BertModel(BertConfig(**shape)) if kind == "bert" else LlamaModel(LlamaConfig(**shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_encoder_embeddings_do_not_depend_on_their_neighbours(tmp_path: Path, kind: str):
    """A batch pads; means are over each text's own tokens, and what is beyond the context is cut."""
    model, tokenizer = load_encoder(str(save_encoder(tmp_path, kind)))
    texts = ["one", "two and three", "many " * 200, "one"]
    together = encoder_embeddings(texts, model, tokenizer)
    alone = np.concatenate([encoder_embeddings([text], model, tokenizer) for text in texts])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(encoder_embeddings(texts, model, tokenizer, batch=2), alone, rtol=1e-4, atol=1e-5)
    ids = tokenizer("two and three", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        plain = AutoModel.from_pretrained(tmp_path).eval()(input_ids=ids).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(alone[1], plain.numpy(), rtol=1e-4, atol=1e-5)
    assert encoder_embeddings([], model, tokenizer).shape == (0, 32)


def test_an_encoder_that_is_not_there(tmp_path: Path):
    with pytest.raises(RunError, match=r"objective.prompt_encoder '.*nope' can't be loaded \(.*; give policy, or"):
        load_encoder(str(tmp_path / "nope"))


# ---- whole runs ----


def run_bco(folder: Path, encoder: str | Path, output: str) -> int:
    rows = write_rows(folder / "rows.jsonl", labelled(40))
    return main(
        [
            *(f"--model_name_or_path={folder / 'model'}", f"--dataset_name={rows}", f"--output_dir={folder / output}"),
            *("--objective.name=bco", f"--objective.prompt_encoder={encoder}", "--eval_share=0.2", "--max_steps=2"),
            *("--rows_per_step=16", "--save_strategy=no", "--logging_steps=1"),
        ]
    )


@pytest.mark.slow
def test_a_named_encoder_trains_and_an_unloadable_one_is_told(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert run_bco(folder, save_encoder(folder / "encoder", "bert"), "run") == 0
    assert "density ratio: prompts of both classes are told apart" in capsys.readouterr().out
    assert run_bco(folder, folder / "nope", "other") == 2
    told = capsys.readouterr().err
    assert "error: objective.prompt_encoder" in told
    assert "give policy, or an encoder's Hub id or folder" in told


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["policy", "bert"])
def test_prompts_typical_of_desirable_rows_have_ratios_above_one(folder: Path, encoder: str):
    if encoder == "bert":
        encoder = str(save_encoder(folder / "encoder", "bert"))
    run = run_of(folder, "--objective.prompt_encoder", encoder, "--max_steps", "1", "--eval_share", "0.2")
    run.trainer.train()
    assert run.trainer.eval_batches is not None
    for split in (run.prepared.train, run.prepared.eval):
        assert split is not None
        batches = run.trainer.batches if split is run.prepared.train else run.trainer.eval_batches
        ratios = batches.known.density_ratio
        assert ratios is not None
        assert len(ratios) == len(split.table)
        polite = np.array(["please" in run.tokenizer.decode(split.table.prompts[i]) for i in range(len(split.table))])
        assert (ratios[polite] > 1).all()
        assert (ratios[~polite] < 1).all()
        for i, j in np.argwhere(split.prompts[:, None] == split.prompts[None]):
            assert ratios[i] == ratios[j]
