"""What the doctor says: findings with a verdict, and the file that holds them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import write_atomically

VERSION = 1
"""Of ``doctor.json``; raise when a reader of the former one would misread it."""
VERDICTS = ("fine", "remark", "warning", "fault")
"""In words: nothing there; worth knowing; it changes what is learned; what comes out would mislead."""
EXAMPLES = 5
"""Rows that a finding names, at most."""


@dataclass(frozen=True, slots=True)
class Limits:
    """From which share of the rows on a finding is a warning, or a fault; below it is a remark, at zero it is fine."""

    warning: float
    fault: float
    why: str


NEVER = math.inf
ANY = 0.0
LIMITS: Mapping[str, Limits] = {
    "dropped": Limits(0.05, NEVER, "one in twenty is more than the odd broken line; data.max_dropped_share decides"),
    "exact_duplicates": Limits(0.01, 0.2, "a copy is a weight of 2; from a fifth on, an epoch is not what it says"),
    "same_answers": Limits(0.2, NEVER, "meant where several pairs are made of one prompt's responses"),
    "near_duplicates": Limits(0.05, NEVER, "templates are alike on purpose; only someone who reads them can tell"),
    "shared_prompts": Limits(ANY, ANY, "evaluation on a prompt that was trained on measures memory"),
    "overlap": Limits(ANY, ANY, "a benchmark whose text was trained on measures memory"),
    "identical_pairs": Limits(ANY, 0.05, "such a pair has no better response: its loss is log 2 and teaches nothing"),
    "contradictions": Limits(ANY, 0.02, "the two gradients cancel; two in a hundred bound what any model can reach"),
    "echo": Limits(0.01, 0.1, "the policy learns to repeat the question; from a tenth on prompts are in the responses"),
    "empty_responses": Limits(ANY, 0.05, "nothing is learned but to end"),
    "scores": Limits(ANY, 0.05, "a chosen response with the lower score says the opposite of its scores"),
    "replacement_characters": Limits(0.001, NEVER, "the text is lost; one row in a thousand is a fault of the export"),
    "mojibake": Limits(0.001, NEVER, "the policy would write it too"),
    "control_characters": Limits(0.001, NEVER, "nobody types them; they come from broken exports"),
    "html": Limits(0.05, NEVER, "some answers are about HTML"),
    "special_tokens": Limits(ANY, NEVER, "tokenizers read them as control tokens: a turn may end inside a text"),
    "truncation": Limits(0.1, NEVER, "responses without an end teach not to end"),
    "cut_differences": Limits(ANY, 0.05, "the pair was one before it was cut; then it is dropped"),
    "boundaries": Limits(0.01, NEVER, "the first tokens of the response count as prompt"),
    "ends": Limits(0.01, NEVER, "templates that end twice train what is never generated"),
    "label_noise": Limits(0.05, NEVER, "a few in a hundred lie against a good model too; more are worth reading"),
    "label_noise_reward_model": Limits(
        0.02, 0.2, "sure and wrong is rare in a good model; from a fifth on, doubt it as well"
    ),
    "beginnings": Limits(0.01, NEVER, "the text has its first token already; it is removed"),
}
"""By check; each with its reason."""
LENGTH_WARNING, LENGTH_REMARK = 0.6, 0.5
"""Share of pairs that the longer (or the shorter) response wins: the interval lies above it. 0.5 is chance; at 0.6
a rule that only looks at length is right in three pairs of five."""
BALANCE_WARNING = 0.1
"""Share of the rarer label below which one class decides: KTO's authors go down to 10 % with weights (2402.01306)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check found."""

    check: str
    verdict: str
    """One of ``VERDICTS``."""
    text: str
    """One sentence."""
    key: str = ""
    """The recipe key or the command that mends it; empty where nothing is to be done."""
    value: float | None = None
    """A share of the rows in [0, 1], or what the text says."""
    low: float | None = None
    """Lower end of the 95 % interval, of what is an estimate."""
    high: float | None = None
    n: int = 0
    """What was looked at: rows, pairs or scores."""
    rows: int = 0
    """Rows concerned."""
    examples: tuple[str, ...] = ()
    """Names of at most ``EXAMPLES`` of them."""
    by_source: Mapping[str, int] = field(default_factory=dict)
    """Rows concerned by dataset, where there are several."""

    def __post_init__(self) -> None:
        assert self.verdict in VERDICTS, self.verdict
        for name in ("value", "low", "high"):
            number = getattr(self, name)
            assert number is None or math.isfinite(number), (self.check, name)


def graded(check: str, rows: int, n: int) -> str:
    """The verdict on so many rows of n, by ``LIMITS``."""
    share, limits = rows / max(n, 1), LIMITS[check]
    if rows == 0:
        return "fine"
    return "fault" if share > limits.fault else "warning" if share > limits.warning else "remark"


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """All findings about the data of a run."""

    dataset: str
    rows: int
    """Training rows that were looked at."""
    findings: Sequence[Finding]
    distributions: Mapping[str, Any]
    """Histograms by name: ``edges`` and ``counts``, one less."""
    sources: Sequence[Mapping[str, Any]]
    """What each dataset gave: name, format, rows, rows without use."""
    versions: Mapping[str, str]
    command: str

    @property
    def worst(self) -> str:
        """The worst verdict."""
        return max((each.verdict for each in self.findings), key=VERDICTS.index, default="fine")

    def as_json(self) -> dict[str, Any]:
        """As ``doctor.json`` has it."""
        found = {each: getattr(self, each) for each in ("dataset", "rows", "distributions", "versions", "command")}
        return {
            "version": VERSION,
            **found,
            "sources": list(self.sources),
            "findings": [{**asdict(each), "examples": list(each.examples)} for each in self.findings],
        }

    def write(self, path: Path) -> None:
        """Writes ``doctor.json``, complete or not at all."""
        write_atomically(path, json.dumps(self.as_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    @staticmethod
    def read(path: Path) -> Diagnosis:
        """What ``write`` wrote.

        Raises:
            DataError: it is not such a file.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["version"] != VERSION:
                raise DataError(f"{path}: version {found['version']} of doctor.json, expected {VERSION}; check again")
            findings = [Finding(**{**each, "examples": tuple(each["examples"])}) for each in found["findings"]]
            names = ("dataset", "rows", "distributions", "sources", "versions", "command")
            return Diagnosis(findings=findings, **{name: found[name] for name in names})
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a doctor.json ({error}); write one with python -m data check") from None
