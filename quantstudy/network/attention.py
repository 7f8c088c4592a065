"""Attention whose projections are ordinary linear layers, so that they are quantized like any other.

`nn.MultiheadAttention` reads the weights of its projections itself, so a quantized layer in their place is never
called. `OpenAttention` computes the same from two `nn.Linear` modules that it does call. The two matrix products of
attention (queries with keys, weights with values) have no weights; a method may round their operands.
"""

import math
import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantstudy.network.graph import put

FUSED = re.compile(r"(^|\.)in_proj_(weight|bias)$")
"""PyTorch's names of the tensors that project queries, keys and values at once."""


class Operand(nn.Module):
    """One side of a matrix product, unchanged; a quantizer may take its place."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x


class Product(nn.Module):
    """The product of two activations, [..., M, K] and [..., K, N]."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Operand(), Operand()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiply both operands, rounded if quantizers took their places."""
        return torch.matmul(self.left(left), self.right(right))

    @property
    def is_plain(self) -> bool:
        """Whether nothing rounds or watches an operand."""
        return all(type(side) is Operand and not side._forward_pre_hooks for side in self.children())


class OpenAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) from the parameters of `source`, an `nn.MultiheadAttention`.

    `in_proj` makes queries, keys and values of its input, `out_proj` the output of the heads' results.
    """

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.batch_first = source.embed_dim, source.num_heads, source.batch_first
        self.dropout, self.head_dim = source.dropout, source.head_dim
        self.in_proj = _linear(source.in_proj_weight, source.in_proj_bias)
        self.out_proj = _linear(source.out_proj.weight, source.out_proj.bias)
        self.scores, self.mixing = Product(), Product()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output and, where they are needed, the weights, as `nn.MultiheadAttention` does."""
        is_batched, is_first = query.ndim == 3, self.batch_first or query.ndim == 2
        if not is_batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        q, k, v = (
            self._heads(part if is_first else part.transpose(0, 1)) for part in self._projected(query, key, value)
        )
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout, weights = self.dropout if self.training else 0.0, None
        is_fused = self.scores.is_plain and self.mixing.is_plain and not torch.compiler.is_exporting()
        if need_weights or not is_fused:
            scores = self.scores(q, k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
            weights = (scores if mask is None else scores + mask).softmax(-1)
            mixed = self.mixing(F.dropout(weights, dropout, self.training), v)
            weights = (weights.mean(1) if average_attn_weights else weights) if need_weights else None
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not is_batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return (output if is_first else output.transpose(0, 1)), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if query is key and key is value:
            return list(self.in_proj(query).chunk(3, -1))
        return [self.in_proj(x).chunk(3, -1)[place] for place, x in enumerate((query, key, value))]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [N, heads, L, E / heads]

    def _mask(self, attention: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """Return the mask to add to the scores: minus infinity where a boolean mask is true."""
        if attention is not None:
            attention = _added(attention, q)
            attention = attention.unflatten(0, (-1, self.num_heads)) if attention.ndim == 3 else attention
        if padding is None:
            return attention
        hidden = _added(padding if padding.ndim == 2 else padding.unsqueeze(0), q)[:, None, None]
        return hidden if attention is None else attention + hidden


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def open_attention(model: nn.Module) -> None:
    """Replace each `nn.MultiheadAttention` of `model` that projects at once by an `OpenAttention`, in place.

    Modules with keys or values of another size, with a bias for keys, or with `add_zero_attn` stay as they are.
    """
    for name, module in list(model.named_modules()):
        is_plain = (
            bool(name)
            and type(module) is nn.MultiheadAttention
            and module._qkv_same_embed_dim
            and module.bias_k is None
        )
        if is_plain and not module.add_zero_attn:  # type: ignore[union-attr]
            put(model, {name: OpenAttention(module)})  # type: ignore[arg-type]


def operands(model: nn.Module) -> dict[str, nn.Module]:
    """Return both operands of every product of attention by name, or the quantizers in their places."""
    products = [(name, module) for name, module in model.named_modules() if isinstance(module, Product)]
    return {f"{name}.{side}": module for name, product in products for side, module in product.named_children()}


def opened_names(state: dict[str, Tensor], own: Collection[str] | None = None) -> dict[str, Tensor]:
    """Return a state_dict with the names that `open_attention` gives to tensors, or to those in `own` alone."""
    renamed = {name: FUSED.sub(r"\1in_proj.\2", name) for name in state}
    return {new if own is None or new in own else name: state[name] for name, new in renamed.items()}


def _linear(weight: Any, bias: Any) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias
    return layer
