"""Integer codes of 2 to 8 bits, packed without a gap.

Code c of b bits is stored as the unsigned value c + 2^(b-1). Four bits lie two to a byte, the first code in
the low half; two bits four to a byte, likewise; eight bits one to a byte. The odd widths (3, 5, 6, 7) are one
stream of bits, the lowest bit of a code first.
"""

import numpy as np
import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack int8 codes of any shape, each in [-2^(bits-1), 2^(bits-1) - 1], into uint8 [ceil(count * bits / 8)]."""
    unsigned = codes.flatten().view(torch.uint8) + 2 ** (bits - 1)  # uint8 wraps round
    if bits == 8:
        return unsigned
    if 8 % bits:
        stream = np.unpackbits(unsigned.cpu().numpy()[:, None], axis=1, count=bits, bitorder="little")
        return torch.from_numpy(np.packbits(stream, bitorder="little")).to(codes.device)
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(unsigned, (0, -len(unsigned) % per_byte)).view(-1, per_byte)
    packed = padded[:, 0].clone()
    for place in range(1, per_byte):
        packed |= padded[:, place] << (bits * place)
    return packed


def unpack(packed: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """Undo `pack`: return int8 codes of `shape`."""
    count, half = shape.numel(), 2 ** (bits - 1)
    if bits == 8:
        unsigned = packed
    elif 8 % bits:
        stream = np.unpackbits(packed.cpu().numpy(), count=count * bits, bitorder="little").reshape(count, bits)
        unsigned = torch.from_numpy(np.packbits(stream, axis=1, bitorder="little")[:, 0]).to(packed.device)
    else:
        unsigned = torch.empty(len(packed), 8 // bits, dtype=torch.uint8, device=packed.device)
        for place in range(8 // bits):
            torch.bitwise_and(packed >> (bits * place), 2**bits - 1, out=unsigned[:, place])
        unsigned = unsigned.flatten()[:count]
    return (unsigned - half).view(torch.int8).view(shape)  # uint8 wraps round to the bits of the int8 code
