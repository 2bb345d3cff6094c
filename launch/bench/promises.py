"""Does every recipe do what it promises? Thirty steps of each on real data with a real model: one table.

    make promises            or: python -m launch.bench.promises [--only rpo,simpo]

Every recipe in ``launch/recipes`` trains a small pretrained model (stories260k) for thirty steps on 48 real prompts of
``alpaca_eval_scored`` (those that compare lengths: on short pairs of ``hh_harmless``), with its own settings but for
the learning rate, and is evaluated on the rows it was trained on. The data lie in ``ALIGN_SHARED`` (default
``../shared``). Intervals are 95 %, clustered by prompt, of one run each. ``docs/promises.md`` is the output.

What is asked of whom follows from what an objective declares:
  pairs            ranking accuracy (does the policy itself give the chosen response more probability?) rises
  labels           AUC of how much desirable and undesirable responses were raised is above 1/2
  one response     its log-prob per token rises
  preference       the log-prob of a response moves to the side on which it is preferred
  reward models    accuracy rises, or the error falls
and of some by name: RPO, DPOP, Cal-DPO and NCA keep chosen responses likelier than DPO at an equal margin, from a
policy that was fine-tuned on the chosen responses; tokens that goldfish drops keep more of their loss; under
length-regularised objectives longer responses gain less margin than under DPO; reward-aware RPO nears differences of
scores, and DFT raises the probability of tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from align.recipe import Recipe, read_recipe
from align.train import main as align_train
from evals import held_out
from launch.bench.sampled_rows import write_sampled
from launch.recipes import FOLDER, training_recipes
from objectives.stats import Estimate, mean_with_interval

DOCUMENT = Path(__file__).parents[2] / "docs" / "promises.md"
STEPS, PROMPTS = 30, 48
SCORED, HH = "alpaca_eval_scored", "hh_harmless"
SFT_STEPS = 90
"""Of likelihood of the chosen responses, before those of LIKELIER."""
PAIRS, SHORT, LENGTH_ALPHA = 400, 160, 0.05
"""Pairs at most, their length in tokens at most, and R-DPO's weight, for those of SHORTER."""
YES, NOT_SHOWN, NO = "yes", "not shown", "**no**"
RATES = {"rpo_reward_aware": 2e-5}
"""Whose margins should stop at small numbers; all others take 5e-4."""
LIKELIER = ("rpo", "dpop", "cal_dpo", "nca")
SHORTER = ("r_dpo", "ld_dpo", "simpo", "dpo_norm")

Sums = Mapping[str, np.ndarray]


@dataclass
class Trained:
    """What thirty steps of a recipe came to."""

    recipe: Recipe
    seconds: float
    sums: dict[int, Sums]
    """Per-row numbers of the training rows, by step."""
    prompts: np.ndarray
    """Which prompt each row has."""
    lines: list[dict[str, float]]
    """Of metrics.jsonl."""
    folder: Path

    @property
    def first(self) -> Sums:
        """Before the first step."""
        return self.sums[min(self.sums)]

    @property
    def last(self) -> Sums:
        """After the last step."""
        return self.sums[max(self.sums)]

    def clustered(self, values: np.ndarray) -> Estimate:
        """Their mean, with an interval over prompts."""
        return mean_with_interval(values.tolist(), self.prompts.tolist())


def shared() -> Path:
    """The folder of models and data.

    Raises:
        SystemExit: it is not there.
    """
    folder = Path(os.environ.get("ALIGN_SHARED") or Path(__file__).parents[3] / "shared")
    if not folder.is_dir():
        raise SystemExit(f"there is no folder {folder}: set ALIGN_SHARED to where models and data sets lie")
    return folder


def words(name: str, data: str, folder: Path, steps: int = STEPS) -> list[str]:
    """A recipe's command line on other data, with a smaller model."""
    path = FOLDER / f"{name}.yaml"
    recipe = read_recipe(path)
    rows = shared() / "data" / f"{data}.jsonl.gz"
    columns = recipe.mixture.needs.columns
    if columns:
        rows = write_sampled(rows, folder / f"{name}.jsonl", columns, PROMPTS)
    most = PROMPTS * 6 if "preference" in columns else PROMPTS  # of its rows every response is one
    found = [
        *(f"--config={path}", f"--model_name_or_path={shared() / 'models' / 'stories260k'}", f"--dataset_name={rows}"),
        *(f"--eval_dataset_name={rows}", f"--max_rows={most}", f"--output_dir={folder / name}"),
        *(
            f"--max_steps={steps}",
            "--rows_per_step=16",
            f"--learning_rate={RATES.get(name, 5e-4)}",
            "--train.warmup_steps=3",
        ),
        *("--save_strategy=no", "--logging_steps=3", "--eval_strategy=steps"),
        *(f"--eval_steps={3 if name in ('dpo', *LIKELIER) else 15}", "--max_dropped_share=0.95"),
        "--overwrite_output_dir",
    ]
    if recipe.data.columns:
        found += ["--columns={}", "--format=auto"]
    if recipe.data.dataset_config:
        found += ["--dataset_config=null"]
    if recipe.relabel:  # plain text has no system message, and these scores are probabilities
        found += ["--relabel.0.lowest=0", "--relabel.0.highest=1", "--relabel.0.form=text"]
        found += ["--dataset_train_split=train"]
    if any(entry.name == "reward_regression" for entry in recipe.objectives):
        found += ["--attributes=[score]"]
    return found


def train(name: str, data: str, folder: Path, *more: str) -> Trained:
    """Trains one recipe, without a warning, and evaluates it on its own rows."""
    recipe = read_recipe(FOLDER / f"{name}.yaml")
    seen: dict[int, Sums] = {}
    prompts: list[np.ndarray] = []
    call = held_out.HeldOut.__call__

    def noted(self: held_out.HeldOut, sums: Sums, step: int) -> dict[str, float]:
        order = np.argsort(sums["row"], kind="stable")
        seen[step] = {key: values[order] for key, values in sums.items()}
        prompts[:] = [self.split.prompts[seen[step]["row"]]]
        return call(self, sums, step)

    out, started = io.StringIO(), time.perf_counter()
    held_out.HeldOut.__call__ = noted  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            status = align_train([*words(name, data, folder), *more])
    finally:
        held_out.HeldOut.__call__ = call  # type: ignore[method-assign]
    said = out.getvalue()
    own = "evaluation prompts are in the training data too"
    complaints = [line for line in said.splitlines() if "warn" in line.lower() and own not in line]
    if status or complaints:
        raise SystemExit(f"{name}: {said[-2000:] if status else complaints[0]}")
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return Trained(recipe, time.perf_counter() - started, seen, prompts[0], lines, folder / name)


# ---- what is asked ----


def verdict(before: float, after: Estimate, *, rises: bool = True) -> str:
    """Whether a number moved as promised, by more than its interval after the last step."""
    sign = 1 if rises else -1
    if sign * (after.value - before) <= 0:
        return NO
    return YES if sign * ((after.low if rises else after.high) - before) > 0 else NOT_SHOWN


def without_interval(kept: bool) -> str:
    """The verdict on numbers of which no interval is known."""
    return f"{YES} (no interval)" if kept else NO


def promise(run: Trained) -> tuple[str, str, str]:
    """What the kind of objective promises, the numbers, and the verdict."""
    first, last = run.first, run.last
    value = next((key for key in last if key.startswith("value_")), None)
    if value is not None and "value_completion" in value:
        score = np.asarray(last[f"score_{value.split('/')[1]}"])
        before, after = (run.clustered((sums[value] - score) ** 2) for sums in (first, last))
        return "squared error falls", _both(before, after), verdict(before.value, after, rises=False)
    if value is not None:
        name = value.split("/")[1]
        before, after = (
            run.clustered(_wins(sums[f"value_chosen/{name}"], sums[f"value_rejected/{name}"])) for sums in (first, last)
        )
        return "accuracy rises", _both(before, after), verdict(before.value, after)
    if any(entry.name == "rpo_reward_aware" for entry in run.recipe.objectives):
        # Its margins are to be as large as differences of scores, not as large as can be.
        seen = [line["eval/loss"] for line in run.lines if "eval/loss" in line]
        numbers, kept = f"{seen[0]:.5f} → {seen[-1]:.5f}", without_interval(seen[-1] < seen[0])
        return "distance of margins from score differences falls", numbers, kept
    if "policy_chosen" in last and "policy_rejected" in last:
        before, after = (run.clustered(_wins(sums["policy_chosen"], sums["policy_rejected"])) for sums in (first, last))
        if run.recipe.mixture.needs.legs and _per_token(run.recipe):
            before, after = (
                run.clustered(
                    _wins(
                        sums["policy_chosen"] / sums["length_chosen"], sums["policy_rejected"] / sums["length_rejected"]
                    )
                )
                for sums in (first, last)
            )
            return "ranking accuracy per token rises", _both(before, after), verdict(before.value, after)
        return "ranking accuracy rises", _both(before, after), verdict(before.value, after)
    if "score_preference" in last:
        liked = np.asarray(last["score_preference"]) - 0.5
        before, after = (
            run.clustered(liked * (sums["policy_completion"] - first["policy_completion"])) for sums in (first, last)
        )
        return "log-prob follows preference", _both(before, after), verdict(0.0, after)
    if "policy_completion" in last:
        auc = [line["eval/labels/auc"] for line in run.lines if "eval/labels/auc" in line]
        kept = without_interval(auc[-1] > max(auc[0], 0.5))
        return "AUC of labels rises above 1/2", f"{auc[0]:.3f} → {auc[-1]:.3f}", kept
    if any(entry.name == "dft" for entry in run.recipe.token_weights):
        # Which it learns in place of log-probs: what is all but impossible stays so.
        seen = [line["dft/weight"] for line in run.lines if "dft/weight" in line]
        kept = without_interval(seen[-1] > seen[0])
        return "mean probability of tokens rises", f"{seen[0]:.4f} → {seen[-1]:.4f}", kept
    leg = next(key for key in last if key.startswith("policy_")).removeprefix("policy_")
    before, after = (run.clustered(sums[f"policy_{leg}"] / sums[f"length_{leg}"]) for sums in (first, last))
    return f"log-prob of {leg} per token rises", _both(before, after), verdict(before.value, after)


def _per_token(recipe: Recipe) -> bool:
    forms = [getattr(entry.built, "pair_form", None) for entry in recipe.objectives]
    return any(form is not None and form.per_token for form in forms)


def _wins(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.where(first == second, 0.5, (first > second).astype(float))


def _both(before: Estimate, after: Estimate) -> str:
    return f"{before.value:.3f} → {after.value:.3f} [{after.low:.3f}, {after.high:.3f}]"


def margin(sums: Sums) -> np.ndarray:
    """Difference of log-ratios of each pair, nats."""
    return (sums["policy_chosen"] - sums["ref_chosen"]) - (sums["policy_rejected"] - sums["ref_rejected"])


def chosen_at(run: Trained, wanted: float) -> float:
    """Mean change of the chosen log-prob, nats, where the mean margin first reaches a value (interpolated)."""
    start, before = run.sums[0], (0.0, 0.0)
    for step in sorted(run.sums)[1:]:
        sums = run.sums[step]
        up = sums["policy_chosen"] - start["policy_chosen"]
        down = sums["policy_rejected"] - start["policy_rejected"]
        after = (float((up - down).mean()), float(up.mean()))
        if after[0] >= wanted:
            share = (wanted - before[0]) / (after[0] - before[0])
            return before[1] + share * (after[1] - before[1])
        before = after
    return float("nan")


def reached(run: Trained) -> float:
    """The largest mean margin on the way, nats."""
    start = run.sums[0]
    moved = (
        (sums["policy_chosen"] - sums["policy_rejected"] - start["policy_chosen"] + start["policy_rejected"]).mean()
        for sums in run.sums.values()
    )
    return float(max(moved))


def length_slope(run: Trained) -> float:
    """Nats of margin per token by which the chosen response is longer (least squares), relative to the margin's spread.

    In units of standard deviations of the margin per standard deviation of the difference in length: a correlation.
    """
    start, last = run.sums[0], run.last
    moved = (last["policy_chosen"] - start["policy_chosen"]) - (last["policy_rejected"] - start["policy_rejected"])
    return float(np.corrcoef(moved, last["length_chosen"] - last["length_rejected"])[0, 1])


def compared(names: Sequence[str], goldfish: Trained | None, submit: Callable[..., Future[Trained]]) -> list[str]:
    """Rows of what is promised relative to DPO, and by goldfish.

    Args:
        names: recipes that are looked at.
        goldfish: its run, if it is one of them.
        submit: trains in another process, with the arguments of ``train``.
    """
    rows: list[str] = []
    wanted = [name for name in LIKELIER if name in names]
    if wanted:
        # From a policy that has learned the chosen responses, as is practice: there DPO lowers them.
        started = submit("sft", SCORED, "--max_length=256", "--leg=chosen", f"--max_steps={SFT_STEPS}").result()
        start = f"--model_name_or_path={started.folder}"
        tasks = {name: submit(name, SCORED, "--max_length=256", start, into="from-sft") for name in ("dpo", *wanted)}
        plain = tasks["dpo"].result()
        for name in wanted:
            run = tasks[name].result()
            at = 0.9 * min(reached(plain), reached(run))
            own, theirs = chosen_at(run, at), chosen_at(plain, at)
            numbers = f"{own:+.2f} nats, dpo {theirs:+.2f}, at a margin of {at:.1f}"
            rows.append(
                _row(
                    name,
                    "chosen responses stay likelier than under dpo at equal margin",
                    numbers,
                    without_interval(own > theirs),
                )
            )
    if goldfish is not None:
        lines = [line for line in goldfish.lines if "goldfish/loss_kept" in line]
        fell = {
            kind: lines[0][f"goldfish/loss_{kind}"] - lines[-1][f"goldfish/loss_{kind}"] for kind in ("kept", "dropped")
        }
        numbers = f"loss of dropped tokens falls by {fell['dropped']:.3f}, of kept ones by {fell['kept']:.3f}"
        kept = without_interval(fell["dropped"] < fell["kept"])
        rows.append(_row("goldfish", "dropped tokens keep more of their loss", numbers, kept))
    wanted = [name for name in SHORTER if name in names]
    if wanted:
        short = ("--truncation=drop", f"--max_rows={PAIRS}", f"--max_length={SHORT}", "--format=auto")
        more = {"r_dpo": (f"--length_alpha={LENGTH_ALPHA}",)}
        tasks = {name: submit(name, HH, *short, *more.get(name, ()), into="hh") for name in ("dpo", *wanted)}
        plain_slope = length_slope(tasks["dpo"].result())
        for name in wanted:
            own = length_slope(tasks[name].result())
            numbers = f"correlation with the difference in length {own:+.2f}, dpo {plain_slope:+.2f}"
            kept = without_interval(own < plain_slope)
            rows.append(_row(name, "longer responses gain less margin than under dpo", numbers, kept))
    return rows


def _row(name: str, what: str, numbers: str, kept: str) -> str:
    return f"| [{name}](../launch/recipes/{name}.yaml) | {what} | {numbers} | {kept} |"


ABOUT = (
    "Measured by `make promises`: thirty steps of 16 rows of every recipe, on the responses to up to "
    f"{PROMPTS} prompts of AlpacaEval with stories260k, evaluated on the rows trained on, of one run each. Recipes "
    "keep their own settings but for the learning rate: 5e-4 (reward-aware RPO: 2e-5), which suits this small model "
    "and not each objective's scale. So this says whether an objective moves what it is made to move, not how well it "
    "does on other rows, nor which one is better.",
    "",
    "*Measured* is before → after, with the 95 % interval over prompts of the number after. **yes**: it moved as "
    "promised, and the interval leaves out where it began. **not shown**: it moved as promised, by less than that. "
    "**yes (no interval)**: it moved as promised, and how sure that is was not measured. **no**: it did not.",
    "",
    "The rows of reward_augmented name the score that is wanted, which a model of 260 thousand weights can't read. "
    "Those of xpo and nash_md are no samples of the policy: every other chosen response passes for its own, and a "
    "score for the probability that a response is preferred. *Log-prob follows preference*: the mean of (preference − "
    "½) times the change of a response's log-prob, nats.",
)
BESIDE = (
    f"rpo, dpop, cal_dpo and nca, and DPO beside them, start from {SFT_STEPS} steps of sft on the chosen responses of "
    "the same rows; the margin is nine tenths of the smaller of the two largest mean margins. r_dpo, ld_dpo, simpo and "
    f"dpo_norm, and DPO beside them, train on pairs of Anthropic HH harmless (of the first {PAIRS} those of up to "
    f"{SHORT} tokens), r_dpo with length_alpha {LENGTH_ALPHA:g}; the correlation is that of a pair's gain in margin "
    "with the difference in length. One run each and no intervals.",
)


def report(names: Sequence[str], folder: Path) -> str:
    """The document."""
    runs: dict[str, Trained] = {}
    rows: list[str] = []
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes, one for each core
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:

        def submit(name: str, data: str, *more: str, into: str = "alone") -> Future[Trained]:
            return pool.submit(train, name, data, folder / into, *more)

        tasks = {name: submit(name, SCORED, "--max_length=256") for name in names}
        for name, task in tasks.items():
            runs[name] = task.result()
            rows.append(_row(name, *promise(runs[name])))
            print(f"{rows[-1]}  ({runs[name].seconds:.0f} s)", flush=True)
        further = compared(names, runs.get("goldfish"), submit)
    print("\n".join(further), flush=True)
    head = ["| recipe | promise | measured | kept |", "|---|---|---|---|"]
    lines = ["# Promises", "", *ABOUT, "", *head, *rows, "", "## Beside DPO", "", *BESIDE, "", *head, *further]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the bench; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="recipes, with commas between; the document is then only printed")
    only = [name for name in parser.parse_args(arguments).only.split(",") if name]
    names = only or [path.stem for path in training_recipes()]
    with tempfile.TemporaryDirectory() as temporary:
        os.environ.setdefault("ALIGN_CACHE", str(Path(temporary) / "cache"))
        document = report(names, Path(temporary))
    if only:
        print(document)
    else:
        DOCUMENT.write_text(document, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
