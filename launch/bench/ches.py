"""Do pairs of high CHES displace likelihood, and does leaving them out help? Measured on the embedded world.

    python -m launch.bench.ches [--pairs 100] [--seeds 4] [--drop 0.05] [--into docs/ches.json]
    python -m launch.bench.ches --real            also the correlation on real HH pairs (needs ALIGN_SHARED)

Two kinds of pairs: ``one_digit``, built to be near-identical (the worked answer against the same with one digit
changed, whichever), and ``usual``, the world's own. The shipped policy is trained by DPO with *full batches*, so that
runs differ in their pairs and in nothing else: no order, no sampling.

    fifths    each fifth of the pairs by LN-CHES alone, and a random fifth: subsets as in the paper
    filter    near-identical pairs: all; those left when the highest share by LN-CHES is dropped; as many at random

Displacement is the change of the chosen response's log-prob, in nats: of the pairs trained on, of those that two runs
share, and of held-out pairs of the same kind. Every seed draws its own pairs, so intervals are Student's t over seeds.

References:
    Razin et al. 2024, arXiv:2410.08847 (section 5: subsets by quantile of CHES).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.console import quiet_libraries
from align.forward import bind, dense
from align.scoring import RowScorer
from align.sections import ModelSection
from align.train import main as train
from data.store import Ragged, TokenTable
from data.worlds import POLICY, candidates, pairs, problems
from evals.ches import of_batch
from evals.results import Results
from launch.bench.workloads import shared
from objectives.stats import mean_with_interval

KINDS = ("one_digit", "usual")
LEGS = ("chosen", "rejected")
BETA = 0.1
POSITIONS = 2048
"""Of a microbatch; steps are whole batches whatever it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all runs share; weight decay is 0 and the learning rate constant."""

    pairs: int = 100
    held_out: int = 30
    drop: float = 0.05
    steps: int = 10
    learning_rate: float = 5e-4


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = Setting()
    parser.add_argument("--seeds", type=int, default=4, help="draws of the pairs: 0, 1, …")
    parser.add_argument("--pairs", type=int, default=usual.pairs, help="to train on")
    parser.add_argument("--held_out", type=int, default=usual.held_out)
    parser.add_argument("--drop", type=float, default=usual.drop, help="share that the filter drops")
    parser.add_argument("--steps", type=int, default=usual.steps, help="of full batches")
    parser.add_argument("--learning_rate", type=float, default=usual.learning_rate, help="of AdamW, constant")
    parser.add_argument("--real", action="store_true", help="also real pairs with a real model")
    parser.add_argument("--into", type=Path, help="a JSON file")
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error(f"--seeds {options.seeds} gives no interval; take 2 or more")
    quiet_libraries()
    names = ("pairs", "held_out", "drop", "steps", "learning_rate")
    setting = Setting(**{name: getattr(options, name) for name in names})
    by_seed: dict[str, list[dict[str, float]]] = {}
    for seed in range(options.seeds):
        for kind in KINDS:
            by_seed.setdefault(f"fifths/{kind}", []).append(fifths(kind, setting, seed))
        by_seed.setdefault("filter/one_digit", []).append(filtered(setting, seed))
        print(json.dumps({name: values[-1] for name, values in by_seed.items()}), file=sys.stderr, flush=True)
    found: dict[str, Any] = {"settings": {name: getattr(options, name) for name in ("seeds", *names)}}
    found |= {name: estimates(values) for name, values in by_seed.items()}
    if options.real:
        with tempfile.TemporaryDirectory() as temporary:
            found["real"] = real(Path(temporary))
    text = json.dumps(found, indent=1)
    print(text)
    if options.into is not None:
        options.into.write_text(text + "\n")
    return 0


def fifths(kind: str, setting: Setting, seed: int) -> dict[str, float]:
    """Displacement by training on each fifth of the pairs by LN-CHES (1: the lowest) alone, and on a random one."""
    asked, held = drawn(kind, "train", setting.pairs, seed), drawn(kind, "held_out", setting.held_out, seed)
    subsets = {str(number): rows for number, rows in enumerate(fifths_by(ln_ches(asked)), start=1)}
    subsets["random"] = np.array(random.Random(f"fifth/{seed}").sample(range(len(asked)), len(subsets["1"])))
    found: dict[str, float] = {}
    for name, rows in subsets.items():
        own, unseen = displaced(asked.take(rows), [asked.take(rows), held], setting)
        found[f"own/{name}"], found[f"held_out/{name}"] = float(own.mean()), float(unseen.mean())
    for where in ("own", "held_out"):
        values = [found[f"{where}/{number}"] for number in range(1, 6)]
        found[f"{where}/highest − lowest"] = values[-1] - values[0]
        found[f"{where}/slope per fifth"] = float(np.polyfit(range(5), values, 1)[0])
        found[f"{where}/lowest − random"] = values[0] - found[f"{where}/random"]
    return found


def filtered(setting: Setting, seed: int) -> dict[str, float]:
    """Displacement by training on near-identical pairs, all or without some, and differences between such runs.

    ``own``: of the pairs a run was trained on. ``kept``: difference on the pairs that both runs were trained on.
    """
    asked, held = (
        drawn("one_digit", "train", setting.pairs, seed),
        drawn("one_digit", "held_out", setting.held_out, seed),
    )
    count = round(setting.drop * len(asked))
    away: dict[str, set[int]] = {
        "all": set(),
        "ches": set(np.argsort(ln_ches(asked), kind="stable")[-count:].tolist()),
        "random": set(random.Random(f"away/{seed}").sample(range(len(asked)), count)),
    }
    change, unseen = {}, {}
    found: dict[str, float] = {}
    for arm, gone in away.items():
        kept = np.array([row for row in range(len(asked)) if row not in gone])
        change[arm], unseen[arm] = displaced(asked.take(kept), [asked, held], setting)
        found[f"own/{arm}"], found[f"held_out/{arm}"] = float(change[arm][kept].mean()), float(unseen[arm].mean())
    for one, other in (("ches", "all"), ("random", "all"), ("ches", "random")):
        both = [row for row in range(len(asked)) if row not in away[one] | away[other]]
        name = f"{one} − {other}"
        found[f"own/{name}"] = found[f"own/{one}"] - found[f"own/{other}"]
        found[f"kept/{name}"] = float((change[one] - change[other])[both].mean())
        found[f"held_out/{name}"] = float((unseen[one] - unseen[other]).mean())
    return found


def real(folder: Path) -> dict[str, Any]:
    """CHES against displacement on real pairs with a real model, as it is."""
    run = folder / "real"
    status = train(
        [
            "--objective.name=dpo",
            f"--model_name_or_path={shared() / 'models' / 'stories260k'}",
            f"--dataset_name={shared() / 'data' / 'hh_harmless.jsonl.gz'}",
            f"--output_dir={run}",
            "--eval_share=0.3",
            "--learning_rate=5e-4",
            "--num_train_epochs=1",
            "--rows_per_step=32",
            "--save_strategy=no",
            "--evals=[ranking, {name: ches, edit_similarity: true}]",
        ]
    )
    assert status == 0
    found = {
        each.metric: [each.value, each.low, each.high, each.n]
        for each in Results.read(run / "results.json").results
        if each.step and (each.metric.startswith("ches/") or each.metric == "displacement/chosen")
    }
    return {"displacement/chosen": found.pop("displacement/chosen"), **found}


# ---- pairs ----


def drawn(kind: str, split: str, number: int, seed: int) -> TokenTable:
    """Tokens of the pairs of one kind, drawn from one split of the world."""
    asked = problems(split, number, seed=seed)
    if kind == "usual":
        made = pairs(asked, candidates(asked, 6, seed=seed), seed=seed).rows
        texts = [(row["prompt"][0]["content"], *(row[leg][0]["content"] for leg in LEGS)) for row in made]
    else:
        rng = random.Random(f"{kind}/{split}/{seed}")
        texts = [(each.question, each.worked, other_digit_anywhere(each.worked, rng)) for each in asked]
    tokenizer = AutoTokenizer.from_pretrained(POLICY)

    def tokens(*said: str) -> list[int]:
        roles = ("user", "assistant")
        messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=len(said) == 1)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompts = [tokens(prompt) for prompt, _, _ in texts]
    legs = {
        leg: [tokens(each[0], each[place])[len(prompt) :] for each, prompt in zip(texts, prompts, strict=True)]
        for place, leg in enumerate(LEGS, start=1)
    }
    return TokenTable(Ragged.of(prompts), {leg: Ragged.of(ids) for leg, ids in legs.items()})


def other_digit_anywhere(text: str, rng: random.Random) -> str:
    """The text with one of its digits changed, whichever: one token of the shipped policy."""
    place = rng.choice([found.start() for found in re.finditer(r"\d", text)])
    digit = rng.choice([digit for digit in "0123456789" if digit != text[place]])
    return text[:place] + digit + text[place + 1 :]


# ---- the policy ----


def fifths_by(scores: np.ndarray) -> list[np.ndarray]:
    """Row numbers of each fifth by score, the lowest first, of one size; up to four of the highest are left over."""
    size = len(scores) // 5
    order = np.argsort(scores, kind="stable")
    return [order[number * size : (number + 1) * size] for number in range(5)]


def ln_ches(table: TokenTable) -> np.ndarray:
    """LN-CHES of every pair under the shipped policy."""
    return scorer_of(policy(), table)(of_batch)["ln_ches"]


def displaced(table: TokenTable, seen: Sequence[TokenTable], setting: Setting) -> list[np.ndarray]:
    """Change of the chosen log-probs of some pairs, nats, by DPO of the shipped policy on full batches of others.

    Args:
        table: trained on.
        seen: tables whose chosen responses are looked at; (pair,) of each is returned.
        setting: steps and learning rate.
    """
    model = policy()
    before = [scorer_of(model, each)()["sum/chosen"] for each in seen]
    scorer = scorer_of(model, table)
    start = scorer()
    reference = torch.tensor(start["sum/chosen"] - start["sum/rejected"], dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, weight_decay=0.0)
    for _ in range(setting.steps):
        for rows in scorer.bins():
            batch = scorer.batches.pack(rows)
            scores = model(packed=batch)
            chosen, rejected = (dense(scores["logps"], batch, leg).sum(dim=1) for leg in LEGS)
            loss = -logsigmoid(BETA * (chosen - rejected - reference[torch.as_tensor(rows)])).sum() / len(table)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [scorer_of(model, each)()["sum/chosen"] - then for each, then in zip(seen, before, strict=True)]


def policy() -> torch.nn.Module:
    """The shipped policy, bound."""
    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    bind(model)
    return model


def scorer_of(model: torch.nn.Module, table: TokenTable) -> RowScorer:
    """Scores pairs, and lays out their microbatches."""
    return RowScorer(ModelSection(model_name_or_path=str(POLICY)), model, table, torch.float32, POSITIONS)


# ---- estimates ----


def estimates(by_seed: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean over seeds of every number, with its 95 % t interval."""
    found = {}
    for name in by_seed[0]:
        each = mean_with_interval([values[name] for values in by_seed], range(len(by_seed)), shares=False)
        found[name] = {"value": each.value, "low": each.low, "high": each.high}
    return found


if __name__ == "__main__":
    sys.exit(main())
