"""The embedded world: splits that share nothing, scores, flaws at their rates, rows that are read, the policy."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.sampling import Sampling, sample
from data.chat import render
from data.sources import Source, load_rows
from data.tokens import TokenPolicy, tokenize_rows
from data.worlds import (
    KINDS,
    POLICY,
    SPLITS,
    Flaws,
    Problem,
    answer_of,
    candidates,
    gold_parts,
    gold_score,
    labels,
    pairs,
    problems,
    respond,
    scored,
    triples,
)
from data.worlds.__main__ import main
from data.worlds.problems import combination
from data.worlds.rows import other_digit
from launch.pretrain_world import make_model, make_tokenizer, pretrain
from objectives.rows import Row
from objectives.stats import wilson

TWO_STEPS = Problem(
    question="Ann has 7 apples, buys 5 more and gives 4 to Ben. How many apples does Ann have left?",
    template="buys_and_gives",
    operands=(7, 5, 4),
    operations="+-",
    tricky=False,
)
any_problem = st.sampled_from([problem for split in SPLITS for problem in problems(split, 200)])


def within(successes: int, n: int, rate: float) -> bool:
    """Whether the rate lies in an interval that is wrong once in 15,000 times."""
    low, high = wilson(successes, n, z=4.0)
    return low <= rate <= high


# Problems


def test_worked_by_hand():
    assert TWO_STEPS.worked == "7 + 5 = 12. 12 - 4 = 8. The answer is 8."
    assert TWO_STEPS.answer == 8


def test_no_split_shares_a_combination_or_an_untrained_template_with_training():
    drawn = {split: problems(split, 4000, seed=3) for split in SPLITS}
    combinations = {split: {as_sets(problem) for problem in drawn[split]} for split in SPLITS}
    templates = {split: {problem.template for problem in drawn[split]} for split in SPLITS}
    assert combinations["train"] & combinations["held_out"] == set()
    assert combinations["train"] & combinations["held_out_templates"] == set()
    assert templates["held_out"] == templates["train"]
    assert templates["held_out_templates"] & templates["train"] == set()
    assert len(templates["train"]) >= 12


def as_sets(problem: Problem) -> tuple:
    """What a problem adds up and what it takes away, whatever the order; written without the module's own function."""
    first, *rest = problem.operands
    added, taken = [], []
    for operation, operand in zip(problem.operations, rest, strict=True):
        if operation == "×":
            first = frozenset(Counter([first, operand]).items())
        else:
            (added if operation == "+" else taken).append(operand)
    if isinstance(first, int):
        return None, frozenset(Counter([first, *added]).items()), frozenset(Counter(taken).items())
    return first, frozenset(Counter(added).items()), frozenset(Counter(taken).items())


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (((3, 5), "+"), ((5, 3), "+"), True),
        (((3, 5), "×"), ((5, 3), "×"), True),
        (((9, 4), "-"), ((4, 9), "-"), False),
        (((3, 5), "+"), ((3, 5), "×"), False),
        (((9, 2, 4), "+-"), ((9, 4, 2), "-+"), True),
        (((9, 2, 4), "--"), ((9, 4, 2), "--"), True),
        (((9, 2, 4), "+-"), ((2, 9, 4), "+-"), True),
        (((9, 2, 4), "+-"), ((4, 2, 9), "+-"), False),
        (((3, 5, 4), "×+"), ((5, 3, 4), "×+"), True),
        (((3, 5, 4), "×+"), ((3, 4, 5), "×+"), False),
    ],
)
def test_a_combination_is_the_same_in_every_order_that_makes_no_difference(one, other, same):
    assert (combination(*one) == combination(*other)) == same


@pytest.mark.parametrize(("split", "least"), [("held_out", 500), ("held_out_templates", 200)])
def test_enough_is_held_out(split, least):
    """Different in story and operands, not only in names and things."""
    drawn = problems(split, 2 * least, seed=0)
    assert len({(problem.template, problem.operands) for problem in drawn}) >= least


@pytest.mark.parametrize("split", SPLITS)
def test_problems_repeat_by_seed_and_not_within_a_call(split):
    drawn = problems(split, 1000, seed=1)
    assert drawn == problems(split, 1000, seed=1)
    assert drawn[:100] == problems(split, 100, seed=1)
    assert drawn != problems(split, 1000, seed=2)
    assert len({problem.question for problem in drawn}) == 1000


@given(any_problem)
def test_a_question_names_its_operands_and_leaves_no_gap(problem):
    assert "{" not in problem.question
    assert all(str(operand) in problem.question for operand in problem.operands)
    assert 1 <= problem.answer <= 60


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="unknown split 'test'"):
        problems("test", 1)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        problems("train", 0)


# Scores


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("7 + 5 = 12. The answer is 12.", 12),
        ("The answer is 3. The answer is 4.", 4),
        ("The answer is 12", None),
        ("12.", None),
        ("The answer is -3.", None),
        ("The answer is ٣.", None),
        ("", None),
    ],
)
def test_the_answer_of_a_response(text, answer):
    assert answer_of(text) == answer


def test_gold_scores_by_hand():
    """Sentences to the point over all, true steps over needed ones, closed: for the problem 7 + 5 − 4."""
    expected = {
        "7 + 5 = 12. 12 - 4 = 8. The answer is 8.": 0.6 + 0.2 + 0.2,
        "So far so good. 7 + 5 = 12. 12 - 4 = 8. The answer is 8.": 0.6 + 0.2 * 3 / 4 + 0.2,
        "7 + 5 = 12. 12 - 4 = 8. The answer is 8. That was fun.": 0.6 + 0.2 * 3 / 4 + 0.1,
        "7 + 5 = 13. 13 - 4 = 9. The answer is 8.": 0.6 + 0.2 + 0.2 * (1 / 2 + 1) / 2,
        "The answer is 8.": 0.6 + 0.2 + 0.1,
        "The answer is 8. The answer is 8.": 0.6 + 0.2 / 2,
        "7 + 5 = 12. 12 + 4 = 16. The answer is 16.": 0.2 + 0.2,
        "7 + 5 = 13. 13 - 4 = 9. The answer is 9.": 0.2 + 0.2 * (1 / 2 + 1) / 2,
        "7 + 5 = 12. 12 - 4 = 8.": 0.2 + 0.1,
        "8.": 0.0,
        "It is a nice day.": 0.0,
        "": 0.0,
    }
    assert {text: gold_score(TWO_STEPS, text) for text in expected} == pytest.approx(expected)


@given(any_problem, st.text(), st.integers(0, 99))
def test_any_right_answer_is_better_than_any_wrong_one(problem, text, number):
    right, wrong = (f"{text} The answer is {n}." for n in (problem.answer, problem.answer + 1 + number))
    assert gold_score(problem, wrong) <= 0.4 < 0.6 <= gold_score(problem, right) <= 1.0
    assert gold_score(problem, text) <= 0.4


@pytest.mark.parametrize("kind", KINDS)
@given(problem=any_problem, seed=st.integers(0, 1000))
def test_a_kind_of_response_scores_as_it_says(kind, problem, seed):
    text = respond(problem, kind, random.Random(seed))
    parts, needed = gold_parts(problem, text), len(problem.operations)
    slipped = (needed - 1) / needed
    expected = {
        "right": (1, 1, 1),
        "slip": (0, 1, (slipped + 1) / 2),
        "wrong_operation": (0, 1, 1),
        "rambling": (1, (needed + 1) / len(sentences(text)), 1 if text.endswith(f"is {problem.answer}.") else 0.5),
        "ill_formed": (0, 1, 0.5) if "=" in text else (0, 0, 0),
        "off_topic": (0, 0, 0),
    }
    assert (parts.right, parts.to_the_point, parts.well_formed) == pytest.approx(expected[kind])
    assert kind != "rambling" or len(sentences(text)) > needed + 1


def sentences(text: str) -> list[str]:
    return [sentence for sentence in text.split(".") if sentence]


def test_responses_repeat_by_seed():
    asked = problems("train", 50)
    assert candidates(asked, 4, seed=1) == candidates(asked, 4, seed=1) != candidates(asked, 4, seed=2)
    with pytest.raises(ValueError, match="unknown kind of response 'rigth'"):
        respond(asked[0], "rigth", random.Random(0))
    with pytest.raises(ValueError, match="at least 1, not 0"):
        candidates(asked, 0)


# Flaws

ASKED = problems("train", 1500, seed=5)
RESPONSES = candidates(ASKED, 4, seed=5)


@pytest.mark.slow
def test_without_flaws_the_better_one_is_chosen():
    made = pairs(ASKED, RESPONSES)
    assert all(row["score_chosen"] > row["score_rejected"] for row in made.rows)
    assert len(made.rows) + made.left_out == len(ASKED)
    assert made == pairs(ASKED, RESPONSES)


def test_ties_make_no_pair_and_are_counted():
    asked = ASKED[:3]
    same, different = ["8.", "9."], [asked[1].worked, "8."]
    assert pairs(asked, [same, different, []]).left_out == 2
    assert scored(asked, [same, different, ["8."]]).left_out == 2
    assert triples(asked, [same, different, same]).left_out == 2


@pytest.mark.slow
def test_label_noise_flips_its_share_and_leaves_scores_with_responses():
    flaws = Flaws(label_noise=0.2)
    for make in (pairs, triples):
        rows = make(ASKED, RESPONSES, flaws=flaws).rows
        flipped = sum(row["score_chosen"] < row["score_rejected"] for row in rows)
        assert within(flipped, len(rows), 0.2)
    by_question = {problem.question: problem for problem in ASKED}
    rows = labels(ASKED, RESPONSES, flaws=flaws).rows
    right = [answer_of(row["completion"][0]["content"]) == by_question[content(row)].answer for row in rows]
    assert within(sum(row["label"] != up for row, up in zip(rows, right, strict=True)), len(rows), 0.2)


def content(row) -> str:
    return row["prompt"][0]["content"]


@pytest.mark.slow
@pytest.mark.parametrize("bias", [0.0, 0.5, 1.0])
def test_length_bias_prefers_the_longer_whatever_the_scores(bias):
    rows = pairs(ASKED, RESPONSES, flaws=Flaws(length_bias=bias)).rows
    where_it_matters = [row for row in pairs(ASKED, RESPONSES).rows if length(row, "chosen") < length(row, "rejected")]
    questions = {content(row) for row in where_it_matters}
    turned = sum(content(row) in questions and row["score_chosen"] < row["score_rejected"] for row in rows)
    assert len(questions) > 100
    assert within(turned, len(questions), bias)


def length(row, leg: str) -> int:
    return len(row[leg][0]["content"])


@pytest.mark.slow
def test_near_identical_pairs_differ_in_one_token():
    rows = pairs(ASKED, RESPONSES, flaws=Flaws(near_identical=0.3)).rows
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    near = 0
    for row in rows:
        chosen, rejected = (tokenizer(row[leg][0]["content"])["input_ids"] for leg in ("chosen", "rejected"))
        if len(chosen) == len(rejected) and sum(a != b for a, b in zip(chosen, rejected, strict=True)) == 1:
            near += 1
            assert row["score_chosen"] > 0.6 > 0.4 >= row["score_rejected"]
    assert within(near, len(rows), 0.3)


def test_the_last_digit_of_the_final_number_is_changed():
    text = "7 + 5 = 12. The answer is 12. That was fun."
    changed = {other_digit(text, random.Random(seed)) for seed in range(99)}
    assert changed == {text.replace("is 12", f"is 1{digit}") for digit in "013456789"}


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_thumbs_up_share_leaves_surplus_rows_out(share):
    everything = labels(ASKED, RESPONSES).rows
    made = labels(ASKED, RESPONSES, flaws=Flaws(thumbs_up_share=share))
    assert len(made.rows) + made.left_out == len(everything)
    assert sum(row["label"] for row in made.rows) / len(made.rows) == pytest.approx(share, abs=0.001)
    rest = Counter(row["label"] for row in made.rows) - Counter(row["label"] for row in everything)
    assert not rest
    assert any(Counter(row["label"] for row in everything)[label] == Counter(row["label"] for row in made.rows)[label]
               for label in (True, False)), "one label is kept in full"  # fmt: skip


@pytest.mark.slow
def test_reward_error_has_its_standard_deviation():
    rows = scored(ASKED, RESPONSES, flaws=Flaws(reward_error=0.25)).rows
    exact = {problem.question: problem for problem in ASKED}
    errors = torch.tensor(
        [entry["score"] - gold_score(exact[content(row)], entry["text"]) for row in rows for entry in row["responses"]]
    )
    assert errors.mean().item() == pytest.approx(0.0, abs=4 * 0.25 / len(errors) ** 0.5)
    assert errors.std().item() == pytest.approx(0.25, rel=4 / (2 * len(errors)) ** 0.5)
    wrong = [
        gold_score(exact[content(row)], row["chosen"][0]["content"])
        < gold_score(exact[content(row)], row["rejected"][0]["content"])
        for row in pairs(ASKED, RESPONSES, flaws=Flaws(reward_error=0.25)).rows
    ]
    assert 0 < sum(wrong) < len(wrong) / 2


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"label_noise": 1.1}, "label_noise must be a number from 0 to 1, not 1.1"),
        ({"length_bias": -0.1}, "length_bias must be a number from 0 to 1, not -0.1"),
        ({"near_identical": float("nan")}, "near_identical must be a number from 0 to 1, not nan"),
        ({"thumbs_up_share": 1.0}, "thumbs_up_share must be a number between 0 and 1, not 1.0"),
        ({"reward_error": float("inf")}, "reward_error must be a number of at least 0, not inf"),
    ],
)
def test_a_flaw_out_of_range_is_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        Flaws(**knobs)


def test_a_flaw_without_effect_is_refused():
    with pytest.raises(ValueError, match="thumbs_up_share has no effect on pairs"):
        pairs(ASKED, RESPONSES, flaws=Flaws(thumbs_up_share=0.5))
    with pytest.raises(ValueError, match="length_bias has no effect on labels"):
        labels(ASKED, RESPONSES, flaws=Flaws(length_bias=0.5))
    with pytest.raises(ValueError, match="2 problems and 1 lists"):
        pairs(ASKED[:2], RESPONSES[:1])


# Files


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pairs", "triples", "scored", "gold"])
def test_what_is_written_is_read_without_problems(kind, tmp_path, capsys):
    path = tmp_path / f"{kind}.jsonl"
    assert main(["write", f"--kind={kind}", "--number=200", f"--out={path}", "--seed=3"]) == 0
    assert f"{kind} of 200 problems" in capsys.readouterr().out
    loaded = load_rows(Source(dataset_name=str(path)))
    assert loaded.problems == []
    assert len(loaded.rows) == len(path.read_text().splitlines()) > 150
    first = loaded.rows[0]
    # Which legs a scored list gives is the reader's choice.
    legs = {"pairs": {"chosen", "rejected"}, "triples": {"chosen", "rejected", "gold"}, "gold": {"gold"}}
    assert kind == "scored" or first.responses.keys() == legs[kind]
    assert kind in ("scored", "gold") or first.scores["chosen"] > first.scores["rejected"]


def test_labels_are_written_one_a_row(tmp_path):
    path = tmp_path / "labels.jsonl"
    assert main(["write", "--kind=labels", "--number=50", "--split=held_out", f"--out={path}"]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(row.keys() == {"prompt", "completion", "label", "template", "answer"} for row in rows)
    assert all(row["completion"][0]["role"] == "assistant" and row["label"] in (True, False) for row in rows)
    assert all(row["label"] == (answer_of(row["completion"][0]["content"]) == row["answer"]) for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["write", "--kind=pears", "--out=x"], "invalid choice: 'pears'"),
        (["write", "--kind=pairs"], "required: --out"),
        (["write", "--kind=gold", "--out=x", "--label_noise=0.1"], "label_noise has no effect on gold"),
        (["write", "--kind=pairs", "--out=x", "--label_noise=2"], "label_noise must be a number from 0 to 1"),
        (["write", "--kind=pairs", "--out=/nowhere/x"], "No such file"),
        (["show", "--number=0"], "at least 1"),
        ([], "required: command"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert sentence in said
    assert said.count("\n") == 1


def test_show_prints_every_kind_with_its_score(capsys):
    assert main(["show", "--number=2"]) == 0
    shown = capsys.readouterr().out
    assert all(shown.count(f"  {kind} ") == 2 for kind in KINDS)
    assert "1.00  right" in shown


# The shipped policy


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(POLICY)


@pytest.fixture(scope="module")
def policy():
    return AutoModelForCausalLM.from_pretrained(POLICY)


@given(text=st.text())
def test_any_text_comes_back_from_its_tokens(text, tokenizer):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_tokenizer_has_a_token_for_each_digit_and_each_turn(tokenizer):
    assert len(tokenizer) <= 512
    assert tokenizer.convert_ids_to_tokens(tokenizer("is 407.")["input_ids"])[-4:] == ["4", "0", "7", "."]
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_template_renders_system_user_and_assistant(tokenizer):
    row = Row(
        prompt=({"role": "system", "content": "Be right."}, {"role": "user", "content": TWO_STEPS.question}),
        responses={"gold": ({"role": "assistant", "content": TWO_STEPS.worked},)},
    )
    text = render(row, tokenizer)
    assert text.prompt == f"<|system|>Be right.<|end|><|user|>{TWO_STEPS.question}<|end|><|assistant|>"
    assert text.prompt_is_prefix
    [tokens], dropped, stats = tokenize_rows([row], tokenizer, TokenPolicy(max_length=256), ["gold"])
    assert not dropped
    assert stats.boundary_mismatches == stats.terminator_added["gold"] == stats.tail_removed["gold"] == 0
    assert tokenizer.decode(tokens.legs["gold"]) == TWO_STEPS.worked + "<|end|>"


def test_the_policy_is_small_and_runs_everywhere(policy):
    assert sum(path.stat().st_size for path in POLICY.rglob("*") if path.is_file()) <= 3 * 2**20
    assert 0.8e6 < sum(parameter.numel() for parameter in policy.parameters()) < 1.2e6
    assert policy.config.head_dim == policy.config.hidden_size // policy.config.num_attention_heads == 32
    assert policy.dtype == torch.float32
    assert policy.config.model_type == "llama"


@pytest.mark.slow
def test_its_tokenizer_is_the_one_that_pretraining_makes(tokenizer):
    made = make_tokenizer(seed=0)
    assert made.get_vocab() == tokenizer.get_vocab()
    assert made.chat_template == tokenizer.chat_template


@pytest.mark.slow
def test_pretraining_repeats_by_seed(tokenizer):
    first, second = make_model(seed=3), make_model(seed=3)
    for model in (first, second):
        pretrain(model, tokenizer, steps=2, seed=3)
    assert not torch.equal(first.lm_head.weight, make_model(seed=3).lm_head.weight)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.slow
def test_the_policy_is_right_about_half_of_the_time(policy, tokenizer):
    asked = problems("held_out", 200, seed=7)
    prompts = [({"role": "user", "content": problem.question},) for problem in asked]
    sampled = sample(policy, tokenizer, prompts, Sampling(max_tokens=80, seed=7))
    right = sum(answer_of(text) == problem.answer for problem, [text] in zip(asked, sampled, strict=True))
    assert 0.35 <= right / 200 <= 0.65
