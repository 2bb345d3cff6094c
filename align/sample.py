"""Draws samples of a policy, to JSON lines that scores, selection and pairs are made of.

    python -m align.sample --config launch/recipes/sample.yaml --model_name_or_path M --dataset_name D \\
        --engine vllm --n 8 --max_tokens 256 --output samples.jsonl
    python -m align.sample --help       every key, its default and what it means

Prompts come from any dataset that can be trained on, each prompt once, and are written as in training. Killed and
started again with the same command, it goes on: what is written stays, and samples do not depend on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from align import samples as stored
from align import settings
from align.adapters import AdapterInfo, read_adapter, refuse_other_base
from align.console import quiet_libraries
from align.errors import RecipeError, RunError
from align.fingerprints import joined, mixed, weights_on_disk
from align.prompts import Prompt, Prompts, read_prompts
from align.sample_settings import SCHEMA, Job, read_job
from align.samplers import Sampler, api_key, end_tokens, make_sampler
from align.samples import Origin, Sample
from align.sampling import Drawn, Request, decoded, encoded, spread, without_end
from align.server_sampler import ServerSampler
from data.files import write_atomically

Say = Callable[[str], None]
EVERY = 20.0
"""Seconds between two lines about progress where there is no terminal."""


def run(job: Job, say: Say = print, sampler: Sampler | None = None) -> Path:
    """Draws what is missing.

    Args:
        job: the settings.
        say: told what is done.
        sampler: one that is running, instead of one that the settings describe.
    Returns:
        The file, in the order of the dataset.
    Raises:
        RecipeError, DataError, RunError: one sentence on what is wrong and what to do.
    """
    from align import model as models
    from data.chat import template_fingerprint

    if job.model.attn_implementation != "auto" and job.serving.chosen != "transformers":
        raise RecipeError(f"model.attn_implementation has no effect with engine {job.serving.chosen}; remove it")
    if job.model.mixture_with is not None and job.serving.chosen != "transformers":
        raise RecipeError(f"model.mixture_with takes engine transformers, not {job.serving.chosen}; set serving.engine")
    output, n = Path(job.out.output), job.sampling.n
    output.parent.mkdir(parents=True, exist_ok=True)
    adapter = _adapter(job)
    config = models.load_config(job.model.section)
    tokenizer = models.load_tokenizer(job.model.section)
    prompts = _shard(read_prompts(job.data), job.out.shard)
    _tell_prompts(prompts, say)
    with _alone(output):
        if job.out.overwrite:
            for path in (output, *output.parent.glob(f".{output.name}.part-*")):
                path.unlink(missing_ok=True)
        served = connected(job, tokenizer) if job.serving.chosen == "server" and sampler is None else None
        origin = Origin(
            engine="",
            model=job.model.adapter_name_or_path or job.model.model_name_or_path,
            fingerprint=fingerprint_of(job, adapter, served),
            template=template_fingerprint(tokenizer),
            sampling=job.sampling.described() | ({} if job.goal is None else {"goal": dataclasses.asdict(job.goal)}),
        )
        _refuse_others(output, origin)
        done = stored.repair(output, n)
        length = longest(job, models.context_length(config), served)
        asked, too_long = _asked(job, tokenizer, [each for each in prompts.found if each.id not in done], length)
        if done:
            say(f"{output}: {len(done)} prompts are there already, {len(asked)} are missing")
        if too_long:
            say(
                f"  {len(too_long)} prompts leave no room for a response within {length} tokens, the first in row "
                f"{too_long[0]}: raise serving.max_model_len if the model can, or shorten them"
            )
        if not asked and not done:
            raise RunError("no prompt leaves room for a response; raise serving.max_model_len, or shorten the prompts")
        if asked and job.serving.data_parallel_size > 1 and sampler is None:
            from align.parallel_sampling import in_parallel

            in_parallel(job, output, say)
        elif asked:
            sampler = sampler or served or started(job, tokenizer, adapter, length, say)
            try:
                origin = dataclasses.replace(origin, engine=sampler.engine)
                _Drawing(job, sampler, tokenizer, length, origin).draw(asked, output, say)
            finally:
                sampler.close()
        stored.sort(output, [prompt.id for prompt in prompts.found])
        _write_report(output, prompts, too_long)
    return output


def started(job: Job, tokenizer: Any, adapter: AdapterInfo | None, length: int, say: Say) -> Sampler:
    """The engine that the settings ask for, in this process.

    Args:
        job: the settings.
        tokenizer: of the model.
        adapter: on it.
        length: most tokens of prompt and response.
        say: told where vLLM is not installed.
    """
    if job.serving.engine == "auto" and job.serving.chosen == "transformers":
        say("vLLM is not installed: sampling with transformers, which is slow for large models")
    return make_sampler(
        job.serving,
        section=job.model.section,
        tokenizer=tokenizer,
        adapter=adapter,
        max_model_len=length,
        ends=end_tokens(job.model.model_name_or_path, tokenizer),
        seed=job.sampling.seed,
        mixture=None if job.model.mixture_with is None else (job.model.mixture_with, job.model.mixture_coef),
    )


Asked = tuple[Prompt, list[int], list[int]]
"""A prompt, its tokens, and those that stand before the response's where it is plain text."""


def _asked(job: Job, tokenizer: Any, prompts: Sequence[Prompt], length: int) -> tuple[list[Asked], list[int]]:
    """Prompts with their tokens, and the rows of those that leave no room for a response."""
    asked: list[Asked] = []
    too_long: list[int] = []
    for prompt in prompts:
        text = prompt.text if job.goal is None else job.goal.condition(prompt.text)
        rendered, ids = encoded(text, tokenizer)
        if len(ids) >= length:
            too_long.append(prompt.row)
        else:
            asked.append((prompt, ids, [] if rendered.chat else ids))
    return asked, too_long


class _Drawing:
    """One pass over the prompts that are missing."""

    def __init__(self, job: Job, sampler: Sampler, tokenizer: Any, length: int, origin: Origin) -> None:
        self.job, self.sampler, self.tokenizer = job, sampler, tokenizer
        self.length, self.origin = length, origin
        self.ends = end_tokens(job.model.model_name_or_path, tokenizer)

    def draw(self, asked: Sequence[Asked], output: Path, say: Say) -> None:
        """Draws and writes; says at the end what there was."""
        how = self.job.sampling
        requests = [
            Request(
                number=number,
                prompt=tuple(ids),
                n=how.n,
                max_tokens=min(how.max_tokens, self.length - len(ids)),
                seed=spread(how.seed, int(prompt.id[:8], 16)),
            )
            for number, (prompt, ids, _) in enumerate(asked)
        ]
        tokens = done = unfinished = 0
        began = last = time.perf_counter()
        with tqdm(total=len(asked), unit="prompt", disable=not sys.stderr.isatty(), smoothing=0.05) as bar:
            for number, drawn in self.sampler.draw(iter(requests), how):
                prompt, _, before = asked[number]
                request = requests[number]
                stored.append(output, [self._sample(prompt, request, i, each, before) for i, each in enumerate(drawn)])
                tokens += sum(len(each.token_ids) for each in drawn)
                unfinished += sum(each.finish_reason == "length" for each in drawn)
                done += 1
                now = time.perf_counter()
                bar.set_postfix_str(f"{tokens / (now - began):,.0f} tokens/s", refresh=False)
                bar.update()
                if bar.disable and now - last >= EVERY:
                    last = now
                    left = (now - began) / done * (len(asked) - done)
                    say(f"{done} of {len(asked)} prompts, {tokens / (now - began):,.0f} tokens/s, {left:.0f} s left")
        seconds = time.perf_counter() - began
        speed = f"{tokens / seconds:,.0f} tokens/s ({self.origin.engine})"
        say(f"{done * how.n} samples, {tokens} tokens in {seconds:.1f} s: {speed}")
        if unfinished:
            say(f"  {unfinished} reached the limit of tokens")

    def _sample(self, prompt: Prompt, request: Request, index: int, drawn: Drawn, before: list[int]) -> Sample:
        ids = without_end(drawn, self.ends)
        return Sample(
            prompt_id=prompt.id,
            index=index,
            row=prompt.row,
            prompt=prompt.text,
            text=decoded(self.tokenizer, ids, before, self.job.sampling.stop),
            token_ids=drawn.token_ids,
            logprob=drawn.logprob,
            finish_reason=drawn.finish_reason,
            seed=request.seed + index,
            origin=self.origin,
            columns=prompt.columns,
        )


def _adapter(job: Job) -> AdapterInfo | None:
    if job.model.adapter_name_or_path is None:
        return None
    adapter = read_adapter(job.model.adapter_name_or_path)
    refuse_other_base(adapter, job.model.model_name_or_path)
    return adapter


def connected(job: Job, tokenizer: Any) -> ServerSampler:
    """The server that the settings name."""
    serving = job.serving
    assert serving.base_url is not None
    return ServerSampler(
        serving.base_url,
        model=serving.served_model_name,
        ends=end_tokens(job.model.model_name_or_path, tokenizer),
        timeout=serving.timeout,
        api_key=api_key(serving),
    )


def fingerprint_of(job: Job, adapter: AdapterInfo | None, served: ServerSampler | None) -> str:
    """Of what is sampled; a server must serve what the settings name.

    Raises:
        RunError: it serves other weights.
    """
    asked = joined(
        weights_on_disk(job.model.model_name_or_path, job.model.model_revision),
        None if adapter is None else weights_on_disk(adapter.path),
    )
    if job.model.mixture_with is not None:
        asked = mixed(asked, weights_on_disk(job.model.mixture_with), job.model.mixture_coef)
    if served is None:
        return asked
    wanted = job.model.adapter_name_or_path or job.model.model_name_or_path
    if served.root == wanted:
        return asked
    folders = [Path(served.root), Path(wanted)]
    same = all(folder.is_dir() for folder in folders) and len({*map(weights_on_disk, map(str, folders))}) == 1
    if not same:
        raise RunError(
            f"{served.url} serves {served.root!r}, and the settings name {wanted!r}; start the server with that, or "
            "set model.model_name_or_path (or serving.served_model_name) to what it serves"
        )
    return asked


def longest(job: Job, context: int | None, served: ServerSampler | None) -> int:
    """Most tokens of prompt and response.

    Raises:
        RunError: more is asked for than the model's context.
    """
    asked, most = job.serving.max_model_len, context or 2**20
    if served is not None and served.max_model_len is not None:
        most = min(most, served.max_model_len)
    if asked is not None and asked > most:
        raise RunError(f"serving.max_model_len {asked} exceeds the model's context of {most} tokens; lower it")
    if asked is None and context is None:
        return 4096
    return asked or most


def _shard(prompts: Prompts, shard: str | None) -> Prompts:
    if shard is not None:
        i, k = map(int, shard.split("/"))
        prompts.found = prompts.found[i::k]
    return prompts


def _tell_prompts(prompts: Prompts, say: Say) -> None:
    repeated = f", {prompts.repeated} repeat an earlier one" if prompts.repeated else ""
    say(f"{prompts.source}: {prompts.rows} rows, {len(prompts.found)} prompts to sample{repeated}")
    for reason, rows in prompts.problems.items():
        say(f"  {len(rows)} rows have none: {reason} (first: row {rows[0]})")


def _alone(output: Path) -> Any:
    """Holds the file for this process."""
    lock = FileLock(output.with_name(f".{output.name}.lock"), timeout=0)
    try:
        return lock.acquire()
    except Timeout:
        raise RunError(f"{output}: another process is writing it; wait for it, or give another output") from None


def _refuse_others(output: Path, origin: Origin) -> None:
    """Refuses to go on with a file whose samples come from something else."""
    if not output.is_file() or not output.stat().st_size:
        return
    with output.open(encoding="utf-8", errors="replace") as file:
        first = file.readline()
    if not first.endswith("\n"):
        return  # torn: nothing is there yet
    there = stored.parse(first, f"{output}, line 1").origin
    pairs = {
        "weights": (there.fingerprint, origin.fingerprint),
        "the chat template": (there.template, origin.template),
        **{f"sampling.{key}": (there.sampling.get(key), value) for key, value in origin.sampling.items()},
    }
    differing = [f"{name} ({was} there, {now} now)" for name, (was, now) in pairs.items() if was != now]
    if differing:
        raise RunError(
            f"{output} holds samples of other settings: {'; '.join(differing)}; give another output, or --overwrite"
        )


def _write_report(output: Path, prompts: Prompts, too_long: Sequence[int]) -> None:
    """What the whole file holds, whichever runs made it."""
    finished: Counter[str] = Counter()
    samples = tokens = 0
    for group in stored.read(output):
        samples += len(group.samples)
        tokens += sum(len(each.token_ids) for each in group.samples)
        finished.update(each.finish_reason for each in group.samples)
    whole = {
        "dataset": prompts.source,
        "rows": prompts.rows,
        "prompts": len(prompts.found),
        "repeated": prompts.repeated,
        "problems": prompts.problems,
        "too_long": list(too_long),
        "samples": samples,
        "tokens": tokens,
        "finish_reasons": dict(finished),
    }
    text = json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
    write_atomically(output.with_name(f"{output.name}.report.json"), text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Samples; see ``align.settings.command``."""

    def do(config: str | None, words: list[str]) -> None:
        job = read_job(config, words)
        quiet_libraries()
        settings.say(f"wrote {run(job, say=settings.say)}")

    return settings.command(arguments, __doc__, SCHEMA, do)


if __name__ == "__main__":
    sys.exit(main())
