"""Fold normalizations into the layers before them, and turn weights that are computed from others into plain ones."""

import contextlib
import copy
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from quantstudy.errors import one_line
from quantstudy.network.graph import (
    Call,
    Graph,
    as_stored,
    capture,
    example_images,
    has_hooks,
    is_transposed,
    out_channels_first,
    put,
    relative_error,
    run_in_eval,
)

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
TOLERANCE = 1e-4
"""How far folding may move the logits, relative to their norm."""


def fold_batchnorm(model: nn.Module, images: Tensor | None = None) -> nn.Module:
    """Return a copy in eval mode where each BatchNorm is folded that alone reads a convolution or a linear layer.

    The names of the layers stay: the layer takes the folded weight and a bias, and the BatchNorm becomes an `Identity`.
    The copy's attribute `unfolded` is a dictionary of the BatchNorms that stay, by name, each with the reason.

    Args:
        model: float32, on the CPU.
        images: float32 [N, C, H, W], to capture the graph on; None for random images of a usual size.
    """
    return fold_in_place(copy_of(model).eval(), images)


def fold_in_place(model: Any, images: Tensor | None = None) -> Any:
    """Fold as `fold_batchnorm` does, but in place; `model` must be in eval mode. Return it.

    The outputs for the images are compared before and after; if they differ, nothing is folded.
    """
    settle_weights(model)
    model.unfolded = {}
    norms = [name for name, module in model.named_modules() if isinstance(module, NORMS)]
    if not norms:
        return model.requires_grad_(False)
    try:
        images = example_images(model) if images is None else images
        graph = capture(model, images)
    except Exception as error:  # your own network's code may raise anything
        model.unfolded = dict.fromkeys(norms, f"the network was not captured: {one_line(error)}")
        return model.requires_grad_(False)
    pairs, model.unfolded = fold_pairs(graph, norms)
    modules = dict(model.named_modules())
    before = run_in_eval(model, images)
    put(model, {name: _fused(modules[name], modules[norm]) for name, norm in pairs})
    put(model, {norm: nn.Identity() for _, norm in pairs})
    try:
        found = run_in_eval(model, images)
        change = 0.0 if before.is_meta else relative_error(before, found)
        reason = f"folded, the network's output would differ by {change:.2g} of its norm"
    except Exception as error:  # it may use attributes that only a BatchNorm has
        change, reason = float("inf"), f"folded, the network fails: {one_line(error)}"
    if change > TOLERANCE:
        put(model, {name: modules[name] for pair in pairs for name in pair})
        model.unfolded |= {norm: reason for _, norm in pairs}
    return model.requires_grad_(False)


def fold_like(model: nn.Module, names: Collection[str]) -> nn.Module:
    """Change a network of random weights, in place, so that its state_dict has the tensors `names` of a folded one."""
    settle_weights(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, NORMS) and f"{name}.running_mean" not in names and module.running_mean is not None:
            put(model, {name: nn.Identity()})
        elif getattr(module, "bias", "") is None and f"{name}.bias" in names:
            weight: Any = module.weight
            outputs = out_channels_first(module, weight).shape[0]
            module.bias = nn.Parameter(torch.empty(outputs, device=weight.device))
    return model.requires_grad_(False)


def fold_pairs(graph: Graph, norms: Collection[str]) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Return the names of each layer and the BatchNorm that folds into it, and why others of `norms` do not fold."""
    pairs: list[tuple[str, str]] = []
    unfolded: dict[str, str] = {}
    for norm in norms:
        layer, reason = _layer_before(graph, norm)
        if layer is None:
            unfolded[norm] = reason
        else:
            pairs.append((layer, norm))
    return pairs, unfolded


def _layer_before(graph: Graph, norm: str) -> tuple[str | None, str]:
    calls = graph.calls_of.get(norm, [])
    if any(f"{norm}.running_mean" in call.reads for call in graph.calls):
        return None, "a function reads its statistics"
    if graph.problem is not None or len(calls) != 1:
        return None, graph.problem or ("it does not run" if not calls else f"it runs {len(calls)} times")
    module: Any = calls[0].module
    before = calls[0].inputs[0] if len(calls[0].inputs) == 1 else Call("what it reads")
    if type(module) not in NORMS or has_hooks(module):
        return None, "its forward is its own, or it has hooks"
    if module.running_mean is None:
        return None, "it has no running statistics"
    if before.name not in graph.plain:
        return None, f"{before.name} is no layer that it could fold into"
    if len(before.readers) > 1:
        return None, f"{before.name} is read elsewhere too"
    if graph.only_call(before.name) is None:
        return None, f"{before.name} runs {len(graph.calls_of[before.name])} times"
    if isinstance(before.module, nn.Linear) and len(before.shape) > 2:
        return None, f"the channels of {before.name} come last, its own come second"
    return before.name, ""


@torch.no_grad()
def _fused(layer: Any, norm: Any) -> Any:
    """Return the layer with the BatchNorm behind it, as `torch.nn.utils.fusion` computes it."""
    fused = copy.copy(layer)
    fused._parameters = dict(layer._parameters)
    deviation = torch.rsqrt(norm.running_var + norm.eps)
    gamma = torch.ones_like(deviation) if norm.weight is None else norm.weight
    beta = torch.zeros_like(deviation) if norm.bias is None else norm.bias
    bias = torch.zeros_like(norm.running_mean) if layer.bias is None else layer.bias
    fused.weight = nn.Parameter(scaled_outputs(layer, gamma * deviation), requires_grad=False)
    fused.bias = nn.Parameter((bias - norm.running_mean) * deviation * gamma + beta, requires_grad=False)
    return fused


def scaled_outputs(layer: Any, factor: Tensor) -> Tensor:
    """Return a layer's weight times `factor`, [O], of each output channel, laid out in memory like the weight."""
    weight = layer.weight.detach()
    scaled = out_channels_first(layer, weight) * factor.view(-1, *[1] * (weight.ndim - 1))
    if not is_transposed(layer):
        return scaled
    return torch.empty_like(weight).copy_(as_stored(layer, scaled))


def settle_weights(model: nn.Module) -> None:
    """Turn each weight that is computed in every forward pass into a plain parameter with its current value, in place.

    These are the weights of weight_norm and spectral_norm, as parametrizations and as hooks, and pruned weights.
    """
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            values = {name: getattr(module, name).detach() for name in module.parametrizations}  # type: ignore[union-attr]
            module.__class__ = type(module).__bases__[0]  # PyTorch's own way would change the class of copies too
            del module._modules["parametrizations"]
            for name, value in values.items():
                module.register_parameter(name, nn.Parameter(value, requires_grad=False))
        for hook in list(module._forward_pre_hooks.values()):
            kind, name = type(hook).__name__, getattr(hook, "name", "weight")
            if kind == "WeightNorm":
                torch.nn.utils.remove_weight_norm(module, name)
            elif kind == "SpectralNorm":
                torch.nn.utils.remove_spectral_norm(module, name)
            elif isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]


def channels_last(model: nn.Module) -> nn.Module:
    """Lay out the weights of 2d convolutions channels_last, in place, and return the model."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    return model


def copy_of(model: nn.Module) -> nn.Module:
    """Return a deep copy, even if weights are computed from others: PyTorch does not copy tensors with a history."""
    with _without_history(model):
        return copy.deepcopy(model)


@contextlib.contextmanager
def _without_history(model: nn.Module) -> Iterator[None]:
    found = [(m, k, v) for m in model.modules() for k, v in vars(m).items() if isinstance(v, Tensor)]
    for module, key, value in found:
        module.__dict__[key] = value.detach()
    try:
        yield
    finally:
        for module, key, value in found:
            module.__dict__[key] = value
