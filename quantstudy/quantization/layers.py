"""The quantized layer: one layer that trains, simulates, is stored packed, and compiles to int8 kernels.

`QuantConv` replaces a convolution, also a transposed one; `QuantLinear` replaces a Linear. Each is in one of two
states:

- trainable: a float weight, rounded in each forward pass with a straight-through gradient (QAT);
- frozen: integer codes and scales. `packed` and `weight_scale` are all that a file stores of the weight.

`ActivationQuantizer` quantizes the input. In eager mode both states use fast simulated arithmetic. While
`torch.compile` or `torch.export` traces, a frozen layer with one scale per channel and a quantized input emits
`torch.ops.quantized_decomposed` quantize and dequantize operators around the ordinary operator. Inductor fuses these to
oneDNN int8 kernels; ONNX knows them as QuantizeLinear and DequantizeLinear.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, nn
from torch.nn import functional as F

from quantstudy.network.attention import operands
from quantstudy.network.graph import as_stored, out_channels_first, put
from quantstudy.quantization.packing import pack, unpack
from quantstudy.quantization.saturation import may_saturate
from quantstudy.quantization.schemes import SMALLEST_SCALE, ActivationScheme, Mode, WeightScheme

OPS = torch.ops.quantized_decomposed


@dataclass(frozen=True)
class LayerScheme:
    """How one layer is quantized."""

    weight: WeightScheme
    activation: ActivationScheme = field(default_factory=ActivationScheme)


class ActivationQuantizer(nn.Module):
    """Quantize and dequantize a layer's input, per tensor, to unsigned codes.

    `scale` and `zero_point` are plain numbers, not tensors, because inductor's int8 patterns and ONNX want
    constants; the model's file stores them along with the tensors.
    """

    def __init__(self, scheme: ActivationScheme, scale: float = 1.0, zero_point: int = 0) -> None:
        super().__init__()
        self.scheme, self.scale, self.zero_point = scheme, scale, zero_point
        self.learned: Any = None  # a module that holds the scale in training

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` rounded to the quantizer's grid, in the dtype and memory format of `x`."""
        if self.scheme.mode == "none":
            return x
        if self.scheme.mode == "dynamic":
            return self._dynamic(x)
        if self.learned is not None:
            return self.learned(x)  # type: ignore[no-any-return]
        if not torch.compiler.is_compiling():
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, 0, self.scheme.highest)
        grid = (self.scale, self.zero_point, 0, self.scheme.highest, torch.uint8)
        return OPS.dequantize_per_tensor.default(OPS.quantize_per_tensor.default(x, *grid), *grid)

    def _dynamic(self, x: Tensor) -> Tensor:
        highest = self.scheme.highest
        if torch.compiler.is_compiling():
            scale, zero_point = OPS.choose_qparams.tensor(x, 0, highest, SMALLEST_SCALE, torch.uint8)
            grid = (scale, zero_point, 0, highest, torch.uint8)
            return OPS.dequantize_per_tensor.tensor(OPS.quantize_per_tensor.tensor(x, *grid), *grid)
        low, high = torch.aminmax(x.detach())
        low, high = low.clamp_max(0.0), high.clamp_min(0.0)
        scale = ((high - low) / highest).clamp_min(SMALLEST_SCALE)
        zero_point = (-low / scale).round().clamp(0, highest).to(torch.int32)
        on = torch.ones(1, dtype=torch.int64, device=x.device)
        fake = torch._fake_quantize_per_tensor_affine_cachemask_tensor_qparams
        return fake(x, scale.view(1), zero_point.view(1), on, 0, highest)[0]

    @torch.no_grad()
    def adopt_learned(self) -> None:
        """End training: the learned scale becomes the quantizer's own."""
        if self.learned is not None:
            self.scale = max(float(self.learned.scale), SMALLEST_SCALE)
            self.zero_point = int(self.learned.zero_point)
            self.learned = None


class _QuantLayer(nn.Module):
    """The common part of the quantized layers; a subclass adds the operator."""

    captured_whole = True

    weight: nn.Parameter | None
    weight_quantizer: Any
    bias: Any
    packed: Tensor
    weight_scale: Tensor
    int_weight: Tensor
    dense_weight: Tensor

    def __init__(self, layer: Any, scheme: LayerScheme) -> None:
        super().__init__()
        self.scheme = scheme
        weight = out_channels_first(layer, layer.weight.detach())
        self.shape = weight.shape
        """The weight's shape, [O, I / groups, ...]; a transposed convolution itself stores it the other way round."""
        self.dtype = torch.float32  # the float type of the network around it; `cast` changes it
        self.activation = ActivationQuantizer(scheme.activation)
        self.weight = nn.Parameter(weight)
        self.weight_quantizer = None  # a module that learns how to round; None: round to nearest
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach())
        for name in ("in_channels", "out_channels", "in_features", "out_features"):  # a network may ask for them
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    @property
    def frozen(self) -> bool:
        """Whether the weight is stored as integer codes."""
        return self.weight is None and self.weight_quantizer is None

    def freeze(self) -> None:
        """Round the weight for good: keep packed codes and scales, drop the float weight."""
        assert not self.frozen, "already frozen"
        if self.weight_quantizer is not None:
            self.set_codes(*self.weight_quantizer.freeze(self.weight))
            return
        weight = self.weight.detach()  # type: ignore[union-attr]
        scale = self.scheme.weight.choose_scale(weight)
        self.set_codes(self.scheme.weight.quantize(weight, scale), scale)

    def set_codes(self, codes: Tensor, scale: Tensor) -> None:
        """Store int8 codes of the weight's shape and float32 scales [O, groups]; this freezes the layer."""
        self.weight = self.weight_quantizer = None
        self.forget_dense()
        self.__dict__.pop("may_saturate", None)
        self.register_buffer("packed", pack(codes, self.scheme.weight.bits))
        self.register_buffer("weight_scale", scale.to(self.scheme.weight.scale_dtype))
        self.requires_grad_(False)

    def empty_codes(self) -> None:
        """Become frozen with uninitialized storage, for `load_state_dict(assign=True)`."""
        layout = self.scheme.weight.layout(self.shape)
        self.weight = None
        self.register_buffer("packed", torch.empty(layout.packed_bytes, dtype=torch.uint8, device="meta"))
        scale = torch.empty(layout.rows, layout.groups, dtype=self.scheme.weight.scale_dtype, device="meta")
        self.register_buffer("weight_scale", scale)

    def weight_codes(self) -> Tensor:
        """Return the int8 codes of a frozen layer, in the weight's shape."""
        return unpack(self.packed, self.scheme.weight.bits, self.shape)

    def dequantized(self) -> Tensor:
        """Return the weight of a frozen layer, float32."""
        return self.scheme.weight.dequantize(self.weight_codes(), self.weight_scale.float())

    def unpack(self) -> None:
        """Make `dense_weight`, the weight of eager mode: dequantized, in the float type of the network."""
        dense = self.dequantized()
        dense = dense.to(self.dtype, memory_format=torch.channels_last if dense.ndim == 4 else torch.contiguous_format)
        self.register_buffer("dense_weight", dense, persistent=False)

    def forget_dense(self) -> None:
        """Drop what `unpack` made; the next forward pass makes it anew if it needs it."""
        if hasattr(self, "dense_weight"):
            del self.dense_weight

    def prepare_to_trace(self) -> None:
        """Make the weight that a compiled or exported graph holds: int8 codes if `emits_int8`, else dense."""
        if not self.emits_int8:
            self.unpack()
            return
        self.register_buffer("int_weight", self.weight_codes(), persistent=False)
        zeros = torch.zeros(self.shape[0], dtype=torch.int64, device=self.packed.device)
        self.register_buffer("weight_zero_point", zeros, persistent=False)

    @property
    def emits_int8(self) -> bool:
        """Whether a compiled graph may compute this layer in int8: one scale per channel, a quantized input."""
        return self.scheme.activation.mode != "none" and self.scheme.weight.group_size is None

    @functools.cached_property
    def may_saturate(self) -> bool:
        """Whether the int8 sums of a frozen layer may saturate on a CPU without VNNI."""
        return may_saturate(self.weight_codes(), getattr(self, "groups", 1), self.scheme.activation.highest)

    def forward_weight(self) -> Tensor:
        """Return the weight for the operator, in the form that the layer's state and the tracer need."""
        if self.weight_quantizer is not None:
            return self.weight_quantizer(self.weight)  # type: ignore[no-any-return]
        if self.weight is not None:
            return self.scheme.weight.fake_quantize(self.weight)
        if torch.compiler.is_compiling():
            if not self.emits_int8:
                return self.dense_weight
            grid = (self.weight_scale.flatten(), self.weight_zero_point, 0, -128, 127, torch.int8)
            return OPS.dequantize_per_channel.default(self.int_weight, *grid)
        if not hasattr(self, "dense_weight"):
            self.unpack()
        return self.dense_weight

    def extra_repr(self) -> str:
        """Show shape and scheme in `print(model)`."""
        return f"{tuple(self.shape)}, {self.scheme.weight}, {'frozen' if self.frozen else 'trainable'}"


class QuantConv(_QuantLayer):
    """A convolution of 1 to 3 dimensions, transposed or not, with quantized weight and input; any groups.

    Input and output are [N, C, ...].
    """

    def __init__(self, layer: Any, scheme: LayerScheme) -> None:
        if layer.padding_mode != "zeros":
            raise NotImplementedError(f"padding_mode {layer.padding_mode!r}; only zeros can be quantized")
        super().__init__(layer, scheme)
        self.transposed, self.kernel_size = layer.transposed, layer.kernel_size
        self.stride, self.padding, self.output_padding = layer.stride, layer.padding, layer.output_padding
        self.dilation, self.groups = layer.dilation, layer.groups

    def forward(self, input: Tensor) -> Tensor:
        """Convolve the quantized input with the quantized weight."""
        weight, dimensions = as_stored(self, self.forward_weight()), len(self.kernel_size)
        if self.transposed:
            function: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dimensions - 1]
            geometry: Any = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        else:
            function = (F.conv1d, F.conv2d, F.conv3d)[dimensions - 1]
            geometry = (self.stride, self.padding, self.dilation, self.groups)
        return function(self.activation(input), weight, self.bias, *geometry)  # type: ignore[no-any-return]


class QuantConv2d(QuantConv):
    """A Conv2d with quantized weight and input, [N, C, H, W]; int8 kernels can run it."""


class QuantLinear(_QuantLayer):
    """A Linear with quantized weight and input. Input [..., in_features], output [..., out_features]."""

    def forward(self, input: Tensor) -> Tensor:
        """Multiply the quantized input with the quantized weight."""
        weight = self.forward_weight()
        return F.linear(self.activation(input), weight, self.bias)


class ChannelReLU(nn.Module):
    """min(max(x, 0), bound) with a bound for each channel: ReLU6 after cross-layer equalization.

    `axis` is the channels' axis, counted from the end: -3 for [N, C, H, W], -1 after a linear layer.
    """

    captured_whole = True

    def __init__(self, bound: Tensor, axis: int = -3) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("bound", bound)
        self.bound: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Clamp at zero and at each channel's bound."""
        return torch.minimum(input.relu(), self.bound.view(-1, *[1] * (-1 - self.axis)))


def quantize_layers(model: nn.Module, schemes: dict[str, LayerScheme]) -> dict[str, _QuantLayer]:
    """Replace the named convolutions and linear layers of `model` in place; return the new layers by name."""
    replaced: dict[str, _QuantLayer] = {}
    for name, scheme in schemes.items():
        layer: Any = model.get_submodule(name)
        is_2d, kind = isinstance(layer, nn.Conv2d), QuantLinear if isinstance(layer, nn.Linear) else QuantConv
        replaced[name] = (QuantConv2d if is_2d else kind)(layer, scheme)
    put(model, replaced)
    return replaced


def quantized_operands(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Return the quantizers of the operands of attention's products, by name."""
    return {name: side for name, side in operands(model).items() if isinstance(side, ActivationQuantizer)}


def activation_modes(model: nn.Module) -> set[Mode]:
    """Return how the activations of `model` are quantized: the modes of its layers' inputs and of operands.

    With "dynamic" among them, the result of an image depends on the other images of its batch.
    """
    return {module.scheme.mode for module in model.modules() if isinstance(module, ActivationQuantizer)}


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """Return every quantized layer of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _QuantLayer)}
