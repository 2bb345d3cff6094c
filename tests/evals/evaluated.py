"""Evaluations of the embedded world's policy, whose answers are drawn once and then read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.worlds import POLICY, candidates, problems
from evals.generations_file import Generation, read_generations
from evals.results import Result, Results
from evals.run import run
from evals.run_settings import read_job

SAMPLING = {"max_tokens": 40, "temperature": 0.7, "seed": 5}
PROMPTS = 6


def write_prompts(path: Path, number: int = PROMPTS) -> Path:
    """Questions of the world with their answers, and responses of others to them."""
    asked = problems("held_out", number, seed=1)
    rows = [
        {
            "prompt": [{"role": "user", "content": problem.question}],
            "answer": problem.answer,
            "output": first,
            "responses_of": [
                {"model": "one", "text": first, "score": 0.1},
                {"model": "two", "text": second, "score": 0.9},
            ],
        }
        for problem, (first, second) in zip(asked, candidates(asked, 2), strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_start(folder: Path, noise: float = 0.05) -> Path:
    """The policy with noise of this standard deviation on every weight: a reference that answers otherwise."""
    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(POLICY).save_pretrained(folder)
    return folder


class World:
    """A folder with prompts, a reference, and what was drawn of both."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prompts, self.start = folder / "prompts.jsonl", folder / "start"

    def make(self) -> None:
        """Draws what tests read."""
        write_prompts(self.prompts)
        save_start(self.start)
        self.evaluate(self.folder / "drawn", {"name": "generations", "reference": True}, drawn=False)

    def evaluate(
        self, out: Path, *evals: Mapping[str, Any], drawn: bool = True, **sections: Any
    ) -> tuple[dict[tuple[str, str], Result], list[str]]:
        """Results by metric and split, and what was said.

        Args:
            out: where to.
            evals: evaluations; prompts and sampling are added where they are absent.
            drawn: read what was drawn before.
            sections: of the recipe, in place of these.
        """
        if drawn:
            shutil.copytree(self.folder / "drawn" / "samples", out / "samples")
        prompts, sampling = {"dataset_name": str(self.prompts)}, dict(SAMPLING)
        recipe = {
            "model": {"model_name_or_path": str(POLICY), "name": "policy"},
            "reference": {"model": str(self.start)},
            "evals": [{"prompts": prompts, "sampling": sampling, **each} for each in evals],
            "serving": {"engine": "transformers"},
            "out": {"output_dir": str(out)},
            **sections,
        }
        out.mkdir(parents=True, exist_ok=True)
        (out / "eval.yaml").write_text(yaml.safe_dump(recipe))
        said: list[str] = []
        run(read_job(str(out / "eval.yaml"), []), say=said.append, report=False)
        found = Results.read(out / "results.json").results
        return {(each.metric, each.split): each for each in found}, said


def answers(out: Path, model: str) -> list[Generation]:
    """The lines of one model."""
    return [each for each in read_generations(out) if each.model == model]
