"""Retention: has the model kept what its reference could do, on tasks of lm-evaluation-harness?"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from align.errors import RecipeError, RunError
from evals.evaluation import EVALS, EvalNeeds, Found
from objectives.checks import require

if TYPE_CHECKING:
    from evals.context import Context
    from evals.lm_eval_runs import Harness
    from evals.results import Result
    from evals.run_settings import Job
    from objectives.stats import Estimate

OURS = (
    *("model", "model_args", "tasks", "num_fewshot", "limit", "apply_chat_template", "include_path", "batch_size"),
    *("output_path", "log_samples", "trust_remote_code", "device"),
)
"""Keys of lm-eval that have a key here, or that are not to be changed."""


@EVALS.register("retention")
@dataclass(frozen=True, kw_only=True)
class Retention:
    """General tasks before and after training, paired document by document, beside what was trained for.

    python -m lm_eval runs in a process of its own, once for the policy and once for its reference, with the same tasks,
    examples and seeds. Without a network it reads what is in the cache of datasets.

    References:
        arXiv:2509.20758; github.com/EleutherAI/lm-evaluation-harness.
    """

    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval, e.g. [ifeval, gsm8k, arc_challenge]; python -m lm_eval ls tasks lists them."""
    target_tasks: tuple[str, ...] = ()
    """Those among them that were trained for; all others are general."""
    target_metric: str | None = None
    """Instead: a metric of an evaluation that is listed before this one, e.g. ranking/gain or win_rate/raw."""
    target_before: float = 0.0
    """With target_metric: its value before training, 0 for differences, 0.5 for a win rate against the reference."""
    metrics: dict[str, str] = field(default_factory=dict)
    """By task, the metric that counts. Default: acc_norm, exact_match, pass@1, acc, …, the first that a task has."""
    num_fewshot: int | None = None
    """Worked examples in every prompt. Default: as the task says."""
    limit: int | None = None
    """Only the first documents of every task."""
    apply_chat_template: bool = False
    """Render prompts with the chat template."""
    include_path: str | None = None
    """Folder of task files of one's own."""
    backend: Literal["hf", "vllm"] = "hf"
    """What computes."""
    batch_size: int | Literal["auto"] = 8
    """Sequences computed together."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Further model_args of lm-eval, e.g. {max_length: 4096}."""
    lm_eval_args: dict[str, Any] = field(default_factory=dict)
    """Further keys of lm-eval's configuration file, e.g. {system_instruction: …, confirm_run_unsafe_code: true}."""
    timeout: float = 86400.0
    """Seconds after which one run of lm-eval is stopped."""

    needs: ClassVar[EvalNeeds] = EvalNeeds(reference=True)

    def __post_init__(self) -> None:
        require("tasks", self.tasks, bool(self.tasks), "a list of tasks, e.g. [gsm8k]")
        unknown = [task for task in self.target_tasks if task not in self.tasks]
        require("target_tasks", self.target_tasks, not unknown, "among tasks")
        require("target_tasks", self.target_tasks, set(self.target_tasks) != set(self.tasks), "fewer than all tasks")
        if self.target_tasks and self.target_metric is not None:
            raise ValueError("target_metric has no effect beside target_tasks; remove one of them")
        if self.target_before and self.target_metric is None:
            raise ValueError("target_before has no effect without target_metric; remove it")
        if self.num_fewshot is not None:
            require("num_fewshot", self.num_fewshot, self.num_fewshot >= 0, ">= 0")
        if self.limit is not None:
            require("limit", self.limit, self.limit >= 2, ">= 2")
        require("timeout", self.timeout, self.timeout > 0, "> 0")
        own = [key for key in OURS if key in self.lm_eval_args]
        if own:
            raise ValueError(f"lm_eval_args.{own[0]} is set by the evaluation's own keys; use those")

    def check(self, job: Job) -> None:
        """Refuses what lm-eval can't do, what is not installed, and a model that is compared with itself."""
        from align import vllm_sampler
        from evals.lm_eval_runs import installed

        if job.base.quantized:
            raise RecipeError("evals: retention loads whole weights; remove model.load_in_4bit")
        try:
            installed()
            if self.backend == "vllm":
                vllm_sampler.require_version(vllm_sampler.installed(), "set backend to hf")
                _refuse_adapters_on_cpus(job)
        except RunError as error:
            raise RecipeError(f"evals: retention: {error}") from None

    def __call__(self, context: Context) -> Found:
        """See ``evals.retention``."""
        from evals.retention import retention_of_scores
        from evals.scores import Scores

        if context.is_reward_model:
            raise RunError(f"evals: retention needs a language model, and {context.job.name} is a reward model")
        context.free()
        after = self._run(context, "policy")
        before = self._run(context, "reference")
        target = self._target(context)
        scores: list[dict[str, dict[Hashable, float]]] = [
            {name: {**task.by_document} for name, task in side.tasks.items()} for side in (before, after)
        ]
        domain = tuple(name for name in after.tasks if self._is_target(name))
        measured, tests = retention_of_scores(*scores, domain=domain)
        extra = self._extra(context, after)
        where: dict[str, Any] = {"dataset": "lm-eval", "split": "general tasks", "step": context.step}
        if target is not None:
            change, about = target
            measured = replace(measured, estimates={**measured.estimates, "retention/domain_change": change})
            extra["target"] = about
        results: list[Result] = [*measured.results(**where, extra=extra)]
        kept: list[Scores] = []
        for name, task in after.tasks.items():
            own = {"dataset": f"lm-eval/{name}", "split": task.metric.removesuffix(",none"), "step": context.step}
            results += self._of_task(context, before, after, name, tests[name], measured.extra["p_holm"][name], own)
            kept.append(Scores(metric="retention/score", **own, by_prompt=task.by_document))
        warnings = []
        if measured.extra["excluded"]:
            warnings.append(
                f"{', '.join(measured.extra['excluded'])}: 0 before training, so that nothing could be lost"
            )
        if self.limit is not None:
            warnings.append(
                f"only the first {self.limit} documents of every task: not comparable with published scores"
            )
        return Found(results=results, scores=kept, warnings=warnings)

    def _is_target(self, task: str) -> bool:
        """Also a task of a group that is a target: lm-eval names them group_…"""
        return any(task == target or task.startswith(f"{target}_") for target in self.target_tasks)

    def _run(self, context: Context, who: str) -> Harness:
        from evals.lm_eval_runs import evaluate

        folder = (context.out / "lm_eval" / who).absolute()
        context.say(f"lm-eval: {', '.join(self.tasks)} of the {who}; its log is {folder / 'log.txt'}")
        return evaluate(self.settings(context.job, context.config, who), folder, self.metrics, self.timeout)

    def settings(self, job: Job, config: Any, who: str) -> dict[str, Any]:
        """What lm-eval is asked.

        Args:
            job: says which models.
            config: of the policy.
            who: ``policy`` or ``reference``.
        """
        import torch

        from align.model import compute_dtype

        base = job.base
        name, adapter, revision = base.model_name_or_path, job.adapter, base.model_revision
        if who == "reference":
            assert job.compared_with is not None
            adapter = None
            if job.compared_with != "base":
                other, adapter = job.located(job.compared_with)
                name, revision = other.model_name_or_path, other.model_revision
        model: dict[str, Any] = {
            "pretrained": name,
            "tokenizer": base.tokenizer_name_or_path or base.model_name_or_path,
            "dtype": str(compute_dtype(base)).removeprefix("torch."),
            "revision": revision,
        }
        if adapter is not None and self.backend == "hf":
            model["peft"] = adapter
        elif adapter is not None:
            from align.adapters import read_adapter
            from align.vllm_sampler import adapter_rank

            rank = adapter_rank(read_adapter(adapter))
            model |= {"lora_local_path": adapter, "max_lora_rank": rank}
        if self.backend == "vllm" and not torch.cuda.is_available():
            model |= {"enforce_eager": True, "enable_chunked_prefill": False}  # as sampling does on CPUs
        asked: dict[str, Any] = {
            "model": self.backend,
            "model_args": {**model, **self.model_args},
            "tasks": list(self.tasks),
            "batch_size": self.batch_size,
            "apply_chat_template": self.apply_chat_template,
            "trust_remote_code": base.trust_remote_code,
        }
        if self.backend == "hf":
            asked["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        for key in ("num_fewshot", "limit", "include_path"):
            if getattr(self, key) is not None:
                asked[key] = getattr(self, key)
        return {**asked, **self.lm_eval_args}

    def _target(self, context: Context) -> tuple[Estimate, Mapping[str, Any]] | None:
        """Change of the metric that was trained for, and where it was found."""
        from evals.results import Results
        from objectives.stats import Estimate

        if self.target_metric is None:
            return None
        path = context.out / "results.json"
        there = Results.read(path).results if path.exists() else []
        found = [each for each in there if each.metric == self.target_metric and each.step == context.step]
        if not found:
            raise RunError(
                f"target_metric {self.target_metric!r} was not measured at step {context.step}; list the evaluation "
                "that measures it before retention"
            )
        if len(found) > 1:
            where = "; ".join(f"{each.dataset}, {each.split}" for each in found)
            raise RunError(
                f"target_metric {self.target_metric!r} was measured on several splits ({where}); measure one"
            )
        one, nan = found[0], float("nan")
        limits = [nan if v is None else v - self.target_before for v in (one.low, one.high)]
        change = Estimate(
            value=one.value - self.target_before,
            stderr=nan if one.stderr is None else one.stderr,
            low=limits[0],
            high=limits[1],
            n=one.n,
            clusters=one.clusters,
            interval=one.interval,
        )
        about = {"metric": one.metric, "dataset": one.dataset, "split": one.split, "before": self.target_before}
        return change, about

    def _extra(self, context: Context, after: Harness) -> dict[str, Any]:
        from data.store import digest

        return {
            "template": after.chat_template or "none",
            "reference": context.job.compared_with,
            "lm_eval": after.version,
            "backend": self.backend,
            "num_fewshot": self.num_fewshot,
            "limit": self.limit,
            "target_tasks": list(self.target_tasks),
            "tasks": {
                name: {
                    "version": task.version,
                    "num_fewshot": task.num_fewshot,
                    "metric": task.metric,
                    "n": len(task.by_document),
                }
                for name, task in after.tasks.items()
            },
            "dataset_hash": digest([[name, task.metric, task.task_hash] for name, task in after.tasks.items()]),
        }

    def _of_task(
        self, context: Context, before: Harness, after: Harness, name: str, test: Any, p_holm: float, where: Any
    ) -> list[Result]:
        """One task: its score, and how it changed."""
        import numpy as np

        from evals.ranking import share_of
        from evals.results import Result

        task = after.tasks[name]
        extra = {
            "template": after.chat_template or "none",
            "lm_eval": after.version,
            "backend": self.backend,
            "version": task.version,
            "num_fewshot": task.num_fewshot,
            "limit": self.limit,
            "dataset_hash": task.task_hash,
            "target": self._is_target(name),
        }
        values = list(task.by_document.values())
        compared = {"reference": context.job.compared_with, "before": before.tasks[name].aggregated}
        tested = {
            "p_value": test.p_value,
            "p_holm": p_holm,
            "test": test.test,
            "better": test.better,
            "worse": test.worse,
        }
        score = share_of(np.array(values), range(len(values)))
        return [
            Result.of(score, metric="retention/score", **where, extra=extra),
            Result.of(test.difference, metric="retention/score_change", **where, extra=extra | compared | tested),
        ]


def _refuse_adapters_on_cpus(job: Job) -> None:
    """Choices are scored by log-probs of prompts, at which vLLM's adapters for CPUs fail (0.30: an error of einsum)."""
    import torch

    if torch.cuda.is_available():
        return
    other = job.compared_with
    adapters = [job.adapter, None if other in (None, "base") else job.located(other)[1]]
    # A run that is yet to be trained has no folder, and names a base only where it will be an adapter.
    if any(adapters) or job.model.base_model_name_or_path is not None:
        raise RecipeError(
            "evals: retention: vLLM on CPUs can't score choices under adapters; set backend to hf, or merge the "
            "adapter (python -m align.export RUN MODEL --merge)"
        )
