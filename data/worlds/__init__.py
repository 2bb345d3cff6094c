"""An embedded world: word problems whose answers can be checked, with every flaw that real preference data has.

    from data.worlds import Flaws, candidates, pairs, problems

    asked = problems("train", 2000, seed=0)
    made = pairs(asked, candidates(asked, 8), flaws=Flaws(label_noise=0.1))

``POLICY`` is a small language model that solves about half of the problems when sampled at temperature 1.
"""

from __future__ import annotations

from pathlib import Path

from data.worlds.flaws import Flaws
from data.worlds.problems import SPLITS, Problem, problem_of, problems
from data.worlds.responses import KINDS, candidates, respond
from data.worlds.rows import ROW_KINDS, Made, gold, labels, pairs, scored, triples
from data.worlds.scoring import answer_of, gold_parts, gold_score

POLICY: Path = Path(__file__).parent / "policy"
"""Folder of the shipped policy: weights, tokenizer, chat template. ``python -m launch.pretrain_world`` makes it."""

__all__ = [
    "KINDS",
    "POLICY",
    "ROW_KINDS",
    "SPLITS",
    "Flaws",
    "Made",
    "Problem",
    "answer_of",
    "candidates",
    "gold",
    "gold_parts",
    "gold_score",
    "labels",
    "pairs",
    "problem_of",
    "problems",
    "respond",
    "scored",
    "triples",
]
