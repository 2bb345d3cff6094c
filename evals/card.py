"""The model card: ``README.md`` with the metadata the Hub reads, and ``.eval_results/`` for its leaderboards.

Everything that comes from data, recipe or command is escaped for Markdown, and stripped of credentials and local paths.
"""

from __future__ import annotations

import functools
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from evals.card_info import CardInfo
from evals.card_limits import limits
from evals.card_plots import FOLDER, Plot, draw
from evals.card_results import TITLES, conditions, final, groups, label
from evals.curves import show_number, show_share
from evals.metrics import METRICS
from evals.parts import of_part
from evals.redact import is_hub_id, public, scrub, shown_name
from evals.results import Result, write_atomically
from evals.run_files import RunFiles, read_run
from evals.summary import calibration, headline, show, show_interval, tables, unit_of

__all__ = ["CardInfo", "code_block", "escape_markdown", "write_card"]

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
"""Of our own metrics without a better and a worse, and of those on given pairs, what goes into the metadata; the tables
in the card have them all."""
ON_PAIRS = ("ranking", "rewards", "displacement", "flow", "ches", "reward_model", "labels")
"""Kinds of metrics of which only the leading ones go into the metadata."""
TAGS = ("generated_from_trainer", "preference-alignment", "align-preferences")
MOST_REASONS = 30
"""Reasons for dropping rows that are listed; the rest is one line."""


def write_card(run_dir: Path, *, info: CardInfo | None = None) -> Path:
    """Writes ``README.md``, its pictures and, for results on Hub datasets, ``.eval_results/<dataset>.yaml``.

    Args:
        run_dir: a run's.
        info: what its files do not say; default is what the run left in ``card.json``.

    Returns:
        The path of ``README.md``.

    Raises:
        ValueError: in one sentence, if the run directory cannot be read (see ``evals.run_files.read_run``).
    """
    info = CardInfo.read(run_dir) if info is None else info
    run = read_run(run_dir)
    name = public(info.model_name or run_dir.resolve().name)
    body = _environment().get_template("card.md.jinja").render(**_context(run, info, name))
    path = run_dir / "README.md"
    write_atomically(path, f"---\n{_front_matter(run, info, name)}---\n\n{body.strip()}\n")
    _write_eval_results(run_dir / ".eval_results", run, info)
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


@functools.cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("evals", "templates"),
        autoescape=False,  # this is Markdown: `finalize` escapes every expression that is not Raw
        finalize=lambda value: value if isinstance(value, Raw) else Raw(escape_markdown(str(value))),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


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
        "plots": draw(run),
        "plot_folder": FOLDER,
        "picture": _picture,
        "reference": _reference(info, identity),
        "trackers": _trackers(run.path),
        "share_of": lambda count: show_share(count / kept) if (kept := (data.get("rows") or {}).get("kept")) else "—",
        "tokens_lost": data.get("tokens_lost") or {},
        "rows": data.get("rows") or {},
        "dropped": dropped[:MOST_REASONS],
        "dropped_more": sum(count for _, count in dropped[MOST_REASONS:]),
        "truncated": data.get("truncated") or {},
        "dataset_hash": data.get("dataset_hash"),
        "settings": _flat(scrub(run.recipe)),
        "steps": run.steps,
        "groups": groups(_shown(run)),
        "label": label,
        "parts": tables(run),
        "calibration": calibration(run),
        "shown_name": shown_name,
        "public": public,
        "unit": lambda metric: {"share": "", "points": "", "nats": "nats"}.get(unit_of(metric), ""),
        "checks": [scrub(check) for check in run.checks],
        "resumes": [public(line) for line in info.resumes],
        "limits": [public(line) for line in limits(run, info, _shown(run))],
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
            task_name=_task_name(r, info),
            dataset_type=r.dataset if is_hub_id(r.dataset) else _slug(shown_name(r.dataset)),
            dataset_name=shown_name(r.dataset),
            dataset_split=public(r.split),
            metric_type=r.metric,
            metric_name=METRICS[r.metric].label if r.metric in METRICS else r.metric,
            metric_value=r.value,
            metric_args={
                "n": r.n,
                "clusters": r.clusters,
                "low": r.low,
                "high": r.high,
                "interval": r.interval,
                **({} if _kind(r) in ON_PAIRS else conditions(r.extra)),
            },
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
        tags=list(dict.fromkeys([*TAGS, *(["reward-model"] if info.outputs else []), *objectives, *info.tags])),
        model_name=name,
        eval_results=results or None,
    )
    # Its to_dict moves model_name into model-index; the Hub reads both.
    return yaml.safe_dump({"model_name": name, **card.to_dict()}, sort_keys=False, allow_unicode=True)


def _write_eval_results(folder: Path, run: RunFiles, info: CardInfo) -> None:
    """One file per Hub dataset; files of an earlier card are removed."""
    for stale in folder.glob("*.yaml") if folder.is_dir() else ():
        stale.unlink()
    results = [r for r in _final(run) if _leading(r) and is_hub_id(r.dataset)]
    date = run.results.run.get("date") if run.results else None
    source = f"https://huggingface.co/{info.repo_id}" if is_hub_id(info.repo_id) else None
    for dataset in dict.fromkeys(r.dataset for r in results):
        entries = [
            EvalResultEntry(
                dataset_id=dataset,
                task_id=re.sub(r"[^A-Za-z0-9\-]", "_", r.metric),
                value=r.value,
                date=date if isinstance(date, str) else None,
                source_url=source,
                source_name=source and "Model card",
                notes=_notes(r),
            )
            for r in results
            if r.dataset == dataset
        ]
        text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
        write_atomically(folder / f"{_slug(dataset)}.yaml", text)


def _notes(r: Result) -> str:
    """Of a line in ``.eval_results``: where the number comes from, its interval, and under which conditions."""
    known = {} if _kind(r) in ON_PAIRS else conditions(r.extra)
    return "; ".join(
        [
            f"split {public(r.split)}, step {r.step}, n {r.n} in {r.clusters} prompts, "
            f"95 % {show_interval(r.metric, r.low, r.high)} ({r.interval})",
            *(f"{key} {text}" for key, text in known.items()),
        ]
    )


def _final(run: RunFiles) -> list[Result]:
    return final(run.results.results if run.results else ())


def _shown(run: RunFiles) -> list[Result]:
    """Those over all rows: parts have a line each in a table of their own."""
    return [r for r in _final(run) if not of_part(r)]


def _task(info: CardInfo) -> str:
    return "text-classification" if info.outputs else "text-generation"


def _kind(result: Result) -> str:
    return result.metric.partition("/")[0]


def _task_name(result: Result, info: CardInfo) -> str:
    if _kind(result) in ON_PAIRS:
        return "Reward modelling" if info.outputs else "Preference ranking"
    return TITLES.get(_kind(result), "Evaluation")


def _leading(result: Result) -> bool:
    if result.metric in LEADING or result.metric not in METRICS:
        return True
    return _kind(result) not in ON_PAIRS and METRICS[result.metric].better != ""


def _picture(plot: Plot) -> Raw:
    """A Markdown picture; what it shows is told in words too."""
    return Raw(f"![{escape_markdown(plot.spoken)}]({FOLDER}/{plot.name}.png)")


def _reference(info: CardInfo, identity: Mapping[str, Any]) -> dict[str, str]:
    """Identity of the reference model, in words."""
    if info.reference is None:
        return {}
    names = {"initial": "the model as it was before training", "base": "the base model without an adapter"}
    ways = {
        "cached": "computed once before the first step",
        "adapter_off": "the policy with its adapter switched off",
        "live": "a second model, in every step",
    }
    found = {
        "reference": names.get(info.reference, shown_name(info.reference)),
        "its log-probs": ways.get(info.reference_source, info.reference_source),
        "hash of its weights": info.reference_fingerprint or "not taken",
        "hash of the weights that training began with": str(identity.get("fingerprint") or "not taken"),
    }
    if info.reference_moves:
        found["moved"] = "it followed the policy during training"
    return found


BADGES = {
    "wandb": '<img src="https://raw.githubusercontent.com/wandb/assets/main/wandb-github-badge-28.svg" '
    'alt="Visualize in Weights & Biases" width="150" height="24"/>',
}


def _trackers(run_dir: Path) -> list[Raw]:
    """Where the run was followed, a sentence each; with a badge and a link where it can be looked at."""
    path = run_dir / "trackers.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    lines: list[Raw] = []
    for name, entry in known.items():
        link = str(entry.get("link") or "")
        shown = escape_markdown(public(str(entry.get("shown") or name)))
        if re.fullmatch(r"https://[A-Za-z0-9.\-]+(?::\d+)?/[\w\-./~%]*", link):
            lines.append(Raw(f"[{BADGES.get(name, escape_markdown(name))}]({link}) {shown}"))
        else:
            lines.append(Raw(shown))
    return lines


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
