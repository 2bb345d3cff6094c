"""Reward models as scorers: the same number alone, in any batch, and as training computed it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from align.errors import RunError
from align.reward_scorer import RewardModel, batches
from align.samples import Group
from align.train import main
from align.world_scorers import Gold
from data.errors import DataError
from data.worlds import POLICY, candidates, problems, scored
from tests.align.sampled import chat, group
from tests.equivalence.runs import write_rows
from tests.equivalence.worlds import save_model

pytestmark = pytest.mark.usefixtures("plain_runs")

SAME: dict[str, Any] = {"rel": 1e-5, "abs": 1e-5}  # float32 sums in another order


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model trained here."""
    folder = tmp_path_factory.mktemp("reward")
    return _trained(folder, folder / "run")


def _trained(folder: Path, run: Path, *words: str) -> Path:
    asked = problems("train", 48)
    rows = write_rows(folder / "scored.jsonl", scored(asked, candidates(asked, 6)).rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(folder / "cache"))
        given = (
            *(f"--model_name_or_path={POLICY}", f"--dataset_name={rows}", f"--output_dir={run}"),
            *("--max_steps=30", "--rows_per_step=8", "--save_strategy=no", "--learning_rate=1e-3"),
            *("--objective.name=bradley_terry", "--token_budget=256", "--eval_share=0"),
        )
        assert main([*given, *words]) == 0
    return run


@pytest.fixture(scope="module")
def asked() -> list[Group]:
    some = problems("held_out", 6, seed=1)
    texts = [[*drawn, drawn[0] + " " + drawn[1]] for drawn in candidates(some, 4)]
    return [chat(problem.question, each) for problem, each in zip(some, texts, strict=True)]


def scores(model: RewardModel, groups: list[Group]) -> list[float | None]:
    found = [each.score for each in model(groups)]
    model.close()
    return found


def alone(model: RewardModel, groups: list[Group]) -> list[float | None]:
    found = [model([Group(samples=(sample,))])[0].score for one in groups for sample in one.samples]
    model.close()
    return found


@pytest.mark.slow
def test_scores_do_not_depend_on_the_batch(run: Path, asked: list[Group]):
    together = scores(RewardModel(model=str(run)), asked)
    assert len(set(together)) > 10
    assert alone(RewardModel(model=str(run)), asked) == pytest.approx(together, **SAME)
    for budget in (1, 100, 333):
        assert scores(RewardModel(model=str(run), token_budget=budget), asked) == pytest.approx(together, **SAME)
    assert scores(RewardModel(model=str(run)), asked[::-1]) == pytest.approx(
        [score for i in range(5, -1, -1) for score in together[5 * i : 5 * i + 5]], **SAME
    )


@pytest.mark.slow
def test_scores_are_those_of_training_s_text(run: Path, asked: list[Group]):
    """Template, response, one end token; nothing after it, though the template writes a newline."""
    model = AutoModelForSequenceClassification.from_pretrained(run)
    tokenizer = AutoTokenizer.from_pretrained(run)
    expected = []
    for sample in (sample for one in asked for sample in one.samples):
        messages = [*map(dict, sample.prompt), {"role": "assistant", "content": sample.text}]  # type: ignore[call-overload]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        text = text[: text.rindex(tokenizer.eos_token)] + tokenizer.eos_token
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            expected.append(float(model(input_ids=torch.tensor([ids])).logits[0, 0]))
    assert scores(RewardModel(model=str(run)), asked) == pytest.approx(expected, **SAME)


@pytest.mark.slow
def test_it_ranks_as_it_was_trained_to(run: Path):
    """Of the pairs it learned: what is scored is the response, not the prompt alone."""
    some = problems("train", 48)
    groups = [chat(each.question, drawn) for each, drawn in zip(some, candidates(some, 6), strict=True)]
    gold, found = [each.score or 0.0 for each in Gold()(groups)], scores(RewardModel(model=str(run)), groups)
    right: list[bool] = []
    for start in range(0, len(gold), 6):
        ordered = sorted(range(start, start + 6), key=lambda i: gold[i])
        right += [(found[ordered[-1]] or 0.0) > (found[ordered[0]] or 0.0)] * (gold[ordered[-1]] > gold[ordered[0]])
    assert sum(right) > 0.8 * len(right) > 30


@pytest.mark.slow
def test_an_adapter_brings_its_base(tmp_path: Path, asked: list[Group]):
    run = _trained(tmp_path, tmp_path / "adapter", "--lora.r=4")
    assert not (run / "config.json").exists()
    found = scores(RewardModel(model=str(run)), asked)
    assert len(set(found)) > 10
    assert alone(RewardModel(model=str(run)), asked[:2]) == pytest.approx(found[:10], **SAME)
    (run / "adapter_config.json").write_text(
        json.dumps(json.loads((run / "adapter_config.json").read_text()) | {"base_model_name_or_path": "/nowhere"})
    )
    with pytest.raises(RunError, match=r"^reward_model: can't load the configuration"):
        RewardModel(model=str(run)).fingerprint()


def test_the_end_token_pads(tmp_path: Path):
    """transformers would read the score one token early, or refuse to take two rows."""
    model = save_model(tmp_path / "lm")  # its pad token is its end token
    config = AutoConfig.from_pretrained(model, num_labels=1)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "rm")
    groups = [group("The cat", [" sat on the mat.", " ran", " was there and it ran to see what was there"])]
    for ending in ("token", "template"):
        together = scores(RewardModel(model=str(tmp_path / "rm"), ending=ending), groups)
        assert alone(RewardModel(model=str(tmp_path / "rm"), ending=ending), groups) == pytest.approx(together, **SAME)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = [*tokenizer("The cat ran")["input_ids"], tokenizer.eos_token_id]
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    saved.config.pad_token_id = None
    with torch.no_grad():
        expected = float(saved(input_ids=torch.tensor([ids])).logits[0, 0])
    found = scores(RewardModel(model=str(tmp_path / "rm"), ending="token"), groups)
    assert found[1] == pytest.approx(expected, **SAME)


def test_absolute_positions(run: Path, tmp_path: Path, asked: list[Group]):
    """Padding on the right moves nobody."""
    tokenizer = AutoTokenizer.from_pretrained(run)
    torch.manual_seed(0)
    shape: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, "num_labels": 1}
    config = GPT2Config(vocab_size=len(tokenizer), **shape)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    together = scores(RewardModel(model=str(tmp_path)), asked)
    assert alone(RewardModel(model=str(tmp_path)), asked) == pytest.approx(together, **SAME)


@pytest.mark.slow
def test_others_models_read_what_the_template_writes(run: Path, tmp_path: Path, asked: list[Group]):
    shutil.copytree(run, tmp_path / "other")
    (tmp_path / "other" / "recipe.yaml").unlink()
    ours, theirs = RewardModel(model=str(run)), RewardModel(model=str(tmp_path / "other"))
    assert scores(ours, asked) == scores(RewardModel(model=str(tmp_path / "other"), ending="token"), asked)
    assert scores(theirs, asked) == scores(RewardModel(model=str(run), ending="template"), asked)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    sample = asked[0].samples[0]
    messages = [*map(dict, sample.prompt), {"role": "assistant", "content": sample.text}]  # type: ignore[call-overload]
    with torch.no_grad():
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
        expected = float(model(input_ids=ids).logits[0, 0])
    assert scores(theirs, asked)[0] == pytest.approx(expected, **SAME)
    checkpoint = run / "checkpoint-3"
    shutil.copytree(tmp_path / "other", checkpoint)
    assert scores(RewardModel(model=str(checkpoint)), asked) == scores(ours, asked), "of a run that has a recipe"
    shutil.rmtree(checkpoint)


def test_a_cross_encoder_reads_a_pair(tmp_path: Path):
    """BERT without a chat template: prompt and response are its two segments."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "two", "plus", "is", "four", "five", "?"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(words), num_labels=2, max_position_embeddings=32, **shape)  # type: ignore[arg-type]
    config.id2label = {0: "bad", 1: "good"}
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    groups = [chat("two plus two?", ["four", "two plus two is five", "five is four"])]
    scorer = RewardModel(model=str(tmp_path / "model"), output="good")
    with torch.no_grad():
        expected = [
            float(model(**tokenizer("two plus two?", sample.text, return_tensors="pt")).logits[0, 1])
            for sample in groups[0].samples
        ]
    assert scores(scorer, groups) == pytest.approx(expected, **SAME)
    long = scorer([chat("two plus two?", ["four " * 40])])
    scorer.close()
    assert long[0].counts == {"truncated": 1}
    assert long[0].score is not None
    with pytest.raises(RunError, match=r"has the outputs bad, good; set output to one of them$"):
        RewardModel(model=str(tmp_path / "model")).fingerprint()
    with pytest.raises(RunError, match=r"has the outputs bad, good; output 'fine' is none of them$"):
        RewardModel(model=str(tmp_path / "model"), output="fine").fingerprint()


def test_what_is_too_long_is_cut_and_counted_or_dropped(run: Path):
    long = "The answer is 7. " * 30
    asked = [chat("How many?", ["The answer is 7.", long])]
    cut = RewardModel(model=str(run), max_length=64)
    found = cut(asked)
    cut.close()
    assert [dict(each.counts) for each in found] == [{}, {"truncated": 1}]
    assert None not in [each.score for each in found]
    dropping = RewardModel(model=str(run), max_length=64, truncation="drop")
    found = dropping(asked)
    dropping.close()
    assert [(each.score is None, each.reason) for each in found] == [(False, ""), (True, "longer than max_length")]
    with pytest.raises(RunError, match=r"max_length 999 exceeds the context of .*, 256 tokens; lower it"):
        RewardModel(model=str(run), max_length=999)(asked)
    prompt = [chat("How many? " * 100, ["The answer is 7." * 9])]
    assert "the prompt leaves fewer than" in RewardModel(model=str(run))(prompt)[0].reason


def test_an_empty_response_has_no_score(run: Path):
    found = RewardModel(model=str(run))([chat("How many?", ["", "The answer is 7."])])
    assert (found[0].score, found[0].reason) == (None, "empty completion response")
    assert found[1].score is not None


@pytest.mark.slow
def test_16_bits_are_near_32(run: Path, asked: list[Group]):
    exact = scores(RewardModel(model=str(run)), asked)
    short = scores(RewardModel(model=str(run), dtype="bfloat16"), asked)
    gaps = [abs(a - b) for a, b in zip(exact, short, strict=True) if a is not None and b is not None]
    assert 0 < max(gaps) < 0.2
    values = [value for value in short if value is not None]
    rounded = sum(value == float(torch.tensor(value).bfloat16()) for value in values)
    assert rounded < len(values) / 2, "the head is computed in float32"


def test_the_fingerprint_changes_with_the_weights(run: Path, tmp_path: Path):
    shutil.copytree(run, tmp_path / "copy")
    model = str(tmp_path / "copy")
    before = RewardModel(model=model).fingerprint()
    assert before == RewardModel(model=str(run)).fingerprint(), "wherever it lies"
    assert RewardModel(model=model, dtype="bfloat16").fingerprint() != before
    assert RewardModel(model=model, ending="template").fingerprint() != before
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    weights["score.weight"][0, 0] += 1
    save_file(weights, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    assert RewardModel(model=model).fingerprint() != before


def test_models_that_can_t_score_are_refused(run: Path, tmp_path: Path):
    with pytest.raises(RunError, match=r"^reward_model: there is no folder './nowhere'"):
        RewardModel(model="./nowhere").fingerprint()
    with pytest.raises(RunError, match=r"is a LlamaForCausalLM and has no scalar head, .*; name a reward model$"):
        RewardModel(model=str(POLICY)).fingerprint()
    with pytest.raises(RunError, match=r"^reward_model: can't load the configuration of 'no-such/model'"):
        RewardModel(model="no-such/model").fingerprint()
    shutil.copytree(run, tmp_path / "cut")
    whole = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(RunError, match=r"^reward_model: can't load .*; copy or download the model again$"):
        RewardModel(model=str(tmp_path / "cut"))([chat("?", ["a"])])
    weights = load_file(run / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "cut" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"lacks 1 weights \(score.weight …\), which would be random"):
        RewardModel(model=str(tmp_path / "cut"))([chat("?", ["a"])])


def test_messages_without_a_template_are_refused(tmp_path: Path):
    model = save_model(tmp_path / "lm")
    config = AutoConfig.from_pretrained(model, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "rm")
    scorer = RewardModel(model=str(tmp_path / "rm"))
    with pytest.raises(RunError, match=r"has no chat template, and the prompts are messages; set ending to token"):
        scorer([chat("?", ["a"])])
    assert None not in scores(RewardModel(model=str(tmp_path / "rm"), ending="token"), [chat("?", ["a", "bc"])])


def test_a_conversation_that_ends_with_the_assistant_stops(run: Path):
    with pytest.raises(DataError, match="the prompt must end with a turn that the assistant answers"):
        RewardModel(model=str(run))([group(({"role": "assistant", "content": "Hi"},), ["a"])])


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_batches_hold_everything_once_within_the_budget(lengths: list[int], budget: int):
    found = list(batches(dict(enumerate(lengths)), budget))
    assert sorted(key for batch in found for key in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(lengths[key] for key in batch) <= budget
    ordered = [lengths[key] for batch in found for key in batch]
    assert ordered == sorted(ordered, reverse=True)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"model": ""}, "model must be a folder or a Hub id"),
        ({"ending": "eos"}, "ending must be one of auto, token, template"),
        ({"truncation": "left"}, "truncation must be one of"),
        ({"max_length": 0}, "max_length must be >= 1"),
        ({"token_budget": 0}, "token_budget must be >= 1"),
        ({"dtype": "int8"}, "dtype must be one of"),
    ],
    ids=str,
)
def test_keys_out_of_range(keys: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=f"^{says}"):
        RewardModel(**{"model": "m", **keys})
