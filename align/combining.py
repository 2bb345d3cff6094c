"""Several scores of a response made one: transformed per prompt, then weighed and added."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from align.errors import RunError
from align.samples import Group
from data.encoders import Encoder
from data.rescoring import KEY
from objectives.reward_transforms import Answers, Embed, RewardTransform, asked, plain
from objectives.rows import Text

Rewards = Mapping[str, Sequence[float | None]]
"""By name, the scores of a prompt's responses."""


def combine(
    rewards: Rewards,
    weights: Mapping[str, float],
    transforms: Sequence[RewardTransform] = (),
    *,
    prompt: Text = "",
    responses: Sequence[str] | None = None,
    gold: str | None = None,
    mean_logps: Sequence[float | None] | None = None,
    encoders: Mapping[str, Embed] | None = None,
) -> list[float | None]:
    """One score for each response to a prompt.

        score = Σ_j weight_j · transformed reward_j

    Transforms come first, because several of them (``z_score``, ``log_sigmoid_centered``) depend on a reward's own
    scale; rewards that they make get a weight of 1. A reward of weight 0 is recorded and neither transformed nor added.

    Args:
        rewards: by name; None where a response could not be scored.
        weights: by name; 1 for those that are not named.
        transforms: in the order in which they run, over the responses that have all rewards.
        prompt: what was asked.
        responses: their texts, which some transforms read.
        gold: a response known to be right.
        mean_logps: of a token of each response, under the policy that drew it, in nats.
        encoders: sentence encoders by the name that transforms ask for.
    Returns:
        None where a reward that counts is missing.
    Raises:
        ValueError: a transform does not fit these rewards, or no reward has a weight other than 0.
        RunError: a score is not finite.
    """
    what = {"prompt": prompt, "responses": responses, "gold": gold, "mean_logps": mean_logps, "encoders": encoders}
    answers, places = answers_of(rewards, weights, **what)  # type: ignore[arg-type]
    found: list[float | None] = [None] * len(next(iter(rewards.values())))
    if answers is None:
        return found
    for transform in transforms:
        answers = transform(answers)
    with np.errstate(over="ignore", invalid="ignore"):  # told below
        total = answers.scores @ np.array([weights.get(name, 1.0) for name in answers.names])
    for place, score in zip(places, total.tolist(), strict=True):
        if not math.isfinite(score):
            raise RunError(f"the combined score of response {place} is {score}; mend the weights or reward_transforms")
        found[place] = score
    return found


def answers_of(
    rewards: Rewards,
    weights: Mapping[str, float],
    *,
    prompt: Text,
    responses: Sequence[str] | None,
    gold: str | None = None,
    mean_logps: Sequence[float | None] | None = None,
    encoders: Mapping[str, Embed] | None = None,
) -> tuple[Answers | None, list[int]]:
    """What transforms see of a prompt's responses, and which responses these are: those with all rewards that count."""
    names = [name for name in rewards if weights.get(name, 1.0) != 0]
    if not names:
        raise ValueError("no scorer has a weight other than 0, so there is nothing to add up; give one a weight")
    columns = [rewards[name] for name in names]
    places = [i for i, values in enumerate(zip(*columns, strict=True)) if None not in values]
    if not places:
        return None, []
    texts = [""] * len(columns[0]) if responses is None else responses
    known = [logp for i in places if mean_logps is not None and (logp := mean_logps[i]) is not None]
    answers = Answers(
        prompt=asked(prompt),
        responses=[plain(texts[i]) for i in places],
        scores=np.array([[column[i] for column in columns] for i in places], dtype=np.float64),
        names=tuple(names),
        gold=gold,
        mean_logps=None if not known or len(known) < len(places) else np.array(known, dtype=np.float64),
        encoders=encoders or {},
    )
    return answers, places


class Combiner:
    """``combine`` for many prompts, whose texts are embedded together.

    Args:
        weights: by the names of scores.
        transforms: in order.
    Raises:
        DataError: an encoder can't be loaded.
    """

    def __init__(self, weights: Mapping[str, float], transforms: Sequence[RewardTransform]) -> None:
        self.weights, self.transforms = weights, transforms
        wanted = dict.fromkeys(getattr(each, "encoder", "") for each in transforms if hasattr(each, "encoder"))
        self.encoders = {name: Encoder(name, key=KEY) for name in wanted}

    def __call__(self, groups: Sequence[Group], rewards: Sequence[Rewards]) -> list[list[float | None]]:
        """The scores of every group's samples.

        Raises:
            RunError: a transform does not fit, or a score is not finite; names the prompt.
        """
        found: list[list[float | None]] = []
        given: list[dict[str, Any]] = [
            {
                "prompt": group.prompt,
                "responses": [sample.text for sample in group.samples],
                "gold": _gold(group),
                "mean_logps": [sample.mean_logp for sample in group.samples],
            }
            for group in groups
        ]
        for name, encoder in self.encoders.items():
            encoder.prefetch(self._texts(name, rewards, given))
        for group, scores, what in zip(groups, rewards, given, strict=True):
            try:
                found.append(combine(scores, self.weights, self.transforms, **what, encoders=self.encoders))
            except (ValueError, RunError) as error:
                raise RunError(f"prompt {group.prompt_id}: {error}") from None
        return found

    def _texts(self, encoder: str, rewards: Sequence[Rewards], given: Sequence[Mapping[str, Any]]) -> list[str]:
        texts: list[str] = []
        for scores, what in zip(rewards, given, strict=True):
            answers, _ = answers_of(scores, self.weights, **what)
            for transform in self.transforms if answers is not None else ():
                if getattr(transform, "encoder", None) == encoder:
                    texts += transform.reads(answers)  # type: ignore[attr-defined]
        return texts


def _gold(group: Group) -> str | None:
    value = next((group.columns[name] for name in ("gold", "reference") if group.columns.get(name)), None)
    return plain(tuple(value) if isinstance(value, list) else value) if isinstance(value, str | list | tuple) else None
