"""Settings of ``python -m evals run``, and the keys that evaluations add to recipes for training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from align import keys, settings
from align.errors import RecipeError
from align.hub_adapters import adapter_folder
from align.keys import Schema
from align.recipe import Recipe, read_recipe
from align.samplers import ServingSection
from align.sections import ModelSection
from align.typed import Entry
from evals import evaluations  # noqa: F401  # registers them
from evals.evaluation import EVALS
from evals.evaluations.generations import names_on_the_way
from objectives.checks import require


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel(ModelSection):
    """What is evaluated."""

    model_name_or_path: str
    """Hub id or folder of a causal language model, a reward model or a LoRA adapter, e.g. of a run."""
    base_model_name_or_path: str | None = None
    """Of an adapter: its base, where that is no longer where it was in training. Of a Hub id, model_revision is the
    adapter's, and the base's is what its configuration says."""
    name: str | None = None
    """What reports call it. Default: its id, or the last part of its folder."""


@dataclass(frozen=True, kw_only=True)
class ComparedModel:
    """The frozen model that the policy is compared with."""

    model: str = "auto"
    """auto: what it was trained from (an adapter's base, or what the run's recipe names), or none where that is not
    known. none: no reference. Else a Hub id or folder."""


@dataclass(frozen=True, kw_only=True)
class PairSection:
    """The pairs that ranking, CHES and reward models are measured on."""

    dataset_name: str
    """Hub id, or a local file or folder (json, jsonl, parquet, arrow, csv, also .gz)."""
    dataset_config: str | None = None
    """Name of the dataset's configuration on the Hub."""
    split: str | None = None
    """Which split to read. Default: test; for a single file, all of it."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our column names to theirs, e.g. {prompt: question, chosen: better, rejected: worse}."""
    format: str = "auto"
    """How rows are written; auto recognises it."""
    as_chat: bool = False
    """Turn plain strings and HH transcripts into messages, rendered with the chat template."""
    max_length: int | None = None
    """Most tokens of prompt + response. Default: 2048 or the model's context, whichever is smaller."""
    truncation: Literal["truncate_response_end", "truncate_prompt_start", "drop", "raise"] = "truncate_response_end"
    """What happens to longer rows."""
    max_dropped_share: float = 0.5
    """Stop if more than this share of the rows can't be used, in [0, 1]."""
    max_rows: int | None = None
    """Read only this many rows."""
    rule: Literal["best_vs_worst", "best_vs_random", "threshold", "margin"] = "best_vs_worst"
    """How lists of scored responses become pairs; see align/train.py --help."""
    threshold: float | None = None
    """Least score of a good response, with rule threshold."""
    margin: float = 0.0
    """Least difference between the scores of chosen and rejected."""

    def __post_init__(self) -> None:
        require("max_dropped_share", self.max_dropped_share, 0 <= self.max_dropped_share <= 1, "in [0, 1]")
        if self.max_rows is not None:
            require("max_rows", self.max_rows, self.max_rows >= 1, ">= 1")
        if (self.rule == "threshold") != (self.threshold is not None):
            raise ValueError("rule threshold and the key threshold go together: give both, or neither")


@dataclass(frozen=True, kw_only=True)
class OutSection:
    """Where results go."""

    output_dir: str
    """Folder for results.json, scores.jsonl, pairs.jsonl, generations.jsonl and report.html. Results that are there
    are kept; those of the same metric, dataset, split and step are replaced."""
    step: int | None = None
    """Optimizer steps that the model has taken, for curves over checkpoints. Default: what a run's folder says."""
    seed: int = 0
    """Of what is random in evaluations: bootstraps, and samples where sampling.seed is not given."""
    token_budget: int | Literal["auto"] = "auto"
    """Positions of a batch in the pass over pairs."""


SCHEMA = Schema(
    sections={
        "model": EvaluatedModel,
        "reference": ComparedModel,
        "data": PairSection,
        "serving": ServingSection,
        "out": OutSection,
    },
    named={"evals": EVALS},
    elsewhere={
        "output": "out.output_dir",
        "adapter_name_or_path": "model.model_name_or_path, which may be an adapter's folder",
        "tasks": "evals: {name: retention, tasks: […]}",
        "n": "sampling.n of an evaluation, e.g. evals: {name: generations, sampling: {n: 4}}",
        "temperature": "sampling.temperature of an evaluation",
    },
    required=("model", "evals", "out"),
    example="launch/recipes/eval.yaml",
    command="python -m evals run",
)
TRAINING = dataclasses.replace(
    keys.TRAINING,
    sections={**keys.TRAINING.sections, "serving": ServingSection},
    named={**keys.TRAINING.named, "evals": EVALS},
)
"""Keys of recipes for training, evaluations included."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is evaluated, how, and where results go."""

    model: EvaluatedModel
    reference: ComparedModel
    data: PairSection | None
    serving: ServingSection
    out: OutSection
    evals: tuple[Entry, ...]
    run_dir: Path | None = None
    """The training run that this ends: its held-out rows are the pairs."""

    @property
    def adapter(self) -> str | None:
        """The adapter's folder, where the model is one; one on the Hub is fetched into its cache.

        Raises:
            RunError: it can't be fetched.
        """
        folder = adapter_folder(self.model.model_name_or_path, self.model.model_revision)
        return None if folder is None else str(folder)

    @property
    def base(self) -> ModelSection:
        """The model whose weights are loaded: an adapter's base, or the model itself."""
        own = {f.name: getattr(self.model, f.name) for f in dataclasses.fields(ModelSection)}
        if self.adapter is None:
            return ModelSection(**own)
        # In a folder an adapter has no revision of its own.
        revision = "main" if self.on_hub else own["model_revision"]
        where = self.model.base_model_name_or_path
        if where is None:
            where, trained_on = self._trained_on(Path(self.adapter))
            revision = trained_on if revision == "main" else revision
        tokenizer = self.model.tokenizer_name_or_path
        if tokenizer is None and (Path(self.adapter) / "tokenizer_config.json").is_file():
            tokenizer = self.adapter
        changed = {"model_name_or_path": where, "model_revision": revision, "tokenizer_name_or_path": tokenizer}
        return ModelSection(**{**own, **changed})

    def _trained_on(self, adapter: Path) -> tuple[str, str]:
        """An adapter's base, and its revision."""
        written = json.loads((adapter / "adapter_config.json").read_text())
        base = str(written.get("base_model_name_or_path") or "")
        looks_local = base.startswith((".", "/")) or base.count("/") > 1
        if not base or (looks_local and not Path(base).is_dir()):
            raise RecipeError(
                f"model.model_name_or_path: the adapter {self.model.model_name_or_path!r} was trained on {base!r}, "
                "which is not there; set model.base_model_name_or_path"
            )
        return base, str(written.get("revision") or "main")

    def located(self, name: str) -> tuple[ModelSection, str | None]:
        """Another model's weights, and its adapter where it is one; loaded as the evaluated model is.

        Args:
            name: Hub id, or folder of a model or of an adapter, which stands on its own base.
        """
        own = self.model
        other = EvaluatedModel(
            model_name_or_path=name,
            base_model_name_or_path=own.base_model_name_or_path if self.adapter is not None else None,
            dtype=own.dtype,
            attn_implementation=own.attn_implementation,
            trust_remote_code=own.trust_remote_code,
        )
        job = dataclasses.replace(self, model=other)
        return job.base, job.adapter

    @property
    def on_hub(self) -> bool:
        """Whether the model is named by its Hub id."""
        return not Path(self.model.model_name_or_path).is_dir()

    @property
    def name(self) -> str:
        """What reports call the model."""
        path = self.model.model_name_or_path
        return self.model.name or (path if self.on_hub else Path(path).resolve().name)

    @property
    def compared_with(self) -> str | None:
        """The reference: a model's name, ``base`` for an adapter's own base, or None."""
        if self.reference.model == "none":
            return None
        if self.reference.model != "auto":
            return self.reference.model
        if self.adapter is not None:
            lora = recipe_of(Path(self.adapter)).get("lora")
            before = lora.get("adapter_name_or_path") if isinstance(lora, Mapping) else None
            from evals.redact import is_hub_id

            if before and self.on_hub and not is_hub_id(str(before)):
                return None  # a folder of the machine that it was trained on
            return str(before) if before else "base"
        recipe = recipe_of(Path(self.model.model_name_or_path))
        section = recipe.get("model")
        return str(section["model_name_or_path"]) if isinstance(section, Mapping) else None


def recipe_of(folder: Path) -> Mapping[str, Any]:
    """The recipe of a run's folder, or of a checkpoint in it; empty where there is none."""
    for place in (folder, folder.parent):
        path = place / "recipe.yaml"
        if path.is_file():
            try:
                found = yaml.safe_load(path.read_text())
            except yaml.YAMLError:
                raise RecipeError(f"{path} is not YAML; restore it, or name the reference in reference.model") from None
            return found if isinstance(found, Mapping) else {}
    return {}


def read_job(config: str | None, words: Sequence[str]) -> Job:
    """The settings of a command line; the first word may be a run's folder, whose recipe then says what to do.

    Raises:
        RecipeError: one sentence on what is wrong.
    """
    if words and not words[0].startswith("--"):
        return of_run(Path(words[0]), words[1:], config)
    schema = SCHEMA
    if "data" not in settings.merge(config, words, SCHEMA).values:  # nothing is asked for that needs pairs
        others = {name: section for name, section in SCHEMA.sections.items() if name != "data"}
        schema = dataclasses.replace(SCHEMA, sections=others)
    return checked(Job(**{"data": None, **settings.read_settings(config, words, schema)}))


def of_run(run_dir: Path, words: Sequence[str] = (), config: str | None = None) -> Job:
    """What a training run's recipe asks for at its end.

    Args:
        run_dir: a finished run.
        words: keys that replace the recipe's: ``--evals``, ``--serving.KEY``.
        config: a file of evaluations instead of the recipe's own.
    """
    if not (run_dir / "recipe.yaml").is_file():
        raise RecipeError(f"{run_dir} is no run's folder (no recipe.yaml); name one, or use --config FILE")
    named = settings.merge(run_dir / "recipe.yaml", words, TRAINING).commanded
    other = sorted(path for path in named if path.split(".")[0] not in ("evals", "serving"))
    if other:
        raise RecipeError(
            f"--{other[0]} has no effect on a run that is trained: only evals and serving can follow its folder; "
            "evaluate it otherwise with --config FILE"
        )
    recipe = read_recipe(run_dir / "recipe.yaml", words, TRAINING)
    data: PairSection | None = None
    if config is not None:
        own = {"data": PairSection, "serving": ServingSection}
        schema = dataclasses.replace(SCHEMA, sections=own, required=("evals",))
        written = settings.merge(config, (), schema).values
        if "data" not in written:
            schema = dataclasses.replace(schema, sections={"serving": ServingSection})
        asked = settings.read_settings(config, (), schema)
        recipe = dataclasses.replace(recipe, evals=asked["evals"])
        if "serving" in written:
            recipe = dataclasses.replace(recipe, serving=asked["serving"])
        data = asked.get("data")
    if not recipe.evals:
        raise RecipeError(f"{run_dir / 'recipe.yaml'} has no evals section; add --evals NAME, or --config FILE")
    return at_the_end(recipe, run_dir, data)


def check_recipe(recipe: Recipe) -> None:
    """Refuses evaluations that could not be made at the end of a run, before it begins.

    Raises:
        RecipeError: one sentence on what is wrong.
    """
    if not recipe.evals:
        if recipe.serving is not None:
            raise RecipeError("serving has no effect without evals; remove the section")
        return
    job = at_the_end(recipe, Path(recipe.train.output_dir))
    held_out = recipe.data.eval_dataset_name is not None or recipe.data.eval_share > 0
    if held_out:
        names_on_the_way(job)
    for number, entry in enumerate(job.evals):
        needs, where = entry.built.needs, f"evals.{number} ({entry.name})"
        if needs.pairs and not held_out:
            raise RecipeError(f"{where} needs held-out rows; set data.eval_share or data.eval_dataset_name")
        if needs.reward_model != recipe.trains_reward_model and (needs.reward_model or needs.states or needs.samples):
            kind = "a reward model" if needs.reward_model else "a language model"
            raise RecipeError(f"{where} measures {kind}, which this recipe does not train; remove it")


def at_the_end(recipe: Recipe, run_dir: Path, data: PairSection | None = None) -> Job:
    """What a recipe asks for when it has been trained into ``run_dir``; on its held-out rows, or on other pairs."""
    own = {f.name: getattr(recipe.model, f.name) for f in dataclasses.fields(ModelSection)}
    adapter = recipe.lora is not None
    model = EvaluatedModel(
        **{
            **own,
            "model_name_or_path": str(run_dir),
            "model_revision": "main",
            "tokenizer_name_or_path": str(run_dir),
            "load_in_4bit": recipe.model.load_in_4bit and adapter,
        },
        base_model_name_or_path=recipe.model.model_name_or_path if adapter else None,
    )
    reference = recipe.reference.model if recipe.needs_reference else "initial"
    name = recipe.model.model_name_or_path if reference in ("initial", "base") else reference
    if adapter and reference in ("initial", "base"):
        trained_adapter = recipe.lora is not None and recipe.lora.adapter_name_or_path
        name = str(trained_adapter) if trained_adapter and reference == "initial" else "base"
    return checked(
        Job(
            model=model,
            reference=ComparedModel(model=name),
            data=data,
            serving=recipe.serving or ServingSection(),
            out=OutSection(output_dir=str(run_dir), seed=recipe.train.seed),
            evals=recipe.evals,
            run_dir=run_dir,
        )
    )


def checked(job: Job) -> Job:
    """The job, if it can be done as far as settings tell.

    Raises:
        RecipeError: an evaluation lacks something, or is listed twice.
    """
    names = [entry.name for entry in job.evals]
    for number, entry in enumerate(job.evals):
        needs, where = entry.built.needs, f"evals.{number} ({entry.name})"
        if needs.pairs and job.data is None and job.run_dir is None:
            raise RecipeError(f"{where} needs pairs; write a data section with dataset_name")
        if needs.reference and job.compared_with is None:
            raise RecipeError(f"{where} compares with a reference, and there is none; set reference.model")
        if not needs.samples and names.count(entry.name) > 1:
            raise RecipeError(f"evals lists {entry.name} {names.count(entry.name)} times; once is enough")
        entry.built.check(job)
    _refuse_repeated(job)
    return job


def _refuse_repeated(job: Job) -> None:
    """Two evaluations of one kind on prompts of one name would replace each other's results."""
    seen: set[tuple[str, ...]] = set()
    for entry in job.evals:
        if not entry.built.needs.samples:
            continue
        prompts, called = getattr(entry.built, "prompts", None), getattr(entry.built, "split_name", None)
        key = (entry.name, str(getattr(prompts, "dataset_name", "")), str(called or getattr(prompts, "split", "")))
        if key in seen:
            raise RecipeError(f"evals lists {entry.name} twice on the same prompts; give one of them a split_name")
        seen.add(key)
