"""No key of anything registered is accepted and ignored, nor one of a rule: each must change the weights that come out
of a few steps. So must everything that can be added to an objective.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

from align.keys import NAMED
from align.recipe import KINDS, read_recipe
from align.train import main
from align.typed import Entry, idle_keys
from evals import run_directory
from objectives.registry import defaults
from tests.equivalence.runs import write_rows
from tests.equivalence.worlds import save_model, save_pairs
from tests.support import without_forecast

LEARNING_RATE = 1e-3
CHANGED = 1e-3 * LEARNING_RATE
"""Of the weight that differs most between two runs. Adam's steps are about a learning rate long; losses that differ in
rounding alone end nearer to each other than this."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """A run that others are compared with: each changes one key of one entry."""

    kind: str
    """The section of the entry."""
    name: str
    changes: tuple[str, ...]
    """``key=value``, one for each of the other runs."""
    keys: str = ""
    """Those that the entry has in this run, as in YAML."""
    rows: str = "pairs"
    more: tuple[str, ...] = ()
    """Further words of the command line."""

    @property
    def words(self) -> tuple[str, ...]:
        """Of this run."""
        keys = f", {self.keys}" if self.keys else ""
        return (*self.more, f"--{self.kind}={{name: {self.name}{keys}}}")

    def __str__(self) -> str:
        return " ".join([self.name, self.keys.replace(": ", "=")]).strip()


def objective(name: str, *changes: str, keys: str = "", rows: str = "pairs", more: tuple[str, ...] = ()) -> Base:
    return Base(kind="objective", name=name, changes=changes, keys=keys, rows=rows, more=more)


def modifier(name: str, *changes: str, keys: str = "", more: tuple[str, ...] = ()) -> Base:
    return Base(kind="modifiers", name=name, changes=changes, keys=keys, more=("--objective=dpo", *more))


def token_weight(name: str, *changes: str, keys: str = "") -> Base:
    """On both of two likelihood terms, so that ``legs`` has something to leave out."""
    more = ("--objective=[{name: sft}, {name: irpo}]",)
    return Base(kind="token_weights", name=name, changes=changes, keys=keys, more=more)


def reward_transform(name: str, *changes: str, keys: str = "") -> Base:
    """For an objective that reads scores, so that they matter even where they make the same pairs."""
    more = ("--objective=rpo_reward_aware",)
    return Base(kind="reward_transforms", name=name, changes=changes, keys=keys, rows="scored", more=more)


def row_filter(name: str, *changes: str, keys: str = "", more: tuple[str, ...] = ()) -> Base:
    return Base(kind="filter", name=name, changes=changes, keys=keys, rows="faulty", more=("--objective=dpo", *more))


def regularizer(name: str, *changes: str, keys: str = "") -> Base:
    return Base(kind="regularizers", name=name, changes=changes, keys=keys, more=("--objective=dpo",))


LIVE = ("--reference.source=live",)
THREE_STEPS = ("--max_steps=3",)
"""Where what one step observes acts in the next: log-ratios of the first are all 0."""
RATED = ("--model_name_or_path=rater",)
"""A reward model with two outputs."""

BASES = [
    objective("dpo", "beta=1", "label_smoothing=0.3"),
    objective("robust", "beta=1", "label_smoothing=0.3"),
    objective("dpo_norm", "beta=1"),
    # Its fine acts where a chosen response has become less likely, which takes pairs that are the other way round.
    objective("dpop", "beta=1", "penalty=5", more=("--columns={chosen: rejected, rejected: chosen}",)),
    objective("cal_dpo", "beta=0.1"),
    objective("hinge", "beta=1"),
    objective("ipo", "beta=0.5", "reduction=sum"),
    objective("exo", "beta=1", "label_smoothing=0.3"),
    objective("discopop", "beta=1", "tau=1"),
    objective("nca", "beta=1"),
    objective("bco_pair", "beta=1", "shift=none", more=THREE_STEPS),
    objective("sppo", "beta=0.1"),
    objective("apo_zero", "beta=1"),
    objective("apo_down", "beta=1"),
    objective("aot", "beta=1", "label_smoothing=0.3"),
    objective("aot_unpaired", "beta=1", "label_smoothing=0.3"),
    objective("beta_dpo", "beta=1", "modulation=0", "filtered=0.5", "momentum=0", "seed=1", more=THREE_STEPS),
    objective("cpo", "beta=1", "cpo_alpha=0", "label_smoothing=0.3", "link=hinge", "link=ipo"),
    objective("simpo", "beta=10", "gamma=0", "label_smoothing=0.3"),
    objective("alpha_po", "beta=10", "alpha=0", "gamma=1"),
    objective("orpo", "beta=1", "nll=sequence"),
    objective("tdpo", "beta=1", "alpha=2", "variant=tdpo1", more=LIVE),
    objective("kto", "beta=1", "desirable_weight=3", "undesirable_weight=3", rows="labels"),
    objective("apo_zero_unpaired", "beta=1", "desirable_weight=3", "undesirable_weight=3", rows="labels"),
    objective("bco", "beta=1", "prompt_encoder=policy", "shift=balanced", rows="labels", more=THREE_STEPS),
    objective(
        *("bco", "min_density_ratio=2", "max_density_ratio=0.5", "prompt_sample_size=2"),
        keys="prompt_encoder: policy",
        rows="labels",
    ),
    objective("tpo", "beta=0.1", "alpha=0", "label_smoothing=0.4", "link=hinge", "link=ipo", keys="beta: 1"),
    objective("tpo_l", "beta=5", "gamma=0", "alpha=1", "label_smoothing=0.4"),
    objective("rpo", "beta=1", "eta=0.1", "form=average", keys="eta: 0.5"),
    objective("irpo", "beta=1", "alpha=0.1", "form=sequence"),
    objective("rpo_reward_aware", "beta=1", "reward_scale=0.1", "distance=fwd_kl", "distance=sq"),
    # A mean over tokens is one over rows but for a factor, which tells steps apart that have unequally many tokens.
    objective("sft", "leg=chosen", "per=sequence", "per=row", more=("--rows_per_step=8", "--max_grad_norm=0")),
    # Of a long answer the probability underflows, and the number of attempts is nothing but a constant.
    objective("dco", "attempts=1000000", "leg=chosen", rows="short"),
    objective("ntl_mse", "leg=chosen"),
    objective("ntl_was", "leg=chosen"),
    objective(
        *("symbolic", "program=chosen and not rejected", "condition='true'", "addition=chosen and rejected"),
        *("link=squared", "link=hinge", "beta=0.1", "reduction=sum", "reference=true"),
        keys="program: rejected -> chosen, condition: chosen or rejected",
    ),
    objective(
        *("bradley_terry", "center_rewards_coefficient=1", "attribute=brevity"), keys="attribute: wit", more=RATED
    ),
    objective("margin_bt", "attribute=brevity", keys="attribute: wit", more=RATED),
    objective("scaled_bt", "attribute=brevity", keys="attribute: wit", more=RATED),
    objective(
        *("reward_regression", "attributes=[brevity]", "attributes=[wit, brevity]"),
        keys="attributes: [wit]",
        rows="rated",
        more=RATED,
    ),
    objective("xpo", "beta=1", "alpha=1", rows="explored"),
    objective("nash_md", "beta=10", rows="preferred", more=THREE_STEPS),
    modifier("r_dpo", "length_alpha=1"),
    modifier("ld_dpo", "ld_alpha=0", "applies_to=policy"),
    modifier("wpo", "clamp=false"),
    modifier("mm_dpo", "scaling=5", "sharpness=0.01"),
    modifier("f_divergence", "divergence=alpha", "divergence=forward_kl"),
    modifier("f_divergence", "divergence_alpha=0", keys="divergence: alpha"),
    modifier("tr_dpo", "sync_alpha=0.1", "sync_steps=2", keys="sync_steps: 1", more=(*LIVE, *THREE_STEPS)),
    token_weight("goldfish", "k=2", "h=3", "strategy=static", "legs=[gold]"),
    token_weight("goldfish", "start=2", keys="strategy: static"),
    token_weight("talr", "min_weight=0.9", "min_tau=50", "legs=[gold]"),
    token_weight("flow", "legs=[gold]"),
    token_weight("dft", "legs=[gold]"),
    *[
        token_weight(name, "temperature=0.1", "warmup_steps=1", "legs=[gold]")
        for name in ("lin_upper", "quadratic", "extremes")
    ],
    # At the initial weights there is nothing to hold back.
    regularizer("l2_init", "coef=1", "norm=l1", keys="coef: 100000"),
    regularizer("wise_ft", "tuned_share=0.9"),
    Base(
        kind="relabel",
        name="reward_augmented",
        changes=("form=text", "lowest=0", "highest=20", "decimals=0"),
        more=("--objective=dpo", "--as_chat"),
    ),
    reward_transform("log_sigmoid_centered", "quantile=0.2", "value=0.5"),
    reward_transform("z_score"),
    reward_transform("clip", "lowest=0.45", "highest=0.7", keys="lowest: 0.25"),
    reward_transform("length_penalty", "alpha=0.1", keys="alpha: 0.01"),
    reward_transform("unlikeliness", "beta_rank=1"),
    reward_transform(
        "r3", "encoder=second", "questions=closed", "most_words=3", "normalize=true", keys="encoder: first"
    ),
    reward_transform("r3", "highest_relevance=1", keys="encoder: first, questions: closed"),
    *[row_filter(name) for name in ("exact_duplicates", "same_answers", "identical_pairs", "echo", "contradictions")],
    row_filter("near_duplicates", "threshold=0.5", "ngram=1"),
    row_filter("length_ratio", "most=9"),
    row_filter("overlap", "against=[held.jsonl]", "ngram=5", keys="against: [long.jsonl]"),
    row_filter("shared_with_eval", more=("--eval_dataset_name=held.jsonl",)),
    row_filter("ches", "share=0.5", "kind=ches", keys="share: 0.2"),
    row_filter("label_noise", "share=0.1", "margin=0.05", "reward_model=judge", keys="share: 0.3"),
]

RULES = ("--objective=dpo",)
THRESHOLD = (*RULES, "--rule=threshold", "--threshold=0.35")
MIXTURE = ("--objective=[{name: dpo}, {name: sft}]",)
OTHER_KEYS = [
    *[("scored", RULES, words) for words in ("--rule=best_vs_random", "--margin=0.55", "--rule=margin --margin=0.2")],
    ("scored", THRESHOLD, "--threshold=0.75"),
    *[("pairs", MIXTURE, f"--objective.{number}.weight=0.1") for number in (0, 1)],
]
"""Keys of the sections that are about objectives but of no registered class: rows, and the words of two runs."""


def recipe(*words: str) -> dict[str, Entry]:
    """The entries of a recipe by section, of each the last."""
    given = ("--model_name_or_path=model", "--dataset_name=rows.jsonl", "--output_dir=run")
    keys = {word.partition("=")[0] for word in words}
    read = read_recipe(None, [*(word for word in given if word.partition("=")[0] not in keys), *words])
    return {kind: getattr(read, field)[-1] for kind, field in KINDS.items() if getattr(read, field)}


@pytest.mark.slow
def test_no_key_was_forgotten() -> None:
    """Every key of everything registered is changed, by itself, from a run in which it is not idle."""
    changed = set()
    for base in BASES:
        before = recipe(*base.words)[base.kind]
        for change in base.changes:
            key = change.partition("=")[0]
            after = recipe(*base.words, f"--{base.kind}.{change}")[base.kind]
            fields = defaults(NAMED[base.kind][base.name])
            assert [name for name in fields if getattr(before.built, name) != getattr(after.built, name)] == [key]
            assert key not in idle_keys(before), (base, key)
            changed.add((base.kind, base.name, key))
    every = {
        (kind, name, key)
        for kind, registry in NAMED.items()
        for name in registry.names()
        for key in defaults(registry[name])
    }
    assert changed == every
    names = {(kind, name) for kind, registry in NAMED.items() for name in registry.names()}
    assert {(base.kind, base.name) for base in BASES} == names, "also what has no keys can be added"


# ---- runs ----

SCORES = [(0.9, 0.4, 0.5, 0.2), (0.8, 0.3, 0.6, 0.7)]


def save_rows(folder: Path) -> None:
    """The same 24 prompts in every shape."""
    save_pairs(folder / "pairs.jsonl", number=24)
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    shapes: dict[str, Callable[[int, dict[str, Any]], dict[str, Any]]] = {
        "pairs": lambda i, row: {
            "prompt": row["prompt"],
            "chosen": f"{row['chosen']} {i * 3}",
            "rejected": row["rejected"],
            "gold": f" {'so ' * (i % 5 + 2)}{i * i} it is, and what was there.",
            "score_chosen": 5.4 + i / 10,
            "score_rejected": 1.7 + i / 12,
        },
        "labels": lambda i, row: {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 3 < 2},
        "explored": lambda i, row: {**row, "chosen_by": ("policy", "reference")[i % 3 == 0]},
        "preferred": lambda i, row: {"prompt": row["prompt"], "completion": row["chosen"], "preference": i / 24},
        "short": lambda i, row: {"prompt": row["prompt"], "chosen": f"{i % 10}", "rejected": "no", "gold": "yn"[i % 2]},
        "rated": lambda i, row: {"prompt": row["prompt"], "completion": row["chosen"], "wit": i % 5, "brevity": i % 3},
        "scored": lambda i, row: {
            "prompt": row["prompt"],
            "responses": [
                {"text": text, "score": score, "mean_logp": -1 - 0.3 * score - len(text) / 50}
                for text, score in zip((row["chosen"], row["rejected"], " no.", f" {i}."), SCORES[i % 2], strict=True)
            ],
            "gold": f" {'so ' * (i % 5 + 2)}it is.",
        },
    }
    for name, made in shapes.items():
        write_rows(folder / f"{name}.jsonl", [made(i, row) for i, row in enumerate(pairs)])
    first, second, third, *_ = pairs
    long = {**first, "prompt": "is there one who sat on what ran to the cat and was it you for once?"}
    faulty = [
        first,
        {**second, "chosen": second["rejected"], "rejected": second["chosen"]},
        {**third, "rejected": third["chosen"].upper()},
        {**third, "prompt": "you there, see?", "chosen": third["chosen"] * 7},
        {**third, "prompt": "what was it you ran from?", "rejected": " what was it you ran from? it was a mat."},
        long,
        {**long, "prompt": long["prompt"].upper()},
        {**long, "prompt": long["prompt"].replace("cat", "mat")},
        {**long, "prompt": "is there one who sat on it, then?"},
    ]
    write_rows(folder / "faulty.jsonl", [*pairs, *faulty])
    write_rows(folder / "long.jsonl", [{"text": long["prompt"]}])
    write_rows(folder / "held.jsonl", [{**third, "gold": "what was it you ran from?"}])


Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Weights]:
    """Maps rows and words to the weights that a run ends with; every run is made once."""
    folder = tmp_path_factory.mktemp("keys")
    save_model(folder / "model")
    outputs = {"num_labels": 2, "id2label": {0: "wit", 1: "brevity"}, "label2id": {"wit": 0, "brevity": 1}}
    config = AutoConfig.from_pretrained(folder / "model", **outputs)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "rater")
    for encoder in ("first", "second"):
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        BertModel(BertConfig(vocab_size=config.vocab_size, **shape)).save_pretrained(folder / encoder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    one = AutoConfig.from_pretrained(folder / "model", num_labels=1)
    AutoModelForSequenceClassification.from_config(one).save_pretrained(folder / "judge")
    for other in ("rater", "judge", "first", "second"):
        tokenizer.save_pretrained(folder / other)
    save_rows(folder)
    found: dict[tuple[str, ...], Weights] = {}

    def run(rows: str, *words: str) -> Weights:
        if (rows, *words) in found:
            return found[rows, *words]
        given = {
            "model_name_or_path": "model",
            "dataset_name": f"{rows}.jsonl",
            "output_dir": f"run-{len(found)}",
            "max_steps": 2,
            "rows_per_step": 24,
            "token_budget": 600,
            "learning_rate": LEARNING_RATE,
            "eval_share": 0,
            "save_strategy": "no",
        }
        named = {word.partition("=")[0].removeprefix("--") for word in words}
        named |= {"eval_share"} if "eval_dataset_name" in named else set()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setenv("ALIGN_CACHE", str(folder / "cache"))
            patch.setattr(run_directory, "finish", lambda *args: None)  # report and card, which nothing reads here
            without_forecast(patch)
            status = main([*(f"--{key}={value}" for key, value in given.items() if key not in named), *words])
        assert status == 0
        return found.setdefault((rows, *words), load_file(folder / given["output_dir"] / "model.safetensors"))

    return run


def difference(before: Weights, after: Weights) -> float:
    """Of the weight that differs most."""
    assert before.keys() == after.keys()
    return max(float((before[name] - after[name]).abs().max()) for name in before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "change"),
    [pytest.param(base, change, id=f"{base}, {change}") for base in BASES for change in base.changes],
)
def test_a_key_changes_the_weights(base: Base, change: str, weights: Callable[..., Weights]) -> None:
    before, after = weights(base.rows, *base.words), weights(base.rows, *base.words, f"--{base.kind}.{change}")
    assert difference(before, after) > CHANGED


@pytest.mark.slow
@pytest.mark.parametrize("base", [base for base in BASES if base.kind != "objective"], ids=str)
def test_what_is_added_changes_the_weights(base: Base, weights: Callable[..., Weights]) -> None:
    assert difference(weights(base.rows, *base.more), weights(base.rows, *base.words)) > CHANGED


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "words", "more"), OTHER_KEYS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_other_keys_change_the_weights(rows: str, words: tuple[str, ...], more: str, weights: Callable[..., Weights]):
    assert difference(weights(rows, *words), weights(rows, *words, *more.split())) > CHANGED


@pytest.mark.slow
def test_what_should_not_matter_does_not(weights: Callable[..., Weights]) -> None:
    """The comparisons above would be no tests if two runs alike differed."""
    words = ("--objective={name: bco, prompt_encoder: policy}",)
    assert difference(weights("labels", *words), weights("labels", *words, "--logging_steps=1")) == 0
