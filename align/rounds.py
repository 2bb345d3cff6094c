"""Rounds: a policy improves on its own samples. Sample, score, make rows, train, evaluate; again with what came out.

    python -m align.rounds --config launch/recipes/rounds.yaml --output_dir runs/rounds
    python -m align.rounds --help       every key, its default and what it means

Every stage is a process of its own, so that its memory is free for the next one, and one of the commands that can be
run by hand. What is finished stands in state.json: killed at any moment and started again with the same command, it
goes on. At every hand-over the weights are checked to be those that are meant.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from align import samples as stored
from align import settings
from align.errors import RecipeError, RunError
from align.fingerprints import joined, mixed, weights_on_disk
from align.prompts import read_prompts
from align.round_results import Evaluation, evaluate, table
from align.round_settings import SCHEMA, Rounds, read_rounds, training_tree
from align.saving import STARTED
from data.files import write_atomically

STATE = "state.json"
Say = Callable[[str], None]


class _Policy:
    """Where the weights of a round are: a model, or an adapter on one."""

    def __init__(self, model: str, adapter: str | None, revision: str = "main") -> None:
        self.model, self.adapter, self.revision = model, adapter, revision

    def fingerprint(self) -> str:
        """As samples carry it."""
        base = weights_on_disk(self.model, self.revision)
        return joined(base, None if self.adapter is None else weights_on_disk(self.adapter))

    @property
    def folder(self) -> str:
        """The folder or Hub id to look at."""
        return self.adapter or self.model


class Runner:
    """Goes through the stages of all rounds, passing over what is finished.

    Args:
        rounds: the settings.
        say: told what is done.
    """

    def __init__(self, rounds: Rounds, say: Say = print) -> None:
        self.rounds, self.say = rounds, say
        self.root = Path(rounds.section.output_dir)
        self.state: dict[str, Any] = {}

    def run(self) -> list[Evaluation]:
        """Every round, or as many as it takes until the held-out score rises no more.

        Returns:
            What was measured before the first round and after each.
        Raises:
            RecipeError, RunError, DataError: one sentence; everything finished is kept.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        self._begin()
        section = self.rounds.section
        measured = [self._evaluated(0)]
        for number in range(1, section.rounds + 1):
            self._trained(number)
            measured.append(self._evaluated(number))
            self.say(f"round {number}: {measured[-1].line(measured[0])}")
            if section.patience is not None and _stands_still(measured, section.patience, section.least_gain):
                self.say(f"stopped after round {number}: the held-out score rose no more ({section.patience} rounds)")
                break
        best = max(range(len(measured)), key=lambda i: measured[i].score)
        where = self.policy(best).folder
        self.say("\n" + table(measured) + f"\n\nbest: round {best}, {where}")
        body = {"best": {"round": best, "path": where}, "rounds": [each.as_json() for each in measured]}
        write_atomically(self.root / "rounds.json", json.dumps(body, indent=1) + "\n")
        return measured

    # ---- what is finished ----

    def _begin(self) -> None:
        """Reads the state, and refuses to go on with other settings than those it was made with."""
        path = self.root / STATE
        wanted = json.loads(json.dumps(self.rounds.resolved()))
        if path.is_file():
            try:
                self.state = json.loads(path.read_text())
                was = self.state["settings"]
            except (ValueError, KeyError, TypeError):
                raise RunError(f"{path} is damaged; restore it, or take another output_dir") from None
            free = ["patience", "least_gain", "accelerate_config"]
            if not self.rounds.section.fresh_prompts:  # which divide the prompts by the number of rounds
                free.append("rounds")
            differing = [
                f"{section}.{key}"
                for section in {*was, *wanted}
                for key in {*_keys(was.get(section)), *_keys(wanted.get(section))}
                if not (section == "run" and key in free)
                and _value(was.get(section), key) != _value(wanted.get(section), key)
            ]
            if differing:
                raise RunError(
                    f"{self.root} holds rounds of other settings ({', '.join(sorted(differing)[:5])}); take them back, "
                    "or take another output_dir"
                )
        else:
            others = [each.name for each in self.root.iterdir() if each.name.startswith("round-")]
            if others:
                raise RunError(f"{self.root} holds {others[0]} and no {STATE}; take another output_dir")
            self._compare_prompts()
            self.state = {"settings": wanted, "done": {}}
            self._note()

    def _compare_prompts(self) -> None:
        """Refuses to judge rounds by the prompts that they train on."""
        judged = {prompt.id for prompt in read_prompts(self.rounds.held_out_prompts()).found}
        shared = sum(prompt.id in judged for prompt in read_prompts(self.rounds.data).found)
        if shared == len(judged):
            raise RecipeError("every prompt of held_out is also trained on; name other prompts, or another split")
        if shared:
            self.say(f"warning: {shared} of {len(judged)} held-out prompts are also trained on")

    def _note(self) -> None:
        write_atomically(self.root / STATE, json.dumps(self.state, indent=1) + "\n")

    def _stage(self, number: int, name: str, do: Callable[[Path], dict[str, Any] | None]) -> dict[str, Any]:
        """Does a stage unless it is finished; what it found is kept."""
        key = f"{number}/{name}"
        if key not in self.state["done"]:
            folder = self.root / f"round-{number}"
            folder.mkdir(exist_ok=True)
            found = do(folder)
            self.state["done"][key] = found or {}
            self._note()
        return self.state["done"][key]

    # ---- the stages ----

    def policy(self, number: int) -> _Policy:
        """The policy after a round; 0 is the one that everything starts from."""
        model = self.rounds.model
        if number == 0:
            return _Policy(model.model_name_or_path, model.adapter_name_or_path, model.model_revision)
        folder = str(self.root / f"round-{number}" / "train")
        if self.rounds.trains_adapter:
            return _Policy(model.model_name_or_path, folder, model.model_revision)
        return _Policy(folder, None)

    def _checked(self, number: int) -> _Policy:
        """The policy after a round, if its weights are still those that the round ended with."""
        policy = self.policy(number)
        found = policy.fingerprint()
        known = self.state.setdefault("weights", {}).setdefault(str(number), found)
        if known != found:
            raise RunError(
                f"{policy.folder} holds other weights than round {number} ended with; restore them, or take another "
                "output_dir"
            )
        self._note()
        return policy

    def _trained(self, number: int) -> None:
        section = self.rounds.section
        policy = self._checked(number - 1)

        def sample(folder: Path) -> None:
            self._draw(policy, folder, number, "samples", self.rounds.sampling_words(number))

        def opponent(folder: Path) -> None:
            other = self._checked(0 if section.reference == "initial" else number - 1)
            words = self.rounds.sampling_words(number, opponent=True)
            if section.opponent == "mixture":
                self._draw(policy, folder, number, "opponent", words, mixture_with=other)
            else:
                self._draw(other, folder, number, "opponent", words)

        def score(folder: Path) -> None:
            for name in ("samples", "opponent") if section.opponent != "none" else ("samples",):
                self._score(folder, number, name)

        def pair(folder: Path) -> None:
            config = folder / "pairs.yaml"
            config.write_text(yaml.safe_dump(self.rounds.pairs_tree(folder), allow_unicode=True))
            self._command(folder, number, "pairs", ["-m", "align.pairs", "--config", str(config)])

        def train(folder: Path) -> dict[str, Any]:
            output = folder / "train"
            if not _complete(output):
                config = folder / "train.yaml"
                initial = self.policy(0)
                tree = training_tree(self.rounds, number, folder, policy.model, policy.adapter, initial.model)
                config.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
                words = ["--config", str(config), "--resume_from_checkpoint", "auto"]
                self._command(folder, number, "train", [*self.rounds.launcher(), *words])
            return {"weights": self._checked(number).fingerprint()}

        self._stage(number, "sample", sample)
        if section.opponent != "none":
            self._stage(number, "opponent", opponent)
        self._stage(number, "score", score)
        self._stage(number, "pairs", pair)
        self._stage(number, "train", train)

    def _evaluated(self, number: int) -> Evaluation:
        policy = self._checked(number)

        def held_out(folder: Path) -> dict[str, Any]:
            self._draw(policy, folder, number, "held_out", self.rounds.held_out_words())
            self._score(folder, number, "held_out")
            return evaluate(folder / "held_out.jsonl", folder / "held_out.scores.jsonl", number).as_json()

        return Evaluation(**self._stage(number, "evaluate", held_out))

    def _draw(
        self,
        policy: _Policy,
        folder: Path,
        number: int,
        name: str,
        words: Sequence[str],
        mixture_with: _Policy | None = None,
    ) -> None:
        output = folder / f"{name}.jsonl"
        config = folder / f"{name}.yaml"
        second = None if mixture_with is None else mixture_with.model
        held_out = name == "held_out"
        tree = self.rounds.sample_tree(policy.model, policy.adapter, held_out=held_out, mixture_with=second)
        config.write_text(yaml.safe_dump(tree, allow_unicode=True))
        command = ["-m", "align.sample", "--config", str(config), *words, f"--out.output={output}"]
        self._command(folder, number, name, command)
        found = next(stored.read(output)).samples[0].origin.fingerprint
        wanted = policy.fingerprint()
        if mixture_with is not None:
            wanted = mixed(wanted, mixture_with.fingerprint(), self.rounds.section.mixture_coef)
        if found != wanted:
            raise RunError(
                f"{output} was drawn from other weights ({found}) than {policy.folder} holds; was the policy changed "
                "meanwhile? Remove the file and start again"
            )

    def _score(self, folder: Path, number: int, name: str) -> None:
        config = folder / f"{name}.scores.yaml"
        tree = self.rounds.scores_tree(transformed=name == "samples")
        config.write_text(yaml.safe_dump(tree, allow_unicode=True))
        files = [f"--samples={folder / f'{name}.jsonl'}", f"--output={folder / f'{name}.scores.jsonl'}"]
        self._command(folder, number, f"{name}.scores", ["-m", "align.scores", "--config", str(config), *files])

    def _command(self, folder: Path, number: int, name: str, words: Sequence[str]) -> None:
        """Runs a stage's process, with what it says in a log; the first error that it tells becomes ours."""
        log = folder / f"{name}.log"
        start = log.stat().st_size if log.exists() else 0
        self.say(f"round {number}: {name}")
        with log.open("a") as file:
            process = subprocess.Popen([sys.executable, *words], stdout=file, stderr=subprocess.STDOUT)
            with _ended_together(process):
                status = process.wait()
        if status:
            lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
            told = [line.split("error: ", 1)[1] for line in lines if "error: " in line and "Traceback" not in line]
            how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            raise RunError(
                f"round {number}, {name}: {told[-1] if told else how} (log: {log}); what is "
                "finished is kept, and the same command goes on"
            )


def _complete(output: Path) -> bool:
    """Whether a training run has saved its weights: it may have been killed before that was noted."""
    weights = [*output.glob("model*.safetensors"), *output.glob("adapter_model.safetensors")]
    return bool(weights) and not (output / STARTED).exists()


def _keys(section: Any) -> list[str]:
    return list(section) if isinstance(section, dict) else [""]


def _value(section: Any, key: str) -> Any:
    return section.get(key) if isinstance(section, dict) else section


def _stands_still(measured: Sequence[Evaluation], patience: int, least_gain: float) -> bool:
    best = max(range(len(measured) - patience), key=lambda i: measured[i].score, default=None)
    if best is None:
        return False
    return all(each.score < measured[best].score + least_gain for each in measured[-patience:])


@contextmanager
def _ended_together(process: subprocess.Popen[Any]) -> Any:
    """Passes on what asks this process to end, so that no stage goes on alone."""

    def pass_on(number: int, _: Any) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs rounds; see ``align.settings.command``."""

    def do(config: str | None, words: list[str]) -> None:
        Runner(read_rounds(config, words), say=settings.say).run()

    return settings.command(arguments, __doc__, SCHEMA, do)


if __name__ == "__main__":
    sys.exit(main())
