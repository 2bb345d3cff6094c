"""What answers look like, whoever judges them: length, repetition, diversity, refusals, empty ones.

    texts, token counts ─► measure ─► Measured

References:
    Welleck et al. 2019, arXiv:1908.04319 (share of repeated n-grams, there seq-rep-n with n = 4); Li et al. 2016,
    arXiv:1510.03055 (distinct-1 and distinct-2); Efron and Stein 1981, doi:10.1214/aos/1176345462 (the jackknife's
    variance is not too small); Zou et al. 2023, arXiv:2307.15043 (openings of refusals).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from scipy.special import stdtrit

from align.scorers import without_thoughts
from evals.bootstrap import numbers_of
from evals.measured import Measured, kept_prompts, means_by_prompt, own_prompts
from evals.ranking import Metric, mean_of, share_of
from objectives.stats import Estimate, clustered_wilson

METRICS: Mapping[str, Metric] = {
    "generations/tokens": Metric("Tokens of an answer, end token included", "tokens"),
    "generations/characters": Metric("Characters of an answer", "characters"),
    "generations/at_limit": Metric("Answers that were cut off at their limit of tokens", "share"),
    "generations/repetition": Metric("Share of an answer's 4-grams of words that it has had before", "share", "lower"),
    "generations/distinct_1": Metric("Different words among all words of all answers", "share"),
    "generations/distinct_2": Metric("Different pairs of words among all pairs of all answers", "share"),
    "generations/refusals": Metric("Answers that begin as refusals do", "share"),
    "generations/empty": Metric("Answers without any text", "share", "lower"),
    "generations/same_as_reference": Metric("Answers that are the reference's, letter by letter", "share"),
}
"""Every metric of this module."""
REPEATED = 4
"""Words of the n-grams that repetition counts."""
OPENINGS = (
    "i'm sorry",
    "i am sorry",
    "sorry, but",
    "sorry, i",
    "i apologize",
    "i apologise",
    "my apologies",
    "as an ai",
    "i'm an ai",
    "as a language model",
    "as a large language model",
    "i'm just an ai",
    "i'm not able to",
    "i am not able to",
    "i'm unable to",
    "i am unable to",
    "i cannot",
    "i can't",
    "i can not",
    "i won't",
    "i must decline",
    "i have to decline",
    "i'm not comfortable",
    "i do not feel comfortable",
    "i don't feel comfortable",
    "it is not appropriate",
    "it's not appropriate",
    "unfortunately, i can",
)
"""How refusals begin, in lower case. English only; "I'm sorry to hear that" counts as one, a refusal in the middle
of an answer does not, and neither does a polite change of subject: the share shows changes, it is no measure of
safety."""
_QUOTES = str.maketrans({"\N{RIGHT SINGLE QUOTATION MARK}": "'", "\N{MODIFIER LETTER APOSTROPHE}": "'"})


def measure(
    texts: Sequence[str],
    prompts: Sequence[Hashable] | None = None,
    *,
    tokens: Sequence[int] | None = None,
    at_limit: Sequence[bool] | None = None,
    reference: Sequence[str | None] | None = None,
) -> Measured:
    """Everything that can be said of answers by themselves, with 95 % intervals clustered by prompt.

    Args:
        texts: the answers, shape (answer,); what was thought before does not count, except as tokens.
        prompts: of each; each its own where left out.
        tokens: of each, end token included; None where they are not known.
        at_limit: whether each ended at its limit of tokens.
        reference: the reference's answer to the same prompt, drawn alike; None where it has none.
    Raises:
        ValueError: no answers, or lengths that differ.
    """
    names = own_prompts(prompts, len(texts))
    if not texts:
        raise ValueError("there are no answers to measure; sample some")
    for what, values in (("tokens", tokens), ("at_limit", at_limit), ("reference", reference)):
        if values is not None and len(values) != len(texts):
            raise ValueError(f"{what} has {len(values)} entries, and there are {len(texts)} answers")
    said = [without_thoughts(text).strip() for text in texts]
    shares: dict[str, Sequence[bool]] = {
        "generations/refusals": [is_refusal(text) for text in said],
        "generations/empty": [not text for text in said],
    }
    if at_limit is not None:
        shares["generations/at_limit"] = at_limit
    numbers: dict[str, Sequence[float]] = {"generations/characters": [len(text) for text in said]}
    if tokens is not None:
        numbers["generations/tokens"] = tokens
    repeated = np.array([repetition(text) for text in said])
    numbers["generations/repetition"] = repeated.tolist()
    estimates: dict[str, Estimate] = {}
    by_prompt: dict[str, Mapping[Hashable, float]] = {}
    for name, values in shares.items():
        array = np.asarray(values, dtype=np.float64)
        estimates[name] = clustered_wilson(array.tolist(), names)
        by_prompt[name] = means_by_prompt(array, names)
    for name, values in numbers.items():
        array = np.asarray(values, dtype=np.float64)
        keep = np.isfinite(array)
        if keep.any():
            kept = kept_prompts(names, keep)
            of = share_of if name == "generations/repetition" else mean_of
            estimates[name] = of(array[keep], kept)
            by_prompt[name] = means_by_prompt(array[keep], kept)
    for n in (1, 2):
        found = distinct(said, names, n)
        estimates |= {} if found is None else {f"generations/distinct_{n}": found}
    if reference is not None:
        known = np.array([each is not None for each in reference], dtype=bool)
        if known.any():
            same = np.array([a == b for a, b in zip(texts, reference, strict=True)], dtype=np.float64)[known]
            kept = kept_prompts(names, known)
            estimates["generations/same_as_reference"] = clustered_wilson(same.tolist(), kept)
            by_prompt["generations/same_as_reference"] = means_by_prompt(same, kept)
    return Measured(
        estimates=estimates,
        extra={"words_per_ngram": REPEATED, "too_short_for_repetition": int(np.isnan(repeated).sum())},
        by_prompt=by_prompt,
    )


def repetition(text: str, n: int = REPEATED) -> float:
    """1 − different n-grams/n-grams of one answer; "a b a b a b" has three bigrams "a b", two "b a": 1 − 2/5 = 0.6.

    Words are what stands between white space. NaN with fewer than n words.

    Args:
        text: an answer.
        n: words of an n-gram.
    """
    grams = ngrams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else float("nan")


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """All runs of n words, in order."""
    words = text.split()
    return list(zip(*(words[i:] for i in range(n)), strict=False)) if n > 1 else [(word,) for word in words]


def distinct(texts: Sequence[str], prompts: Sequence[Hashable], n: int) -> Estimate | None:
    """Different n-grams among all n-grams of all answers: "a b", "a c" have 3 of 4 words.

    It falls as answers become more: compare the same number of prompts. The interval is a t interval around the value
    with the jackknife's standard error, every prompt left out once; a bootstrap, in which prompts occur twice, would
    find fewer different ones.

    Args:
        texts: answers.
        prompts: of each.
        n: words of an n-gram.
    Returns:
        None where no answer has n words.
    """
    number = numbers_of(prompts)
    clusters = int(number.max()) + 1
    of_prompt: list[Counter[tuple[str, ...]]] = [Counter() for _ in range(clusters)]
    for text, prompt in zip(texts, number.tolist(), strict=True):
        of_prompt[prompt].update(ngrams(text, n))
    holders: Counter[tuple[str, ...]] = Counter()
    for counted in of_prompt:
        holders.update(counted.keys())
    total = sum(counted.total() for counted in of_prompt)
    if not total:
        return None
    value = len(holders) / total
    stderr = low = high = float("nan")
    own = np.array([sum(holders[gram] == 1 for gram in counted) for counted in of_prompt])
    left = total - np.array([counted.total() for counted in of_prompt])
    if clusters > 1 and (left > 0).all():
        without = (len(holders) - own) / left
        stderr = float(np.sqrt((clusters - 1) / clusters * ((without - without.mean()) ** 2).sum()))
        half = float(stdtrit(clusters - 1, 0.975)) * stderr
        low, high = max(0.0, value - half), min(1.0, value + half)
    return Estimate(value=value, stderr=stderr, low=low, high=high, n=total, clusters=clusters, interval="jackknife-t")


def is_refusal(text: str) -> bool:
    """Whether an answer begins as refusals do (``OPENINGS``), whatever marks stand before its first word."""
    start = re.sub(r"^\W+", "", text.translate(_QUOTES).lower())
    return start.startswith(OPENINGS)
