"""Settings of rounds, and the recipes of their stages that follow from them."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from align import settings
from align.command_line import pairs as command_pairs
from align.errors import RecipeError
from align.keys import TRAINING, Schema
from align.pairs import PairsSection
from align.prompt_settings import PromptSection
from align.recipe import Recipe, read_recipe
from align.sample_settings import SampledModel
from align.samplers import ServingSection
from align.sampling import Sampling
from align.saving import MAY_DIFFER
from align.scores import SCORERS
from align.typed import Entry
from objectives import REWARD_TRANSFORMS
from objectives.checks import require

TRAIN = Path(__file__).with_name("train.py")
ROWS_KEYS = ("dataset_name", "dataset_config", "dataset_train_split", "columns", "format", "datasets", "max_rows")
"""Keys of a recipe's data section that describe its own dataset, in whose place the rounds' rows come."""


@dataclass(frozen=True, kw_only=True)
class RoundsSection:
    """What is repeated."""

    output_dir: str
    """Folder of everything: a folder round-N for each round, state.json, rounds.json."""
    recipe: str
    """Training recipe of each round: objective, learning rate, …; its model and dataset are replaced."""
    overrides: list[str] = field(default_factory=list)
    """Keys of that recipe as on its command line, e.g. ["--learning_rate=1e-6", "--beta=0.2"]."""
    rounds: int = 3
    """How many."""
    reference: Literal["previous", "initial"] = "previous"
    """Against what log-ratios are taken: the policy as the round starts, or as the first one did."""
    fresh_prompts: bool = False
    """Each round takes another part of the prompts; else all of them, with another seed."""
    opponent: Literal["none", "reference", "mixture"] = "none"
    """Also sample an opponent, one response for each of the policy's: for xpo the reference, for nash_md that, or the
    geometric mixture of policy and reference (arXiv:2312.00886), which is drawn with transformers."""
    mixture_coef: float = 0.5
    """With opponent mixture: the reference's share, in (0, 1]."""
    mix_dataset: str | None = None
    """Offline dataset to train on too, in every round."""
    mix_weight: float = 1.0
    """How often each of its rows occurs in a round."""
    patience: int | None = None
    """Stop when the held-out score has not risen for this many rounds."""
    least_gain: float = 0.0
    """What counts as risen."""
    accelerate_config: str | None = None
    """File for accelerate launch, e.g. launch/accelerate/zero3.yaml; without it, one process trains."""

    def __post_init__(self) -> None:
        require("rounds", self.rounds, self.rounds >= 1, ">= 1")
        require("mix_weight", self.mix_weight, self.mix_weight > 0, "> 0")
        require("least_gain", self.least_gain, self.least_gain >= 0, ">= 0")
        require("mixture_coef", self.mixture_coef, 0 < self.mixture_coef <= 1, "in (0, 1]")
        if self.opponent != "mixture" and self.mixture_coef != 0.5:
            raise ValueError("mixture_coef has no effect without opponent mixture; remove it")
        if self.patience is not None:
            require("patience", self.patience, self.patience >= 1, ">= 1")
        if self.mix_dataset is None and self.mix_weight != 1.0:
            raise ValueError("mix_weight has no effect without mix_dataset; remove it")
        if self.patience is None and self.least_gain:
            raise ValueError("least_gain has no effect without patience; remove it")


@dataclass(frozen=True, kw_only=True)
class HeldOutSection:
    """What rounds are judged by."""

    dataset_name: str
    """Prompts that are never trained on."""
    dataset_config: str | None = None
    """Name of its configuration on the Hub."""
    split: str = "train"
    """Which split; of a single file, all of it. Columns and format are those of data."""
    n: int = 4
    """Samples of each prompt, with the same seed after every round."""
    max_rows: int | None = None
    """Use only this many rows."""

    def __post_init__(self) -> None:
        require("n", self.n, self.n >= 1, ">= 1")


@dataclass(frozen=True, kw_only=True)
class RowsSection:
    """How scored samples become rows; see ``python -m align.pairs``."""

    kind: Literal["scored", "pairs", "triples", "labels"] = "scored"
    """scored: lists, of which the recipe's data.rule makes what its objective needs."""
    rule: Literal["best_vs_worst", "best_vs_random", "threshold", "margin"] = "best_vs_worst"
    """Which responses make a pair, for other kinds than scored."""
    threshold: float | None = None
    """Least score of a good response, with rule threshold."""
    margin: float = 0.0
    """Least difference between the scores of a pair."""
    max_length_ratio: float | None = None
    """The longer response of a pair has at most this many times the characters of the shorter one."""
    keep_unfinished: bool = False
    """Also take responses that were cut off at the limit of tokens."""

    def __post_init__(self) -> None:
        PairsSection(samples="", scores="", output="", **dataclasses.asdict(self))


SCHEMA = Schema(
    sections={
        "model": SampledModel,
        "data": PromptSection,
        "held_out": HeldOutSection,
        "sampling": Sampling,
        "serving": ServingSection,
        "rows": RowsSection,
        "run": RoundsSection,
    },
    named={"scorers": SCORERS, "reward_transforms": REWARD_TRANSFORMS},
    elsewhere={"learning_rate": "run.overrides: [--learning_rate=…], a key of the training recipe"},
    required=("model", "data", "held_out", "scorers", "run"),
    example="launch/recipes/rounds.yaml",
    command="python -m align.rounds",
)


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """Rounds, described completely."""

    section: RoundsSection
    model: SampledModel
    data: PromptSection
    held_out: HeldOutSection
    sampling: Sampling
    serving: ServingSection
    rows: RowsSection
    scorers: tuple[Entry, ...]
    reward_transforms: tuple[Entry, ...]
    recipe: Recipe

    @property
    def trains_adapter(self) -> bool:
        """Whether a round leaves an adapter rather than a whole model."""
        return self.recipe.lora is not None

    def resolved(self) -> dict[str, Any]:
        """Everything that the rounds' numbers depend on."""
        names = ("model", "data", "held_out", "sampling", "rows")
        plain: dict[str, Any] = {name: dataclasses.asdict(getattr(self, name)) for name in names}
        elsewhere = ("output_dir", "recipe", "overrides")  # the recipe that they make stands below
        return {
            **plain,
            "run": {key: v for key, v in dataclasses.asdict(self.section).items() if key not in elsewhere},
            "scorers": [settings.resolved(entry) for entry in self.scorers],
            "reward_transforms": [settings.resolved(entry) for entry in self.reward_transforms],
            "recipe": self._recipe(),
        }

    def _recipe(self) -> dict[str, Any]:
        resolved = self.recipe.resolved()
        free = MAY_DIFFER["train"]
        resolved["train"] = {key: value for key, value in resolved["train"].items() if key not in free}
        resolved.pop("hub", None)
        resolved["data"] = _without_rows(resolved["data"])
        return {key: value for key, value in resolved.items() if key != "model"}

    # ---- what the stages are told ----

    def sample_tree(
        self, model: str, adapter: str | None, *, held_out: bool, mixture_with: str | None = None
    ) -> dict[str, Any]:
        """Settings of ``python -m align.sample``."""
        data = dataclasses.asdict(self.held_out_prompts() if held_out else self.data)
        section = dataclasses.asdict(self.model) | {"model_name_or_path": model, "adapter_name_or_path": adapter}
        if model != self.model.model_name_or_path:
            section["model_revision"] = "main"  # a folder of ours
        serving = dataclasses.asdict(self.serving)
        if mixture_with is not None:
            section |= {"mixture_with": mixture_with, "mixture_coef": self.section.mixture_coef}
            serving = {"engine": "transformers", "max_model_len": self.serving.max_model_len}
        return {
            "model": section,
            "data": data,
            "sampling": dataclasses.asdict(self.sampling),
            "serving": serving,
        }

    def held_out_prompts(self) -> PromptSection:
        """Prompts that rounds are judged by, read as the others are."""
        own = self.held_out
        return dataclasses.replace(
            self.data,
            dataset_name=own.dataset_name,
            dataset_config=own.dataset_config,
            split=own.split,
            max_rows=own.max_rows,
        )

    def sampling_words(self, number: int, *, opponent: bool = False) -> list[str]:
        """What differs from round to round: the seed, and with fresh prompts the part of them."""
        words = [f"--sampling.seed={self.sampling.seed + 2 * number + opponent}"]
        if self.section.fresh_prompts:
            words.append(f"--out.shard={(number - 1) % self.section.rounds}/{self.section.rounds}")
        return words

    def held_out_words(self) -> list[str]:
        """The same after every round."""
        return [f"--sampling.n={self.held_out.n}", f"--sampling.seed={self.sampling.seed}"]

    def scores_tree(self, *, transformed: bool) -> dict[str, Any]:
        """Settings of ``python -m align.scores``.

        Args:
            transformed: whether reward transforms act. They compare the responses to a prompt, so that rounds can't be
                judged by what they make of scores.
        """
        tree: dict[str, Any] = {"scorers": [settings.resolved(entry) for entry in self.scorers]}
        if self.reward_transforms and transformed:
            tree["reward_transforms"] = [
                {key: v for key, v in settings.resolved(entry).items() if key != "weight"}
                for entry in self.reward_transforms
            ]
        return tree

    def pairs_tree(self, folder: Path) -> dict[str, Any]:
        """Settings of ``python -m align.pairs``."""
        rows = dataclasses.asdict(self.rows)
        if self.section.opponent != "none":
            names = {"opponent": "opponent.jsonl", "opponent_scores": "opponent.scores.jsonl"}
            rows |= {key: str(folder / name) for key, name in names.items()}
            rows["kind"] = "nash_md" if self.recipe.objectives[0].name == "nash_md" else "xpo"
        files = {"samples": "samples.jsonl", "scores": "samples.scores.jsonl", "output": "train.jsonl"}
        return {"pairs": {**{key: str(folder / name) for key, name in files.items()}, **rows}}

    def launcher(self) -> list[str]:
        """How the training process is started."""
        if self.section.accelerate_config is None:
            return [str(TRAIN)]
        launch = ["-m", "accelerate.commands.launch", "--config_file", self.section.accelerate_config]
        return [*launch, str(TRAIN)]


def read_rounds(config: str | None, words: Sequence[str]) -> Rounds:
    """The settings of a command line.

    Raises:
        RecipeError: one sentence on what is wrong, in these settings or in the training recipe.
    """
    found = settings.read_settings(config, words, SCHEMA)
    section: RoundsSection = found.pop("run")
    model: SampledModel = found["model"]
    if not Path(section.recipe).is_file():
        raise RecipeError(f"run.recipe: there is no recipe {section.recipe!r}; name a training recipe")
    if section.accelerate_config is not None and not Path(section.accelerate_config).is_file():
        raise RecipeError(f"run.accelerate_config: there is no file {section.accelerate_config!r}")
    for key, _, _ in command_pairs(section.overrides):
        if key.split(".")[-1] in (*ROWS_KEYS, "output_dir", "model_name_or_path", "adapter_name_or_path"):
            raise RecipeError(f"run.overrides: {key} is set by the rounds; leave it out")
    tree = _tree(section.recipe)
    tree["model"] = {**tree.get("model", {}), **_model_keys(model, model.model_name_or_path)}
    tree["data"] = {**_without_rows(tree.get("data")), "dataset_name": "rows of a round"}
    tree["train"] = {**tree.get("train", {}), "output_dir": section.output_dir}
    recipe = _read(tree, section.overrides, section.recipe)
    if model.adapter_name_or_path is not None and recipe.lora is None:
        raise RecipeError(
            "model.adapter_name_or_path starts from an adapter, and run.recipe trains all weights; merge it first"
        )
    if section.reference == "initial" and model.adapter_name_or_path is not None:
        raise RecipeError("run.reference initial can't be an adapter; merge it into its base, or set previous")
    columns = recipe.mixture.needs.columns
    if bool(columns) != (section.opponent != "none"):
        names = ", ".join(entry.name for entry in recipe.objectives)
        if columns:
            raise RecipeError(f"run.opponent: {names} compares the policy with an opponent; set run.opponent reference")
        raise RecipeError(f"run.opponent has no effect: {names} reads nothing of an opponent; remove it")
    if section.reference == "initial" and not recipe.needs_reference:
        names = ", ".join(entry.name for entry in recipe.objectives)
        raise RecipeError(f"run.reference has no effect: {names} needs no reference model; remove it")
    if section.opponent == "mixture" and (recipe.lora is not None or "chosen_by" in columns):
        why = "adapters can't be mixed; train all weights" if recipe.lora is not None else "xpo's is the reference"
        raise RecipeError(f"run.opponent mixture: {why}, or set run.opponent reference")
    rounds = Rounds(section=section, recipe=recipe, **found)
    if rounds.serving.engine == "server":
        raise RecipeError("serving.engine server serves one policy, and every round samples another; use vllm or auto")
    if rounds.reward_transforms and section.opponent != "none":
        raise RecipeError("reward_transforms change scores per prompt, and the opponent's apart; leave them out")
    try:
        PairsSection(**rounds.pairs_tree(Path("round"))["pairs"])
    except ValueError as error:
        raise RecipeError(f"rows: {error}") from None
    return rounds


def training_tree(
    rounds: Rounds, number: int, folder: Path, model: str, adapter: str | None, initial: str
) -> dict[str, Any]:
    """The recipe that a round trains with.

    Args:
        rounds: the settings.
        number: of the round, from 1.
        folder: of the round.
        model: the policy's weights as the round starts, or its base.
        adapter: the policy's adapter as the round starts.
        initial: the weights that the first round started from.
    """
    tree = rounds.recipe.resolved()
    tree["model"] = {**tree["model"], **_model_keys(rounds.model, model)}
    tree["data"] = _without_rows(tree["data"])
    own = str(folder / "train.jsonl")
    section = rounds.section
    if section.mix_dataset is None:
        tree["data"]["dataset_name"] = own
    else:
        mixed = {"dataset_name": section.mix_dataset, "weight": section.mix_weight}
        tree["data"]["datasets"] = [{"dataset_name": own}, mixed]
    tree["train"] = {**tree["train"], "output_dir": str(folder / "train"), "seed": rounds.recipe.train.seed + number}
    if adapter is not None:
        tree["lora"] = {"adapter_name_or_path": adapter}
    if rounds.recipe.needs_reference:
        reference = "initial"
        if section.reference == "initial" and number > 1:
            reference = "base" if adapter is not None else initial
        tree["reference"] = {**tree.get("reference", {}), "model": reference}
    return tree


def _model_keys(section: SampledModel, model: str) -> dict[str, Any]:
    """What a policy is trained with as it is sampled with: tokenizer, end token, template.

    Args:
        section: of the rounds.
        model: its weights now: those that the section names, or a folder of ours.
    """
    keys = {
        "tokenizer_name_or_path": section.tokenizer_name_or_path,
        "eos_token": section.eos_token,
        "chat_template": section.chat_template,
        "trust_remote_code": section.trust_remote_code,
    }
    revision = section.model_revision if model == section.model_name_or_path else "main"
    named = {"model_name_or_path": model, "model_revision": revision}
    return {**named, **{key: value for key, value in keys.items() if value}}


def _tree(path: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"run.recipe: {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or "objective" not in tree:
        raise RecipeError(f"run.recipe: {path} has no objective; name a recipe of {TRAINING.command}")
    return tree


def _without_rows(data: Any) -> dict[str, Any]:
    return {key: value for key, value in (data or {}).items() if key not in ROWS_KEYS}


def _read(tree: dict[str, Any], words: Sequence[str], where: str) -> Recipe:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
        try:
            return read_recipe(path, list(words))
        except RecipeError as error:
            raise RecipeError(f"run.recipe {where}: {str(error).replace(str(path), where)}") from None
