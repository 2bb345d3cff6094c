"""Publishes a finished run on the Hugging Face Hub: the model, its card and its numbers, nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml
from httpx2 import HTTPError  # what huggingface_hub speaks HTTP with, and whose errors it lets through
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from evals import generations_file, pair_rows, scores
from evals.card_plots import FOLDER
from evals.redact import public, redact, scrub

__all__ = ["check_access", "files_to_push", "push", "redact"]

MODEL_FILES = re.compile(
    r"(?:model|adapter_model)(?:-\d+-of-\d+)?\.safetensors(?:\.index\.json)?"
    r"|config\.json|generation_config\.json|adapter_config\.json"
    r"|tokenizer\.json|tokenizer_config\.json|tokenizer\.model|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.json|vocab\.txt|merges\.txt|spiece\.model|sentencepiece\.bpe\.model|chat_template\.(?:jinja|json)"
)
"""Weights, configuration and tokenizer. A list of what may go rather than of what may not: checkpoints, caches,
optimizer states, and whatever else will one day lie in a run directory, stay out by themselves."""
RUN_FILES = (
    *("README.md", "recipe.yaml", "report.html", "results.json", "metrics.jsonl"),
    *("scores.jsonl", "doctor.json"),
)
SAMPLES = ("generations.jsonl", "pairs.jsonl")
"""Files with text of the datasets, which go only where they are asked for."""
_FAILURES = (HTTPError, OfflineModeIsEnabled, OSError, RuntimeError)


def check_access(repo_id: str, *, token: str | None = None, endpoint: str | None = None, ask_hub: bool = False) -> None:
    """Fails before training where pushing after it would fail.

    Args:
        repo_id: ``owner/name``, or ``name`` for the token's owner.
        token: default is the one saved by ``hf auth login`` or in ``HF_TOKEN``.
        endpoint: default is the public Hub.
        ask_hub: also asks the Hub whether it accepts the token, which needs the network.

    Raises:
        ValueError: in one sentence, if the name is not well-formed, no token is there, or the Hub refuses it.
    """
    try:
        if not repo_id:
            raise HFValidationError("it is empty")
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"{repo_id!r} cannot be a repository on the Hub ({_one_sentence(error)}); "
            "use owner/name, of letters, digits, '-', '_' and '.'."
        ) from error
    if not (token or get_token()):
        raise ValueError(
            f"no Hub token was found, so {repo_id!r} can not be pushed to: "
            "run `hf auth login` or set HF_TOKEN (or, before training, push_to_hub: false)."
        )
    if ask_hub:
        try:
            HfApi(endpoint=endpoint, token=token).whoami()
        except _FAILURES as error:
            raise ValueError(
                f"the Hub did not accept the token for {repo_id!r} ({_one_sentence(error)}): "
                "run `hf auth login` again, or check the network."
            ) from error


def push(
    run_dir: Path,
    repo_id: str,
    *,
    private: bool = False,
    samples: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Creates the repository if need be and uploads the run in one commit.

    Uploaded are the model or adapter, the tokenizer, the card with its pictures, ``.eval_results/``, and of
    ``RUN_FILES`` what there is. What is there already and has not changed is not sent again. Credentials are taken out
    of all text among them, and local paths out of the recipe and the JSON files, which is why these are rewritten
    rather than copied.

    Args:
        run_dir: a finished run.
        repo_id: ``owner/name``, or ``name`` for the token's owner.
        samples: also uploads what models wrote, and the rows they were compared on (``SAMPLES``).
        private: makes a new repository private; an existing public one is then refused rather than pushed to.
        token: default is the one saved by ``hf auth login`` or in ``HF_TOKEN``.
        endpoint: default is the public Hub.

    Returns:
        The repository's address.

    Raises:
        ValueError: if the name or token is missing or wrong, the run has no weights, or privacy would be broken.
        RuntimeError: if the Hub refuses the upload or cannot be reached; the run itself is untouched.
    """
    check_access(repo_id, token=token, endpoint=endpoint)
    files = files_to_push(run_dir, samples=samples)
    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError(f"{run_dir} holds no model or adapter weights (*.safetensors), so there is nothing to push")
    api = HfApi(endpoint=endpoint, token=token)
    try:
        public_already = private and _is_public(api, repo_id)
        if not public_already:
            address = api.create_repo(repo_id, private=private or None, exist_ok=True)
            operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=what) for name, what in files.items()]
            message = "Add the trained model, its card and its results"
            api.create_commit(address.repo_id, operations, commit_message=message)
            return str(address)
    except (*_FAILURES, ValueError) as error:  # the latter where the Hub refuses the card's metadata
        raise RuntimeError(
            f"pushing to {repo_id!r} failed ({_one_sentence(error)}); the run is complete in {run_dir} and can be "
            "pushed again."
        ) from error
    raise ValueError(f"{repo_id!r} exists and is public; make it private on the Hub first, or push elsewhere")


def files_to_push(run_dir: Path, *, samples: bool = False) -> dict[str, Path | bytes]:
    """Path in the repository to a file, or to the bytes that go up in its place.

    Args:
        run_dir: a finished run.
        samples: with the files of ``SAMPLES``.
    """
    named = {*RUN_FILES, *(SAMPLES if samples else ())}
    chosen: dict[str, Path | bytes] = {}
    for path in sorted(run_dir.iterdir()):
        if path.is_file() and MODEL_FILES.fullmatch(path.name):
            chosen[path.name] = path
        elif path.is_file() and path.name in named:
            chosen[path.name] = _public_bytes(path)
    for path in sorted((run_dir / ".eval_results").glob("*.yaml")):
        chosen[f".eval_results/{path.name}"] = path
    for path in sorted((run_dir / FOLDER).glob("*.png")):
        chosen[f"{FOLDER}/{path.name}"] = path
    return chosen


def _public_bytes(path: Path) -> bytes:
    text = path.read_text(encoding="utf-8", errors="replace")
    # Structured files are rewritten value by value, so that they can still be parsed.
    if path.name == "recipe.yaml":
        return yaml.safe_dump(scrub(yaml.safe_load(text)), sort_keys=False, allow_unicode=True).encode()
    if path.suffix == ".json":
        return (json.dumps(scrub(json.loads(text)), indent=2, ensure_ascii=False) + "\n").encode()
    if path.name in (scores.NAME, pair_rows.NAME, generations_file.NAME):
        return "".join(f"{_public_line(line)}\n" for line in text.splitlines()).encode()
    return redact(text).encode()


def _public_line(line: str) -> str:
    """A line of an evaluation: names lose their paths; texts keep what they say, but for credentials."""
    values = json.loads(line)
    names = ("dataset", "split", "model", "row")
    shown = {key: scrub(value) if key in names else value for key, value in values.items()}
    return redact(json.dumps(shown, ensure_ascii=False))


def _is_public(api: HfApi, repo_id: str) -> bool:
    name = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
    try:
        return not api.repo_info(name).private
    except RepositoryNotFoundError:
        return False


def _one_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if len(lines) > 1 and lines[1].startswith("- "):  # a heading and its list
        lines[0] = f"{lines[0].rstrip('.:')}: {'; '.join(line.removeprefix('- ') for line in lines[1:])}"
    server = str(getattr(error, "server_message", None) or "").strip().splitlines()  # what the Hub itself says
    if lines and server and server[0] not in lines[0]:
        lines[0] = f"{lines[0].rstrip('. ')}: {server[0]}"
    return public(lines[0].rstrip(". ")) if lines else type(error).__name__
