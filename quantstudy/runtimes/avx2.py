"""Kernels for x86 CPUs that lack newer instructions (`avx2.cpp`), compiled when first needed.

Layers of low-bit weights alone, without AVX512: codes are widened in registers and multiplied with float32. Reading the
weights is what takes time for one image, widening them for a few.

Int8 layers, without VNNI, in products of 16-bit integers. Other int8 kernels (of oneDNN, ONNX Runtime, OpenVINO) take
three instructions for 32 products there: two that multiply, one that adds. Products of 16-bit integers take as many
that multiply and one more that adds; but a 3x3 convolution by Winograd's F(2x2, 3x3) or F(3x3, 3x3), which want the
wider integers, has 2.25 or 3.24 times fewer of them:

- Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016, https://arxiv.org/abs/1509.09308;
- Meng and Brothers, Efficient Winograd Convolution via Integer Arithmetic, 2019, https://arxiv.org/abs/1901.01965.

They are exact: the sums are those of the direct convolution, if they fit into 32 bits. On an AMD EPYC (Zen 3) VGG-11's
convolutions at 224 px took 0.5 to 0.8 of oneDNN's time, its first linear layer 0.3. Other layers stay on oneDNN.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantstudy.machine.compiler import library
from quantstudy.machine.hardware import int8_sums_saturate

_SOURCE = Path(__file__).with_suffix(".cpp")
_TRANSFORMS = {
    2: torch.tensor([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], dtype=torch.float64),
    3: torch.tensor([[3, 0, 0], [-3, -3, -3], [-1, 1, -1], [1, 2, 4], [0, 0, 6]], dtype=torch.float64),
}
"""G of F(2, 3) times 2 and of F(3, 3) times 6, so that they are whole."""
_OUTPUTS = 16
_MOST_CHANNELS = 1800
"""Input channels, up to which 4 * 9 * 255 * 128 * channels stays below 2^31."""
_LEAST_CHANNELS = 32
"""Input channels, of which fewer are too few to pay for the transforms."""
_LEAST_TILES = 24
"""Of a batch, of which fewer are too few to pay for reading larger weights."""
_MOST_ROWS = 64
"""Of a matrix product, of which oneDNN does more as fast."""
_TILES, _TILES_OF_LARGE, _LARGE = 24, 72, 2**22
"""Tiles that a core transforms at a time, and for how many bytes of weights more, as those are read again for each."""

_SUMS = range(64, 513)
"""Inputs of a product of float32 that are summed before their scale is applied, where one is enough for all."""


class _Output(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("scale", "bias", "to")),
        *((name, ctypes.c_float) for name in ("low", "high", "inverse")),
        *((name, ctypes.c_int32) for name in ("zero_point", "writes_codes")),
        ("outputs", ctypes.c_int64),
    ]


class _Convolution(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("images", "weights")),
        ("output", _Output),
        *((name, ctypes.c_int64) for name in ("n", "h", "w", "c")),
        ("zero_point", ctypes.c_int32),
    ]


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("rows", "weights")),
        ("output", _Output),
        *((name, ctypes.c_int64) for name in ("n", "inputs")),
    ]


class _FloatProduct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("rows", "weights", "scale", "bias", "to")),
        *((name, ctypes.c_int64) for name in ("n", "inputs", "outputs", "groups", "bits")),
    ]


@dataclass(frozen=True)
class Ending:
    """What becomes of a layer's sums: y = sum * scale + bias within [low, high], then the codes of a grid, if any."""

    low: float = -torch.inf
    high: float = torch.inf
    grid: tuple[float, int] | None = None
    """Scale and zero point of the uint8 codes to write; without, y is written, float32."""

    def of(self, scale: Tensor, bias: Tensor, to: Tensor) -> _Output:
        """Return the kernel's argument; the tensors have to outlive it."""
        low, high, (step, zero_point) = self.low, self.high, self.grid or (1.0, 0)
        if self.grid is not None:  # what is far outside the grid would not fit into an int32
            low, high = max(low, -1e6 * step), min(high, 1e6 * step)
        pointers = (scale.data_ptr(), bias.data_ptr(), to.data_ptr())
        return _Output(*pointers, low, high, 1 / step, zero_point, self.grid is not None, len(scale))

    def empty(self, *shape: int) -> Tensor:
        """Return what the output, [N, ...], is written to."""
        return torch.empty(*shape, dtype=torch.float32 if self.grid is None else torch.uint8)


def available() -> bool:
    """Whether int8 layers are faster here, on an x86 CPU with AVX2 and without VNNI, and can be compiled."""
    return int8_sums_saturate() and compiled()


def compiled() -> bool:
    """Whether the kernels run: on a CPU with AVX2, with a C++ compiler."""
    return library(_SOURCE) is not None


def _call(name: str, given: ctypes.Structure, *numbers: int) -> None:
    kernels = library(_SOURCE)
    assert kernels is not None, "ask `compiled` first"
    getattr(kernels, name)(ctypes.byref(given), *map(ctypes.c_int64, numbers), ctypes.c_int64(torch.get_num_threads()))


class Convolution3x3:
    """A 3x3 convolution with a stride and a padding of 1, from uint8 codes."""

    def __init__(self, codes: Tensor) -> None:
        """Keep int8 `codes`, [O, I, 3, 3]."""
        self._codes = codes
        self._packed: dict[int, Tensor] = {}

    def _weights(self, side: int) -> Tensor:
        """Return the transformed weights for tiles of `side`, int16 [O / 16, (side + 2)^2, I / 2, 16, 2]."""
        if side not in self._packed:
            g = _TRANSFORMS[side]
            moved = torch.einsum("yi,ocij,xj->yxoc", g, self._codes.double(), g).to(torch.int16)
            self._packed[side] = _in_pairs(moved.flatten(0, 1)).permute(1, 0, 2, 3, 4).contiguous()
        return self._packed[side]

    def pays(self, size: Sequence[int]) -> bool:
        """Whether images of a size, [N, I, H, W], are convolved faster than by oneDNN."""
        n, channels, h, w = size
        return channels >= _LEAST_CHANNELS and n * _tiles(_side(h, w), h, w) >= _LEAST_TILES

    def __call__(self, codes: Tensor, zero_point: int, scale: Tensor, bias: Tensor, ending: Ending) -> Tensor:
        """Convolve uint8 [N, I, H, W], channels_last, to [N, O, H, W], channels_last.

        Args:
            codes: the images.
            zero_point: code that stands around them.
            scale: float32 [O].
            bias: float32 [O].
            ending: what becomes of the sums of the codes as they are.
        """
        codes = codes.contiguous(memory_format=torch.channels_last)
        n, channels, h, w = codes.shape
        _check(self._codes.shape, channels, scale, bias)
        y = ending.empty(n, h, w, len(scale))
        side = _side(h, w)
        weights = self._weights(side)
        pointers = (codes.data_ptr(), weights.data_ptr())
        given = _Convolution(*pointers, ending.of(scale, bias, y), n, h, w, channels, zero_point)
        tiles = _TILES if weights.nbytes <= _LARGE else _TILES_OF_LARGE
        _call("convolve_3x3", given, side, tiles)
        return y.permute(0, 3, 1, 2)


class Product:
    """The packed weight of a linear layer, from uint8 codes."""

    def __init__(self, codes: Tensor) -> None:
        """Pack int8 `codes`, [O, I], to [O / 16, I / 2, 16, 2]."""
        self._shape = codes.shape
        self._weights = _in_pairs(codes.unsqueeze(0)).squeeze(0).contiguous()

    @staticmethod
    def pays(rows: int) -> bool:
        """Whether so many rows are multiplied faster than by oneDNN."""
        return rows <= _MOST_ROWS

    def __call__(self, codes: Tensor, scale: Tensor, bias: Tensor, ending: Ending) -> Tensor:
        """Multiply contiguous uint8 [N, I] to [N, O]; `scale` and `bias` are float32 [O]."""
        rows, inputs = codes.shape
        _check(self._shape, inputs, scale, bias)
        y = ending.empty(rows, len(scale))
        given = _Product(codes.data_ptr(), self._weights.data_ptr(), ending.of(scale, bias, y), rows, inputs)
        _call("multiply_rows", given)
        return y


class FloatProduct:
    """The packed weight of a linear layer of low-bit weights alone, from float32."""

    def __init__(self, codes: Tensor, scale: Tensor, bits: int) -> None:
        """Pack int8 `codes`, [O, I], of 8 or 4 `bits`, and their `scale`, float32 [O, groups]."""
        (self._outputs, self._inputs), self._bits = codes.shape, bits
        if scale.shape[1] == 1:  # short sums in float32 are more precise
            size = max((size for size in _SUMS if self._inputs % size == 0), default=self._inputs)
            scale = scale.expand(-1, self._inputs // size)
        self._groups = scale.shape[1]
        self._weights = _by_outputs(codes).contiguous()
        if bits == 4:
            first, second = (self._weights + 8).to(torch.uint8).chunk(2, dim=2)
            self._weights = (second << 4 | first).contiguous()
        self._scale = _by_outputs(scale).contiguous()

    def __call__(self, rows: Tensor, bias: Tensor) -> Tensor:
        """Multiply contiguous float32 [N, I] to [N, O], and add `bias`, float32 [O]."""
        n, inputs = rows.shape
        if (inputs, len(bias)) != (self._inputs, self._outputs):  # the kernel would read beyond a tensor
            raise RuntimeError(f"{inputs} inputs and {len(bias)} biases, the weight is {[self._outputs, self._inputs]}")
        y = torch.empty(n, self._outputs)
        pointers = (tensor.data_ptr() for tensor in (rows, self._weights, self._scale, bias, y))
        _call("multiply_float_rows", _FloatProduct(*pointers, n, inputs, self._outputs, self._groups, self._bits))
        return y


def is_3x3(codes: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> bool:
    """Whether `Convolution3x3` does a convolution with int8 weights [O, I / groups, kH, kW]."""
    plain = groups == 1 and all(list(pair) == [1, 1] for pair in (stride, padding, dilation))
    return plain and codes.shape[2:] == (3, 3) and codes.shape[1] <= _MOST_CHANNELS


def _side(h: int, w: int) -> int:
    """Return the side of the tiles that an image takes the fewest products with."""
    return min(_TRANSFORMS, key=lambda side: _tiles(side, h, w) * (side + 2) ** 2)


def _tiles(side: int, h: int, w: int) -> int:
    return -(-h // side) * -(-w // side)


def _check(shape: Sequence[int], inputs: int, scale: Tensor, bias: Tensor) -> None:
    """Raise RuntimeError where the kernels would read beyond a tensor."""
    if (inputs, len(scale), len(bias)) != (shape[1], shape[0], shape[0]):
        counts = f"{inputs} input channels, {len(scale)} scales and {len(bias)} biases"
        raise RuntimeError(f"{counts}, the weights are {list(shape)}")
    if not (scale.is_contiguous() and bias.is_contiguous()):
        raise RuntimeError("scales and biases have to be contiguous")


def _by_outputs(weights: Tensor) -> Tensor:
    """Return [O, I] as [O / 16, I, 16], zeros where there is no output."""
    padded = torch.nn.functional.pad(weights, (0, 0, 0, -len(weights) % _OUTPUTS))
    return padded.view(-1, _OUTPUTS, weights.shape[1]).transpose(1, 2)


def _in_pairs(weights: Tensor) -> Tensor:
    """Return [B, O, I] as [B, O / 16, I / 2, 16, 2], zeros where there is no output or input."""
    count, outputs, inputs = weights.shape
    padded = torch.nn.functional.pad(weights, (0, inputs % 2, 0, -outputs % _OUTPUTS))
    return padded.view(count, -1, _OUTPUTS, padded.shape[2] // 2, 2).transpose(2, 3)
