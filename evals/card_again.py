"""The card of a finished run once more, from its files alone; and the push that did not work, or goes elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from evals import hub
from evals.card import write_card
from evals.card_info import NAME, CardInfo
from evals.run_files import read_run


def card_again(run_dir: Path, *, repo_id: str | None = None) -> Path:
    """Writes ``README.md``, its pictures and ``.eval_results/`` as the run's files now have it.

    Args:
        run_dir: a finished run.
        repo_id: where the quick start loads the model from; default is what it was.

    Returns:
        The path of ``README.md``.

    Raises:
        ValueError: in one sentence, if the run is not finished or a file of it can't be read.
    """
    info = CardInfo.read(run_dir)
    if repo_id is not None and repo_id != info.repo_id:
        info = replace(info, repo_id=repo_id)
        info.write(run_dir)
    return write_card(run_dir, info=info)


def push_again(
    run_dir: Path, *, repo_id: str | None = None, private: bool | None = None, samples: bool | None = None
) -> str:
    """Writes the card again and pushes what ``push_to_hub`` would have.

    A run of an earlier version, which has a card and no ``card.json``, is pushed with the card it has.

    Args:
        run_dir: a finished run.
        repo_id: ``owner/name``; default is the recipe's.
        private: create it private; default is the recipe's.
        samples: with text of samples; default is the recipe's.

    Returns:
        The repository's address.

    Raises:
        ValueError: in one sentence: no repository is named, no token is there, or the run is not finished.
        RuntimeError: the Hub refused it or could not be reached; the run is as it was.
    """
    run = read_run(run_dir)
    known = run.get("hub.hub_model_id")
    where = repo_id or known
    if not where:
        raise ValueError(f"{run_dir} names no repository (hub.hub_model_id); give one with --repo_id user/name")
    hub.check_access(str(where))
    if (run_dir / NAME).is_file() or not (run_dir / "README.md").is_file():
        card_again(run_dir, repo_id=str(where))
    return hub.push(
        run_dir,
        str(where),
        private=bool(run.get("hub.hub_private_repo")) if private is None else private,
        samples=bool(run.get("hub.push_samples")) if samples is None else samples,
    )
