"""Objectives: each is one small pure formula over per-token log-probs.

``python -m objectives`` lists them; ``python -m objectives show NAME`` prints one in full.
"""

from objectives import bco, dpo, kto, relabel, rpo, sft, token_weights, tpo
from objectives.batch import Leg, LegBatch, masked_sum
from objectives.mixture import Mixture, mixture
from objectives.needs import Needs, Objective, Stateful
from objectives.output import Counts, Mean, Output, Term
from objectives.registry import (
    OBJECTIVES,
    REGULARIZERS,
    RELABELERS,
    REWARD_TRANSFORMS,
    TOKEN_WEIGHTS,
    Registry,
)
from objectives.relabel import LeftOut, Relabeler, RewardAugmented
from objectives.rows import Candidate, Message, Row, Text
from objectives.token_weights import AdaptiveWeight, MaskWeight, TokenWeight
from objectives.weighting import Weighting, weighting

__all__ = [
    "OBJECTIVES",
    "REGULARIZERS",
    "RELABELERS",
    "REWARD_TRANSFORMS",
    "TOKEN_WEIGHTS",
    "AdaptiveWeight",
    "Candidate",
    "Counts",
    "LeftOut",
    "Leg",
    "LegBatch",
    "MaskWeight",
    "Mean",
    "Message",
    "Mixture",
    "Needs",
    "Objective",
    "Output",
    "Registry",
    "Relabeler",
    "RewardAugmented",
    "Row",
    "Stateful",
    "Term",
    "Text",
    "TokenWeight",
    "Weighting",
    "bco",
    "dpo",
    "kto",
    "masked_sum",
    "mixture",
    "relabel",
    "rpo",
    "sft",
    "token_weights",
    "tpo",
    "weighting",
]
