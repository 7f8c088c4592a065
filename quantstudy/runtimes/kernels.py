"""Int8 convolutions and linear layers on a CPU, in eager mode, without compiling anything.

The input is quantized to unsigned 8-bit codes and multiplied with int8 weights by oneDNN (the operators
`torch.ops.onednn.qconv2d_pointwise` and `qlinear_pointwise`, to which inductor lowers too), which accumulates in
int32 and returns float32: y = (sum (q_x - zero_point) * q_w) * scale_x * scale_w + bias. Up to float32 rounding this
equals the simulated layer, so accuracy measured on one holds for the other. The input range is either fixed
(`StaticActivation`) or found from the batch in each forward pass (`DynamicActivation`).

If all readers of a layer's output share one known input grid, the layer can write the codes of that grid itself
(`output`), and the readers take uint8. No float32 image is written or read in between. `lowering.py` decides where.

oneDNN's convolution always gets a zero point of 0. The zero point's part of the sums goes into the bias, and an image
that needs padding is padded with the zero point. oneDNN's own correction term is computed anew in each call, and is
wrong for some geometries. A 1x1 convolution of stride 1 is computed as a linear layer over the channels.

On an x86 CPU without VNNI the kernels refuse weights whose sums may saturate (`quantization.saturation`).
"""

import copy
import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantstudy.machine.hardware import int8_sums_saturate, is_x86
from quantstudy.quantization.saturation import LARGEST_PAIR, may_saturate
from quantstudy.runtimes.onednn_geometry import as_pair, is_right, padding_of
from quantstudy.runtimes.uint8 import choose_dynamic_qparams, quantize_to_uint8

PostOp = Literal["none", "relu", "relu6"]

_ATTRIBUTES: dict[PostOp, tuple[str, list[float]]] = {
    "none": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
}
"""oneDNN's name for each post-op, and its numbers."""


@dataclass(frozen=True)
class StaticActivation:
    """A calibrated input grid: x ~ (code - zero_point) * scale with codes in [0, highest], highest <= 255."""

    scale: float
    zero_point: int
    highest: int = 255


@dataclass(frozen=True)
class DynamicActivation:
    """An input grid chosen in each forward pass from the batch's minimum and maximum; codes in [0, highest]."""

    highest: int = 255


Activation = StaticActivation | DynamicActivation


class _Int8Layer(nn.Module):
    """What the two kernel layers share: the scales, the bias and the quantization of the input.

    The layers hold plain tensors instead of parameters: there is nothing to train, to save or to move off the CPU.
    """

    _packed: Tensor
    captured_whole = True

    def __init__(
        self,
        weight_codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        activation: Activation,
        *,
        groups: int = 1,
        post_op: PostOp = "none",
        output: StaticActivation | None = None,
    ) -> None:
        super().__init__()
        if int8_sums_saturate() and may_saturate(weight_codes, groups, activation.highest):
            raise RuntimeError("without VNNI the sums of these weights may saturate: quantize with saturation_free")
        self.activation = activation
        self._set_output(post_op, output)
        self._scale = weight_scale.detach().float().flatten().contiguous()
        self._zero_point = torch.zeros(len(self._scale), dtype=torch.int32)
        self._bias = None if bias is None else bias.detach().float().contiguous()
        self._code_sum = weight_codes.flatten(1).sum(dim=1).double().mul(self._scale).float()

    def fused(self, post_op: PostOp, output: StaticActivation | None) -> "_Int8Layer":
        """Return a copy that applies an activation and, if `output` is given, writes the codes of that grid."""
        layer = copy.copy(self)
        layer._set_output(post_op, output)
        return layer

    def _set_output(self, post_op: PostOp, output: StaticActivation | None) -> None:
        if output is not None and output.highest != 255:
            raise ValueError(f"output.highest is {output.highest}; a kernel writes 8-bit codes only, up to 255")
        self.post_op, self.output = post_op, output
        grid = (1.0, 0, torch.float32) if output is None else (output.scale, output.zero_point, torch.uint8)
        self._last_arguments = (*grid, *_ATTRIBUTES[post_op], "")

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Int8Layer":
        return self  # nothing in it ever changes, and a packed weight cannot be copied

    def _quantize(self, x: Tensor) -> tuple[Tensor, float, int]:
        if isinstance(self.activation, StaticActivation):
            scale, zero_point = self.activation.scale, self.activation.zero_point
            if x.dtype == torch.uint8:
                return x, scale, zero_point
        else:
            scale, zero_point = choose_dynamic_qparams(x, self.activation.highest)
        codes = quantize_to_uint8(x, scale, zero_point)
        if self.activation.highest < 255:
            codes.clamp_(max=self.activation.highest)
        return codes, scale, zero_point

    def _shifted_bias(self, scale: float, zero_point: int) -> Tensor | None:
        """Return the bias less the zero point's part of the sums, zero_point * sum(q_w), times both scales."""
        if not zero_point:
            return self._bias
        shift = self._code_sum * (-zero_point * scale)
        return shift if self._bias is None else shift.add_(self._bias)

    def _multiply(self, codes: Tensor, scale: float, zero_point: int) -> Tensor:
        """Multiply codes [..., I] with a packed weight [O, I]."""
        return torch.ops.onednn.qlinear_pointwise(
            *(codes, scale, zero_point, self._packed, self._scale, self._zero_point, self._bias),
            *self._last_arguments,
        )


class Int8Conv2d(_Int8Layer):
    """A Conv2d in int8: [N, C, H, W] in and out, channels_last out.

    The input is float32, or the uint8 codes of a static `activation`; the output is float32, or the uint8 codes of
    the grid `output`.

    `weight_codes` is int8 [O, I / groups, kH, kW], `weight_scale` float32 [O] (symmetric), `bias` float32 [O] or
    None; `stride`, `padding` ("same" and "valid" too), `dilation` and `groups` are those of `nn.Conv2d`. `fused` holds
    `post_op`, which the kernel applies to its output, and `output`, the grid of the codes that the kernel writes.
    Padding means the value zero, whatever the zero point. Inputs must be finite.

    Raises:
        RuntimeError: the sums may saturate, or `int8_kernels_available` is False.
        ValueError: an `output` of fewer than 8 bits, or a geometry that oneDNN gets wrong (`onednn_geometry`).
    """

    def __init__(
        self,
        weight_codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        activation: Activation,
        *,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | Literal["same", "valid"] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        **fused: Any,
    ) -> None:
        super().__init__(weight_codes, weight_scale, bias, activation, groups=groups, **fused)
        if not is_right(weight_codes.shape, stride, padding, dilation, groups):
            shape = list(weight_codes.shape)
            raise ValueError(f"a kernel of {shape}, stride {stride}, padding {padding} comes out wrong")
        self.stride, self.dilation, self.groups = as_pair(stride), as_pair(dilation), groups
        size = weight_codes.shape[2:]
        self.padding = padding_of(padding, [step * (side - 1) for step, side in zip(self.dilation, size, strict=True)])
        self._pointwise = groups == 1 and self.stride == [1, 1] and size.numel() == 1
        if self._pointwise:
            self._packed = torch.ops.onednn.qlinear_prepack(weight_codes.flatten(1), None)
        else:
            geometry = (self.stride, self.padding, self.dilation, groups)
            self._packed = torch.ops.onednn.qconv_prepack(weight_codes, self._scale, 1.0, 0, *geometry, None)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve."""
        codes, scale, zero_point = self._quantize(input.contiguous(memory_format=torch.channels_last))
        if self._pointwise:
            return self._multiply(codes.permute(0, 2, 3, 1), scale, zero_point).permute(0, 3, 1, 2)
        padding = self.padding
        if zero_point and any(padding):
            sides = [padding[1], padding[1], padding[0], padding[0]]
            codes = nn.functional.pad(codes, sides, value=zero_point).contiguous(memory_format=torch.channels_last)
            padding = [0, 0]
        bias = self._shifted_bias(scale, zero_point)
        return torch.ops.onednn.qconv2d_pointwise(
            *(codes, scale, 0, self._packed, self._scale, self._zero_point, bias),
            *(self.stride, padding, self.dilation, self.groups, *self._last_arguments),
        )


class Int8Linear(_Int8Layer):
    """A Linear in int8: [..., I] in, [..., O] out; float32 or uint8 codes, as for `Int8Conv2d`.

    `weight_codes` is int8 [O, I], `weight_scale` float32 [O] (symmetric), `bias` float32 [O] or None. `fused` and the
    RuntimeError and ValueError are as for `Int8Conv2d`. Inputs must be finite.
    """

    def __init__(
        self, weight_codes: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: Activation, **fused: Any
    ) -> None:
        super().__init__(weight_codes, weight_scale, bias, activation, **fused)
        self._packed = torch.ops.onednn.qlinear_prepack(weight_codes, None)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply."""
        codes, scale, zero_point = self._quantize(input.contiguous())
        return self._multiply(codes, scale, zero_point)


def int8_kernels_available(device: torch.device | str = "cpu") -> bool:
    """Whether `Int8Conv2d` and `Int8Linear` run fast and exactly on `device`: an x86 CPU with oneDNN's operators.

    The answer is found once per process, by looking at the CPU and by computing a convolution whose sums would saturate
    in 16 bits. On a CPU without VNNI the sums just fit: weights with larger sums are refused there
    (`lowering.runs_in_int8`).
    """
    return torch.device(device).type == "cpu" and _probe()


@functools.cache
def _probe() -> bool:
    if not is_x86():
        return False
    code = LARGEST_PAIR // 2 if int8_sums_saturate() else 127
    try:
        with warnings.catch_warnings():  # torch.quint8 is deprecated, and nothing else quantizes in one pass
            warnings.simplefilter("ignore")
            weight = torch.full((16, 16, 3, 3), code, dtype=torch.int8)
            layer = Int8Conv2d(weight, torch.ones(16), None, StaticActivation(1.0, 0))
            y = layer(torch.full((1, 16, 3, 3), 300.0))
    except (RuntimeError, TypeError, AttributeError):  # another version of torch, or a build without oneDNN
        return False
    return bool((y == 255 * code * 16 * 9).all())
