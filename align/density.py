"""Density ratios of prompts: how much likelier a prompt is among desirable rows than among undesirable ones.

    ratio(x) = p(x | desirable) / p(x | undesirable) = σ(f(x)) / (1 − σ(f(x))) = exp(f(x))

with f a logistic regression, classes balanced, on frozen embeddings of prompts. It is fitted once, before the first
step, and stored by content beside the reference log-probs: a resumed run reads it, because its policy has moved on.

References:
    Jung et al. 2024, arXiv:2404.04656 (underlying distribution matching); sampling and regression as in TRL's
    BCOTrainer.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from align.errors import RunError
from align.saving import explained
from data import encoders
from data.encoders import encoder_embeddings
from data.errors import DataError
from data.loader import PlannedBatches
from data.pack import pack
from data.store import Ragged, TokenTable, cache_dir, digest

if TYPE_CHECKING:
    from align.trainer import ObjectiveTrainer

FORMAT = 1
KEY, WAY_OUT = "objective.prompt_encoder", "policy, or "
"""What messages about an encoder name, and what else could be written there."""


@dataclass(frozen=True, kw_only=True)
class DensityRatio:
    """Sets ``known.density_ratio`` of a trainer's rows, training and held out."""

    encoder: str
    """``policy``, or a Hub id or folder of an encoder."""
    weights: str | None
    """Fingerprint of the policy before training; None for another encoder."""
    sample_size: int
    """Prompts of each class that the regression is fitted on."""
    seed: int
    tokenizer: Any
    """The policy's: an encoder reads the prompts' text."""
    precision: str

    def __call__(self, trainer: ObjectiveTrainer, say: Callable[[str], None]) -> None:
        """Fits the regression, or reads what was fitted before.

        Raises:
            RunError: the encoder can't be loaded, or a resumed run's ratios are gone.
        """
        splits = [split for split in (trainer.batches, trainer.eval_batches) if split is not None]
        embed, weights = self._embedder(trainer)
        labels = trainer.batches.table.labels
        assert labels is not None
        key = digest(
            [FORMAT, weights, self.precision, self.sample_size, self.seed],
            *(split.table.prompts.values.tobytes() + split.table.prompts.offsets.tobytes() for split in splits),
            np.asarray(labels).tobytes(),
        )
        path = cache_dir() / "density" / f"{key}.npz"
        found = trainer.gather(_read(path) if trainer.args.process_index == 0 else None)[0]
        if found is None:
            if trainer.resumed and self.encoder == "policy":
                raise RunError(
                    "the density ratios of this run are no longer in the cache (ALIGN_CACHE), and the policy has moved "
                    "on from the model they came from; restore the cache, or start again"
                )
            found = self._fit(splits, embed, trainer, path)
        assert isinstance(found, dict)
        for split, name in zip(splits, ("train", "eval"), strict=False):
            split.known = replace(split.known, density_ratio=found[name])
        undesirable = found["train"][~np.asarray(labels, dtype=bool)]
        low, middle, high = np.quantile(undesirable, (0.05, 0.5, 0.95))
        say(
            f"density ratio: prompts of both classes are told apart in {float(found['accuracy']):.1%} of the sample; "
            f"undesirable rows have ratios of {middle:.2g} (median; 5 to 95 %: {low:.2g} to {high:.2g})"
        )

    def _embedder(self, trainer: ObjectiveTrainer) -> tuple[Callable[[Ragged], np.ndarray], str]:
        """What embeds prompts, and a fingerprint of its weights."""
        if self.encoder == "policy":
            assert self.weights is not None
            return lambda prompts: _policy_embeddings(prompts, trainer), self.weights
        model, tokenizer = load_encoder(self.encoder)
        model.to(trainer.args.device)
        from align.model import weights_fingerprint

        def embed(prompts: Ragged) -> np.ndarray:
            ids = [prompts[row].tolist() for row in range(len(prompts))]
            texts = [self.tokenizer.decode(one, skip_special_tokens=True) for one in ids]
            return _over_ranks(texts, trainer, lambda mine: encoder_embeddings(mine, model, tokenizer))

        return embed, weights_fingerprint(model)

    def _fit(
        self,
        splits: list[PlannedBatches],
        embed: Callable[[Ragged], np.ndarray],
        trainer: ObjectiveTrainer,
        path: Path,
    ) -> dict[str, np.ndarray]:
        embedded = [_by_row(split.table.prompts, embed) for split in splits]
        found: dict[str, np.ndarray] | None = None
        if trainer.args.process_index == 0:  # one process, so that all have the same numbers
            labels = np.asarray(splits[0].table.labels, dtype=bool)
            coef, intercept, accuracy = fit(embedded[0], labels, sample_size=self.sample_size, seed=self.seed)
            found = {"coef": coef, "intercept": np.array(intercept), "accuracy": np.array(accuracy)}
            for name, rows in zip(("train", "eval"), embedded, strict=False):
                # exp of a logit beyond ±50 is no estimate but a separation; objectives clamp far below.
                found[name] = np.exp(np.clip(rows @ coef + intercept, -50, 50)).astype(np.float32)
            with explained(cache_dir(), "set ALIGN_CACHE to a folder that can be written to"):
                _write(path, found)
        shared = trainer.gather(found)[0]
        assert isinstance(shared, dict)
        return shared


def fit(
    embeddings: np.ndarray, desirable: np.ndarray, *, sample_size: int, seed: int
) -> tuple[np.ndarray, float, float]:
    """Logistic regression that tells prompts of desirable rows from those of undesirable ones, classes balanced.

    Args:
        embeddings: one per row, (row, hidden).
        desirable: label of each row; both classes occur.
        sample_size: prompts drawn of each class, with replacement; of a smaller class as many as it has.
        seed: of the draw.
    Returns:
        Coefficients (hidden,), intercept, and the share of the sample it gets right.
    """
    from sklearn.linear_model import LogisticRegression  # pyright: ignore[reportMissingTypeStubs]

    rng = np.random.default_rng([seed, 0xBC0])
    rows: list[np.ndarray] = []
    for label in (True, False):
        members = np.flatnonzero(desirable == label)
        rows.append(rng.choice(members, size=min(len(members), sample_size), replace=True))
    drawn = np.concatenate(rows)
    regression: Any = LogisticRegression(class_weight="balanced", max_iter=1000)
    regression.fit(embeddings[drawn], desirable[drawn])
    accuracy = float(regression.score(embeddings[drawn], desirable[drawn]))
    return regression.coef_[0].astype(np.float64), float(regression.intercept_[0]), accuracy


def check_encoder(name: str) -> None:
    """Raises ``RunError`` if there is no such encoder; reads its configuration only."""
    try:
        encoders.check_encoder(name, key=KEY, way_out=WAY_OUT)
    except DataError as error:
        raise RunError(str(error)) from None


def load_encoder(name: str) -> tuple[Any, Any]:
    """An encoder and its tokenizer.

    Raises:
        RunError: it can't be loaded.
    """
    try:
        return encoders.load_encoder(name, key=KEY, way_out=WAY_OUT)
    except DataError as error:
        raise RunError(str(error)) from None


def _by_row(prompts: Ragged, embed: Callable[[Ragged], np.ndarray]) -> np.ndarray:
    """Embeddings of every row's prompt, each distinct prompt computed once."""
    numbers: dict[bytes, int] = {}
    of_row = [numbers.setdefault(prompts[row].tobytes(), len(numbers)) for row in range(len(prompts))]
    first = np.unique(np.array(of_row), return_index=True)[1]
    distinct = Ragged.of([prompts[int(row)].tolist() for row in first])
    return embed(distinct)[np.array(of_row)].astype(np.float64)


def _policy_embeddings(prompts: Ragged, trainer: ObjectiveTrainer) -> np.ndarray:
    # A response of one token, because a batch has responses; prompts do not see it.
    one = Ragged.of([prompts[row][:1].tolist() for row in range(len(prompts))])
    table = TokenTable(prompts, {"completion": one})
    plan, share = trainer.batches.plan, trainer.batches.share
    lengths = table.shared_lengths() if share else table.separate_lengths()
    order = np.argsort(lengths, kind="stable")
    ends = plan.layout.bins_under(lengths[order], max(plan.token_budget, int(lengths.max())))
    bins = [order[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    bins += [order[:0]] * (-len(bins) % trainer.args.world_size)  # every rank runs as many forward passes
    kind = plan.layout.kind if share else "bucket"

    def embedded(mine: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for rows in mine:
            trainer.note("embedding prompts")
            batch = pack(table, rows, share=share, kind=kind, counts={})
            with trainer.scoring():
                vectors = trainer.wrapped(packed=batch.to(trainer.args.device), embed=True)["prompts"]
            if len(rows):
                yield rows, vectors.float().cpu().numpy()

    world, rank = trainer.args.world_size, trainer.args.process_index
    gathered: list[Any] = trainer.gather(list(embedded(bins[rank::world])))
    parts: list[tuple[np.ndarray, np.ndarray]] = [part for each in gathered for part in each]
    vectors = np.zeros((len(prompts), parts[0][1].shape[1]), dtype=np.float32)
    for rows, values in parts:
        vectors[rows] = values
    return vectors


def _over_ranks(texts: list[str], trainer: ObjectiveTrainer, embed: Callable[[list[str]], np.ndarray]) -> np.ndarray:
    world, rank = trainer.args.world_size, trainer.args.process_index
    parts = trainer.gather(embed(texts[rank::world]))
    vectors = np.zeros((len(texts), np.asarray(parts[0]).shape[1]), dtype=np.float32)
    for start, part in enumerate(parts):
        vectors[start::world] = np.asarray(part)
    return vectors


def _read(path: Path) -> dict[str, np.ndarray] | None:
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file) as stored:
            return {name: stored[name] for name in stored.files}
    except PermissionError as error:
        raise RunError(f"can't read {path}: {error.strerror}; set ALIGN_CACHE to a folder of your own") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        path.unlink(missing_ok=True)  # a damaged file is made again
        return None


def _write(path: Path, values: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".npz", delete=False) as file:
        np.savez(file, **values)  # type: ignore[arg-type]
    Path(file.name).chmod(0o644)
    Path(file.name).rename(path)
