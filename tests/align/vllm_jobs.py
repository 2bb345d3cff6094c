"""What tests ask of a real vLLM, in a process of its own: it starts engines, and starting one takes half a minute.

python -m tests.align.vllm_jobs in_process FOLDER
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from align import answer
from align import sample as command
from align.adapters import read_adapter
from align.sampling import Drawn, Request, Sampling
from align.vllm_sampler import VllmSampler
from data.worlds import POLICY

WORDS = ("--n=4", "--max_tokens=40", "--seed=3", "--engine=vllm")


def job(folder: Path, output: str, *words: str) -> command.Job:
    """Samples of the world's policy for ``prompts.jsonl``."""
    given = [f"--model_name_or_path={POLICY}", f"--dataset_name={folder / 'prompts.jsonl'}"]
    return command.read_job(None, [*given, *WORDS, f"--output={folder / output}", *words])


def qalign(folder: Path, sampler: VllmSampler) -> None:
    """Chains on the running engine: prefixes of responses, continued."""
    command.started = lambda *_: sampler  # type: ignore[assignment]
    words = [f"--model_name_or_path={POLICY}", f"--dataset_name={folder / 'prompts.jsonl'}", "--max_tokens=40"]
    words += ["--scorers=world_answer", "--strategy=qalign", "--engine=vllm", "--steps=12"]
    for beta in (0.1, 1000.0):
        output = folder / f"qalign-{beta}.jsonl"
        answer.run(answer.read_answer(None, [*words, f"--answer.output={output}", f"--strategy.beta={beta}"]))


def in_process(folder: Path) -> None:
    """One engine for everything: with the adapter in ``adapter``, and without."""
    sampler = VllmSampler(
        model=str(POLICY),
        revision="main",
        tokenizer=str(POLICY),
        dtype="auto",
        adapter=read_adapter(str(folder / "adapter")),
        max_model_len=256,
        ends={1},
        options={},
    )
    sampler.close, close = lambda: None, sampler.close  # the command would end it
    try:
        command.run(job(folder, "adapter.jsonl", f"--adapter_name_or_path={folder / 'adapter'}"), sampler=sampler)
        sampler._lora = None
        command.run(job(folder, "plain.jsonl"), sampler=sampler)
        command.run(job(folder, "again.jsonl"), sampler=sampler)
        whole = (folder / "plain.jsonl").read_bytes()
        (folder / "resumed.jsonl").write_bytes(whole[: len(whole) * 2 // 3])
        command.run(job(folder, "resumed.jsonl"), sampler=sampler)
        command.run(job(folder, "cut.jsonl", "--temperature=0.7", "--top_p=0.8", "--top_k=9"), sampler=sampler)
        command.run(job(folder, "stop.jsonl", "--stop=['. The answer']"), sampler=sampler)
        command.run(job(folder, "greedy.jsonl", "--n=1", "--temperature=0"), sampler=sampler)
        # 6,000 sequences: more than are given to the engine at a time, and prompts longer than its step.
        many = [Request(number=i, prompt=(2, 5, 9, 30 + i % 40), n=20, max_tokens=3, seed=i) for i in range(300)]
        counted = {number: len(drawn) for number, drawn in sampler.draw(many, Sampling())}
        (folder / "many.json").write_text(json.dumps(counted))
        long = [Request(number=i, prompt=tuple([5, 9, 30] * 70), n=8, max_tokens=2, seed=i) for i in range(40)]
        found: dict[int, list[Drawn]] = dict(sampler.draw(long, Sampling()))
        qalign(folder, sampler)
        (folder / "long.json").write_text(json.dumps({i: [asdict(d) for d in each] for i, each in found.items()}))
    finally:
        close()


if __name__ == "__main__":
    {"in_process": in_process}[sys.argv[1]](Path(sys.argv[2]))
