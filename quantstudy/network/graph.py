"""The captured graph of a network: what it calls, in which order and on what, when it runs on a few images.

The network runs as it is, with its own control flow. A hook on each layer and a `TorchFunctionMode` record every call
of a module of `torch.nn` and, outside of these modules, of a function of PyTorch. Each call is recorded with the calls
whose results it reads. A `Graph` thus tells in which order layers run, which calls read whose output, and whether a
layer computes just what its class computes.
"""

import contextlib
import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

from quantstudy.errors import one_line

LAYERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    nn.Linear,
)
"""The layers that can be quantized."""
_READS_VALUES = frozenset(["__bool__", "__int__", "__float__", "__index__", "item", "tolist", "nonzero"])


@dataclass(eq=False)
class Call:
    """One call of a module or a function; the first call of a graph stands for the images.

    In `arguments` and `keywords`, a tensor's shape stands for the tensor.
    """

    name: str
    """The name of the module in the network, or of the function."""
    module: nn.Module | None = None
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    inputs: list["Call"] = field(default_factory=list)
    """The calls whose results it reads, without what is the same for all images, such as a parameter."""
    readers: list["Call"] = field(default_factory=list)
    reads: frozenset[str] = frozenset()
    """The parameters and buffers of the network that a function reads."""
    source: torch.Size = field(default_factory=torch.Size)
    """The shape of the first tensor that it is given."""
    shape: torch.Size = field(default_factory=torch.Size)
    """The shape of its first result."""


@dataclass
class Graph:
    """The calls of a network, in order. `problem` says why they may differ for other images."""

    calls: list[Call]
    result: Call | None
    """The call whose result the network returns."""
    plain: dict[str, Any]
    """The layers that compute just what their class computes, by name, in the order in which they first run."""
    left: dict[str, str]
    """The other layers, each with the reason."""
    problem: str | None = None

    @functools.cached_property
    def calls_of(self) -> dict[str, list[Call]]:
        """The calls of each module, by name."""
        found: dict[str, list[Call]] = defaultdict(list)
        for call in self.calls:
            if call.module is not None:
                found[call.name].append(call)
        return dict(found)

    def only_call(self, name: str) -> Call | None:
        """Return the call of a module that is called exactly once; None for any other module."""
        calls = self.calls_of.get(name, [])
        return calls[0] if len(calls) == 1 else None

    @property
    def order(self) -> list[str]:
        """The names of all layers that run, in the order in which they first run."""
        return [name for name, calls in self.calls_of.items() if isinstance(calls[0].module, LAYERS)]

    def head(self) -> str | None:
        """Return the name of the layer that makes the logits: the last one before the result, whatever lies between."""
        call = self.result
        while call is not None and not isinstance(call.module, LAYERS):
            call = call.inputs[0] if len(call.inputs) == 1 else None
        return None if call is None else call.name


@torch.no_grad()
def capture(model: nn.Module, images: Tensor) -> Graph:
    """Run `model` in eval mode on the first two images of [N, C, H, W], or on a single one twice; return its graph.

    The model also runs on the first image alone. The graph has a `problem` if the calls then differ, or if the control
    flow depends on values. A module with the attribute `captured_whole` is one call.

    Raises:
        Whatever the network raises.
    """
    images = images[:2] if len(images) > 1 else images.expand(2, *images.shape[1:])
    training = model.training
    model.eval()
    try:
        graph = _captured(model, images)
        if graph.problem is None:
            alone = _captured(model, images[:1])
            if [call.name for call in alone.calls] != [call.name for call in graph.calls]:
                graph.problem = "it computes otherwise for one image than for several"
    finally:
        model.train(training)
    return graph


def _captured(model: nn.Module, images: Tensor) -> Graph:
    own_hooks = {name for name, module in model.named_modules() if has_hooks(module)}
    images = images.clone()  # a network may write to its input
    recorder = _Recorder(model, images)
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if _is_leaf(module):
                before, after = (functools.partial(hook, name) for hook in (recorder.enter, recorder.leave))
                stack.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
                stack.enter_context(module.register_forward_hook(after, with_kwargs=True))
        stack.enter_context(recorder)
        result = model(images)
    tensors = [value for value in tree_flatten(result)[0] if isinstance(value, Tensor)]
    graph = Graph(recorder.calls, recorder.made.get(id(tensors[0])) if tensors else None, {}, {}, recorder.problem)
    _sort_layers(model, graph, own_hooks)
    return graph


def _is_leaf(module: nn.Module) -> bool:
    """Whether a call of a module is one call of the graph: a layer, or a PyTorch module without children."""
    if isinstance(module, LAYERS) or hasattr(module, "captured_whole"):
        return True
    return type(module).__module__.startswith("torch.nn.modules.") and not any(True for _ in module.children())


class _Recorder(TorchFunctionMode):
    """Records what is called. Tensors are kept until the end, so that no new one takes an old one's place in memory."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        super().__init__()
        named = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        self.parameters: dict[int, set[str]] = defaultdict(set)
        for name, tensor in itertools.chain(*named):
            self.parameters[id(tensor)].add(name)
        self.calls = [Call("images", shape=images.shape)]
        self.made: dict[int, Call] = {id(images): self.calls[0]}
        self.kept: list[Tensor] = [images]
        self.versions: list[list[tuple[Tensor, int]]] = []
        self.problem: str | None = None

    def enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.versions.append([])  # first: what is asked of tensors below is no call of the network
        self.versions[-1] = _versions((args, kwargs))

    def leave(self, name: str, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if len(self.versions) == 1:
            self._add(name, module, args, kwargs, result, self.versions[0])
        self.versions.pop()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.versions:  # inside a module that is one call
            return function(*args, **kwargs)
        given, name = _versions((args, kwargs)), getattr(function, "__name__", str(function))
        if name in _READS_VALUES and any(id(tensor) in self.made for tensor, _ in given):
            self.problem = "its control flow depends on values"
        result = function(*args, **kwargs)
        self._add(name, None, args, kwargs, result, given)
        return result

    def _add(
        self, name: str, module: nn.Module | None, args: Any, kwargs: Any, result: Any, given: list[tuple[Tensor, int]]
    ) -> None:
        made = [value for value in tree_flatten(result)[0] if isinstance(value, Tensor)]
        written = [tensor for tensor, version in given if tensor._version != version]
        reads = frozenset(name for tensor, _ in given for name in self.parameters.get(id(tensor), ()))
        inputs = [self.made[id(tensor)] for tensor, _ in given if id(tensor) in self.made]
        if not made and not written:
            return
        if not inputs and not reads and module is None:
            return
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.shape, (tuple(args), dict(kwargs)))
        call = Call(name, module, args, kwargs, inputs, reads=reads)
        call.source = given[0][0].shape if given else torch.Size()
        call.shape = (made or written)[0].shape
        for source in inputs:
            source.readers.append(call)
        self.calls.append(call)
        places = {tensor.untyped_storage()._cdata for tensor in written}
        shared = [tensor for tensor in self.kept if places and tensor.untyped_storage()._cdata in places]
        for tensor in (*shared, *written, *made):
            if inputs and id(tensor) not in self.parameters:
                self.made[id(tensor)] = call
        self.kept += [*made, *written]


def _versions(arguments: Any) -> list[tuple[Tensor, int]]:
    return [(value, value._version) for value in tree_flatten(arguments)[0] if isinstance(value, Tensor)]


def _sort_layers(model: nn.Module, graph: Graph, hooked: set[str]) -> None:
    """Sort the layers into plain ones and others, with the reasons."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    owners: Counter[int] = Counter(id(layer._parameters["weight"]) for layer in layers.values() if _owns(layer))
    read = {name: call.name for call in graph.calls if call.module is None for name in call.reads}
    for name in [*graph.order, *(name for name in layers if name not in graph.calls_of)]:
        layer: Any = layers[name]
        reason = _not_its_class(layer) or _reads_of(name, graph, read)
        if reason is None and name in hooked:
            reason = "it has hooks"
        if reason is None and not _owns(layer):
            reason = "its weight is no parameter"
        if reason is None and owners[id(layer.weight)] > 1:
            reason = "another layer has the same weight"
        if reason is None:
            graph.plain[name] = layer
        else:
            graph.left[name] = reason


def _owns(layer: nn.Module) -> bool:
    return layer._parameters.get("weight") is not None


def _not_its_class(layer: Any) -> str | None:
    """Return why a layer may compute something else than its class."""
    known: Any = next(kind for kind in type(layer).__mro__ if kind in LAYERS)
    forwards = ("forward", "_conv_forward", "__call__")
    if any(getattr(type(layer), key, None) is not getattr(known, key, None) for key in forwards):
        return "its forward is its own"
    if "forward" in vars(layer):
        return "its forward is its own"
    if parametrize.is_parametrized(layer):
        return "its weight is parametrized"
    mode = getattr(layer, "padding_mode", "zeros")
    return None if mode == "zeros" else f"padding_mode {mode!r}"


def _reads_of(name: str, graph: Graph, read: dict[str, str]) -> str | None:
    """Return why a layer is not the only reader of its weight, does not run, or is called in an unusual way."""
    calls = graph.calls_of.get(name, [])
    for tensor in ("weight", "bias"):
        if function := read.get(f"{name}.{tensor}"):
            return f"{function} reads its {tensor}{' too' if calls else ''}"
    if not calls:
        return "it does not run"
    if any(len(call.arguments) + len(call.keywords) > 1 for call in calls):
        return "it is called with more than its input"
    weight: Any = getattr(calls[0].module, "weight", None)
    if weight is not None and weight.ndim > 2 and any(len(call.source) != weight.ndim for call in calls):
        return "it is called without a batch"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run before or after the forward pass of a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def put(model: nn.Module, replaced: Mapping[str, nn.Module]) -> None:
    """Put each module in the place of the module with its name, wherever that module stands in `model`."""
    new = {id(model.get_submodule(name)): module for name, module in replaced.items()}
    for place, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in new:
            model.set_submodule(place, new[id(module)])


def example_images(model: nn.Module) -> Tensor:
    """Return two random images that `model` takes: of its `example_shape`, [C, H, W], or of a usual size.

    Raises:
        ValueError: the model fails on all of these.
    """
    first = next((module for module in model.modules() if isinstance(module, LAYERS)), None)
    channels = first.in_channels if isinstance(first, nn.Conv2d) else 3
    device = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0)).device
    usual = [(channels, side, side) for side in (32, 64, 128, 224, 8, 299)]
    problem = ""
    for shape in [model.example_shape] if hasattr(model, "example_shape") else usual:
        images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)  # type: ignore[misc]
        try:
            run_in_eval(model, images)
        except Exception as error:  # a network may raise anything for images of another size
            problem = problem or one_line(error)
            continue
        return images
    raise ValueError(f"the network fails on images of every usual size: {problem}")


def head_name(model: nn.Module) -> str:
    """Return the name of the layer that makes the logits, or, if no graph tells, of the last layer that is defined."""
    try:
        head = capture(model, example_images(model)).head()
    except Exception:  # your own network's code may raise anything
        head = None
    return head or [name for name, module in model.named_modules() if isinstance(module, LAYERS)][-1]


@torch.no_grad()
def run_in_eval(model: nn.Module, images: Tensor) -> Tensor:
    """Return the output of `model` for images, in eval mode; its mode stays as it is."""
    training = model.training
    try:
        return model.eval()(images.clone())  # type: ignore[no-any-return]
    finally:
        model.train(training)


def relative_error(wanted: Tensor, found: Tensor) -> float:
    """Return the norm of the difference as a share of the norm of `wanted`; infinity if it is not finite."""
    error = (found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)
    return float(error) if bool(error.isfinite()) else float("inf")


def out_channels_first(layer: Any, weight: Tensor) -> Tensor:
    """Return a layer's weight, or a tensor of its shape, as [O, I / groups, ...].

    All layers store it in this way, except transposed convolutions: [I, O / groups, ...].
    """
    if not is_transposed(layer):
        return weight
    grouped = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2)  # [groups, O / groups, I / groups, ...]
    return grouped.flatten(0, 1)


def as_stored(layer: Any, weight: Tensor) -> Tensor:
    """Undo `out_channels_first`."""
    if not is_transposed(layer):
        return weight
    return weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)


def is_transposed(layer: Any) -> bool:
    """Whether a layer is a transposed convolution, or a quantized one."""
    return bool(getattr(layer, "transposed", False))
