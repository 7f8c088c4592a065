"""Mixed precision within a budget: each layer gets the bits that lose least.

The allocation needs a loss for each layer and width, and no loss is best everywhere (`LOSSES`). To first order, the
errors of several layers add up in the logits, so the sum of their sizes bounds the error of all layers together. If the
errors are independent, their squares add up (Zhou et al., *Adaptive Quantization for Deep Neural Network*, AAAI 2018).
Where a layer breaks, the size of its error stops growing, but the divergence of the predictions still grows. So each
loss proposes an allocation, and every uniform width within the budget is one more. The whole network, run on
calibration images, decides between them. It is judged by divergence, not by accuracy: a drop of accuracy on a few
hundred images is mostly zero or noise.
"""

import copy
import functools
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quantstudy import params as P
from quantstudy.errors import UserError
from quantstudy.machine.device import DTYPES
from quantstudy.methods.allocation import HALF, Allocation, allocate, operations_budget, size_budget, stored_bits
from quantstudy.methods.calibration import Calibration
from quantstudy.methods.post_training import freeze
from quantstudy.methods.recipe import Recipe, register
from quantstudy.methods.sensitivity import Layers, Row, Table, divergence, quantized_table, stored_shape
from quantstudy.methods.uniform import left_as_they_are
from quantstudy.network.graph import put
from quantstudy.quantization.layers import quantized_layers
from quantstudy.quantization.variant import Skipped, Variant, cast, merged

LOSSES: dict[str, Callable[[Row], float]] = {
    "size of the logits' relative error": lambda row: 10 ** (-row["sqnr_db"] / 20),
    "its square": lambda row: 10 ** (-row["sqnr_db"] / 10),
    "Kullback-Leibler divergence": lambda row: row["kl_divergence"],
}
"""What a layer loses at a width, computed from its row of `measure_layers`."""


@register(P.MixedBudget)
class BudgetRecipe(Recipe[P.MixedBudget]):
    """Of the allocations that the sensitivity proposes, take the one that diverges least on calibration images."""

    def quantize(self, model: nn.Module, calibration: Calibration, row: P.MixedBudget) -> Variant:
        allocations = allocations_within(calibration.replaceable, calibration.sensitivity, row)
        widths = sorted({width for bits in allocations for width in bits.values() if width < HALF})
        table, skipped = quantized_table(model, calibration, row, widths)
        divergence_of = divergence_from(model, table, calibration.images, DTYPES[row.dtype])
        bits = min(allocations, key=divergence_of)
        counts = ", ".join(f"{count} of {width} bits" for width, count in sorted(Counter(bits.values()).items()))
        tqdm.write(f"layers: {counts}; the choice of {len(allocations)} that diverges least from fp32")
        variant = mixed(model, table, bits, calibration, row)
        variant.skipped = merged(_of_integers(skipped, bits), variant.skipped)
        return variant


def mixed(
    model: nn.Module, table: Table, bits: Allocation, calibration: Calibration, settings: P.MixedBudget
) -> Variant:
    """Return each layer in integers of its own `bits`; layers at 16 bits and everything else are 16-bit floats.

    The codes come from `table`, which `quantized_table` made with the same settings; the steps that it left out run
    here. Learned rounding has thus seen the other layers at the width of the layer that it rounded, not at their own.
    """
    network = _assembled(model, table, bits, torch.float32).network
    if settings.rounding != "brecq":  # which has learned the biases together with the codes
        for name, layer in quantized_layers(network).items():  # `freeze` corrects the whole bias, not the layer's part
            layer.bias = copy.deepcopy(model.get_submodule(name).bias)
    rest = settings.model_copy(update={"rounding": "nearest", "gain_correction": False})
    skipped = merged(left_as_they_are(model, calibration.graph), freeze(model, network, calibration, rest))
    return cast(network, DTYPES[settings.dtype], skipped)


def _of_integers(skipped: Skipped, bits: Allocation) -> Skipped:
    """Return what was left out of the layers that an allocation stores as integers."""
    return {
        technique: {name: why for name, why in layers.items() if bits.get(name, HALF) < HALF}
        for technique, layers in skipped.items()
    }


def _assembled(model: nn.Module, table: Table, bits: Allocation, dtype: torch.dtype) -> Variant:
    network = copy.deepcopy(model)
    put(network, {name: table[width][name] for name, width in bits.items() if width < HALF})
    return cast(network, dtype)


def allocations_within(layers: Layers, rows: Sequence[Row], settings: P.MixedBudget) -> list[Allocation]:
    """Return the candidate allocations for `layers` within the budgets of `settings`.

    They are the allocation with the least summed loss for each of `LOSSES`, and each measured width for all layers.

    Raises:
        UserError: the rows belong to another network, or no allocation fits the budgets.
    """
    shapes = {name: stored_shape(layer) for name, layer in layers.items()}
    by_layer: dict[str, dict[int, Row]] = {}
    for row in rows:
        by_layer.setdefault(row["layer"], {})[row["bits"]] = row
    if by_layer.keys() != shapes.keys():
        raise UserError(
            f"sensitivity.json has {len(by_layer)} layers, not the model's {len(shapes)}; run sensitivity again"
        )
    widths, budgets = list(next(iter(by_layer.values()))), []
    if settings.mean_bits is not None:
        budgets.append(size_budget("mean_bits", settings.mean_bits, shapes, settings.group_size, widths))
    if settings.bit_operations is not None:
        macs = {row["layer"]: row["macs"] for row in rows}
        budgets.append(operations_budget("bit_operations", settings.bit_operations, macs, widths))
    found: list[Allocation] = []
    for loss in LOSSES.values():
        losses = {name: {bits: loss(row) for bits, row in at.items()} for name, at in by_layer.items()}
        found.append(allocate(losses, budgets))
    uniform = [dict.fromkeys(shapes, width) for width in widths]
    found += [bits for bits in uniform if all(budget.spent(bits) <= budget.most for budget in budgets)]
    return [bits for number, bits in enumerate(found) if bits not in found[:number]]


@torch.no_grad()
def divergence_from(
    model: nn.Module, table: Table, images: Sequence[Tensor], dtype: torch.dtype = torch.float16
) -> Callable[[Allocation], float]:
    """Return a function from an allocation to the divergence of its predictions from those of `model`, in nats.

    The function runs the network once for each allocation, and remembers the result.

    Args:
        model: fp32, BatchNorm folded, eval mode.
        table: the layers of `model` at every width below 16 that the allocations use.
        images: calibration batches, float32 [N, 3, S, S].
        dtype: of the layers at 16 bits.
    """
    reference = torch.cat([model(batch.clone()) for batch in images])

    @functools.cache
    @torch.no_grad()
    def measured(items: tuple[tuple[str, int], ...]) -> float:
        network = cast(_assembled(model, table, dict(items), dtype).network, torch.float32)
        return divergence(reference, torch.cat([network(batch.clone()) for batch in images]))

    return lambda bits: measured(tuple(bits.items()))


def mean_bits(layers: Layers, bits: Allocation, group_size: int | None) -> float:
    """Return the stored bits per weight of `layers` under an allocation, scales and layers at 16 bits included."""
    stored = sum(stored_bits(stored_shape(layers[name]), width, group_size) for name, width in bits.items())
    return stored / sum(layer.weight.numel() for layer in layers.values())
