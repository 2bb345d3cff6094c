"""Objectives: each is one small pure formula over per-token log-probs.

``python -m objectives`` lists them; ``python -m objectives show NAME`` prints one in full.
"""

from objectives import (
    absolute,
    bco,
    beta_dpo,
    coverage,
    dpo,
    kto,
    links,
    modifiers,
    number_tokens,
    online,
    plugins,
    reference_free,
    regularizers,
    relabel,
    reward_aware,
    reward_model,
    reward_transforms,
    rpo,
    sample_weights,
    sft,
    sorting,
    symbolic,
    tdpo,
    token_weights,
    tpo,
)
from objectives.batch import Leg, LegBatch, masked_sum
from objectives.columns import COLUMNS, Column
from objectives.mixture import Mixture, mixture
from objectives.modifiers import Modified, Modifier, modified
from objectives.needs import EXTRAS, Coupled, Needs, Objective, PairForm, Stateful, form_of, with_own_step
from objectives.output import Counts, Mean, Output, Term
from objectives.registry import (
    MODIFIERS,
    OBJECTIVES,
    REGULARIZERS,
    RELABELERS,
    REWARD_TRANSFORMS,
    TOKEN_WEIGHTS,
    Registry,
)
from objectives.regularizers import Averaging, Penalty
from objectives.relabel import LeftOut, Relabeler, RewardAugmented
from objectives.reward_transforms import Answers, RewardTransform
from objectives.rows import Candidate, Message, Row, Text
from objectives.sample_weights import SampleWeight
from objectives.token_weights import AdaptiveWeight, MaskWeight, TokenWeight
from objectives.weighting import Weighting, weighting

__all__ = [
    "COLUMNS",
    "EXTRAS",
    "MODIFIERS",
    "OBJECTIVES",
    "REGULARIZERS",
    "RELABELERS",
    "REWARD_TRANSFORMS",
    "TOKEN_WEIGHTS",
    "AdaptiveWeight",
    "Answers",
    "Averaging",
    "Candidate",
    "Column",
    "Counts",
    "Coupled",
    "LeftOut",
    "Leg",
    "LegBatch",
    "MaskWeight",
    "Mean",
    "Message",
    "Mixture",
    "Modified",
    "Modifier",
    "Needs",
    "Objective",
    "Output",
    "PairForm",
    "Penalty",
    "Registry",
    "Relabeler",
    "RewardAugmented",
    "RewardTransform",
    "Row",
    "SampleWeight",
    "Stateful",
    "Term",
    "Text",
    "TokenWeight",
    "Weighting",
    "absolute",
    "bco",
    "beta_dpo",
    "coverage",
    "dpo",
    "form_of",
    "kto",
    "links",
    "masked_sum",
    "mixture",
    "modified",
    "modifiers",
    "number_tokens",
    "online",
    "plugins",
    "reference_free",
    "regularizers",
    "relabel",
    "reward_aware",
    "reward_model",
    "reward_transforms",
    "rpo",
    "sample_weights",
    "sft",
    "sorting",
    "symbolic",
    "tdpo",
    "token_weights",
    "tpo",
    "weighting",
    "with_own_step",
]

plugins.load_entry_points()
