"""Samples of a policy: repeatable, independent of their batch, and asked for in training's own words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.sampling import Sampling, sample
from data.tokens import TokenPolicy, tokenize_rows
from data.worlds import POLICY, answer_of, problems
from objectives.relabel import RewardAugmented
from objectives.rows import Row

ASKED = problems("held_out", 8, seed=1)
PROMPTS = [({"role": "user", "content": problem.question},) for problem in ASKED]
GREEDY = Sampling(temperature=0, max_tokens=40)


def load(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def policy() -> tuple[Any, Any]:
    return load(POLICY)


def asked_for(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Will hold the prompts that the model is given, without padding."""
    seen: list[list[int]] = []
    original = model.generate

    def generate(**options: Any) -> Any:
        for ids, mask in zip(options["input_ids"], options["attention_mask"], strict=True):
            seen.append(ids[mask.bool()].tolist())
        return original(**options)

    monkeypatch.setattr(model, "generate", generate)
    return seen


@pytest.mark.slow
def test_the_same_seed_gives_the_same_samples(policy: tuple[Any, Any]):
    how = Sampling(n=3, max_tokens=24, seed=5)
    first = sample(*policy, PROMPTS, how)
    assert [len(texts) for texts in first] == [3] * len(PROMPTS)
    torch.rand(7)
    assert sample(*policy, PROMPTS, how) == first
    assert sample(*policy, PROMPTS, Sampling(n=3, max_tokens=24, seed=6)) != first
    assert any(len(set(texts)) > 1 for texts in first)


def test_sampling_disturbs_nothing(policy: tuple[Any, Any]):
    model, tokenizer = policy
    model.train()
    state = torch.get_rng_state()
    sample(model, tokenizer, PROMPTS[:2], Sampling(max_tokens=4))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()
    sample(model, tokenizer, PROMPTS[:2], Sampling(max_tokens=4))
    assert not model.training


@pytest.mark.slow
def test_a_batch_changes_no_greedy_answer(policy: tuple[Any, Any]):
    """Prompts of other lengths beside it pad a prompt on the left; answers come back in the order of their prompts."""
    together = sample(*policy, PROMPTS, GREEDY)
    assert len({len(prompt[0]["content"]) for prompt in PROMPTS}) > 3
    assert [sample(*policy, [prompt], GREEDY)[0] for prompt in PROMPTS] == together
    assert sample(*policy, PROMPTS, Sampling(temperature=0, max_tokens=40), batch=3) == together
    assert sample(*policy, PROMPTS[::-1], GREEDY) == together[::-1]
    assert any(answer_of(texts[0]) == problem.answer for texts, problem in zip(together, ASKED, strict=True))
    assert not any(policy[1].eos_token in texts[0] for texts in together)


def test_greedy_answers_are_the_most_probable_tokens(policy: tuple[Any, Any]):
    """Step by step with the model's own forward."""
    model, tokenizer = policy
    text = tokenizer.apply_chat_template(list(PROMPTS[0]), add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(ids)
    while len(ids) < start + 40:
        with torch.no_grad():
            best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if best == tokenizer.eos_token_id:
            break
        ids.append(best)
    assert sample(model, tokenizer, PROMPTS[:1], GREEDY)[0] == [tokenizer.decode(ids[start:])]


@pytest.mark.parametrize("form", ["system", "text"])
def test_a_goal_is_asked_for_in_training_s_words(policy: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, form: str):
    """Token for token the prompt of a training row whose chosen response has the highest score."""
    model, tokenizer = policy
    relabel = RewardAugmented(form=form, lowest=0, highest=1)
    responses = {leg: ({"role": "assistant", "content": leg},) for leg in ("chosen", "rejected")}
    row = Row(prompt=PROMPTS[0], responses=responses, scores={"chosen": 1.0, "rejected": 0.25})
    tokens, dropped, _ = tokenize_rows(
        relabel(row), tokenizer, TokenPolicy(max_length=256, truncation="raise"), ("chosen", "rejected")
    )
    assert not dropped
    seen = asked_for(model, monkeypatch)
    sample(model, tokenizer, PROMPTS[:1], GREEDY, goal=relabel)
    assert seen == [list(tokens[0].prompt)]
    assert "Overall score: 1." in tokenizer.decode(seen[0])
    sample(model, tokenizer, PROMPTS[:1], GREEDY)
    assert seen[1] != seen[0]
    assert tuple(seen[1]) != tokens[1].prompt  # the other row aims at 0.25


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"n": 2, "temperature": 0}, "at temperature 0 all samples are the same; set n 1"),
        ({"n": 0}, "n must be >= 1"),
        ({"temperature": -1.0}, "temperature must be >= 0 and finite"),
        ({"temperature": float("nan")}, "temperature must be >= 0 and finite"),
        ({"max_tokens": 0}, "max_tokens must be >= 1"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_k": -1}, "top_k must be >= 0"),
        ({"min_p": 1.0}, "min_p must be in"),
        ({"seed": -1}, "seed must be in"),
        ({"stop": [""]}, "stop must be texts that are not empty"),
    ],
    ids=str,
)
def test_what_can_t_be_drawn_is_refused(keys: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        Sampling(**keys)


def test_no_prompts_give_no_samples(policy: tuple[Any, Any]):
    assert sample(*policy, [], GREEDY) == []


def test_more_samples_than_a_batch_holds_are_drawn_all_the_same(policy: tuple[Any, Any]):
    assert [len(texts) for texts in sample(*policy, PROMPTS[:2], Sampling(n=5, max_tokens=4), batch=2)] == [5, 5]


def test_low_temperatures_are_nearly_greedy(policy: tuple[Any, Any]):
    cold = sample(*policy, PROMPTS[:4], Sampling(n=2, temperature=1e-3, max_tokens=40))
    greedy = sample(*policy, PROMPTS[:4], GREEDY)
    assert cold == [texts * 2 for texts in greedy]


def test_plain_text_goes_on_as_in_training(shared: Path, monkeypatch: pytest.MonkeyPatch):
    """A model without chat: text begins with its beginning token, and the continuation keeps its space."""
    model, tokenizer = load(shared / "models" / "stories260k")
    seen = asked_for(model, monkeypatch)
    prompts = ["Once upon a time", "Lily and Tom went to the park. They"]
    (first,), (second,) = sample(model, tokenizer, prompts, Sampling(temperature=0, max_tokens=20))
    row = Row(prompt=prompts[0], responses={"gold": " there was a cat."})
    tokens, _, _ = tokenize_rows([row], tokenizer, TokenPolicy(max_length=64, truncation="raise"), ("gold",))
    assert sorted(seen, key=len)[0] == list(tokens[0].prompt)
    assert {ids[0] for ids in seen} == {tokenizer.bos_token_id}
    assert first.startswith((",", " there"))
    assert second.startswith(" ")
    assert [sample(model, tokenizer, [p], Sampling(temperature=0, max_tokens=20))[0] for p in prompts] == [
        [first],
        [second],
    ]
