"""Objectives: each is one small pure formula over per-token log-probs.

``python -m objectives`` lists them; ``python -m objectives show NAME`` prints one in full.
"""

from objectives import dpo, sft
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
from objectives.rows import Message, Row, Text

__all__ = [
    "OBJECTIVES",
    "REGULARIZERS",
    "RELABELERS",
    "REWARD_TRANSFORMS",
    "TOKEN_WEIGHTS",
    "Counts",
    "Leg",
    "LegBatch",
    "Mean",
    "Message",
    "Mixture",
    "Needs",
    "Objective",
    "Output",
    "Registry",
    "Row",
    "Stateful",
    "Term",
    "Text",
    "dpo",
    "masked_sum",
    "mixture",
    "sft",
]
