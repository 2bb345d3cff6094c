"""What a run checks before it spends anything. Each failure stops the run with a sentence that says what to do.

RNG state and buffers are restored afterwards, so that checking does not change a number.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from align.engines import discarded_gradients, steps_in_backward
from align.errors import RunError
from align.fused import fuse, plain, unfuse
from data.loader import PlannedBatches
from data.pack import PROMPT, PackedBatch, pack
from data.store import TokenTable

if TYPE_CHECKING:
    from align.trainer import ObjectiveTrainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What was looked at and what was found; listed in ``checks.json``, report and card."""

    check: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far two computations of the same numbers may differ."""

    token: float
    """Nats in one token's log-prob, at most."""
    mean: float
    """Nats per token, on average."""
    loss: float
    """In the loss at step 0."""


# float32: sums in another order. bfloat16 has 8 bits of mantissa, and attention in another layout rounds otherwise.
# A wrong mask or a shifted index is off by whole nats in either.
TOLERANCES = {
    torch.float64: Tolerance(token=1e-8, mean=1e-9, loss=1e-8),
    torch.float32: Tolerance(token=5e-3, mean=1e-4, loss=1e-3),
    torch.bfloat16: Tolerance(token=1.0, mean=0.03, loss=0.1),
}


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restores random number generators, buffers, gradients and the model's mode."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    training = model.training
    try:
        yield
    finally:
        for parameter in model.parameters():  # DeepSpeed's zero_grad is another function
            parameter.grad = None
        model.train(training)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if buffers[name].shape == buffer.shape:
                    buffer.copy_(buffers[name])
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


COMPILES = frozenset({"cuda"})
"""Devices on which attention is compiled for the backward pass apart, so that it has to be tried as well."""


def choose_path(model: nn.Module, table: TokenTable, dtype: torch.dtype, device: torch.device) -> tuple[bool, Check]:
    """Scores one real row both ways and trusts shared prompts only where they agree with the model's own forward.

    The latter is computed without fused modules; where they are to blame, the model goes on without them.

    Args:
        model: bound, on ``device``, not wrapped.
        table: training rows.
        dtype: of the computation.
        device: where the model is.
    Returns:
        Whether responses may share their prompt, and what was found.
    """
    row = _middle_row(table)
    low = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def scored(share: bool) -> Tensor:
        batch = pack(table, [row], share=share, counts={}).to(device)
        backward = share and device.type in COMPILES
        with low, torch.set_grad_enabled(backward):
            numbers = _numbers(model(packed=batch))
        if backward:
            numbers.sum().backward()
        return numbers.detach()

    with undisturbed(model):
        model.eval()
        try:
            with plain():
                separate = scored(share=False)
        except Exception as error:
            raise RunError(f"the model can't score a row: {_short(error)}") from error
        if not bool(separate.isfinite().all()):
            raise RunError(
                "the model gives log-probs that are not finite before any training; check its weights, model.dtype "
                "and, with lora.use_dora, that no weight has rows of zeros"
            )
        worst, reason = _apart(separate, lambda: scored(share=True), dtype)
        if reason is not None and unfuse(model):
            worst, reason = _apart(separate, lambda: scored(share=True), dtype)
            if reason is not None:  # they were not to blame
                fuse(model)
    if reason is not None:
        return False, _fallback(reason)
    return True, Check(
        check="shared prompts equal separate sequences",
        passed=True,
        detail=f"log-probs of one row differ by at most {worst:.1e} nats in a token",
    )


def _apart(separate: Tensor, shared: Callable[[], Tensor], dtype: torch.dtype) -> tuple[float, str | None]:
    """How far two computations are apart at most, and in what way too far."""
    try:
        agree, worst = _agree((separate, shared()), dtype)
    except Exception as error:  # whatever this architecture can't do with our masks, its own forward still can
        return math.nan, f"{type(error).__name__}: {_short(error)}"
    return worst, None if agree else f"log-probs differ by up to {worst:.2g} nats in a token"


def check_path(trainer: ObjectiveTrainer, dtype: torch.dtype) -> Check:
    """The same of a model that the engine has divided among processes.

    Raises:
        RunError: shared prompts and separate sequences disagree.
    """
    table = trainer.batches.table
    row = _middle_row(table)
    with plain():
        separate = _numbers(trainer.score(pack(table, [row], share=False, counts={})))
    shared = _numbers(trainer.score(pack(table, [row], share=True, counts={})))
    agree, worst = _agree((separate, shared), dtype)
    if not agree:
        raise RunError(
            f"with shared prompts log-probs differ by up to {worst:.2g} nats in a token on this engine; set "
            "model.attn_implementation to sdpa or eager"
        )
    detail = f"log-probs of one row differ by at most {worst:.1e} nats in a token"
    return Check(check="the divided model agrees", passed=True, detail=detail)


def _middle_row(table: TokenTable) -> int:
    """One of middling length."""
    lengths = table.shared_lengths()
    return int(np.argsort(lengths, kind="stable")[len(lengths) // 2])


def _numbers(scores: Mapping[str, Any]) -> Tensor:
    """What a reward model or a language model gives for a batch."""
    return scores["values" if "values" in scores else "logps"]


def _agree(flats: Sequence[Tensor], dtype: torch.dtype) -> tuple[bool, float]:
    """Whether two computations of the same numbers do, and how far they are apart at most."""
    difference, allowed = (flats[0] - flats[1]).abs(), TOLERANCES[dtype]
    worst, mean = float(difference.max()), float(difference.mean())
    return worst <= allowed.token and mean <= allowed.mean, worst


def _fallback(reason: str) -> Check:
    return Check(
        check="responses are computed one by one",
        passed=True,
        detail=f"not for this model ({reason}); every response takes its own prompt through the model's own forward",
    )


def first_batch(batches: PlannedBatches) -> PackedBatch:
    """A microbatch of the first step that holds rows."""
    bins = next(rows for microbatch in batches.plan.epoch(0)[0] for rows in microbatch if len(rows))
    return batches.pack(bins)


def check_prompt_is_not_trained(batch: PackedBatch, table: TokenTable) -> Check:
    """Every target is a response token, in order, and is predicted from its own row: prompts do not enter the loss."""
    expected = [table.legs[leg][int(row)] for leg in batch.legs for row in batch.rows]
    wanted = torch.from_numpy(np.concatenate(expected)).long()
    leg_of_source = batch.leg_ids.flatten()[batch.source]
    prompt_sources = int((leg_of_source == PROMPT).sum())
    if not torch.equal(batch.target, wanted) or prompt_sources != len(expected):
        raise RunError("prompt tokens would enter the loss; this is a fault of the program, please report it")
    return Check(
        check="prompt tokens do not enter the loss",
        passed=True,
        detail=f"{len(wanted)} targets of {len(expected)} responses are their own tokens, end token included",
    )


def check_step0(trainer: ObjectiveTrainer, batch: PackedBatch, dtype: torch.dtype) -> list[Check]:
    """Where the reference is the initial policy, both agree and the loss is the objective's known constant.

    Raises:
        RunError: they don't, or it isn't.
    """
    allowed, checks = TOLERANCES[dtype], []
    batch = batch.to(trainer.args.device)
    with trainer.scoring():
        output, legs, _ = trainer.compute_output(trainer.wrapped, batch)
        loss = float(output.loss(batch.counts))
    if not math.isfinite(loss):
        raise RunError(trainer.name_bad_rows(batch, loss))
    if any(leg.ref_logps is not None for leg in legs.legs.values()):
        cached = trainer.losses.live_reference is None
        ratios = [_token_difference(legs[name].logps, legs[name].ref_logps, legs[name].mask) for name in legs]
        worst = max(worst for worst, _ in ratios)
        mean = max(mean for _, mean in ratios)
        if not (worst <= allowed.token and mean <= allowed.mean):
            way_out = "delete the reference cache (ALIGN_CACHE)" if cached else "check model.dtype and the model's code"
            raise RunError(
                f"policy and reference should be the same model before training, but their log-probs differ by up to "
                f"{worst:.2g} nats in a token; {way_out}"
            )
        detail = f"log-probs differ by at most {worst:.1e} nats in a token"
        checks.append(Check(check="policy equals reference before training", passed=True, detail=detail))
    expected = trainer.losses.mixture.step0
    if expected is not None and "router" not in output.terms:
        if not math.isclose(loss, expected, abs_tol=allowed.loss, rel_tol=allowed.loss):
            raise RunError(
                f"the loss before training is {loss:.6f} and should be {expected:.6f} for "
                f"{' + '.join(trainer.losses.mixture.parts)}; policy and reference differ, or the batch is not what it "
                "seems"
            )
        detail = f"{loss:.6f}, and should be {expected:.6f}"
        checks.append(Check(check="loss before training is the known constant", passed=True, detail=detail))
    return checks


def _token_difference(logps: Tensor, ref: Tensor | None, mask: Tensor) -> tuple[float, float]:
    assert ref is not None
    difference = torch.where(mask, (logps - ref).abs(), 0.0)
    return float(difference.max()), float(difference.sum() / mask.sum().clamp(min=1))


def check_longest(trainer: ObjectiveTrainer) -> Check:
    """Runs the costliest bin forward and backward, so that memory fails now or never.

    Raises:
        RunError: it does not fit.
    """
    rows = trainer.batches.plan.costliest()
    positions = trainer.batches.plan.positions(rows)
    model = trainer.wrapped
    # DeepSpeed's backward pass reduces gradients and keeps them: there the forward pass, which holds all activations
    # at its end, has to do.
    steps_itself = steps_in_backward(trainer.accelerator)
    with undisturbed(model):
        model.train()  # gradient checkpointing works in this mode only
        try:
            with discarded_gradients(trainer.accelerator, model):
                batch = trainer.batches.pack(rows).to(trainer.args.device)
                with trainer.compute_loss_context_manager():
                    output, _, anchor = trainer.compute_output(model, batch)
                    loss = output.loss(batch.counts) + anchor
                if not steps_itself:
                    trainer.accelerator.backward(loss)
        except (torch.OutOfMemoryError, MemoryError):
            raise RunError(
                f"the costliest microbatch ({len(rows)} rows, {positions} positions) does not fit into memory; lower "
                f"train.token_budget (now {trainer.batches.plan.token_budget}) or set train.gradient_checkpointing"
            ) from None
    return Check(
        check="the costliest microbatch fits",
        passed=True,
        detail=f"{len(rows)} rows, {positions} positions, forward{'' if steps_itself else ' and backward'}{_peak()}",
    )


def _peak() -> str:
    if not torch.cuda.is_available():
        return ""
    return f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most"


def rendered(table: TokenTable, row: int, tokenizer: Any, name: str) -> str:
    """One row decoded; what is trained on stands between ⟦ and ⟧."""
    lines = [f"{name} (what is trained on stands between ⟦ and ⟧)", tokenizer.decode(table.prompts[row].tolist())]
    lines += [f"--- {leg} ---\n⟦{tokenizer.decode(tokens[row].tolist())}⟧" for leg, tokens in table.legs.items()]
    return "\n".join(lines)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
