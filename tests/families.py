"""torchvision's families of classifiers, one of each, of few layers where it lets us choose."""

from collections.abc import Callable
from functools import partial

from torch import nn
from torchvision import models
from torchvision.models import convnext, densenet, efficientnet, inception, maxvit, regnet, swin_transformer, vgg

from tests.zoo import Entry

WINDOWS = r"attn\.(qkv|proj)$"
"""Layers of Swin whose weights its attention reads itself."""
FAMILIES: list[Entry] = []


def family(make: Callable[..., nn.Module], name: str, size: int = 32, unquantized: str = "") -> None:
    """Put a network, which `make` makes of `num_classes`, into the families, and into this module by its name."""
    FAMILIES.append(Entry(name, f"{__name__}:{name}", folds=None, size=size, unquantized=unquantized))
    globals()[name] = make


def small_vgg(num_classes: int) -> nn.Module:
    network = vgg.VGG(vgg.make_layers([8, "M", 16, "M", 32, "M"], batch_norm=True), num_classes)
    network.classifier[0], network.classifier[3] = nn.Linear(32 * 7 * 7, 64), nn.Linear(64, 64)
    network.classifier[6] = nn.Linear(64, num_classes)
    return network


def small_efficientnet(num_classes: int) -> nn.Module:
    fused, plain = efficientnet.FusedMBConvConfig, efficientnet.MBConvConfig
    blocks = [fused(1, 3, 1, 16, 16, 1), fused(4, 3, 2, 16, 24, 1), plain(4, 3, 2, 24, 32, 2)]
    return efficientnet.EfficientNet(blocks, dropout=0.2, num_classes=num_classes, last_channel=64)


def small_convnext(num_classes: int) -> nn.Module:
    blocks = [convnext.CNBlockConfig(16, 32, 2), convnext.CNBlockConfig(32, None, 1)]
    return convnext.ConvNeXt(blocks, 0.1, num_classes=num_classes)


def small_swin(num_classes: int) -> nn.Module:
    sizes: dict[str, list[int]] = {"patch_size": [4, 4], "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    return swin_transformer.SwinTransformer(embed_dim=16, num_classes=num_classes, **sizes)


def small_regnet(num_classes: int) -> nn.Module:
    return regnet.RegNet(regnet.BlockParams.from_init_params(4, 16, 20, 2.0, 8, se_ratio=0.25), num_classes=num_classes)


def small_maxvit(num_classes: int) -> nn.Module:
    sizes = {"stem_channels": 8, "block_channels": [16, 32], "block_layers": [1, 1], "head_dim": 8}
    return maxvit.MaxVit((32, 32), partition_size=4, stochastic_depth_prob=0.1, num_classes=num_classes, **sizes)


def small_alexnet(num_classes: int) -> nn.Module:
    network = models.alexnet(num_classes=num_classes)
    network.classifier[1], network.classifier[4] = nn.Linear(256 * 6 * 6, 64), nn.Linear(64, 64)
    network.classifier[6] = nn.Linear(64, num_classes)
    return network


def small_vit(num_classes: int) -> nn.Module:
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    network = models.VisionTransformer(num_classes=num_classes, **sizes)
    nn.init.normal_(network.heads.head.weight)  # which is zeros, so that all logits are
    return network


family(small_alexnet, "alexnet", 64)
family(small_vgg, "vgg11_bn")
family(models.resnet18, "resnet18")
family(models.squeezenet1_1, "squeezenet1_1")
family(partial(densenet.DenseNet, 8, (2, 2, 2), 16), "densenet121")
family(partial(models.googlenet, aux_logits=False, init_weights=False), "googlenet")
family(partial(inception.Inception3, aux_logits=False, init_weights=False), "inception_v3", 75)
family(models.mobilenet_v2, "mobilenet_v2")
family(models.mobilenet_v3_small, "mobilenet_v3_small")
family(models.mnasnet0_5, "mnasnet0_5")
family(models.shufflenet_v2_x0_5, "shufflenet_v2_x0_5", 96)
family(models.efficientnet_b0, "efficientnet_b0")
family(small_efficientnet, "efficientnet_v2_s")
family(small_regnet, "regnet_y")
family(small_convnext, "convnext_tiny")
family(small_vit, "vit_b_16")
family(small_swin, "swin_t", unquantized=WINDOWS)
family(small_maxvit, "maxvit_t")
