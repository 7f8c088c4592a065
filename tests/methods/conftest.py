"""A network of the size that the methods are made for, and images that it has seen."""

import pytest
import torch
from torch import Tensor, nn

from quantstudy.network.architectures import build
from quantstudy.network.folding import fold_batchnorm

SEEN = {"image_size": 32, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
FP32 = {"architecture": "mobilenet_v2", "classes": 10, "preprocessing": SEEN}
"""What a variant's file says of the network."""


@pytest.fixture(scope="session")
def images() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(8, 3, 32, 32).contiguous(memory_format=torch.channels_last)


@pytest.fixture(scope="session")
def network(images: Tensor) -> nn.Module:
    """A MobileNetV2 whose BatchNorm has seen images, so that activations have a natural size; folded."""
    torch.manual_seed(0)
    model = build("mobilenet_v2", 10).train()
    with torch.no_grad():
        for _ in range(20):
            model(images)
    return fold_batchnorm(model).to(memory_format=torch.channels_last)
