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
RUN_FILES = ("README.md", "recipe.yaml", "report.html", "results.json", "metrics.jsonl")
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
            f"no Hub token was found, so {repo_id!r} could not be pushed to after training: "
            "run `hf auth login` or set HF_TOKEN, or set push_to_hub: false."
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
    run_dir: Path, repo_id: str, *, private: bool = False, token: str | None = None, endpoint: str | None = None
) -> str:
    """Creates the repository if need be and uploads the run in one commit.

    Uploaded are the model or adapter, the tokenizer, ``README.md``, ``.eval_results/``, ``recipe.yaml``,
    ``report.html``, ``results.json`` and ``metrics.jsonl``. Credentials are taken out of all text among them, and local
    paths out of the recipe and the results, which is why those two are rewritten rather than copied.

    Args:
        run_dir: a finished run.
        repo_id: ``owner/name``, or ``name`` for the token's owner.
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
    files = files_to_push(run_dir)
    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError(f"{run_dir} holds no model or adapter weights (*.safetensors), so there is nothing to push")
    api = HfApi(endpoint=endpoint, token=token)
    try:
        if private and _is_public(api, repo_id):
            raise ValueError(f"{repo_id!r} exists and is public; make it private on the Hub first, or push elsewhere")
        address = api.create_repo(repo_id, private=private or None, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=what) for name, what in files.items()]
        api.create_commit(address.repo_id, operations, commit_message="Add the trained model, its card and its results")
    except _FAILURES as error:
        raise RuntimeError(
            f"pushing to {repo_id!r} failed ({_one_sentence(error)}); the run is complete in {run_dir} and can be "
            "pushed again."
        ) from error
    return str(address)


def files_to_push(run_dir: Path) -> dict[str, Path | bytes]:
    """Path in the repository to a file, or to the bytes that go up in its place."""
    chosen: dict[str, Path | bytes] = {}
    for path in sorted(run_dir.iterdir()):
        if path.is_file() and MODEL_FILES.fullmatch(path.name):
            chosen[path.name] = path
        elif path.is_file() and path.name in RUN_FILES:
            chosen[path.name] = _public_bytes(path)
    for path in sorted((run_dir / ".eval_results").glob("*.yaml")):
        chosen[f".eval_results/{path.name}"] = path
    return chosen


def _public_bytes(path: Path) -> bytes:
    text = path.read_text(encoding="utf-8", errors="replace")
    # Structured files are rewritten value by value, so that they can still be parsed.
    if path.name == "recipe.yaml":
        return yaml.safe_dump(scrub(yaml.safe_load(text)), sort_keys=False, allow_unicode=True).encode()
    if path.name == "results.json":
        return (json.dumps(scrub(json.loads(text)), indent=2, ensure_ascii=False) + "\n").encode()
    return redact(text).encode()


def _is_public(api: HfApi, repo_id: str) -> bool:
    name = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
    try:
        return not api.repo_info(name).private
    except RepositoryNotFoundError:
        return False


def _one_sentence(error: Exception) -> str:
    return public(str(error).strip().splitlines()[0].rstrip(". ")) if str(error).strip() else type(error).__name__
