"""What keeps hold of other weights than the ones being trained: the initial ones, and a reference that follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from align.engines import gathered, in_full, like, put_back, size
from align.errors import RunError
from objectives import Averaging, Penalty
from objectives.modifiers import TRDPO

REFERENCE_FILE = "synced_reference.safetensors"
"""In a checkpoint: the reference's weights, where they follow the policy."""


class InitialWeights:
    """Regularizers on the difference to the weights a run started from, whether or not it was resumed since.

    Args:
        model: the one to train; its weights are copied by ``keep``.
        regularizers: by name.
    """

    def __init__(self, model: nn.Module, regularizers: Mapping[str, object]) -> None:
        self.penalties = {name: each for name, each in regularizers.items() if isinstance(each, Penalty)}
        self.averages = [each for each in regularizers.values() if isinstance(each, Averaging)]
        self.names = tuple(regularizers)
        self.with_adapter = hasattr(model, "peft_config")
        self.initial: dict[str, Tensor] = {}

    def keep(self, model: nn.Module) -> None:
        """Copies the weights, whole or in this process's parts: before training, and before a checkpoint is read."""
        if self.penalties or (self.averages and not self.with_adapter):
            # On the CPU where it is read once, at the end; where it is read in every step, beside the parameters.
            self.initial = {
                name: (value.detach().clone() if self.penalties else value.detach().to("cpu", copy=True))
                for name, value in model.named_parameters()
                if value.requires_grad
            }

    def add_gradients(self, model: nn.Module) -> dict[str, Tensor]:
        """Adds the penalties' gradients to those of the loss, once per step, and returns the penalties.

        The gradients a step ends with are those of its whole loss on every rank, so nothing is left to divide by.
        """
        trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
        count = sum(size(value) for _, value in trained)
        totals: dict[str, Tensor] = {}
        for key, penalty in self.penalties.items():
            total = torch.zeros((), dtype=torch.float64)
            for name, value in trained:
                initial = self.initial[name] = like(self.initial[name], value)
                moved = (value.detach() - initial).requires_grad_()
                with torch.enable_grad():
                    term = penalty.penalty(moved)
                (slope,) = torch.autograd.grad(term, moved)
                slope = slope * (penalty.coef / count)
                value.grad = slope.to(value.dtype) if value.grad is None else value.grad.add_(slope)
                total += in_full(term.detach()).double().cpu()
            totals[key] = total * (penalty.coef / count)
        return totals

    @torch.no_grad()
    def average(self, model: nn.Module) -> None:
        """Puts the averaged weights in place of the trained ones."""
        put_back(model)
        for averaging in self.averages:
            for name, value in model.named_parameters():
                if not value.requires_grad:
                    continue
                with gathered(value, change=True):
                    if not self.with_adapter:
                        # Under ZeRO-3 the first process alone has them, and what others write here is dropped.
                        initial = self.initial[name] if self.initial else value
                        value.copy_(averaging.averaged(value, like(initial, value)))
                    elif "lora_B" in name or "lora_embedding_B" in name:
                        # The adapter starts with this factor at 0: the average of merged weights scales it.
                        value.copy_(averaging.averaged(value, torch.zeros_like(value)))


class MovingReference:
    """A reference that follows the policy (TR-DPO)."""

    def __init__(self, rule: TRDPO, reference: nn.Module) -> None:
        self.rule, self.reference = rule, reference

    @torch.no_grad()
    def after_step(self, step: int, policy: nn.Module) -> bool:
        """Moves the reference if it is time; says whether it did."""
        if step % self.rule.sync_steps:
            return False
        put_back(self.reference)
        own = dict(self.reference.named_parameters())
        for name, value in policy.named_parameters():
            with gathered(value), gathered(own[name], change=True):
                self.rule.sync(own[name], value)
        return True

    def save(self, folder: Path, write: Callable[[dict[str, Tensor], Path], object] | None) -> None:
        """Writes the reference into a checkpoint. Shared (tied) weights are one parameter and written once.

        Args:
            folder: of the checkpoint.
            write: takes copies of the weights and their file; None on all processes but one. All have to call this,
                because each may hold a part.
        """
        put_back(self.reference)
        weights: dict[str, Tensor] = {}
        for name, value in self.reference.named_parameters():
            with gathered(value):
                whole = in_full(value.detach())
                if write is not None:
                    weights[name] = whole.to("cpu", copy=True).contiguous()
        if write is not None:
            write(weights, folder / REFERENCE_FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Reads it back.

        Raises:
            RunError: the checkpoint has none.
        """
        path = folder / REFERENCE_FILE
        if not path.is_file():
            raise RunError(f"{folder} holds no {REFERENCE_FILE}, so the synced reference is lost; start again")
        weights = load_file(path)
        for name, value in self.reference.named_parameters():
            with gathered(value, change=True):
                value.copy_(like(weights[name], value))
