"""A diagnosis as text for a terminal."""

from __future__ import annotations

import textwrap

from data.findings import VERDICTS, Diagnosis

WIDTH = 110


def told(diagnosis: Diagnosis, *, tokens: bool) -> str:
    """Findings in order, each with its verdict, what mends it, and rows to look at.

    Args:
        diagnosis: all findings.
        tokens: whether there was a tokenizer.
    """
    lines = [f"{printable(diagnosis.dataset)}: {diagnosis.rows} training rows", ""]
    for each in diagnosis.findings:
        lines += _wrapped(f"{each.verdict.upper() if each.verdict != 'fine' else 'fine':<8}{each.check}: {each.text}")
        if each.verdict == "fine":
            continue
        if each.low is not None and each.high is not None:
            lines.append(f"          95 % interval {each.low:.3f} to {each.high:.3f}")
        if each.by_source:
            told = ", ".join(f"{name} {count}" for name, count in each.by_source.items())
            lines += _wrapped(f"        by dataset: {told}")
        if each.key:
            lines += _wrapped(f"        mend: {each.key}")
        if each.examples:
            lines += _wrapped(f"        e.g. {'; '.join(each.examples)}")
    if not tokens:
        lines.append("        not looked at: tokens, templates and truncation, for want of --model_name_or_path")
    counts = {name: sum(each.verdict == name for each in diagnosis.findings) for name in reversed(VERDICTS)}
    summary = ", ".join(f"{count} {name}{'s' * (count != 1 and name != 'fine')}" for name, count in counts.items())
    return "\n".join([*lines, "", summary, ""])


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(printable(text), WIDTH, subsequent_indent=" " * 10, break_long_words=False)


def printable(text: str) -> str:
    """Without what a terminal would obey: names of files and datasets are somebody else's."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
