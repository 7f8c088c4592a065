"""Networks composed of blocks at random keep their function when they are folded, equalized and exported.

`COMPOSITIONS` in the environment is how many are tried, each with a seed of its own then; one in ten is exported.
"""

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quantstudy import params as P
from quantstudy.methods.equalization import absorb_high_biases, equalize
from quantstudy.network.folding import fold_batchnorm
from quantstudy.network.fp32 import save_fp32
from quantstudy.quantization.sqnr import sqnr_db
from quantstudy.runtimes.library import load_model
from quantstudy.runtimes.sessions import why_missing
from tests.zoo import settled

EXAMPLES = int(os.environ.get("COMPOSITIONS", 20))
EXPORTED = EXAMPLES // 10
CLASSES, HALF = 7, (0.5, 0.5, 0.5)
LAYERS: dict[str, Callable[[int, int], nn.Module]] = {  # of [N, inputs, S, S]; a linear one works on tokens
    "conv": lambda inputs, outputs: nn.Conv2d(inputs, outputs, 3, padding=1),
    "grouped": lambda inputs, outputs: nn.Conv2d(inputs, outputs, 3, padding=1, groups=4, bias=False),
    "depthwise": lambda inputs, outputs: nn.Conv2d(inputs, outputs, 3, padding=1, groups=inputs),
    "pointwise": lambda inputs, outputs: nn.Conv2d(inputs, outputs, 1, stride=2),
    "transposed": lambda inputs, outputs: nn.ConvTranspose2d(inputs, outputs, 3, padding=1, groups=4),
    "linear": nn.Linear,
}
NORMS = ("none", "batch", "no_affine", "negative")
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "silu": nn.SiLU,
    "clamp": lambda: nn.Hardtanh(0.0, 0.5),
}
POOLINGS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "max": lambda: nn.MaxPool2d(2, ceil_mode=True),
    "average": lambda: nn.AvgPool2d(3, 1, padding=1),
}


class Block(nn.Module):
    """Layer, normalization, activation and pooling, once or twice, beside a skip or not."""

    def __init__(self, plan: dict[str, Any], inputs: int) -> None:
        super().__init__()
        outputs = inputs if plan["residual"] or plan["reused"] else plan["channels"]
        outputs = inputs * (outputs // inputs or 1) if plan["layer"] == "depthwise" else outputs
        self.layer, self.norm = LAYERS[plan["layer"]](inputs, outputs), nn.Identity()
        self.on_tokens, self.outputs = plan["layer"] == "linear", outputs
        if plan["norm"] != "none":
            make = nn.BatchNorm1d if self.on_tokens and plan["flat"] else nn.BatchNorm2d
            self.norm = make(outputs, affine=plan["norm"] != "no_affine")
            if plan["norm"] == "negative":
                nn.init.constant_(self.norm.weight[::2], -1)
        self.activation, self.pooling = ACTIVATIONS[plan["activation"]](), POOLINGS[plan["pooling"]]()
        self.residual = plan["residual"] and plan["layer"] != "pointwise"
        self.times = 2 if plan["reused"] else 1

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, S, S] to [N, outputs, S', S']."""
        for _ in range(self.times):
            y = self.activation(self._normalized(x))
            x = x + y if self.residual else y
        return self.pooling(x)

    def _normalized(self, x: Tensor) -> Tensor:
        if not self.on_tokens:
            return self.norm(self.layer(x))
        height, width = x.shape[2:]
        y = self.layer(x.flatten(2).transpose(1, 2))  # [N, S * S, C]
        if isinstance(self.norm, nn.BatchNorm1d):
            return (
                self.norm(y.flatten(0, 1))
                .unflatten(0, (-1, height * width))
                .transpose(1, 2)
                .unflatten(2, (height, width))
            )
        return self.norm(y.transpose(1, 2).unflatten(2, (height, width)))


class Composition(nn.Module):
    """A first convolution, blocks and a head."""

    def __init__(self, plans: list[dict[str, Any]], classes: int) -> None:
        super().__init__()
        self.first, channels, blocks = nn.Conv2d(3, 8, 3, padding=1), 8, []
        for plan in plans:
            blocks.append(Block(plan, channels))
            channels = blocks[-1].outputs
        self.blocks, self.pool = nn.ModuleList(blocks), nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(torch.flatten(self.pool(x), 1))


PLAN = st.fixed_dictionaries(
    {
        "layer": st.sampled_from(list(LAYERS)),
        "norm": st.sampled_from(NORMS),
        "activation": st.sampled_from(list(ACTIVATIONS)),
        "pooling": st.sampled_from(list(POOLINGS)),
        "channels": st.sampled_from((8, 16, 32)),
        "residual": st.booleans(),
        "reused": st.sampled_from((False, False, True)),
        "flat": st.booleans(),  # BatchNorm1d over all tokens
        "offset": st.sampled_from((0, 3)),  # of biases, so that ReLU never cuts some channels
        "tiny": st.booleans(),
    }
)
CASES: dict[str, Any] = {
    "plans": st.lists(PLAN, min_size=1, max_size=4),
    "seed": st.integers(0, 2**16),
    "size": st.sampled_from((8, 11, 16)),
}
PLANS: list[list[dict[str, Any]]] = []


def composition(num_classes: int) -> nn.Module:
    """The network of the plan that was put into `PLANS` last."""
    return Composition(PLANS[-1], num_classes)


RULES: dict[str, Any] = {
    "derandomize": "COMPOSITIONS" not in os.environ,
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}


def made(plans: list[dict[str, Any]], seed: int, size: int) -> tuple[nn.Module, Tensor]:
    """Return the network of a plan, its statistics settled, and images that differ in contrast and brightness."""
    torch.manual_seed(seed)
    images = torch.randn(4, 3, size, size) * torch.rand(4, 1, 1, 1) + torch.randn(4, 3, 1, 1)
    PLANS.append(plans)
    model = composition(CLASSES)
    for block, plan in zip(model.blocks, plans, strict=True):
        if block.layer.bias is not None:
            block.layer.bias.data += plan["offset"]
        if plan["tiny"] and plan["norm"] == "none" and plan["layer"] != "transposed":  # BatchNorm would make it noise
            block.layer.weight.data[0] = 1e-32
    return settled(model, images), images


def decibels(model: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], images: Tensor) -> float:
    with torch.no_grad():
        return sqnr_db(model(images).numpy(), other(images).numpy())


@settings(max_examples=EXAMPLES, **RULES)
@given(**CASES)
def test_folding_and_equalizing_keep_the_function(plans: list[dict[str, Any]], seed: int, size: int) -> None:
    model, images = made(plans, seed, size)
    folded = fold_batchnorm(model)
    exact = copy.deepcopy(
        model
    ).double()  # in float32 BatchNorm itself may be that far off, where channels are constant
    for some in (images, images[:1], images.contiguous(memory_format=torch.channels_last)):
        assert decibels(lambda x: exact(x.double()), folded, some) > 80, "folded"  # 1e-4
    equalized = equalize(folded)
    assert decibels(model, equalized, images) > 60, "equalized"
    absorb_high_biases(equalized, [images])
    assert decibels(model, equalized, images) > 60, "absorbed"


@pytest.mark.skipif(why_missing("onnxruntime") is not None, reason="no onnxruntime")
@settings(max_examples=EXPORTED, **RULES)
@given(**CASES)
def test_the_exported_file_computes_the_network(
    tmp_path_factory: pytest.TempPathFactory, plans: list[dict[str, Any]], seed: int, size: int
) -> None:
    model, images = made(plans, seed, size)
    path = tmp_path_factory.mktemp("composition") / "fp32.pth"
    preprocessing = P.Preprocessing(image_size=size, mean=HALF, std=HALF)
    save_fp32(path, model, f"{__name__}:composition", CLASSES, preprocessing)
    exported = load_model(path).executable("onnxruntime", torch.device("cpu"))
    assert decibels(model, exported.run, images) > 60
