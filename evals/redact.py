"""What must not leave the machine: secrets, and paths that name people and disks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

HIDDEN = "***"

_TOKENS = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    # Hub tokens have no underscore after the prefix; hf_transfer, hf_hub_download and the like are names.
    r"hf_(?:[A-Za-z0-9]{12,}|(?=[A-Za-z]*\d)[A-Za-z0-9]{6,})"
    r"|api_org_[A-Za-z0-9]{12,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|sk-[A-Za-z0-9_\-]{16,}"
    r"|wandb_v\d_[A-Za-z0-9_]{12,}|AKIA[A-Z0-9]{16})"
)
_SECRET_KEY = r"(?:(?:hub|hf|access|auth|huggingface|hugging_face_hub|api)_?(?:token|key)|password|secret(?:_?key)?)"
_NAMED = re.compile(
    # `key: value`, `key=value`, `--key value`; not `password` followed by a word, which prose has. A flag begins
    # after what is no word, not far before its name: a line of dashes would be searched from each of them to its end.
    rf"(?i)((?:\b|_){_SECRET_KEY}[\"']?\s*[=:]\s*[\"']?|(?<![\w\-])--?[\w\-.]{{0,64}}?{_SECRET_KEY}\s+[\"']?|\bbearer\s+)"
    r"(?!null\b|none\b|true\b|false\b|-)[^\s\"',;}&<]+"
)
_NAMED_KEY = re.compile(rf"(?i)(?:^|_|-){_SECRET_KEY}$")
_IN_URL = re.compile(r"(?<=://)[^/\s@:]+:[^/\s@]+(?=@)")

_QUOTED_PATH = re.compile(r"(?<=[\"'])(?:~?/|[A-Za-z]:[\\/])[^\"'\n]*?([^\"'/\\\n]+)[/\\]?(?=[\"'])")
# Two or more steps deep: /etc alone says nothing. Not after a word, dot or slash, as in relative paths and URLs.
_PATH = re.compile(r"(?<![\w:/.~\\\]])(?:file://)?(?:~?(?:/[^\s/\"'<>|,;:()\[\]{}=]+)+/([^\s/\"'<>|,;:()\[\]{}=]+)/?)")
_WINDOWS_PATH = re.compile(r"(?<!\w)[A-Za-z]:\\(?:[^\s\\\"'<>|]+\\)+([^\s\\\"'<>|]+)")


def redact(text: str) -> str:
    """The text with everything that looks like a credential replaced by ``***``.

    That is: Hub, GitHub, OpenAI, W&B and AWS tokens by their shape; the value of ``--hub_token``, ``HF_TOKEN=``,
    ``password:`` and the like; user and password in a URL.
    """
    text = _TOKENS.sub(HIDDEN, text)
    text = _NAMED.sub(lambda match: match.group(1) + HIDDEN, text)
    return _IN_URL.sub(HIDDEN, text)


def hide_paths(text: str) -> str:
    """The text with each absolute local path replaced by its last component."""
    text = _QUOTED_PATH.sub(lambda match: match.group(1), text)
    text = _WINDOWS_PATH.sub(lambda match: match.group(1), text)
    return _PATH.sub(lambda match: match.group(1), text)


def public(text: str) -> str:
    """What may be shown to strangers: no credentials, no local paths."""
    return hide_paths(redact(text))


def scrub(value: Any) -> Any:
    """:func:`public` for every string in nested mappings and lists; values under secret keys are hidden whole."""
    if isinstance(value, str):
        return shown_name(value) if _is_path(value) else public(value)
    if isinstance(value, Mapping):
        return {
            public(str(key)): HIDDEN if _NAMED_KEY.search(str(key)) and item not in (None, "", False) else scrub(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [scrub(item) for item in value]
    return value


def shown_name(name: str) -> str:
    """A model or dataset as cards show it: a Hub id as it is, a local path by its last component."""
    name = redact(name)
    if _is_path(name):
        pure = PureWindowsPath(name) if "\\" in name else PurePosixPath(name)
        return pure.name or name
    return hide_paths(name)


def is_hub_id(name: str) -> bool:
    """Whether a name is an ``owner/name`` that can be linked to on the Hub.

    Names without an owner are not taken for one: they may be files or built-in datasets. Neither is what exists here
    as a file or folder, nor what ends like a data file.
    """
    if name.count("/") != 1 or name != redact(name) or name.lower().endswith(_DATA_FILES) or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


_DATA_FILES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz", ".zst", ".zip", ".yaml", ".yml")


def _is_path(name: str) -> bool:
    """A whole string that is a path, blanks and all: absolute, from home, or explicitly relative."""
    return "\n" not in name and bool(re.match(r"(?:~?/|\.\.?/|[A-Za-z]:[\\/])\S*", name)) and len(name) > 1
