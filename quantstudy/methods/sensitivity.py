"""What it costs to quantize one layer alone, at each number of bits.

For each layer and width only that layer's weights are quantized, and the network's logits are compared with those of
fp32 on calibration images. The network is run once, operator by operator (`torch.fx`); where it comes to a layer, the
rest of it is run from there, once for each width, so that on average half of the network is computed.

A budget is spent by a loss of each layer at each width, and no loss is best everywhere (`LOSSES`). To first order the
errors of several layers add up in the logits, so the sum of their sizes bounds what all together do; were they
independent, squares would add (Zhou et al., *Adaptive Quantization for Deep Neural Network*, AAAI 2018); but a size
stops growing where a layer breaks, and there the divergence of the predictions goes on. At 3 bits rounded to nearest,
sizes were best for MobileNetV2 on digits and hopeless for VGG-11 on CIFAR-100. So each loss proposes an allocation,
every uniform width within the budget is one more, and the network as a whole, on calibration images, decides. A drop of
accuracy on a few hundred images is mostly zero or noise.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from quantstudy import params as P
from quantstudy.errors import UserError
from quantstudy.machine.device import DTYPES
from quantstudy.measure.statistics import sqnr_db
from quantstudy.methods.allocation import HALF, allocate, operations_budget, size_budget, stored_bits
from quantstudy.methods.bias_correction import correct_own_biases
from quantstudy.methods.moments import input_moments
from quantstudy.methods.post_training import freeze
from quantstudy.methods.registry import Calibration, replaceable, weight_only
from quantstudy.quantization.layers import quantized_layers
from quantstudy.quantization.variant import Variant, cast

Row = dict[str, Any]
COLUMNS = (
    *("layer", "bits", "weights", "macs", "bytes", "sqnr_db", "loss_increase", "kl_divergence", "top1_drop", "images"),
)
Table = dict[int, dict[str, nn.Module]]
"""Layers by bits and by name."""
Layers = Mapping[str, Any]
"""The Conv2d and Linear of a network that can be quantized, by name."""
Allocation = Mapping[str, int]
"""Bits of each layer."""
LOSSES: dict[str, Callable[[Row], float]] = {
    "size of the logits' relative error": lambda row: 10 ** (-row["sqnr_db"] / 20),
    "its square": lambda row: 10 ** (-row["sqnr_db"] / 10),
    "Kullback-Leibler divergence": lambda row: row["kl_divergence"],
}
"""What a layer at a width loses, by a row of `measure_layers`."""


def measurable(model: nn.Module, calibration: Calibration) -> Layers:
    """Return the layers of `model` that can be quantized and that `torch.fx` sees called, by name."""
    called = {node.target for node in fx.symbolic_trace(model).graph.nodes if node.op == "call_module"}
    return {name: layer for name, layer in replaceable(model, calibration).items() if name in called}


def quantized_table(model: nn.Module, calibration: Calibration, settings: P.Rounding, widths: Sequence[int]) -> Table:
    """Return each layer of `model` quantized on its own (weights alone, frozen) at each of `widths`, all below 16.

    What looks at other layers' errors is left out: joint fine-tuning, and of bias correction all but what makes up for
    the layer's own mean error.
    """
    rounding = {key: getattr(settings, key) for key in P.Rounding.model_fields}
    rounding |= {"bias_correction": False, "finetune": False}
    if settings.rounding == "gptq" or settings.gain_correction or settings.bias_correction:
        calibration = {**calibration, "moments": input_moments(model, calibration["images"])}
    table: Table = {}
    for bits in widths:
        row = P.WeightOnly(kind="weight_only", weight_bits=bits, **rounding)
        network = weight_only(model, calibration, row).network
        if settings.bias_correction:
            correct_own_biases(model, network, calibration["moments"])
        table[bits] = dict(quantized_layers(network))
    return table


def mixed(
    model: nn.Module, table: Table, bits: Allocation, calibration: Calibration, settings: P.MixedBudget
) -> Variant:
    """Return each layer in integers of its own `bits`, those at 16 and everything else in a 16-bit float type.

    The codes are those of `table`, which `quantized_table` made with the same settings; what it left out is done here.
    Learned rounding has thus seen the other layers at the same width.
    """
    network = _assembled(model, table, bits, torch.float32).network
    for name, layer in quantized_layers(network).items():  # what follows corrects all of a bias, not only its own part
        layer.bias = copy.deepcopy(model.get_submodule(name).bias)
    rest = settings.model_copy(update={"rounding": "nearest", "gain_correction": False})
    freeze(model, network, calibration, rest)
    return cast(network, DTYPES[settings.dtype])


def _assembled(model: nn.Module, table: Table, bits: Allocation, dtype: torch.dtype) -> Variant:
    network = copy.deepcopy(model)
    for name, width in bits.items():
        if width < HALF:
            network.set_submodule(name, table[width][name])
    return cast(network, dtype)


@torch.no_grad()
def measure_layers(
    model: nn.Module,
    calibration: Calibration,
    batches: Sequence[tuple[Tensor, Tensor]],
    settings: P.Sensitivity,
    macs: Mapping[str, int],
) -> list[Row]:
    """Return one row a layer and width, in the order of execution.

    A row has the `layer`, `bits`, its number of `weights`, `macs` per image, `bytes` stored at that width, scales
    included; and on `images`: `sqnr_db` of the logits, `loss_increase` (cross-entropy, nats), `kl_divergence` of the
    predicted distribution from fp32's (nats) and `top1_drop` (percentage points).

    Args:
        model: fp32, BatchNorm folded, eval mode; it stays untouched.
        calibration: as methods take it.
        batches: images float32 [N, 3, S, S] and labels int64 [N], of the training split.
        settings: widths, and how weights are rounded.
        macs: multiply-accumulates per image of every layer.
    """
    layers = measurable(model, calibration)
    labels = torch.cat([labels for _, labels in batches])
    reference = torch.cat([model(images) for images, _ in batches])
    rows = []
    table = quantized_table(model, calibration, settings, [bits for bits in settings.bits if bits < HALF])
    images = [images for images, _ in batches]
    for name, bits, logits in _logits_with_one_layer_changed(model, layers, table, images, settings.bits):
        weight = layers[name].weight
        row = {"layer": name, "bits": bits, "weights": weight.numel(), "macs": macs[name]}
        row["bytes"] = stored_bits(weight.shape, bits, settings.group_size) // 8
        rows.append(row | _compare(reference, logits, labels))
    return rows


def allocations_within(layers: Layers, rows: Sequence[Row], settings: P.MixedBudget, key: str) -> list[Allocation]:
    """Return the allocations for `layers` within the budgets of `settings`, the params at `key`, that are worth a try.

    They are the one of least summed loss by each of `LOSSES`, and the uniform widths that were measured.

    Raises:
        UserError: the rows are of another network, or no choice is within the budgets.
    """
    shapes: dict[str, torch.Size] = {name: layer.weight.shape for name, layer in layers.items()}
    by_layer: dict[str, dict[int, Row]] = {}
    for row in rows:
        by_layer.setdefault(row["layer"], {})[row["bits"]] = row
    if by_layer.keys() != shapes.keys():
        raise UserError(
            f"sensitivity.json has {len(by_layer)} layers, not the model's {len(shapes)}; run sensitivity again"
        )
    widths, budgets = list(next(iter(by_layer.values()))), []
    if settings.mean_bits is not None:
        budgets.append(size_budget(f"{key}.mean_bits", settings.mean_bits, shapes, settings.group_size, widths))
    if settings.bit_operations is not None:
        macs = {row["layer"]: row["macs"] for row in rows}
        budgets.append(operations_budget(f"{key}.bit_operations", settings.bit_operations, macs, widths))
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
    """Return how far the predictions under an allocation diverge from those of `model`, in nats, as a function.

    It runs the network once for each allocation, whatever the number of calls.

    Args:
        model: fp32, BatchNorm folded, eval mode.
        table: its layers at every width below 16 of the allocations.
        images: calibration batches, float32 [N, 3, S, S].
        dtype: of the layers at 16 bits.
    """
    reference = torch.cat([model(batch) for batch in images])

    @functools.cache
    @torch.no_grad()
    def measured(items: tuple[tuple[str, int], ...]) -> float:
        network = cast(_assembled(model, table, dict(items), dtype).network, torch.float32)
        return _divergence(reference, torch.cat([network(batch) for batch in images]))

    return lambda bits: measured(tuple(bits.items()))


def mean_bits(layers: Layers, bits: Allocation, group_size: int | None) -> float:
    """Return the stored bits a weight of `layers` under an allocation of them all, scales and 16 bits included."""
    stored = sum(stored_bits(layers[name].weight.shape, width, group_size) for name, width in bits.items())
    return stored / sum(layer.weight.numel() for layer in layers.values())


def _divergence(reference: Tensor, logits: Tensor) -> float:
    """Return the mean Kullback-Leibler divergence of the predictions by `logits` from those by `reference`, in nats."""
    log_p, log_q = reference.double().log_softmax(1), logits.double().log_softmax(1)
    return float(F.kl_div(log_q, log_p, reduction="batchmean", log_target=True))


def _compare(reference: Tensor, logits: Tensor, labels: Tensor) -> Row:
    log_p, log_q = reference.double().log_softmax(1), logits.double().log_softmax(1)
    right, right_now = ((x.argmax(1) == labels).float().mean().item() for x in (reference, logits))
    return {
        "sqnr_db": sqnr_db(np.asarray(reference), np.asarray(logits)),
        "loss_increase": float(F.nll_loss(log_q, labels) - F.nll_loss(log_p, labels)),
        "kl_divergence": _divergence(reference, logits),
        "top1_drop": 100 * (right - right_now),
        "images": len(labels),
    }


def _logits_with_one_layer_changed(
    model: nn.Module, layers: Layers, table: Table, images: Sequence[Tensor], widths: Sequence[int]
) -> Iterator[tuple[str, int, Tensor]]:
    graph = fx.symbolic_trace(model)  # its layers are the model's own
    nodes, seen = list(graph.graph.nodes), set()
    runners = [_Runner(graph, batch) for batch in images]
    for index, node in enumerate(nodes):
        if node.op == "call_module" and node.target in layers and node.target not in seen:
            name = str(node.target)
            seen.add(name)  # a layer that is called twice is changed in both places at the first
            for bits in widths:
                with _changed(layers[name], table[bits][name] if bits < HALF else None):
                    logits = torch.cat([runner.rest(nodes[index:]) for runner in runners])
                yield name, bits, logits
        for runner in runners:
            runner.step(node)


@contextlib.contextmanager
def _changed(layer: Any, quantized: Any) -> Iterator[None]:
    """Give `layer` the weight and bias of its quantized self, or its own in float16 where that is None."""
    weight, bias = layer.weight, layer.bias
    if quantized is None:
        dense = weight.half().float()
    else:
        dense = quantized.dequantized()
        layer.bias = quantized.bias
    laid_out_alike = torch.empty_like(weight).copy_(dense)  # so that the same numbers give the same logits
    layer.weight = nn.Parameter(laid_out_alike, requires_grad=False)
    try:
        yield
    finally:
        layer.weight, layer.bias = weight, bias


class _Runner(fx.Interpreter):
    """A network on one batch, run operator by operator, keeping the values that are still needed."""

    def __init__(self, graph: fx.GraphModule, images: Tensor) -> None:
        super().__init__(graph)
        self.args_iter = iter([images])

    def step(self, node: fx.Node) -> None:
        """Run one operator."""
        self.env[node] = self.run_node(node)
        for unneeded in self.user_to_last_uses.get(node, ()):
            del self.env[unneeded]

    def rest(self, nodes: Sequence[fx.Node]) -> Tensor:
        """Return what `nodes`, the rest of the network, give; the runner stays where it is."""
        kept = self.env
        self.env = {node: x.clone() if isinstance(x, Tensor) else x for node, x in kept.items()}  # ReLU is in place
        for node in nodes:
            self.step(node)
        logits: Tensor = self.env[nodes[-1]]
        self.env = kept
        return logits
