"""Checks that need a tokenizer: what is cut, where responses begin and end. Read off what preparation counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from data.doctor_rows import longer_wins, lost_rows
from data.findings import EXAMPLES, Finding, graded
from data.preparation import Prepared
from data.store import TokenTable
from data.tokens import Dropped

LONGER = "raise data.max_length, or choose data.truncation (truncate_prompt_start, drop)"
SAME = "chosen and rejected are the same tokens"
"""How preparation's reason begins."""
TEMPLATE = "model.chat_template, or model.eos_token if responses end with another token"


def dropped_rows(report: Mapping[str, Any], most: float) -> Finding:
    """Rows that are not trained on, whatever step dropped them."""
    rows = [Dropped(**each) for each in report["dropped_rows"]]
    return lost_rows(rows, report["rows"]["read"], most, len(report["formats"]) > 1)


def token_findings(prepared: Prepared, eos: int, *, chat: bool) -> list[Finding]:
    """All findings about tokens.

    Args:
        prepared: tables and report.
        eos: the end token.
        chat: whether rows are messages, which a template ends.
    """
    report = prepared.report
    kept = report["rows"]["kept"]
    found = [_truncation(prepared, eos), _cut_differences(report), _boundaries(report, kept)]
    found += [_ends(report, kept, chat=chat), _beginnings(report, kept)]
    table = prepared.train.table
    if {"chosen", "rejected"} <= table.legs.keys():
        chosen, rejected = (table.legs[leg].lengths().astype(np.float64) for leg in ("chosen", "rejected"))
        found.append(longer_wins("length_bias_tokens", "tokens", chosen, rejected, np.asarray(prepared.train.prompts)))
    return found


def unfinished(table: TokenTable, eos: int) -> np.ndarray:
    """Which rows have a response that does not end with the end token, because its tail was cut, (row,)."""
    found = np.zeros(len(table), dtype=bool)
    for ragged in table.legs.values():
        found |= np.asarray(ragged.values)[np.asarray(ragged.offsets)[1:] - 1] != eos
    return found


def _truncation(prepared: Prepared, eos: int) -> Finding:
    """Tokens cut off by side, and training rows of which a response lost its tail and with it its end token."""
    report = prepared.report
    cut = unfinished(prepared.train.table, eos)
    lost = report["tokens_lost"]
    told = ", ".join(f"{count} × {side} ({lost[side]} tokens)" for side, count in report["truncated"].items())
    number, n = int(cut.sum()), len(cut)
    rows = number or int(sum(report["truncated"].values()) > 0)
    verdict = graded("truncation", max(number, *report["truncated"].values(), 0) if rows else 0, max(n, 1))
    text = f"max_length {report['max_length']} cuts {told or 'nothing'}; {number} of {n} training rows "
    return Finding(
        check="truncation",
        verdict=verdict,
        text=text + "have a response without its end.",
        key=LONGER if verdict != "fine" else "",
        value=number / n,
        n=n,
        rows=number,
        examples=tuple(prepared.train.name(row) for row in np.flatnonzero(cut)[:EXAMPLES].tolist()),
    )


def _cut_differences(report: Mapping[str, Any]) -> Finding:
    """Pairs that are the same tokens after truncation, or were before it: they are dropped."""
    same = [row for row in report["dropped_rows"] if row["reason"].startswith(SAME)]
    after = sum(row["reason"].endswith("after truncation") for row in same)
    n = report["rows"]["kept"] + len(same)
    return Finding(
        check="cut_differences",
        verdict=graded("cut_differences", len(same), n),
        text=f"{after} of {n} pairs are the same tokens after truncation, {len(same) - after} already before it; they "
        "are dropped.",
        key=LONGER if after else "mend the pairs" if same else "",
        value=len(same) / max(n, 1),
        n=n,
        rows=len(same),
        examples=tuple(f"{row['source']}, row {row['index']}" for row in same[:EXAMPLES]),
    )


def _boundaries(report: Mapping[str, Any], kept: int) -> Finding:
    """Rows whose prompt as tokens is no prefix of prompt + response: the boundary moves left."""
    rows = report["boundary_mismatches"]
    text = f"in {rows} of {kept} rows prompt and response share a token, which counts as response."
    key = "end prompts where a token ends (a space belongs to the response), or model.chat_template"
    return _counted("boundaries", rows, kept, text, key)


def _ends(report: Mapping[str, Any], kept: int, *, chat: bool) -> Finding:
    """Responses with something after their end token, which is removed, or without one, which is added."""
    removed = max(report["tail_removed"].values(), default=0)
    added = max(report["terminator_added"].values(), default=0)
    rows = max(removed, added) if chat else removed
    told = "the template writes" if chat else "plain text has"
    text = (
        f"{sum(report['tail_removed'].values())} responses have something after their end token, which is removed; "
        f"{sum(report['terminator_added'].values())} get an end token, because {told} none."
    )
    return _counted("ends", rows, kept, text, TEMPLATE)


def _beginnings(report: Mapping[str, Any], kept: int) -> Finding:
    """Texts that begin with the token which the tokenizer puts before every text: it stands there once."""
    rows = report["bos_removed"]
    text = f"{rows} of {kept} texts begin with the token that the tokenizer adds; one of the two is removed."
    return _counted("beginnings", rows, kept, text, "leave the token out of the data")


def _counted(check: str, rows: int, n: int, text: str, key: str) -> Finding:
    """What preparation only counts: it names no rows."""
    return Finding(
        check=check,
        verdict=graded(check, rows, n),
        text=text,
        key=key if rows else "",
        value=rows / max(n, 1),
        n=n,
        rows=rows,
    )
