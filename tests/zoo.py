"""Small networks of every kind, random, each with what is known of it.

A network is a factory of this module, `tests.zoo:NAME`, of images [N, 3, 32, 32].
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations, prune

OWN = "its forward is its own"


@dataclass(frozen=True)
class Entry:
    """A network and what is right for it. Reasons and refusals are regular expressions."""

    name: str
    architecture: str
    layers: tuple[str, ...] | None = None  # that are quantized, in the order in which they run; None: all
    left: dict[str, str] = field(default_factory=dict)  # layers that stay in float, and why
    either: dict[str, str] = field(default_factory=dict)  # layers that are quantized, or left for this reason
    folds: int | None = 0  # BatchNorms that fold; None: all
    kept: int = 0  # BatchNorms that do not
    refused: str = ""  # what a one-line error says, where any step may refuse the network
    unquantized: str = ""  # which layers stay in float, where `layers` are not named
    unexportable: str = ""  # likewise where it cannot be exported
    size: int = 32
    classes: int = 7
    macs: int = 0  # multiply-accumulates of an image, counted by hand; 0: not counted


ZOO: list[Entry] = []


class Net(nn.Module):
    """Layers by name, in this order, and what is computed of them and the images."""

    def __init__(self, run: Callable[["Net", Any], Any], **layers: Any) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


Factory = Callable[..., nn.Module]


def entry(layers: str = "first head", name: str = "", **facts: Any) -> Callable[[Factory], Factory]:
    """Put the factory below, of a network with these layers, into the zoo, and into this module by its name."""

    def add(factory: Factory) -> Factory:
        key = name or factory.__name__
        ZOO.append(Entry(key, f"{__name__}:{key}", tuple(layers.split()), **facts))
        globals()[key] = factory
        return factory

    return add


def network(name: str, run: Callable[[Net, Any], Any], layers: str = "first head", wide: int = 8, **parts: Any) -> None:
    """Put a network into the zoo.

    Args:
        name: its own.
        run: computes, of the network and the images, what its head reads.
        layers: those that are quantized.
        wide: inputs of the head.
        parts: the facts of the entry, and the modules, each as a function that makes it.
    """
    makers = {key: parts.pop(key) for key in list(parts) if key not in Entry.__dataclass_fields__}

    def factory(num_classes: int = 10) -> nn.Module:
        modules = {key: make() for key, make in makers.items()}
        return Net(lambda m, x: m.head(run(m, x)), **modules, head=nn.Linear(wide, num_classes))

    entry(layers, name, **parts)(factory)


def between(name: str, middle: Callable[[Net, Any], Any], wide: int = 8, layers: str = "", **parts: Any) -> None:
    """Put a network into the zoo that computes `middle`, to `wide` channels, between two convolutions."""

    def run(m: Net, x: Any) -> Any:
        return F.relu(m.second(middle(m, m.first(x)))).mean((2, 3))

    parts = {"first": START, **parts, "second": lambda: conv(wide, 16, 1)}
    network(name, run, f"first {layers} second head", 16, **parts)


def patches(name: str, run: Callable[[Net, Any], Any], layers: str, wide: int = 8, **parts: Any) -> None:
    """Put a network into the zoo that splits images into patches; `run` gets the tokens."""
    network(name, lambda m, x: run(m, tokens(m.first(x))), f"first {layers} head", wide, first=PATCH, **parts)


def conv(inputs: int, outputs: int, kernel: int = 3, **keys: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **{"padding": kernel // 2} | keys)


def pooled(m: Net, x: Any) -> Any:
    """Average over the image, then the head."""
    return m.head(x.mean((2, 3)))


def tokens(x: Any) -> Any:
    """Images [N, C, H, W] to [N, H * W, C]."""
    return x.flatten(2).transpose(1, 2)


@torch.no_grad()
def settled(model: nn.Module, images: Tensor, batches: int = 3, *, is_deep: bool = False) -> nn.Module:
    """Give BatchNorm the statistics of a few batches, and random factors where not `is_deep`; return it in eval mode.

    SyncBatchNorm computes no statistics on a CPU: they are random.
    """
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        if norm.affine and not is_deep:  # which makes noise of a deep network
            norm.weight.mul_(torch.empty_like(norm.weight).uniform_(0.5, 1.5))
            norm.bias.add_(torch.randn_like(norm.bias) * 0.3)
        if isinstance(norm, nn.SyncBatchNorm):
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 1.5)
        elif norm.track_running_stats:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
    for number in range(batches if norms else 0):
        model(images * (1 + number / 10))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


START, SAME, PATCH = lambda: conv(3, 8), (lambda: conv(8, 8)), lambda: conv(3, 8, 8, stride=8, padding=0)
NORM = lambda: nn.BatchNorm2d(8)  # noqa: E731


def linear(inputs: int, outputs: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(inputs, outputs)


# Normalizations

HIDDEN = 27 * 8 * 1024 + 8 * 16 + 16 * 7  # multiply-accumulates of `batchnorm_linear`


def normalized(name: str, make: Callable[[], nn.Module], **facts: Any) -> None:
    between(name, lambda m, x: F.relu(m.norm(x)), norm=make, **facts)


def negative_gamma() -> nn.Module:
    norm = nn.BatchNorm2d(8)
    norm.weight.data[::2] = -1
    return norm


normalized("batchnorm", NORM, folds=1)
normalized("batchnorm_negative", negative_gamma, folds=1)
normalized("batchnorm_no_affine", lambda: nn.BatchNorm2d(8, affine=False), folds=1)
normalized("batchnorm_no_stats", lambda: nn.BatchNorm2d(8, track_running_stats=False), kept=1)
normalized("sync_batchnorm", lambda: nn.SyncBatchNorm(8), folds=1)
normalized("group_norm", lambda: nn.GroupNorm(2, 8))
normalized("instance_norm", lambda: nn.InstanceNorm2d(8, affine=True))
normalized("layer_norm", lambda: nn.LayerNorm([8, 32, 32]))
between("batchnorm_read_twice", lambda m, x: F.relu(y := m.norm(x)) + y, norm=NORM, folds=1)
between("batchnorm_beside_skip", lambda m, x: F.relu(m.norm(x)) + x, norm=NORM, kept=1)
between("batchnorm_first", lambda m, x: x + m.inner(F.relu(m.norm(x))), 8, "inner", norm=NORM, inner=SAME, kept=1)
between(
    "batchnorm_called_twice", lambda m, x: m.norm(m.inner(F.relu(m.norm(x)))), 8, "inner", norm=NORM, inner=SAME, kept=1
)


def asserting(m: Net, x: Any) -> Any:
    assert x.shape[1] == 3
    return F.relu(m.norm(m.first(x))).mean((2, 3))


network("assertion", asserting, first=START, norm=NORM, folds=1)
run = lambda m, x: F.relu(m.norm(m.hidden(F.relu(m.first(x)).mean((2, 3)))))  # noqa: E731
parts = {"hidden": linear(8, 16), "norm": lambda: nn.BatchNorm1d(16)}
network("batchnorm_linear", run, "first hidden head", 16, first=START, **parts, folds=1, macs=HIDDEN)
run = lambda m, x: F.relu(m.norm(m.hidden(F.relu(x)))).mean(1)  # noqa: E731
patches("batchnorm_over_tokens", run, "hidden", 16, **parts, kept=1)  # 16 tokens are its channels, not 16 outputs
for name, up, macs in (
    ("batchnorm_transposed", lambda: nn.ConvTranspose2d(8, 8, 2, stride=2), 8 * 8 * 4),
    ("batchnorm_transposed_groups", lambda: nn.ConvTranspose2d(8, 8, 3, 2, 1, 1, groups=2, bias=False), 8 * 4 * 9),
):
    network(
        name,
        lambda m, x: F.relu(m.norm(m.up(F.relu(m.first(x))))).mean((2, 3)),
        "first up head",
        first=lambda: conv(3, 8, stride=2),
        up=up,
        norm=NORM,
        folds=1,
        macs=(27 * 8 + macs) * 256 + 8 * 7,
    )
network(
    "batchnorm_conv1d",
    lambda m, x: F.relu(m.second(F.relu(m.norm(m.first(x.flatten(2)))))).mean(2),
    "first second head",
    first=lambda: nn.Conv1d(3, 8, 5, padding=2),
    norm=lambda: nn.BatchNorm1d(8),
    second=lambda: nn.Conv1d(8, 8, 3, padding=1),
    folds=1,
    macs=(3 * 5 + 8 * 3) * 8 * 1024 + 8 * 7,
)
network(
    "batchnorm_conv3d",
    lambda m, x: F.relu(m.second(F.relu(m.norm(m.first(x.unflatten(2, (4, 8))))))).mean((2, 3, 4)),
    "first second head",
    first=lambda: nn.Conv3d(3, 8, 3, padding=1),
    norm=lambda: nn.BatchNorm3d(8),
    second=lambda: nn.Conv3d(8, 8, 1),
    folds=1,
    macs=(81 + 8) * 8 * 1024 + 8 * 7,
)


# Convolutions


class StandardizedConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True) + 1e-5
        return F.conv2d(x, (self.weight - mean) / std, self.bias, self.stride, self.padding)


class SamePadConv2d(nn.Conv2d):
    """Pads as TensorFlow does: more on the right and below."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class SameConv2d(nn.Conv2d):
    """Pads as TensorFlow does, by the size of the image."""

    def forward(self, x: Tensor) -> Tensor:
        totals = [
            max((-(-size // step) - 1) * step + kernel - size, 0)
            for size, kernel, step in zip(x.shape[2:], self.kernel_size, self.stride, strict=True)
        ]
        sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
        return F.conv2d(F.pad(x, sides), self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class NamedConv2d(nn.Conv2d):
    """A Conv2d with one more attribute."""

    purpose = "to have a name"


def inner(name: str, make: Callable[[], nn.Module], wide: int = 8, **facts: Any) -> None:
    """A layer `inner` between two convolutions, from 8 channels."""
    layers = "" if {"left", "either"} & set(facts) else "inner"
    between(name, lambda m, x: F.relu(m.inner(F.relu(x))), wide, layers, inner=make, **facts)


EDGES = 27 * 8 * 1024 + 8 * 16 * 1024 + 16 * 7  # of `between`, at 8 channels
inner("standardized", lambda: StandardizedConv2d(8, 8, 3, padding=1), left={"inner": OWN})
between(
    "same_pad",
    lambda m, x: m.inner(F.max_pool2d(F.relu(x), 4)),
    inner=lambda: SamePadConv2d(8, 8, 3, stride=2),
    layers="inner.conv",
)
between("same", lambda m, x: m.inner(F.relu(x)), inner=lambda: SameConv2d(8, 8, 3, stride=2), layers="inner.conv")
inner("pads_itself", lambda: SameConv2d(8, 8, 5))
inner("subclass", lambda: NamedConv2d(8, 8, 3, padding=1), either={"inner": OWN})
inner("reflect", lambda: conv(8, 8, padding_mode="reflect"), either={"inner": "padding|reflect"})
inner("circular", lambda: conv(8, 8, padding_mode="circular"), either={"inner": "padding|circular"})
inner("padding_same", lambda: conv(8, 8, padding="same"), macs=EDGES + 72 * 8 * 1024)
inner("dilation", lambda: conv(8, 8, dilation=2, padding=2))
inner("groups", lambda: conv(8, 8, groups=4), macs=EDGES + 18 * 8 * 1024)
inner("multiplier", lambda: conv(8, 16, groups=8), 16)
inner("uneven", lambda: nn.Conv2d(8, 8, (1, 5), (2, 1), (0, 2)))
COMPUTED = "parametri|hook|computed|norm"
inner("weight_norm", lambda: parametrizations.weight_norm(conv(8, 8)), either={"inner": COMPUTED})
inner("spectral_norm", lambda: parametrizations.spectral_norm(conv(8, 8)), either={"inner": COMPUTED})
inner("old_weight_norm", lambda: nn.utils.weight_norm(conv(8, 8)), either={"inner": COMPUTED})
inner("old_spectral_norm", lambda: nn.utils.spectral_norm(conv(8, 8)), either={"inner": COMPUTED})
inner("pruned", lambda: prune.l1_unstructured(conv(8, 8), "weight", 0.3), either={"inner": COMPUTED + "|prun"})
between(
    "functional",
    lambda m, x: F.conv2d(F.relu(x), m.kernel, padding=1),
    kernel=lambda: nn.Parameter(torch.randn(8, 8, 3, 3) / 8),
    macs=EDGES + 72 * 8 * 1024,
)
between(
    "called_twice",
    lambda m, x: F.relu(m.inner(F.relu(m.inner(x)))),
    inner=SAME,
    layers="inner",
    macs=EDGES + 2 * 72 * 8 * 1024,
)
between("called_by_keyword", lambda m, x: m.inner(input=F.relu(x)), inner=SAME, layers="inner")


for name, value in (("tiny_channel", 1e-32), ("zero_channel", 0.0)):

    @entry("first second head", name=name)
    def with_channel(num_classes: int = 10, value: float = value) -> nn.Module:
        """A channel whose weights, on both sides, are all of this size."""
        run = lambda m, x: pooled(m, F.relu(m.second(F.relu(m.first(x)))))  # noqa: E731
        model: Any = Net(run, first=START(), second=conv(8, 16, 1), head=nn.Linear(16, num_classes))
        model.first.weight.data[3], model.second.weight.data[:, 3] = value, value
        return model


SHARED = "share|also|another|other|alone|twice"


@entry("first head", either={"one": SHARED, "two": SHARED})
def shared_parameter(num_classes: int = 10) -> nn.Module:
    one, two = conv(8, 8), conv(8, 8)
    two.weight = one.weight
    run = lambda m, x: pooled(m, F.relu(m.two(F.relu(m.one(F.relu(m.first(x)))))))  # noqa: E731
    return Net(run, first=conv(3, 8), one=one, two=two, head=nn.Linear(8, num_classes))


network(
    "weight_read_elsewhere",
    lambda m, x: F.linear(F.relu(m.tied(y := F.relu(m.first(x)).mean((2, 3)))), m.tied.weight.t()) + y,
    first=START,
    tied=linear(8, 12),
    left={"tied": SHARED + "|read"},
)

# Order, heads and calls


@entry("first second head")
def defined_backwards(num_classes: int = 10) -> nn.Module:
    run = lambda m, x: pooled(m, F.relu(m.second(F.relu(m.first(x)))))  # noqa: E731
    return Net(run, second=conv(8, 16), head=nn.Linear(16, num_classes), first=conv(3, 8))


@entry("first skip second head")
def projection_behind_head(num_classes: int = 10) -> nn.Module:
    run = lambda m, x: pooled(m, F.relu(m.skip(x := F.relu(m.first(x))) + m.second(x)))  # noqa: E731
    return Net(run, first=conv(3, 8), second=conv(8, 16), head=nn.Linear(16, num_classes), skip=conv(8, 16, 1))


def with_auxiliary(name: str, run: Callable[[Net, Any], Any], reason: str, **facts: Any) -> None:
    """A network with two heads, `run` on the average over the image."""

    @entry("first head", name, either={"auxiliary": reason}, **facts)
    def factory(num_classes: int = 10) -> nn.Module:
        heads = {name: nn.Linear(8, num_classes) for name in ("head", "auxiliary")}
        return Net(lambda m, x: run(m, F.relu(m.first(x)).mean((2, 3))), first=START(), **heads)


with_auxiliary("dropped_head", lambda m, x: (m.head(x), m.auxiliary(x))[0], "read|drop|output|run")
with_auxiliary(
    "tuple_in_training",
    lambda m, x: (m.head(x), m.auxiliary(x)) if m.training else m.head(x),
    "run|train",
    refused="training mode",
)


@entry("", refused="no (layer|conv)|no Conv|nothing|not a state_dict")
def no_layers(num_classes: int = 10) -> nn.Module:
    scale = nn.Parameter(torch.randn(num_classes))
    return Net(lambda m, x: F.adaptive_avg_pool2d(x, (1, len(m.scale))).mean((1, 2)) * m.scale, scale=scale)


def branching(m: Net, x: Any) -> Any:
    x = F.relu(m.norm(m.first(x))).mean((2, 3))
    return x * 2 if x.mean() > 0 else x


UNKNOWN = "export|captur|value|data"
network("branch_on_values", branching, first=START, norm=NORM, kept=1, unexportable=UNKNOWN)
network("view", lambda m, x: F.relu(m.first(x)).view(x.size(0), -1), wide=128, first=PATCH, refused="reshape")


@entry("first", classes=1, macs=27 * 1024)
def one_class(num_classes: int = 10) -> nn.Module:
    return Net(lambda m, x: m.first(x).mean((2, 3)), first=conv(3, num_classes))


@entry("first head")
def dominant_bias(num_classes: int = 10) -> nn.Module:
    model = Net(lambda m, x: pooled(m, F.relu(m.first(x))), first=conv(3, 8), head=nn.Linear(8, num_classes))
    model.head.bias.data[0] = 100.0
    return model


between("branch_on_training", lambda m, x: F.dropout(F.relu(x), 0.5) if m.training else F.relu(x))
between("dropout", lambda m, x: m.drop(F.relu(x)), drop=lambda: nn.Dropout2d(0.2))
between(
    "made_zeros",
    lambda m, x: torch.cat([F.relu(x), torch.zeros(len(x), 2, 32, 32)], 1),
    10,
    unexportable=r"fixes the number of images, with len\(x\)",
)
between("made_new_zeros", lambda m, x: torch.cat([F.relu(x), x.new_zeros(x.shape)], 1), 16)
between("made_arange", lambda m, x: F.relu(x) * torch.arange(32) / 16)

# Activations


def activation(name: str, make: Callable[[], nn.Module]) -> None:
    between(name, lambda m, x: m.act(x), act=make)


activation("relu_in_place", lambda: nn.ReLU(inplace=True))
activation("relu6", nn.ReLU6)
activation("hardswish", nn.Hardswish)
activation("silu", nn.SiLU)
activation("gelu", nn.GELU)
activation("leaky_relu", lambda: nn.LeakyReLU(0.1))
activation("prelu", lambda: nn.PReLU(8))
between(
    "channel_clip",
    lambda m, x: torch.clip(x, torch.zeros(()), m.bound),
    bound=lambda: nn.Parameter(torch.rand(8, 1, 1) + 0.2),
)
between("clamp", lambda m, x: x.clamp(0, 0.5))
between("clamp_below", lambda m, x: x.clamp(min=-0.1, max=0.4))

# Pooling, sums and moves


def pooling(name: str, make: Callable[[], nn.Module]) -> None:
    """Channels that ReLU never cuts, as absorption moves them, then a pooling."""

    def raised() -> nn.Module:
        layer = conv(8, 8, 1)
        nn.init.constant_(layer.bias, 3)
        return layer

    between(name, lambda m, x: m.pool(F.relu(m.raised(x))), raised=raised, pool=make, layers="raised")


pooling("average_padded", lambda: nn.AvgPool2d(3, 2, padding=1))
pooling("average_divisor", lambda: nn.AvgPool2d(2, divisor_override=3))
pooling("average_inside", lambda: nn.AvgPool2d(3, 2, padding=1, count_include_pad=False))
pooling("average_adaptive", lambda: nn.AdaptiveAvgPool2d((5, 3)))
pooling("max_ceil", lambda: nn.MaxPool2d(3, 2, ceil_mode=True))
pooling("pixel_shuffle", lambda: nn.Sequential(nn.PixelUnshuffle(2), nn.PixelShuffle(2)))
pooling("channel_shuffle", lambda: nn.ChannelShuffle(4))
between("interpolated", lambda m, x: F.interpolate(F.relu(x), scale_factor=0.5, mode="bilinear"))
between("concatenated", lambda m, x: torch.cat([x, m.inner(F.relu(x))], 1), 16, "inner", inner=SAME)
between("residual", lambda m, x: F.relu(x + m.inner(F.relu(x))), 8, "inner", inner=SAME)


def added_in_place(m: Net, x: Any) -> Any:
    y = m.norm(m.inner(x.relu_()))
    y += x
    return y.relu_()


def squeezed(m: Net, x: Any) -> Any:
    x = F.relu(m.first(x))
    return (x * m.excite(F.relu(m.squeeze(F.adaptive_avg_pool2d(x, 1)))).sigmoid()).mean((2, 3))


between("residual_in_place", added_in_place, 8, "inner", inner=SAME, norm=NORM, folds=1)
network(
    "squeeze_excitation",
    squeezed,
    "first squeeze excite head",
    first=START,
    squeeze=lambda: conv(8, 4, 1),
    excite=lambda: conv(4, 8, 1),
    macs=27 * 8 * 1024 + 2 * 8 * 4 + 8 * 7,
)


def flattened(name: str, flatten: Callable[[Net, Any], Any]) -> None:
    network(name, lambda m, x: flatten(m, F.relu(m.first(x))), wide=128, first=PATCH, flatten=nn.Flatten)


flattened("flatten_module", lambda m, x: m.flatten(x))
flattened("flatten_function", lambda m, x: torch.flatten(x, 1))
flattened("flatten_method", lambda m, x: x.flatten(1))
flattened("flatten_reshape", lambda m, x: x.reshape(x.shape[0], -1))

# Tokens and attention: 16 tokens of 8 channels


PATCHES = 192 * 8 * 16 + 8 * 7  # of `patches`
ATTENTION = 16 * 8 * 24 + 16 * 8 * 8 + 2 * 16 * 16 * 8  # projections, both products


def mixed(m: Net, x: Any) -> Any:
    x = x + F.relu(m.across(m.norm(x).transpose(1, 2))).transpose(1, 2)
    return (x + F.relu(m.along(x))).mean(1)


def einsum_attention(m: Net, x: Any) -> Any:
    q, k, v = m.qkv(x).unflatten(2, (3, 2, 4)).unbind(2)  # [N, 16, heads, 4]
    weights = torch.einsum("nqhc,nkhc->nhqk", q, k).softmax(-1)
    return m.out(torch.einsum("nhqk,nkhc->nqhc", weights, v).flatten(2)).mean(1)


patches(
    "tokens_flattened",
    lambda m, x: torch.flatten(F.relu(m.hidden(x)), 1),
    "hidden",
    192,
    hidden=linear(8, 12),
)
patches(
    "mixer",
    mixed,
    "across along",
    norm=lambda: nn.LayerNorm(8),
    across=linear(16, 16),
    along=linear(8, 8),
    macs=PATCHES + 8 * 16 * 16 + 16 * 8 * 8,
)
patches(
    "attention",
    lambda m, x: (x + m.attend(x, x, x, need_weights=False)[0]).mean(1),
    "attend.in_proj attend.out_proj",
    attend=lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    macs=PATCHES + ATTENTION,
)
patches(
    "encoder",
    lambda m, x: m.block(x).mean(1),
    "block.self_attn.in_proj block.self_attn.out_proj block.linear1 block.linear2",
    block=lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True),
    macs=PATCHES + ATTENTION + 2 * 16 * 8 * 16,
)
patches(
    "attention_by_einsum",
    einsum_attention,
    "qkv out",
    qkv=linear(8, 24),
    out=linear(8, 8),
    macs=PATCHES + ATTENTION,
)
