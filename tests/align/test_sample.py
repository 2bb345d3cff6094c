"""Samples to a file: the right distribution and log-probs, each prompt once, nothing lost or repeated after a kill."""

from __future__ import annotations

import json
import math
import threading
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from align import sample as command
from align import samples as stored
from align.adapters import read_adapter, refuse_other_base
from align.errors import RecipeError, RunError
from align.sampling import Request, Sampling, draw, encoded
from align.vllm_sampler import adapter_rank, require_version
from data.errors import DataError
from data.worlds import POLICY, problems
from tests.equivalence.worlds import save_model

WORDS = ("--engine=transformers", "--n=3", "--max_tokens=24", "--seed=5")


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder with ``prompts.jsonl``: twelve problems, two of them twice."""
    asked = problems("held_out", 12, seed=1)
    rows = [{"prompt": [{"role": "user", "content": p.question}], "answer": p.answer} for p in asked]
    write(tmp_path / "prompts.jsonl", [*rows, rows[3], rows[0]])
    return tmp_path


def write(path: Path, rows: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def job(folder: Path, *words: str, output: str = "samples.jsonl") -> command.Job:
    given = [f"--model_name_or_path={POLICY}", f"--dataset_name={folder / 'prompts.jsonl'}"]
    return command.read_job(None, [*given, *WORDS, f"--output={folder / output}", *words])


def sampled(folder: Path, *words: str, output: str = "samples.jsonl") -> list[stored.Group]:
    lines: list[str] = []
    return list(stored.read(command.run(job(folder, *words, output=output), say=lines.append)))


@pytest.mark.slow
def test_each_prompt_once_in_the_dataset_s_order(world: Path):
    groups = sampled(world, "--keep=[answer]")
    assert [group.samples[0].row for group in groups] == list(range(12))
    assert {len(group.samples) for group in groups} == {3}
    assert [group.columns["answer"] for group in groups] == [p.answer for p in problems("held_out", 12, seed=1)]
    report = json.loads((world / "samples.jsonl.report.json").read_text())
    assert (report["rows"], report["prompts"], report["repeated"], report["samples"]) == (14, 12, 2, 36)
    sample = groups[0].samples[2]
    assert sample.origin.sampling["seed"] == 5
    assert sample.origin.engine.startswith("transformers ")
    assert sample.finish_reason in stored.FINISHED
    assert sample.text
    assert "</s>" not in sample.text


@pytest.mark.slow
def test_log_probs_are_the_model_s(world: Path):
    """At temperature 1 over all tokens, whatever they were drawn with; the end token counts."""
    groups = sampled(world, "--temperature=0.5", "--top_k=5", "--top_p=0.9")
    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    for group in groups[:4]:
        _, prompt = encoded(group.prompt, tokenizer)
        for sample in group.samples:
            ids = torch.tensor([[*prompt, *sample.token_ids]])
            with torch.no_grad():
                logps = torch.log_softmax(model(input_ids=ids).logits[0, :-1], dim=-1)
            wanted = logps.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum()
            assert sample.logprob == pytest.approx(float(wanted), abs=1e-4)  # float32, with and without a cache
            assert (sample.token_ids[-1] == tokenizer.eos_token_id) == (sample.finish_reason == "stop")


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.1, "temperature": 1.5}], ids=str
)
def test_tokens_are_drawn_from_the_distribution_asked_for(tmp_path: Path, keys: dict[str, Any]):
    """First tokens of 4,000 samples against the probabilities worked out here."""
    save_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    how, prompt = Sampling(**keys), (1, 5, 9)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].double().numpy() * 1.0
    wanted = probabilities(logits, how)
    request = Request(number=0, prompt=prompt, n=4000, max_tokens=1, seed=11)
    ((_, drawn),) = draw(model, [request], how, ends={2}, pad=0, tokenizer=tokenizer)
    counts = Counter(each.token_ids[0] for each in drawn)
    assert set(counts) <= set(np.flatnonzero(wanted))
    for token, probability in enumerate(wanted):
        spread = math.sqrt(4000 * probability * (1 - probability))
        assert abs(counts[token] - 4000 * probability) <= 5 * spread + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 0.2, 1.0])
def test_the_geometric_mixture_of_two_models(tmp_path: Path, share: float):
    """First and second tokens of 4,000 samples against softmax(c·second + (1 − c)·first), found without a cache."""
    models = []
    for seed in (0, 1):
        save_model(tmp_path / f"{seed}", seed=seed)
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / f"{seed}", dtype=torch.float32)
        with torch.no_grad():
            model.lm_head.weight.mul_(40)  # far from uniform, and from each other
        models.append(model)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "0")

    def logits(ids: tuple[int, ...]) -> list[np.ndarray]:
        with torch.no_grad():
            return [m(input_ids=torch.tensor([ids])).logits[0, -1].double().numpy() for m in models]

    def mixed(ids: tuple[int, ...]) -> np.ndarray:
        first, second = logits(ids)
        p = np.exp(share * second + (1 - share) * first - (share * second + (1 - share) * first).max())
        return p / p.sum()

    prompts = [(40, 50, 90), (7, 8, 9, 10, 11, 12)]  # of unequal lengths: one is padded
    requests = [Request(number=i, prompt=ids, n=4000, max_tokens=2, seed=10**6 * i) for i, ids in enumerate(prompts)]
    mixture = (models[1].eval(), share)
    found = dict(
        draw(models[0], requests, Sampling(), ends={1}, pad=0, tokenizer=tokenizer, batch=8000, mixture=mixture)
    )
    for number, prompt in enumerate(prompts):
        firsts = Counter(each.token_ids[0] for each in found[number])
        agree(firsts, mixed(prompt), 4000)
        likeliest = next(token for token, _ in firsts.most_common() if token != 1)
        after = [each.token_ids[1] for each in found[number] if each.token_ids[0] == likeliest]
        agree(Counter(after), mixed((*prompt, likeliest)), len(after))
        sample = found[number][0]
        policy = [torch.log_softmax(torch.tensor(logits((*prompt, *sample.token_ids[:i]))[0]), -1) for i in range(2)]
        wanted = sum(float(policy[i][token]) for i, token in enumerate(sample.token_ids))
        assert sample.logprob == pytest.approx(wanted, abs=1e-3), "log-probs are the first model's"


def agree(counts: Counter[int], wanted: np.ndarray, number: int) -> None:
    for token, probability in enumerate(wanted):
        spread = math.sqrt(number * probability * (1 - probability))
        assert abs(counts[token] - number * probability) <= 5 * spread + 2


@pytest.mark.slow
def test_a_mixture_is_told_from_its_parts(world: Path):
    save_model(world / "other")
    with pytest.raises(RunError, match="has another vocabulary than the model"):
        sampled(world, f"--mixture_with={world / 'other'}", output="no.jsonl")
    save_adapter(world / "adapter")
    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32), str(world / "adapter")
    ).merge_and_unload()  # type: ignore[operator]
    merged.save_pretrained(str(world / "second"))
    mixture = sampled(world, f"--mixture_with={world / 'second'}", "--mixture_coef=0.9", output="mixed.jsonl")
    plain = sampled(world)
    assert mixture[0].samples[0].origin.fingerprint.startswith(plain[0].samples[0].origin.fingerprint + "~0.9*files:")
    drawn = [[s.token_ids for group in groups for s in group.samples] for groups in (mixture, plain)]
    assert drawn[0] != drawn[1]
    with pytest.raises(RecipeError, match="mixture_with takes engine transformers, not vllm"):
        sampled(world, f"--mixture_with={world / 'second'}", "--engine=vllm", output="no.jsonl")


def probabilities(logits: np.ndarray, how: Sampling) -> np.ndarray:
    """Temperature, the top k, the smallest set of probability top_p, then what is at least min_p of the best."""
    logits = logits / how.temperature
    order = np.argsort(-logits)
    if how.top_k:
        logits[order[how.top_k :]] = -np.inf
    p = np.exp(logits - logits.max())
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= how.top_p]] = 0
    p[p < how.min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.slow
@pytest.mark.parametrize("cut", [0.0, 0.1, 0.35, 0.5, 0.77, 0.999])
def test_a_kill_loses_and_repeats_nothing(world: Path, cut: float):
    """Wherever the file ends, what is written afterwards makes it the file of an undisturbed run."""
    undisturbed = sampled(world)
    whole = (world / "samples.jsonl").read_bytes()
    (world / "samples.jsonl").write_bytes(whole[: int(len(whole) * cut)])
    again = sampled(world)
    for one, other in zip(undisturbed, again, strict=True):
        for a, b in zip(one.samples, other.samples, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)  # float32, beside other rows
            assert replace(a, logprob=None) == replace(b, logprob=None)


@pytest.mark.slow
def test_what_is_finished_is_left_alone(world: Path):
    sampled(world)
    before = (world / "samples.jsonl").stat().st_mtime_ns
    said: list[str] = []
    command.run(job(world), say=said.append)
    assert (world / "samples.jsonl").stat().st_mtime_ns == before
    assert any("12 prompts are there already, 0 are missing" in line for line in said)


@pytest.mark.slow
def test_samples_depend_on_nothing_but_prompt_and_seed(world: Path):
    """Neither on the other prompts, nor on the shard; shards together are the whole."""
    whole = {group.prompt_id: [s.token_ids for s in group.samples] for group in sampled(world)}
    parts = [sampled(world, f"--shard={i}/3", output=f"part{i}.jsonl") for i in range(3)]
    assert sum(len(part) for part in parts) == 12
    assert {g.prompt_id: [s.token_ids for s in g.samples] for part in parts for g in part} == whole
    other = {g.prompt_id: [s.token_ids for s in g.samples] for g in sampled(world, "--seed=6", output="other.jsonl")}
    assert other != whole


@pytest.mark.slow
def test_prompts_of_every_kind_of_dataset(tmp_path: Path):
    turn = [{"role": "user", "content": "How many?"}]
    answer = [{"role": "assistant", "content": "Two."}]
    kinds = {
        "prompts": {"prompt": turn},
        "pairs": {"prompt": turn, "chosen": answer, "rejected": [{"role": "assistant", "content": "Three."}]},
        "gold": {"prompt": turn, "completion": answer},
        "messages": {"messages": turn + answer},
        "scored": {"prompt": "How many?", "responses": [{"text": "Two.", "score": 1.0}]},
    }
    ids = {}
    for name, row in kinds.items():
        write(tmp_path / "prompts.jsonl", [row])
        (group,) = sampled(tmp_path, "--as_chat", output=f"of-{name}.jsonl")
        ids[name] = (group.prompt_id, group.prompt)
    assert len(set(map(str, ids.values()))) == 1
    write(tmp_path / "prompts.jsonl", [{"question": "How many?"}])
    (group,) = sampled(tmp_path, "--as_chat", "--columns={prompt: question}", output="renamed.jsonl")
    assert group.prompt == tuple(turn)


def test_a_stop_text_that_the_prompt_ends_with_stops_nothing(world: Path):
    """transformers' own criterion looks at the end of the prompt too."""
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    rows = [json.loads(line) for line in (world / "prompts.jsonl").read_text().splitlines()[:1]]
    text, _ = encoded(tuple(rows[0]["prompt"]), tokenizer)
    write(world / "prompts.jsonl", rows)
    plain = sampled(world)[0].samples
    first = plain[0].text[:1]
    stop = json.dumps([text.prompt[-2:] + first])
    found = sampled(world, f"--stop={stop}", output="stop.jsonl")[0].samples
    assert [each.token_ids for each in found] == [each.token_ids for each in plain]


@pytest.mark.slow
def test_stop_texts_end_a_response(world: Path):
    groups = sampled(world, "--stop=['. The answer']", "--max_tokens=60")
    samples = [sample for group in groups for sample in group.samples]
    assert not any(". The answer" in sample.text for sample in samples)
    assert {sample.finish_reason for sample in samples} == {"stop"}
    assert any("=" in sample.text for sample in samples)


@pytest.mark.slow
def test_an_adapter_is_sampled_as_its_merged_weights_are(world: Path):
    save_adapter(world / "adapter")
    with_adapter = sampled(world, f"--adapter_name_or_path={world / 'adapter'}")
    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32), str(world / "adapter")
    ).merge_and_unload()  # type: ignore[operator]
    merged.save_pretrained(world / "merged")
    AutoTokenizer.from_pretrained(POLICY).save_pretrained(world / "merged")
    again = sampled(world, f"--model_name_or_path={world / 'merged'}", output="merged.jsonl")
    plain = sampled(world, output="plain.jsonl")
    ids = [[[s.token_ids for s in g.samples] for g in groups] for groups in (with_adapter, again, plain)]
    assert ids[0] == ids[1] != ids[2]
    assert len({groups[0].samples[0].origin.fingerprint for groups in (with_adapter, again, plain)}) == 3


def save_adapter(folder: Path, base: Path = POLICY, **keys: Any) -> None:
    """An adapter whose weights do something."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", **keys))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    wrapped.save_pretrained(folder)


# ---- what is refused ----


@pytest.mark.slow
def test_a_file_of_other_settings_is_not_gone_on_with(world: Path):
    sampled(world)
    with pytest.raises(RunError, match=r"sampling.temperature \(1.0 there, 0.7 now\).* --overwrite"):
        sampled(world, "--temperature=0.7")
    whole = (world / "samples.jsonl").read_bytes()
    for n in (1, 2, 5):
        with pytest.raises(RunError, match=rf"sampling\.n \(3 there, {n} now\)"):
            sampled(world, f"--n={n}")
    assert (world / "samples.jsonl").read_bytes() == whole, "what is refused is not touched"
    save_adapter(world / "adapter")
    with pytest.raises(RunError, match="holds samples of other settings: weights"):
        sampled(world, f"--adapter_name_or_path={world / 'adapter'}")
    again = sampled(world, "--temperature=0.7", "--overwrite")
    assert {sample.origin.sampling["temperature"] for group in again for sample in group.samples} == {0.7}


def test_two_processes_do_not_write_one_file(world: Path):
    with command._alone(world / "samples.jsonl"), pytest.raises(RunError, match="another process is writing it"):
        sampled(world)


@pytest.mark.slow
def test_prompts_that_leave_no_room_are_counted(world: Path):
    rows = [json.loads(line) for line in (world / "prompts.jsonl").read_text().splitlines()]
    rows.insert(1, {"prompt": [{"role": "user", "content": "How many? " * 400}], "answer": 1})
    write(world / "prompts.jsonl", rows)
    said: list[str] = []
    command.run(job(world), say=said.append)
    report = json.loads((world / "samples.jsonl.report.json").read_text())
    assert report["too_long"] == [1]
    assert any("1 prompts leave no room for a response within 256 tokens, the first in row 1" in line for line in said)
    before = (world / "samples.jsonl").read_bytes()
    sampled(world)  # nothing is missing but what can't be drawn
    assert (world / "samples.jsonl").read_bytes() == before
    again = json.loads((world / "samples.jsonl.report.json").read_text())
    assert again == report
    assert report["samples"] == 36
    write(world / "prompts.jsonl", rows[1:2])
    with pytest.raises(RunError, match="no prompt leaves room for a response"):
        sampled(world, output="none.jsonl")


def test_responses_end_with_the_context(world: Path):
    groups = sampled(world, "--max_model_len=40", "--max_tokens=500")
    _, ids = encoded(groups[0].prompt, AutoTokenizer.from_pretrained(POLICY))
    assert max(len(ids) + len(s.token_ids) for s in groups[0].samples) <= 40


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--n=0"], "sampling.n must be >= 1"),
        (["--temperature=-1"], "sampling.temperature must be >= 0"),
        (["--n=2", "--temperature=0"], "at temperature 0 all samples are the same"),
        (["--shard=3/3"], "out.shard must be i/k"),
        (["--shard=x"], "out.shard must be i/k"),
        (["--engine=server"], "engine server and base_url go together"),
        (["--base_url=http://x"], "engine server and base_url go together"),
        (["--tensor_parallel_size=2"], "no effect with engine transformers"),
        (["--engine=vlm"], "serving.engine must be one of auto, vllm, server, transformers"),
        (["--max_new_tokens=3"], "here it is sampling.max_tokens"),
        (["--nn=3"], "unknown key --nn"),
        (["--gpu_memory_utilization=1.5", "--engine=vllm"], "must be in"),
        (["--relabel=r_dpo"], "relabel"),
        (["--engine_args={a: 1}"], "engine_args has no effect with engine transformers"),
    ],
    ids=str,
)
def test_settings_that_can_t_be_meant_are_one_sentence(world: Path, words: list[str], says: str):
    with pytest.raises(RecipeError, match=says) as error:
        job(world, *words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rows", "words", "says"),
    [
        ([], [], "has no rows"),
        ([{"text": "x"}], [], "found columns 'text'"),
        ([{"prompt": ""}], [], "none of 1 rows has a usable prompt; row 0: empty prompt"),
        ([{"prompt": "x"}], ["--keep=[anser]"], "data.keep names the column 'anser', which is not there"),
        ([{"prompt": "x"}], ["--model_name_or_path=nowhere/at_all"], "can't load"),
        ([{"prompt": "x"}], ["--adapter_name_or_path=nowhere"], "no adapter there"),
        ([{"prompt": "x"}], ["--engine=vllm", "--attn_implementation=eager"], "no effect with engine vllm; remove it"),
        ([{"prompt": "x"}], ["--max_model_len=9999"], "exceeds the model's context of 256 tokens"),
    ],
    ids=str,
)
def test_what_can_t_be_sampled_is_one_sentence(
    world: Path, capfd: pytest.CaptureFixture[str], rows: list[Any], words: list[str], says: str
):
    write(world / "prompts.jsonl", rows)
    given = [f"--model_name_or_path={POLICY}", f"--dataset_name={world / 'prompts.jsonl'}"]
    assert command.main([*given, *WORDS, f"--output={world / 'samples.jsonl'}", *words]) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert says in error[0]


def test_columns_that_json_can_t_hold_are_refused(world: Path):
    (world / "prompts.jsonl").write_text('{"prompt": "x", "answer": 1.5}\n{"prompt": "y", "answer": NaN}\n')
    with pytest.raises(DataError, match=r"row 1: data\.keep names the column 'answer', and a float like this one"):
        sampled(world, "--keep=[answer]")


def test_an_adapter_of_another_base_is_refused(world: Path):
    save_model(world / "other", hidden_size=64)
    save_adapter(world / "adapter", world / "other")
    with pytest.raises(RunError, match=r"was trained on .*other, .* name the adapter's own base"):
        sampled(world, f"--adapter_name_or_path={world / 'adapter'}")
    refuse_other_base(read_adapter(str(world / "adapter")), str(world / "other"))


@pytest.mark.slow
def test_adapters_that_vllm_can_t_use_are_refused(world: Path):
    save_adapter(world / "plain")
    assert adapter_rank(read_adapter(str(world / "plain"))) == 8
    save_adapter(world / "dora", use_dora=True)
    with pytest.raises(RunError, match=r"because it is a DoRA adapter; merge it .*align.export --merge"):
        adapter_rank(read_adapter(str(world / "dora")))
    with warnings.catch_warnings(action="ignore"):  # the head is tied
        save_adapter(world / "head", modules_to_save=["lm_head"])
    with pytest.raises(RunError, match=r"because it holds whole modules \(lm_head\)"):
        adapter_rank(read_adapter(str(world / "head")))


@pytest.mark.parametrize("version", ["0.26.9", "0.33.0", "1.0"])
def test_versions_of_vllm_outside_the_window_are_refused(version: str):
    with pytest.raises(RunError, match=rf"vLLM {version} is not supported: install one from 0.27 to 0.32"):
        require_version(version)


@pytest.mark.parametrize("version", ["0.27.0", "0.30.0", "0.32.4", "0.30.0+cpu"])
def test_versions_of_vllm_inside_the_window_are_taken(version: str):
    assert require_version(version) == version.partition("+")[0]


def test_without_vllm_that_is_said(world: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(RunError, match="vLLM is not installed"):
        require_version(None)
    monkeypatch.setattr("align.vllm_sampler.installed", lambda: None)
    said: list[str] = []
    command.run(job(world, "--engine=auto"), say=said.append)
    assert sum("vLLM is not installed: sampling with transformers" in line for line in said) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not a sample"),
        ("{}", "lacks 'prompt'"),
        ('"text"', "not a sample"),
    ],
)
def test_a_damaged_file_names_its_line(world: Path, line: str, says: str):
    sampled(world)
    lines = (world / "samples.jsonl").read_text().splitlines()
    lines[4] = line
    (world / "samples.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(RunError, match=rf"samples.jsonl, line 5: .*{says}"):
        list(stored.read(world / "samples.jsonl"))
    with pytest.raises(RunError, match="line 5"):
        sampled(world)


def test_missing_and_repeated_lines_are_found(world: Path):
    sampled(world)
    lines = (world / "samples.jsonl").read_text().splitlines(keepends=True)
    (world / "samples.jsonl").write_text("".join(lines[:1] + lines[2:]))
    with pytest.raises(RunError, match="a line is missing or twice there"):
        list(stored.read(world / "samples.jsonl"))
    (world / "samples.jsonl").write_text("".join(lines + lines[:3]))
    with pytest.raises(RunError, match=r"line 37: prompt \w+ occurs again"):
        list(stored.read(world / "samples.jsonl"))


# ---- a server ----


class Server:
    """Speaks as much of vLLM's protocol as sampling needs, answers with fixed tokens, and can misbehave."""

    def __init__(self, root: str, troubles: Sequence[Any] = ()) -> None:
        self.root, self.troubles, self.asked = root, list(troubles), list[dict[str, Any]]()
        self.best = -0.3
        own = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

            def do_GET(self) -> None:
                if self.path == "/version":
                    return self.answer(200, {"version": "0.30.0"})
                return self.answer(200, {"data": [{"id": "served", "root": own.root, "max_model_len": 64}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                trouble = own.troubles.pop(0) if own.troubles else None
                if trouble == "hang up":
                    return self.connection.close()
                if isinstance(trouble, int):
                    return self.answer(trouble, {"error": {"message": "no such luck"}})
                own.asked.append(body)
                ids, logprobs = [7, 8, own_end], [-1.0, -2.0, -0.5]
                if body["top_k"] == 1:
                    ids, logprobs = [7], [own.best]
                choice = {"finish_reason": "stop", "token_ids": ids, "logprobs": {"token_logprobs": logprobs}}
                choices = [{"index": i, **choice} for i in range(body["n"])][::-1]
                if trouble == "too few":
                    choices = choices[1:]
                if trouble == "no ids":
                    choices = [{**each, "token_ids": None} for each in choices]
                if trouble == "aborted":
                    choices = [{**each, "finish_reason": "abort"} for each in choices]
                return self.answer(200, {"choices": choices})

            def answer(self, status: int, body: Any) -> None:
                text = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

        own_end = int(AutoTokenizer.from_pretrained(POLICY).eos_token_id)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Server:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.server_sampler.WAITS", (0.01, 0.01))


def serve(folder: Path, server: Server, *words: str) -> list[stored.Group]:
    return sampled(folder, "--engine=server", f"--base_url={server.url}/v1", *words)


@pytest.mark.slow
def test_a_server_is_asked_for_exactly_this_sampling(world: Path):
    with Server(str(POLICY)) as server:
        groups = serve(world, server, "--temperature=0.7", "--top_p=0.9", "--min_p=0.01", "--top_k=40")
    assert [sample.logprob for sample in groups[0].samples] == [-3.5] * 3
    assert groups[0].samples[0].origin.engine == "server vllm 0.30.0"
    body = next(body for body in server.asked if body["max_tokens"] > 1)
    wanted = {"n": 3, "temperature": 0.7, "top_p": 0.9, "min_p": 0.01, "top_k": 40, "max_tokens": 24, "model": "served"}
    assert {key: body[key] for key in wanted} == wanted
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    prompts = [encoded(group.prompt, tokenizer)[1] for group in groups]
    assert sorted(body["prompt"] for body in server.asked if body["max_tokens"] > 1) == sorted(prompts)


@pytest.mark.slow
def test_log_probs_after_temperature_are_not_taken_for_the_model_s(world: Path):
    with Server(str(POLICY)) as server:
        server.best = 0.0  # what a server says of the only token that is left
        cut = serve(world, server, "--temperature=0.7")
        plain = sampled(world, "--engine=server", f"--base_url={server.url}", output="plain.jsonl")
    assert {sample.logprob for group in cut for sample in group.samples} == {None}
    assert {sample.logprob for group in plain for sample in group.samples} == {-3.5}


@pytest.mark.slow
def test_a_server_in_trouble_is_asked_again(world: Path):
    with Server(str(POLICY), troubles=[500, 429, "hang up", 503]) as server:
        assert len(serve(world, server)) == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        ([400], r"refuses a request \(400: no such luck\)"),
        ([401], r"refuses the key \(401: no such luck\); set serving\.api_key_env"),
        ([500] * 60, "500: no such luck"),
        (["hang up"] * 60, "does not answer"),
        (["too few"], "gave 2 of 3 responses"),
        (["no ids"], "does not return token ids"),
        (["aborted"], "gave a response up"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_server_that_fails_loses_nothing(world: Path, trouble: list[Any], says: str):
    """What was finished stays; the same command goes on."""
    with Server(str(POLICY), troubles=[None] * 3 + trouble) as server:
        with pytest.raises(RunError, match=says):
            serve(world, server)
        kept = len((world / "samples.jsonl").read_text().splitlines()) if (world / "samples.jsonl").exists() else 0
        assert kept % 3 == 0
        assert kept < 36
        server.troubles.clear()
        assert len(serve(world, server)) == 12


def test_nothing_there_is_one_sentence(world: Path):
    with pytest.raises(RunError, match=r"http://127.0.0.1:1/v1/models does not answer .* serving.base_url"):
        sampled(world, "--engine=server", "--base_url=http://127.0.0.1:1/v1")


@pytest.mark.slow
def test_a_server_of_other_weights_is_refused(world: Path):
    save_model(world / "other")
    with (
        Server(str(world / "other")) as server,
        pytest.raises(RunError, match=r"serves .*other.*and the settings name"),
    ):
        serve(world, server)
    with Server(str(POLICY)) as server, pytest.raises(RunError, match="does not serve 'mine'"):
        serve(world, server, "--served_model_name=mine")


@pytest.mark.slow
def test_a_server_s_key_comes_from_a_variable(world: Path):
    with Server(str(POLICY)) as server, pytest.raises(RunError, match="the variable NO_SUCH_KEY is not set"):
        serve(world, server, "--api_key_env=NO_SUCH_KEY")
