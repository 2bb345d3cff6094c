"""A page that is one file: template, style, script and data in it, and a policy that lets nothing else in.

The Content-Security-Policy names the page's one script by its hash, so that even markup that got past escaping could
not run, and forbids every request.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from evals.curves import show_number, show_share, well_formed
from evals.redact import public, redact, shown_name
from evals.summary import show, show_interval


def render(template: str, context: Mapping[str, Any], *, data: str = "") -> str:
    """The whole page, without credentials.

    Args:
        template: its name, below ``evals/templates``.
        context: of the template; everything in it is escaped that is not markup already.
        data: JSON of the browser of prompts, as ``prompt_data.escaped`` makes it; nothing where there is none.
    """
    script = "".join(_source(name) for name in ("report.js", *(["browser.js"] if data else [])))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Where script and data come to stand: a random word, so that no text of a run can be taken for it.
    here = {"script": secrets.token_hex(16), "data": secrets.token_hex(16)}
    page = (
        _environment()
        .get_template(template)
        .render(
            **context,
            has_data=bool(data),
            here=here,
            script_hash=digest,
            now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )
    # Inputs are redacted one by one; a token's shape survives escaping, so the whole page is looked through once more.
    page = well_formed(redact(page))
    return page.replace(here["data"], data).replace(here["script"], script)


@functools.cache
def _environment() -> Environment:
    """Compiled templates, which a process may need for many reports."""
    environment = Environment(
        loader=PackageLoader("evals", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(show=show, show_interval=show_interval, show_number=show_number, show_share=show_share)
    environment.globals.update(public=public, name=shown_name)
    return environment


def _source(name: str) -> str:
    return (files("evals") / "templates" / name).read_text(encoding="utf-8")
