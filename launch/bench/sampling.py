"""How fast samples are drawn: ``python -m align.sample`` against vLLM's own ``LLM.generate`` on the same requests.

    python -m launch.bench.sampling [--prompts 200] [--n 8] [--max_tokens 128] [--rounds 3] [--model M]

Both draw the same tokens with the same seeds on one engine, alternating A B A B. What differs is what ours adds:
requests made one by one, texts decoded, results written to disk as they are done.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align import sample as command
from align.console import quiet_libraries
from align.sampling import encoded, spread
from align.vllm_sampler import VllmSampler
from data.worlds import POLICY, problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--max_tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default=str(POLICY))
    options = parser.parse_args(arguments)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(measure(options, Path(temporary)), indent=1))
    return 0


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Tokens a second of both, and their ratio in every round."""
    asked = problems("train", options.prompts, seed=11)
    rows = [{"prompt": [{"role": "user", "content": problem.question}]} for problem in asked]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"--model_name_or_path={options.model}", f"--dataset_name={folder / 'prompts.jsonl'}"]
    words += [f"--n={options.n}", f"--max_tokens={options.max_tokens}", "--engine=vllm"]
    job = command.read_job(None, [*words, f"--output={folder / 'ours.jsonl'}"])
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ends = {int(tokenizer.eos_token_id)}
    sampler = VllmSampler(
        model=options.model,
        revision="main",
        tokenizer=options.model,
        dtype="auto",
        adapter=None,
        max_model_len=256,
        ends=ends,
        options={},
    )
    sampler.close, close = lambda: None, sampler.close
    prompts = command.read_prompts(job.data).found
    ids = [encoded(prompt.text, tokenizer)[1] for prompt in prompts]
    seeds = [spread(job.sampling.seed, int(prompt.id[:8], 16)) for prompt in prompts]
    ours: list[float] = []
    raw: list[float] = []
    _raw(sampler, ids[:8], seeds[:8], options, ends)  # both warm
    for number in range(options.rounds):
        began = time.perf_counter()
        output = command.run(
            command.read_job(None, [*words, f"--output={folder / f'ours-{number}.jsonl'}"]),
            say=lambda line: None,
            sampler=sampler,
        )
        seconds = time.perf_counter() - began
        tokens = json.loads(output.with_name(f"{output.name}.report.json").read_text())["tokens"]
        ours.append(tokens / seconds)
        drawn, seconds = _raw(sampler, ids, seeds, options, ends)
        assert drawn == tokens, "both draw the same"
        raw.append(drawn / seconds)
    close()
    return {
        "engine": sampler.engine,
        "prompts": options.prompts,
        "n": options.n,
        "tokens": tokens,
        "ours_tokens_per_second": [round(each) for each in ours],
        "generate_tokens_per_second": [round(each) for each in raw],
        "ratio": [round(a / b, 3) for a, b in zip(ours, raw, strict=True)],
        "median_ratio": round(statistics.median(a / b for a, b in zip(ours, raw, strict=True)), 3),
    }


def _raw(
    sampler: VllmSampler, ids: list[list[int]], seeds: list[int], options: argparse.Namespace, ends: set[int]
) -> tuple[int, float]:
    """vLLM's own loop over all requests at once: tokens and seconds."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            n=options.n,
            temperature=1.0,
            max_tokens=options.max_tokens,
            seed=seed,
            stop_token_ids=sorted(ends),
            logprobs=0,
            detokenize=False,
            skip_special_tokens=False,
        )
        for seed in seeds
    ]
    began = time.perf_counter()
    outputs = sampler._llm.generate([{"prompt_token_ids": each} for each in ids], params, use_tqdm=False)
    seconds = time.perf_counter() - began
    return sum(len(part.token_ids) for output in outputs for part in output.outputs), seconds


if __name__ == "__main__":
    sys.exit(main())
