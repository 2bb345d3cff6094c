"""Weights that one process reads for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from align import read_once
from align.errors import RunError
from align.model import load_config, load_divided
from align.sections import ModelSection
from tests.equivalence.worlds import save_model


class Wire:
    """What the first process says is heard by the others, one after the other in one process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch, self.said = monkeypatch, list[Any]()
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
        monkeypatch.setattr(read_once, "_from_reader", self.tell)
        self.become(0)

    def become(self, rank: int) -> None:
        self.rank = rank
        self.patch.setenv("RANK", str(rank))

    def tell(self, value: Any) -> Any:
        if self.rank:
            return self.said.pop(0)
        self.said.append(value)
        return value


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    return Wire(monkeypatch)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_room_is_the_model_without_its_weights(tied: bool, dtype: torch.dtype, wire: Wire, tmp_path: Path):
    section = ModelSection(model_name_or_path=str(save_model(tmp_path / "model", tie_word_embeddings=tied)))
    read = load_divided(section, load_config(section), dtype)
    wire.become(1)
    drawn = torch.get_rng_state()
    room: Any = load_divided(section, load_config(section), dtype)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not wire.said

    def about(model: nn.Module) -> list[tuple[str, torch.Size, torch.dtype, str]]:
        parameters = model.named_parameters()
        return [(name, value.shape, value.dtype, value.device.type) for name, value in parameters]

    assert about(room) == about(read)
    assert (room.get_output_embeddings().weight is room.get_input_embeddings().weight) is tied
    assert room.training is read.training
    assert type(room) is type(read)
    assert room.config.to_dict() == read.config.to_dict()
    with torch.no_grad():
        for mine, other in zip(room.parameters(), read.parameters(), strict=True):
            mine.copy_(other)
    ids = torch.arange(12)[None]
    assert torch.equal(room(input_ids=ids).logits, read(input_ids=ids).logits), "buffers too are the reader's"


def test_scalar_heads_have_room(wire: Wire, tmp_path: Path):
    section = ModelSection(model_name_or_path=str(save_model(tmp_path / "model")))
    read = load_divided(section, load_config(section), torch.float32, values=("reward",))
    wire.become(1)
    room = load_divided(section, load_config(section), torch.float32, values=("reward",))
    assert [(name, value.shape) for name, value in room.named_parameters()] == [
        (name, value.shape) for name, value in read.named_parameters()
    ]


def test_a_reader_that_fails_tells_the_others(wire: Wire, tmp_path: Path):
    section = ModelSection(model_name_or_path=str(save_model(tmp_path / "model")))
    config = load_config(section)
    (tmp_path / "model/model.safetensors").write_bytes(b"nothing")
    with pytest.raises(RunError, match="can't load the weights") as first:
        load_divided(section, config, torch.float32)
    wire.become(1)
    with pytest.raises(RunError, match="can't load the weights") as other:
        load_divided(section, config, torch.float32)
    assert str(first.value) == str(other.value)


def test_other_errors_of_the_reader_are_told_as_well(wire: Wire):
    def fails() -> str:
        raise MemoryError("no place")

    with pytest.raises(MemoryError):
        read_once.of_reader(fails)
    wire.become(1)
    with pytest.raises(RunError, match=r"could not read the weights .*no place"):
        read_once.of_reader(fails)


def test_weights_that_the_configuration_does_not_have_are_refused(wire: Wire, tmp_path: Path):
    one, other = (
        ModelSection(model_name_or_path=str(save_model(tmp_path / name, tie_word_embeddings=False, **shape)))
        for name, shape in (("deep", {"num_hidden_layers": 3}), ("flat", {}))
    )
    load_divided(one, load_config(one), torch.float32)
    wire.become(1)
    with pytest.raises(RunError, match=r"other weights than its configuration says .*zero2\.yaml"):
        load_divided(other, load_config(other), torch.float32)


def test_what_is_told_of_weights_is_the_readers(wire: Wire):
    assert read_once.of_reader(lambda: "a fingerprint") == "a fingerprint"
    wire.become(1)
    assert read_once.of_reader(lambda: pytest.fail("asked of nothing")) == "a fingerprint"
