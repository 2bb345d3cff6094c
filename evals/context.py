"""What evaluations share: the pairs with their log-probs, from one pass, and samples, from one engine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from align import model as models
from align import sample
from align.errors import RunError
from align.prompt_settings import PromptSection
from align.sample_settings import Job as SampleJob
from align.sample_settings import OutputSection, SampledModel
from align.samplers import Sampler
from align.samples import Group, read
from align.sampling import Drawn, Request, Sampling
from align.scoring import OfLogps, OfStates
from align.sections import ModelSection
from align.value_head import is_reward_model
from data.chat import template_fingerprint
from data.preparation import Split
from data.store import TokenTable
from evals import loading
from evals.evaluation import EvalNeeds
from evals.passes import under_models
from evals.run_settings import ComparedModel, Job, recipe_of

Say = Callable[[str], None]
NO_REFERENCE = ComparedModel(model="none")


@dataclass(frozen=True, kw_only=True)
class PairTable:
    """Pairs, and what the models make of each."""

    split: Split
    dataset: str
    name: str
    """Of the split."""
    report: Mapping[str, Any]
    """Of the rows' preparation: what was read, dropped, cut."""
    numbers: Mapping[str, np.ndarray]
    """``policy/sum/chosen``, ``reference/sum/rejected``, ``length/chosen``, … by row, and what was made of states."""

    def __len__(self) -> int:
        return len(self.split.table)

    @cached_property
    def prompts(self) -> list[str]:
        """Of each pair; pairs of one prompt form a cluster."""
        return [self.split.prompt_id(row) for row in range(len(self))]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.numbers[name]


class Context:
    """What is evaluated, as evaluations see it. A context manager: engines are stopped at its end.

    Args:
        job: the settings.
        say: told what is done.
        of_states: what evaluations want of hidden states.
    """

    def __init__(self, job: Job, say: Say, of_states: OfStates | None = None) -> None:
        self.job, self.say, self.of_states = job, say, of_states
        self.out = Path(job.out.output_dir)
        self.base = job.base
        self.tokenizer = models.load_tokenizer(self.base)
        self.config = models.load_config(self.base)
        self.is_reward_model = is_reward_model(self.config)
        of_model = step_of(Path(job.adapter or job.model.model_name_or_path))
        self.step = of_model if job.out.step is None else job.out.step
        self.fingerprint = loading.fingerprint(self.base, job.adapter)
        self.template = template_fingerprint(self.tokenizer)
        self.left_out: Mapping[str, int] = {}
        """Rows without a prompt that the model could answer, by reason, where it was sampled last."""
        self._engine: tuple[str, _Engine] | None = None
        self._pairs: PairTable | None = None
        self.needs = EvalNeeds(
            pairs=any(entry.built.needs.pairs for entry in job.evals),
            columns=tuple(dict.fromkeys(name for entry in job.evals for name in entry.built.needs.columns)),
        )

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    @cached_property
    def reference_fingerprint(self) -> str | None:
        """Content hash of what the policy is compared with."""
        compared = None if self.is_reward_model else self.job.compared_with
        if compared is None:
            return None
        return loading.fingerprint(*((self.base, None) if compared == "base" else self.job.located(compared)))

    # ---- pairs ----

    def prepare_pairs(self) -> tuple[Split, str, str, dict[str, Any]]:
        """Reads and tokenises the pairs: faults in the data are found before a model is loaded."""
        found = loading.pairs_of(self.job, self.tokenizer, self.config, self.needs.columns)
        models.check_vocabulary(self.base, self.config, found[0].table)
        rows = found[3]["rows"]
        dropped = sum(found[3]["dropped"].values())
        self.say(f"pairs: {len(found[0].table)} of {found[1]} ({found[2]}); {dropped} of {rows['read']} rows dropped")
        return found

    @property
    def pairs(self) -> PairTable:
        """The pairs under policy and reference."""
        if self._pairs is None:
            self._pairs = self._scored(*self.prepare_pairs())
        return self._pairs

    def _scored(self, split: Split, dataset: str, name: str, report: Mapping[str, Any]) -> PairTable:
        numbers = self.under_models(split.table, self.of_states)
        for leg in split.table.legs:
            numbers[f"length/{leg}"] = split.table.legs[leg].lengths().astype(np.float64)
        for column, values in split.table.scores.items():
            numbers[f"column/{column}"] = np.asarray(values, dtype=np.float64)
        return PairTable(split=split, dataset=dataset, name=name, report=report, numbers=numbers)

    def under_models(
        self, table: TokenTable, of_states: OfStates | None = None, of_logps: OfLogps | None = None, what: str = "pairs"
    ) -> dict[str, np.ndarray]:
        """Rows under the policy and, where there is one, its reference; see ``evals.passes``."""
        self.free()
        job = self.job if not self.is_reward_model else dataclasses.replace(self.job, reference=NO_REFERENCE)
        return under_models(job, self.config, table, self.say, of_states=of_states, of_logps=of_logps, what=what)

    # ---- samples ----

    def samples(
        self, prompts: PromptSection, sampling: Sampling, name: str, model: SampledModel | None = None
    ) -> list[Group]:
        """Responses to prompts, drawn now or read where they were drawn before with the same settings.

        Args:
            prompts: where they come from.
            sampling: how responses are drawn.
            name: of the file they go to, in ``samples/``; settings are told apart by a hash in it.
            model: another model than the one that is evaluated: a baseline.
        Raises:
            RunError, RecipeError, DataError: one sentence on what is wrong.
        """
        if self.is_reward_model and model is None:
            raise RunError(f"{self.job.name} is a reward model, which can't be sampled")
        who = model or self.sampled_model
        serving = self.job.serving if model is None or self.job.serving.chosen != "server" else None
        if serving is None:
            raise RunError("serving.engine server serves one model: sample the baseline beforehand, and give the file")
        described = [dataclasses.asdict(each) for each in (who, prompts, sampling)]
        weights = self.fingerprint if model is None else loading.fingerprint(who.section, who.adapter_name_or_path)
        short = hashlib.sha256(json.dumps([weights, described], sort_keys=True).encode()).hexdigest()[:10]
        output = self.out / "samples" / f"{name}-{short}.jsonl"
        job = SampleJob(
            model=who, data=prompts, sampling=sampling, serving=serving, out=OutputSection(output=str(output))
        )
        sampler = None if serving.chosen == "server" or serving.data_parallel_size > 1 else self._kept(weights, job)
        sample.run(job, self.say, sampler)
        if model is None:
            self.left_out = _left_out(output)
        return list(read(output))

    def continued(self, prefixes: Sequence[Sequence[int]], tokens: int, name: str) -> tuple[list[Drawn], str]:
        """Greedy continuations of token sequences, and the engine that wrote them.

        Args:
            prefixes: token ids, continued as they are.
            tokens: to write at most.
            name: what the prefixes come from, for messages.
        """
        how = Sampling(temperature=0.0, max_tokens=tokens)
        job = SampleJob(
            model=self.sampled_model,
            data=PromptSection(dataset_name=name),
            sampling=how,
            serving=self.job.serving,
            out=OutputSection(output=str(self.out / "samples" / "continued.jsonl")),
        )
        served = sample.connected(job, self.tokenizer) if self.job.serving.chosen == "server" else None
        if served is not None:
            sample.fingerprint_of(job, sample._adapter(job), served)
        sampler = served or self._kept(self.fingerprint, job)
        requests = [
            Request(number=number, prompt=tuple(map(int, ids)), n=1, max_tokens=tokens, seed=0)
            for number, ids in enumerate(prefixes)
        ]
        found = {number: drawn[0] for number, drawn in sampler.draw(iter(requests), how)}
        engine = sampler.engine
        if served is not None:
            served.close()
        return [found[number] for number in range(len(requests))], engine

    @property
    def sampled_model(self) -> SampledModel:
        """The evaluated model, as sampling takes it."""
        return as_sampled(self.base, self.job.adapter)

    def free(self) -> None:
        """Stops an engine that waits for further samples: it may hold all of a GPU's memory."""
        self._stop()

    def _kept(self, weights: str, job: SampleJob) -> Sampler:
        """An engine that stays for the next evaluation of the same model; one at a time."""
        if self._engine is None or self._engine[0] != weights:
            self._stop()
            self._engine = (weights, _Engine(job, self.say))
        return self._engine[1]

    def _stop(self) -> None:
        if self._engine is not None:
            self._engine[1].stop()
            self._engine = None


class _Engine:
    """A sampler that starts when it is first needed, and is stopped by its owner alone."""

    def __init__(self, job: SampleJob, say: Say) -> None:
        self.job, self.say = job, say
        self.started: Sampler | None = None

    @property
    def engine(self) -> str:
        """Name and version, which only one that runs can tell."""
        return self._sampler().engine

    def draw(self, requests: Iterable[Request], how: Sampling) -> Iterator[tuple[int, list[Drawn]]]:
        """See ``align.samplers.Sampler``."""
        return self._sampler().draw(requests, how)

    def close(self) -> None:
        """Not yet: the next evaluation samples from it too."""

    def stop(self) -> None:
        """Gives memory back."""
        if self.started is not None:
            self.started.close()
            self.started = None

    def _sampler(self) -> Sampler:
        if self.started is None:
            section = self.job.model.section
            adapter = sample._adapter(self.job)
            length = sample.longest(self.job, models.context_length(models.load_config(section)), None)
            self.started = sample.started(self.job, models.load_tokenizer(section), adapter, length, self.say)
        return self.started


def _left_out(output: Path) -> dict[str, int]:
    report = json.loads(output.with_name(f"{output.name}.report.json").read_text())
    found = {reason: len(rows) for reason, rows in report["problems"].items()}
    return found | ({"the prompt leaves no room for a response": len(report["too_long"])} if report["too_long"] else {})


def as_sampled(section: ModelSection, adapter: str | None) -> SampledModel:
    """A model as sampling takes it.

    Args:
        section: of the model whose weights are loaded.
        adapter: folder of a LoRA adapter on it.
    """
    keys = {f.name for f in dataclasses.fields(SampledModel)} & {f.name for f in dataclasses.fields(ModelSection)}
    own = {key: getattr(section, key) for key in keys}
    if own["attn_implementation"] not in ("auto", "sdpa", "eager"):
        own["attn_implementation"] = "auto"
    return SampledModel(**own, adapter_name_or_path=adapter)


def step_of(folder: Path) -> int:
    """Optimizer steps that a run's folder, or a checkpoint in it, says it has taken; 0 where nothing is said."""
    if folder.name.startswith("checkpoint-") and folder.name.removeprefix("checkpoint-").isdigit():
        return int(folder.name.removeprefix("checkpoint-"))
    results = folder / "results.json"
    if recipe_of(folder) and results.is_file():
        steps = json.loads(results.read_text()).get("run", {}).get("steps")
        return steps if isinstance(steps, int) else 0
    return 0


def by_prompt_of(values: Sequence[float] | np.ndarray, prompts: Sequence[str]) -> dict[str, float]:
    """Each prompt's mean over its pairs, NaN left out."""
    from evals.measured import means_by_prompt

    array = np.asarray(values, dtype=np.float64)
    keep = np.isfinite(array)
    kept = [prompt for prompt, kept in zip(prompts, keep, strict=True) if kept]
    return {str(prompt): value for prompt, value in means_by_prompt(array[keep], kept).items()} if kept else {}
