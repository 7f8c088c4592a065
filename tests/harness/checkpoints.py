"""Checkpoints that a stranger may hand over: what writes each, how loading has to end, and the key of the weights."""

import io
import json
import os
import pickle
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.harness.sets import ACCEPTED, REFUSED, Make, written

FIRST, VARIANCE, HEAD = "0.0.weight", "0.1.running_var", "2.weight"
"""Tensors of the network."""
State = dict[str, Tensor]
Case = tuple[str, Make, str, str | None]


class Evil:
    """Makes a folder where it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def saved(content: Any, **options: Any) -> bytes:
    """Return the bytes of `torch.save`."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def checkpoints(model: nn.Module) -> Iterator[Case]:
    """Yield files of weights for `model`."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    good: dict[str, Any] = {f"wrapped: {name}": content for name, content in wrapped(state).items()}
    noise = {"epoch": 3, "optimizer": torch.optim.Adam(model.parameters()).state_dict(), "loss": torch.zeros(())}
    keys = ("state_dict", "model", "net", "model_ema", "state_dict_ema", "model_state_dict", "any")
    good |= {f"under {key}": noise | {key: state} for key in keys}
    places = (FIRST, HEAD)
    bad = {
        f"{place} is {kind}": state | {place: one} for place in places for kind, one in tensors(state[place]).items()
    }
    bad |= {
        "a negative variance": state | {VARIANCE: -torch.ones(8)},
        "no head": {name: tensor for name, tensor in state.items() if not name.startswith("2.")},
        "another network's": nn.Sequential(nn.Linear(4, 4)).state_dict(),
        "a name of a megabyte": state | {"n." * 10**6: state[FIRST]},
        "integer keys": {0: state[FIRST], 1: state[HEAD]},
        "a list": [state[FIRST]],
        "a tensor": state[FIRST],
        "nothing": None,
        "a number": 3,
        "empty": {},
        **{f"{name} in it": content for name, content in code(model, state).items()},
        **{f"this project's, with {name}": content for name, content in own(state).items()},
    }
    for contents, expected in ((good, ACCEPTED), (bad, REFUSED)):
        for name, content in contents.items():
            yield name, written("m.pth", saved(content)), expected, None
    for name, content in ({"weights": state} | code(model, state)).items():
        legacy = saved(content, _use_new_zipfile_serialization=False)
        expected = ACCEPTED if content is state else REFUSED
        yield f"{name}, in the legacy format", written("m.pth", legacy), expected, None
    several = noise | {"state_dict": state, "state_dict_ema": state, "ema": {"module": state, "decay": 0.9}}
    twins = {f"{who}.{name}": tensor for who in ("student", "teacher") for name, tensor in state.items()}
    for content, key in ((several, "state_dict_ema"), (several, "ema.module"), (twins, "student")):
        yield f"named {key}", written("m.pth", saved(content)), ACCEPTED, key
        yield f"named {key}x", written("m.pth", saved(content)), REFUSED, f"{key}x"
        yield f"not named {key}", written("m.pth", saved(content)), REFUSED, None
    for name, content in (damaged(state) | wrong_safetensors(state)).items():
        yield f"damaged: {name}", written("m.pth", content), REFUSED, None
    for name in ("m.safetensors", "pytorch_model.bin"):
        yield f"safetensors as {name}", written(name, safetensors(state)), ACCEPTED, None
    yield "TorchScript", lambda folder: scripted(model, folder / "m.pt"), REFUSED, None


def wrapped(state: State) -> dict[str, State]:
    """Return state_dicts with the names that modules around a network give to its tensors."""

    def named(change: Callable[[str], str]) -> State:
        return {change(name): tensor for name, tensor in state.items()}

    prefixes = ("", "module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "model.backbone.")
    found = {prefix or "plain": named(lambda name, prefix=prefix: prefix + name) for prefix in prefixes}
    return found | {
        "a module inside": named(lambda name: name.replace("0.", "0.module.", 1)),
        "a criterion": found["model."] | {"criterion.weight": torch.ones(3)},
        "an average": found["module."] | {"n_averaged": torch.ones(())},
        "half": {name: one.half() if one.is_floating_point() else one for name, one in state.items()},
    }


def tensors(weight: Tensor) -> dict[str, Any]:
    """Return what is no weight in the place of one."""
    return {
        "NaN": weight.clone().index_fill_(0, torch.tensor(1), float("nan")),
        "infinite": weight / 0,
        "complex": weight + 1j,
        "integers": weight.mul(9).int(),
        "boolean": weight > 0,
        "beyond float32": weight.double() * 1e300,
        "sparse": weight.to_sparse(),
        "CSR": weight.flatten(1).to_sparse_csr(),
        "meta": weight.to("meta"),
        "quantized": torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([weight[0], weight[1]]),
        "expanded": torch.ones(1).expand(weight.shape),
        "vast": torch.ones(1).expand(10**9, 8),
        "a scalar": torch.ones(()),
        "empty": weight[:0],
        "text": "weights",
        "null": None,
        "an array": weight.numpy(),
    }


def code(model: nn.Module, state: State) -> dict[str, Any]:
    """Return contents that only code could load."""
    return {
        "a whole model": model,
        "a Namespace": {"state_dict": state, "args": types.SimpleNamespace(lr=1)},
        "a command": {"model": Evil()},
        "a class": state | {"w": types.SimpleNamespace},
        "a path": state | {"w": Path("x")},
        "a function": state | {"w": print},
    }


def own(state: State) -> dict[str, Any]:
    """Return what says to be a file of this project."""
    facts: dict[str, Any] = {"format": "quantstudy-3", "variant": "fp32", "architecture": "resnet18", "classes": 3}
    seen = {"preprocessing": {"image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}, "state_dict": state}
    wrong = facts | {"preprocessing": 3, "state_dict": 7, "variant": "int8", "layers": [], "dtype": "float64"}
    return {"no more": {"format": "quantstudy-3"}, "facts": facts, "others": facts | seen, "types": wrong}


def damaged(state: State) -> dict[str, bytes]:
    """Return damaged files of torch.save, and pickles."""
    whole, values = saved(state), state[FIRST].numpy().tobytes()
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "noise": os.urandom(len(whole)),
        "other values": whole.replace(values, bytes(len(values))),
        "compressed": buffer.getvalue(),
        "a bare pickle": pickle.dumps({"w": [1, 2]}),
        "a bare command": pickle.dumps(Evil()),
        "a deep pickle": b"\x80\x02" + b"(" * 10**6,
    }


def safetensors(state: State, content: bytes | None = None, **change: Any) -> bytes:
    """Return a state_dict in that format, with other content, or a change of the row of the first tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    values = b""
    for name, tensor in state.items():
        kind, end = {torch.float32: "F32", torch.int64: "I64"}[tensor.dtype], len(values) + tensor.nbytes
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [len(values), end]}
        values += tensor.numpy().tobytes()
    header[FIRST] |= change
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + (values if content is None else content)


def wrong_safetensors(state: State) -> dict[str, bytes]:
    """Return files that are nearly in that format."""
    whole = safetensors(state)
    size = len(whole) - 8 - int.from_bytes(whole[:8], "little")
    return {
        "cut safetensors": whole[:-40],
        "longer safetensors": whole + b"x",
        "safetensors of a huge header": b"\xff" * 8 + b"{}",
        "safetensors of a deep header": (2 * 10**5).to_bytes(8, "little") + b'{"a":' * 40000,
        "safetensors of NaN": safetensors(state, b"\xff" * size),
        "safetensors of an unknown type": safetensors(state, dtype="F99"),
        "safetensors of another shape": safetensors(state, shape=[8, 3, 3, 9]),
        "safetensors of a vast shape": safetensors(state, shape=[10**9, 10**9]),
        "safetensors of no offsets": safetensors(state, data_offsets=3),
    }


def scripted(model: nn.Module, path: Path) -> Path:
    """Write a TorchScript program."""
    torch.jit.trace(model.eval(), torch.ones(1, 3, 32, 32)).save(str(path))  # noqa: TID251
    return path
