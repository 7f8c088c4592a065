"""Weights of training scripts: found under any name, refused when they are no numbers; one line says what to save."""

import argparse
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantstudy.errors import UserError
from quantstudy.network.weights import load_state, read_state_dict


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.pth"


def loaded(network: nn.Module, path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Load a file into a network of zeros; return what it has then."""
    for tensor in network.state_dict().values():
        tensor.zero_()
    load_state(network, read_state_dict(path, key), str(path), "model", "mine")
    return network.state_dict()


def failure(network: nn.Module, path: Path, content: Any = None, key: str | None = None) -> str:
    if content is not None:
        torch.save(content, path)
    with pytest.raises(UserError) as error:
        loaded(network, path, key)
    line = str(error.value).replace(str(path), "PATH")
    assert len(line) < 400 and "\n" not in line and "\x1b" not in line
    return line


def copies(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in state.items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "net.", "module._orig_mod.model.", "a.b.c."])
@pytest.mark.parametrize("key", [None, "state_dict", "model", "net", "model_ema", "checkpoint"])
def test_the_names_of_wrappers_are_left_out(network: nn.Module, path: Path, prefix: str, key: str | None) -> None:
    state = copies(network)
    named = {prefix + name: tensor for name, tensor in state.items()}
    named |= {"criterion.weight": torch.ones(3)} if prefix == "model." else {}
    torch.save({key: named, "epoch": 3, "rng": torch.zeros(5, 5)} if key else named, path)
    assert same(loaded(network, path), state)


def test_wrappers_inside_a_network_and_of_its_own_are_told_apart(path: Path) -> None:
    own = nn.Sequential()
    own.module = nn.Conv2d(3, 4, 1)
    own.add_module("head", nn.Linear(4, 2))
    state = copies(own)
    torch.save(state, path)
    assert same(loaded(own, path), state)
    torch.save({name.replace("head.", "head._orig_mod."): tensor for name, tensor in state.items()}, path)
    assert same(loaded(own, path), state)


def test_one_of_several_has_to_be_named(network: nn.Module, path: Path) -> None:
    state = copies(network)
    averaged = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": averaged, "ema": {"module": state}, "epoch": 3}, path)
    line = failure(network, path)
    assert "weights_key" in line and "state_dict_ema (9 tensors)" in line and "ema.module" in line
    assert "did you mean state_dict_ema?" in failure(network, path, key="state_dict_em")
    assert same(loaded(network, path, "state_dict_ema"), averaged)
    torch.save(
        {f"{who}.{k}": v for who, s in {"student": averaged, "teacher": state}.items() for k, v in s.items()}, path
    )
    assert "student and teacher" in failure(network, path)
    assert same(loaded(network, path, "student"), averaged)


def test_weights_that_are_no_finite_real_numbers_are_named(network: nn.Module, path: Path) -> None:
    state, name = copies(network), "0.0.weight"
    weight = state[name]
    for tensor, what in (
        (weight / 0, "has 108 values that are not finite"),
        (weight.double() * 1e300, "not finite"),
        (weight + 0j, "is complex"),
        (weight.to_sparse(), "is sparse"),
        (torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8), "is quantized"),
        (weight.int(), "is of torch.int32, not of torch.float32"),
        (weight.to("meta"), "is without values"),
    ):
        assert f"PATH: {name} " in (line := failure(network, path, state | {name: tensor})) and what in line
    line = failure(network, path, state | {"0.1.running_var": torch.tensor([1.0, 1.0, -2.0, 1.0])})
    assert line == "PATH: 0.1.running_var has negative variances, down to -2"


def test_safetensors_are_read(network: nn.Module, path: Path) -> None:
    state, header, values = copies(network), {"__metadata__": {"format": "pt"}}, b""
    state["0.0.weight"] = state["0.0.weight"].bfloat16().float()
    for name, tensor in state.items():
        kind = {torch.float32: "F32", torch.int64: "I64"}[tensor.dtype]
        stored = tensor.bfloat16() if name == "0.0.weight" else tensor
        content = stored.reshape(-1).view(torch.uint8).numpy().tobytes()
        row = {"dtype": "BF16" if name == "0.0.weight" else kind, "shape": list(tensor.shape)}
        header[name] = row | {"data_offsets": [len(values), len(values) + len(content)]}
        values += content
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)
    assert same(loaded(network, path), state)
    path.write_bytes(path.read_bytes()[:-1])
    assert failure(network, path) == "PATH: truncated, corrupt or not a file of tensors"


def test_a_training_script_may_save_its_arguments_too(network: nn.Module, path: Path) -> None:
    state = copies(network)
    torch.save({"model": state, "optimizer": {}, "epoch": 3, "args": argparse.Namespace(lr=1, data=["a"])}, path)
    assert same(loaded(network, path), state)


def test_the_line_says_what_a_file_is_and_what_to_save(network: nn.Module, path: Path) -> None:
    line = failure(network, path, network)
    assert "a whole pickled model (torch.nn.modules" in line and "torch.save(model.state_dict(), path)" in line
    line = failure(network, path, {"state_dict": copies(network), "args": types.SimpleNamespace(lr=1)})
    assert "beside its tensors types.SimpleNamespace" in line and "torch.save(checkpoint['state_dict'], path)" in line
    torch.jit.trace(network.eval(), torch.ones(1, 3, 8, 8)).save(str(path))  # noqa: TID251
    assert "a TorchScript program" in failure(network, path)
    assert "holds {0: Tensor}, not a state_dict" in failure(network, path, {0: torch.ones(2, 2)})
    assert "holds a list" in failure(network, path, [1])
