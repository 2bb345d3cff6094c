"""The main job on an embedded default: a model and preferences made on the spot, trained, evaluated, reported.

    make quickstart            or: .venv/bin/python -m launch.quickstart [--output_dir runs/quickstart]

The preferences follow a rule that nobody told the model: the chosen answer takes up the subject of the question, the
rejected one is as long and takes up another. A model with random weights is at chance on held-out
questions; after about a minute of training it is not, and the table says by how much, with 95 % intervals.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import sys
from pathlib import Path

from align.train import main as train
from align.train import quiet_libraries

WORDS = [
    "moon",
    "river",
    "stone",
    "bread",
    "violin",
    "garden",
    "winter",
    "letter",
    "candle",
    "harbour",
    "thunder",
    "paper",
]
OPENINGS = ["tell me about the", "what do you know of the", "write a line on the", "do you like the"]
KINDS = ["old", "blue", "quiet", "small", "broken", "golden", "lost", "famous", "foreign", "heavy"]
PLACES = ["north", "kitchen", "valley", "museum", "story", "village", "attic", "film", "market", "dream"]
SHOWN = {
    "ranking/accuracy": "chosen more probable than rejected",
    "rewards/accuracies": "chosen raised more than rejected",
    "displacement/chosen": "log-prob of chosen answers, change",
    "displacement/rejected": "log-prob of rejected answers, change",
}


def make_pairs(number: int, seed: int) -> list[dict[str, str]]:
    """Questions, no two alike, with a chosen answer that keeps to the subject and a rejected one that does not."""
    rng = random.Random(seed)
    pairs = []
    for opening, kind, subject, place in rng.sample(list(itertools.product(OPENINGS, KINDS, WORDS, PLACES)), number):
        other = rng.choice([word for word in WORDS if word != subject])
        start = rng.choice(["so", "well", "yes", "ah"])
        pairs.append(
            {
                "prompt": f"{opening} {kind} {subject} of the {place} ?",
                "chosen": f" {start} , the {subject}",
                "rejected": f" {start} , the {other}",
            }
        )
    return pairs


def save_model(folder: Path) -> None:
    """A Llama of two layers with random weights and a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    pieces = {word for pair in make_pairs(1000, 0) for text in pair.values() for word in text.split()}
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<unk>", *sorted(pieces)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def table(run: Path) -> str:
    """Before and after, with intervals, from ``results.json``."""
    results = json.loads((run / "results.json").read_text())["results"]
    steps = sorted({result["step"] for result in results})
    lines = [f"{'held-out questions':<38}{'before':>24}{'after':>24}"]
    for metric, label in SHOWN.items():
        cells = []
        for step in (steps[0], steps[-1]):
            r = next(r for r in results if r["metric"] == metric and r["step"] == step)
            cells.append(f"{r['value']:8.3f} [{r['low']:.3f}, {r['high']:.3f}]")
        lines.append(f"{label:<38}{cells[0]:>24}{cells[1]:>24}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Makes model and data, trains with the shipped recipe, prints the table."""
    parser = argparse.ArgumentParser(prog="python -m launch.quickstart", description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"))
    output_dir = parser.parse_args(arguments).output_dir
    inputs = output_dir.with_name(output_dir.name + "-inputs")
    quiet_libraries()
    shutil.rmtree(inputs, ignore_errors=True)
    inputs.mkdir(parents=True)
    save_model(inputs / "model")
    (inputs / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in make_pairs(2000, 0)))
    status = train(
        [
            f"--config={Path(__file__).parent / 'recipes' / 'dpo.yaml'}",
            f"--model_name_or_path={inputs / 'model'}",
            f"--dataset_name={inputs / 'pairs.jsonl'}",
            f"--output_dir={output_dir}",
            "--overwrite_output_dir",
            "--learning_rate=2e-3",
            "--num_train_epochs=4",
            "--rows_per_step=32",
            "--eval_share=0.15",
            "--logging_steps=20",
        ]
    )
    if status:
        return status
    print(f"\n{table(output_dir)}\n\nreport {output_dir}/report.html   card {output_dir}/README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
