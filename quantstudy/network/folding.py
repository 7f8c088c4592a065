"""Fold BatchNorm into the convolutions before it."""

import copy
from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode where each BatchNorm2d that follows a Conv2d is folded into it.

    The names of the layers stay: the convolution takes the folded weight and a bias, the BatchNorm becomes an
    `Identity`. A BatchNorm that does not directly follow a convolution stays as it is, and so does every one of a
    network that `torch.fx` cannot trace.
    """
    return fold_in_place(copy.deepcopy(model).eval())


def fold_in_place(model: nn.Module) -> nn.Module:
    """Do what `fold_batchnorm` does, to the model itself, which is in eval mode, and return it."""
    modules = dict(model.named_modules())
    for conv_name, norm_name in conv_norm_pairs(model):
        conv, norm = modules[conv_name], modules[norm_name]
        model.set_submodule(conv_name, _fused(conv, norm))
        model.set_submodule(norm_name, nn.Identity())
    return model.requires_grad_(False)


def _fused(conv: Any, norm: Any) -> nn.Module:
    if not conv.weight.is_meta:
        return fuse_conv_bn_eval(conv, norm)
    conv.bias = nn.Parameter(torch.empty(norm.num_features, device="meta"))  # empty_like would import sympy
    return conv  # type: ignore[no-any-return]


def conv_norm_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Return the names of each convolution and the BatchNorm2d that alone reads it."""
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return []
    try:
        graph = fx.Tracer().trace(model)
    except Exception:  # the code of a network of one's own may raise anything at the tracer's stand-in for an image
        return []
    modules = dict(model.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    pairs = []
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        before = node.args[0]
        is_conv = before.op == "call_module" and isinstance(modules[before.target], nn.Conv2d)
        if is_conv and len(before.users) == calls[before.target] == calls[node.target] == 1:
            pairs.append((before.target, node.target))
    return pairs
