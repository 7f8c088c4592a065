import pytest
import torch
from torch import nn

from quantstudy.measure.operations import count_macs, tera_bit_operations


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def test_operations_by_hand() -> None:
    assert count_macs(small().eval(), 16)[1] == {"0": 16 * 16 * 8 * 3 * 9, "1.2": 14 * 14 * 8 * 9, "4": 40}
    convolution = nn.Conv2d(3, 3, 1)
    twice = nn.ModuleDict({"stem": convolution, "body": nn.Sequential(convolution, nn.ReLU()), "rest": nn.Flatten()})
    twice.forward = lambda x: twice["rest"](twice["body"](x))  # type: ignore[method-assign]
    assert count_macs(twice, 16)[1] == {"stem": 16 * 16 * 9}
    macs = {"a": 10**12, "b": 2 * 10**12}
    assert tera_bit_operations(macs, {"a": (4, 8), "b": (8, 32)}) == 32 + 512
    with pytest.raises(KeyError):
        tera_bit_operations(macs, {"a": (4, 8)})


@pytest.mark.parametrize(("architecture", "giga"), [("vgg11", 7.609), ("mobilenet_v2", 0.301)])
def test_known_models_at_224(architecture: str, giga: float) -> None:
    from torchvision.models import get_model

    with torch.device("meta"):
        model = get_model(architecture).eval()
    assert count_macs(model, 224)[0] / 1e9 == pytest.approx(giga, abs=0.001)
