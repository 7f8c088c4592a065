"""Attention whose projections are ordinary linear layers, so that they are quantized like any other.

`nn.MultiheadAttention` reads the weights of its projections itself: put a quantized layer in their place and it is
never called. `SelfAttention` computes the same from two `nn.Linear` modules that it does call. The two matrix products
of attention (queries with keys, weights with values) have no weights; they stay in floating point.
"""

import re
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

FUSED = re.compile(r"\.self_attention\.in_proj_(weight|bias)$")
"""How torchvision's files name the projection of queries, keys and values in one."""


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017) from the parameters of `source`, an `nn.MultiheadAttention`.

    `in_proj` makes queries, keys and values of the input, `out_proj` the output of the heads' results.
    """

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, self.dropout = source.num_heads, source.dropout
        self.in_proj = _linear(source.in_proj_weight, source.in_proj_bias)
        self.out_proj = _linear(source.out_proj.weight, source.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False) -> tuple[Tensor, None]:
        """Return (output, None), as the encoder block expects it; all three inputs are one tensor [N, L, E]."""
        split = self.in_proj(query).unflatten(-1, (3, self.heads, -1))  # [N, L, 3, heads, E / heads]
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None


def open_attention(model: nn.Module) -> None:
    """Put a `SelfAttention` into each encoder block of torchvision's vision transformers in `model`."""
    for module in model.modules():
        if type(module).__module__ == "torchvision.models.vision_transformer":
            attention = getattr(module, "self_attention", None)
            if isinstance(attention, nn.MultiheadAttention):
                module.self_attention = SelfAttention(attention)


def opened_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a torchvision state_dict with the names that `open_attention` gives to the tensors."""
    return {FUSED.sub(r".self_attention.in_proj.\1", name): tensor for name, tensor in state.items()}


def _linear(weight: Any, bias: Any) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias
    return layer
