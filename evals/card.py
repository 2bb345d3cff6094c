"""The model card: ``README.md`` with the metadata the Hub reads, and ``.eval_results/`` for its leaderboards.

Everything that comes from data, recipe or command is escaped for Markdown, and stripped of credentials and local paths.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from evals.curves import show_number, show_share
from evals.metrics import METRICS
from evals.redact import is_hub_id, public, scrub, shown_name
from evals.results import Result, write_atomically
from evals.run_files import RunFiles, read_run
from evals.summary import calibration, headline, notes, of_part, parts, show, show_interval, unit_of, whole

LEADING = (
    "ranking/accuracy",
    "ranking/accuracy_per_token",
    "ranking/gain",
    "rewards/accuracies",
    "displacement/chosen",
    "reward_model/accuracy",
    "reward_model/ece",
    "reward_model/absolute_error",
    "reward_model/spearman",
)
"""Of our own metrics, those that go into the metadata; the table in the card has them all."""
TAGS = ("generated_from_trainer", "preference-alignment", "align-preferences")
MOST_REASONS = 30
"""Reasons for dropping rows that are listed; the rest is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardInfo:
    """What a card needs and a run directory does not say by itself.

    Raises:
        ValueError: if ``license`` is not an id such as ``apache-2.0``.
    """

    base_model: str
    """Hub id or local path of the model that was trained."""
    datasets: Sequence[str]
    """Hub ids or local paths; only the ids go into the metadata."""
    objective: str
    """Registry name; ``dpo + sft`` for several."""
    formula: str
    """As the objective's docstring has it."""
    citation: str
    """Where the formula is from."""
    adapter: bool
    """Whether a PEFT adapter was trained, rather than the whole model."""
    command: str
    """The command line that trained it."""
    usage: str = ""
    """How the model is meant to be asked, where prompts alone are not enough."""
    license: str | None = None
    """Of the trained model, if known; nothing is guessed."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Library to version."""
    resumes: Sequence[str] = ()
    """One sentence for each time the run was resumed."""
    model_name: str = ""
    """Of the trained model; default is the run directory's name."""
    language: Sequence[str] = ()
    """ISO 639-1 codes of the training data, if known."""
    repo_id: str = ""
    """Where it will be on the Hub, for the quick start."""
    outputs: Sequence[str] = ()
    """Names of a scalar head's outputs, all of them in order; empty for a language model."""

    def __post_init__(self) -> None:
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", self.license):
            raise ValueError(f"license {self.license!r} is not an id such as 'apache-2.0' or 'other'")


def write_card(run_dir: Path, *, info: CardInfo) -> Path:
    """Writes ``README.md`` and, for results on Hub datasets, ``.eval_results/<dataset>.yaml``.

    Returns:
        The path of ``README.md``.

    Raises:
        ValueError: in one sentence, if the run directory cannot be read (see ``evals.run_files.read_run``).
    """
    run = read_run(run_dir)
    name = public(info.model_name or run_dir.resolve().name)
    environment = Environment(
        loader=PackageLoader("evals", "templates"),
        autoescape=False,  # this is Markdown: `finalize` escapes every expression that is not Raw
        finalize=lambda value: value if isinstance(value, Raw) else Raw(escape_markdown(str(value))),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    body = environment.get_template("card.md.jinja").render(**_context(run, info, name))
    path = run_dir / "README.md"
    write_atomically(path, f"---\n{_front_matter(run, info, name)}---\n\n{body.strip()}\n")
    _write_eval_results(run_dir / ".eval_results", _final(run))
    return path


class Raw(str):
    """Markdown of our own making, which is not escaped again."""

    __slots__ = ()


def escape_markdown(text: str) -> str:
    """One line of plain text that Markdown, tables and HTML leave as it is."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    line = html.escape(line, quote=False)
    # Backslash escapes for what is markup anywhere in a line; entities for what would become a link by itself.
    # An underscore inside a word is plain to Markdown, so recipe keys stay readable in the source too.
    line = re.sub(r"([\\`*\[\]|~$^{}#!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", line)
    # At its beginning a line can be a list item or, under a paragraph, turn that into a heading.
    line = re.sub(r"^([-+=])(?=[-=\s]|$)", r"\\\1", line)
    line = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", line)
    return line.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")


def code_block(text: str, language: str = "") -> Raw:
    """A fenced block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Raw(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def _context(run: RunFiles, info: CardInfo, name: str) -> dict[str, Any]:
    data = scrub(run.data)
    identity = scrub(run.results.run) if run.results else {}
    dropped = sorted((data.get("dropped") or {}).items(), key=lambda item: -item[1])
    return {
        "name": name,
        "base": shown_name(info.base_model),
        "base_link": _link(info.base_model, ""),
        "datasets": [(shown_name(d), _link(d, "datasets/")) for d in info.datasets],
        "adapter": info.adapter,
        "objective": info.objective,
        "usage": code_block(public(info.usage), "text") if info.usage else "",
        "formula": code_block(public(info.formula), "text"),
        "citation": public(info.citation),
        "headline": headline(run),
        "reward_model": bool(info.outputs),
        "quick_start": code_block(_quick_start(run, info), "python"),
        "rows": data.get("rows") or {},
        "dropped": dropped[:MOST_REASONS],
        "dropped_more": sum(count for _, count in dropped[MOST_REASONS:]),
        "truncated": data.get("truncated") or {},
        "dataset_hash": data.get("dataset_hash"),
        "settings": _flat(scrub(run.recipe)),
        "steps": run.steps,
        "results": [(r, METRICS[r.metric].label if r.metric in METRICS else "") for r in _shown(run)],
        "parts": parts(run),
        "part_metrics": list(dict.fromkeys(metric for part in parts(run) for metric in part.cells)),
        "calibration": calibration(run),
        "shown_name": shown_name,
        "public": public,
        "unit": lambda metric: {"share": "", "points": "", "nats": "nats"}.get(unit_of(metric), ""),
        "checks": [scrub(check) for check in run.checks],
        "resumes": [public(line) for line in info.resumes],
        "notes": [note.text for note in notes(run)],
        "versions": {str(k): public(str(v)) for k, v in info.versions.items()},
        "identity": _flat({k: v for k, v in identity.items() if not (k == "versions" and info.versions)}),
        "command": code_block(public(info.command), "sh"),
        "recipe_there": bool(run.recipe_text),
        "show": show,
        "show_interval": lambda *result: Raw(show_interval(*result)),
        "show_number": show_number,
        "show_share": show_share,
    }


def _front_matter(run: RunFiles, info: CardInfo, name: str) -> str:
    """YAML between the dashes; a base model or dataset without a Hub id is left out, as the Hub would refuse it."""
    on_hub = is_hub_id(info.base_model)
    results = [
        EvalResult(
            task_type=_task(info),
            task_name=("Reward modelling" if info.outputs else "Preference ranking")
            if r.metric in METRICS
            else "Evaluation",
            dataset_type=r.dataset if is_hub_id(r.dataset) else _slug(shown_name(r.dataset)),
            dataset_name=shown_name(r.dataset),
            dataset_split=public(r.split),
            metric_type=r.metric,
            metric_name=METRICS[r.metric].label if r.metric in METRICS else r.metric,
            metric_value=r.value,
            metric_args={"n": r.n, "clusters": r.clusters, "low": r.low, "high": r.high, "interval": r.interval},
        )
        for r in _final(run)
        if _leading(r)
    ]
    objectives = [part.strip() for part in info.objective.split("+") if part.strip()]
    card = ModelCardData(
        base_model=info.base_model if on_hub else None,
        base_model_relation=("adapter" if info.adapter else "finetune") if on_hub else None,
        datasets=[d for d in info.datasets if is_hub_id(d)] or None,
        library_name="peft" if info.adapter else "transformers",
        license=info.license,
        language=list(info.language) or None,
        pipeline_tag=_task(info),
        tags=[*TAGS, *(["reward-model"] if info.outputs else []), *objectives],
        model_name=name,
        eval_results=results or None,
    )
    # Its to_dict moves model_name into model-index; the Hub reads both.
    return yaml.safe_dump({"model_name": name, **card.to_dict()}, sort_keys=False, allow_unicode=True)


def _write_eval_results(folder: Path, results: Sequence[Result]) -> None:
    """One file per Hub dataset; files of an earlier card are removed."""
    for stale in folder.glob("*.yaml") if folder.is_dir() else ():
        stale.unlink()
    for dataset in dict.fromkeys(r.dataset for r in results if _leading(r) and is_hub_id(r.dataset)):
        entries = [
            EvalResultEntry(
                dataset_id=dataset,
                task_id=r.metric.replace("/", "_"),
                value=r.value,
                notes=f"split {public(r.split)}, step {r.step}, n {r.n} in {r.clusters} prompts, "
                f"95 % {show_interval(r.metric, r.low, r.high)} ({r.interval})",
            )
            for r in results
            if r.dataset == dataset and _leading(r)
        ]
        text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
        write_atomically(folder / f"{_slug(dataset)}.yaml", text)


def _final(run: RunFiles) -> list[Result]:
    """Of each metric on each split, the result at the latest step."""
    latest: dict[tuple[str, str, str], Result] = {}
    for result in run.results.results if run.results else ():
        key = (result.metric, result.dataset, result.split)
        if key not in latest or result.step >= latest[key].step:
            latest[key] = result
    return list(latest.values())


def _shown(run: RunFiles) -> list[Result]:
    """Those of the large table: of a reward model, parts of the rows have a table of their own."""
    together = whole(run)
    return [r for r in _final(run) if not of_part(r, together)]


def _task(info: CardInfo) -> str:
    return "text-classification" if info.outputs else "text-generation"


def _leading(result: Result) -> bool:
    return result.metric in LEADING or result.metric not in METRICS


def _quick_start(run: RunFiles, info: CardInfo) -> str:
    where = json.dumps(info.repo_id) if info.repo_id else '"."  # this folder, or its id on the Hub'
    chat = (run.path / "chat_template.jinja").exists()
    kind = "SequenceClassification" if info.outputs else "CausalLM"
    loader = f"AutoPeftModelFor{kind}" if info.adapter else f"AutoModelFor{kind}"
    # The base model of an adapter does not know how many outputs the head has.
    heads = f", num_labels={len(info.outputs)}" if info.outputs and info.adapter else ""
    lines = [
        *(["import torch"] if info.outputs else []),
        f"from peft import {loader}" if info.adapter else f"from transformers import {loader}, AutoTokenizer",
        *(["from transformers import AutoTokenizer"] if info.adapter else []),
        "",
        f"model_id = {where}",
        "tokenizer = AutoTokenizer.from_pretrained(model_id)",
        f'model = {loader}.from_pretrained(model_id{heads}, device_map="auto")',
        *_scoring(info.outputs, chat=chat),
    ]
    if info.outputs:
        return "\n".join(lines)
    lines.append("")
    if chat:
        lines += [
            'messages = [{"role": "user", "content": "How do I keep bread fresh?"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ").to(model.device)",
        ]
    else:
        lines += ['inputs = tokenizer("How do I keep bread fresh?", return_tensors="pt").to(model.device)']
    lines += [
        "output = model.generate(**inputs, max_new_tokens=200)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "\n".join(lines)


def _scoring(outputs: Sequence[str], *, chat: bool) -> list[str]:
    """The second half of a reward model's quick start, which tokenises as training did: one end token, at the end."""
    if not outputs:
        return []
    question, answer = '"How do I keep bread fresh?"', '"Wrap it in a cloth."'
    if chat:
        lines = [
            "messages = [",
            f'    {{"role": "user", "content": {question}}},',
            f'    {{"role": "assistant", "content": {answer}}},',
            "]",
            "text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()",
            "if not text.endswith(tokenizer.eos_token):",
            "    text += tokenizer.eos_token",
        ]
    else:
        lines = [f'text = {question} + " " + {answer} + tokenizer.eos_token']
    special = ", add_special_tokens=False" if chat else ""
    lines = [
        "model.config.pad_token_id = None  # one text at a time: its last token holds the score",
        "",
        *lines,
        f'inputs = tokenizer(text{special}, return_tensors="pt").to(model.device)',
        "with torch.no_grad():",
        '    scores = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[0]',
    ]
    if len(outputs) == 1:
        return [*lines, "print(scores.item())"]
    names = json.dumps(list(outputs), ensure_ascii=False)
    return [*lines, f"for name, score in zip({names}, scores.tolist()):", "    print(name, score)"]


def _link(name: str, kind: str) -> Raw:
    """A Markdown link for a Hub id, else the escaped last component."""
    shown = escape_markdown(shown_name(name))
    return Raw(f"[{shown}](https://huggingface.co/{kind}{name})" if is_hub_id(name) else shown)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._\-]+", "-", name).strip("-.") or "dataset"


def _flat(value: Any, key: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [item for name, inner in value.items() for item in _flat(inner, f"{key}.{name}" if key else str(name))]
    return [] if value is None else [(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]
