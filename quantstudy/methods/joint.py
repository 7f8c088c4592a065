"""Joint fine-tuning: train every degree of freedom of a quantized network at once, without labels.

Finkelstein, Fuchs, Tal, Grobman, Vosco and Meller, *QFT: Post-training Quantization via Fast Joint Finetuning of All
Degrees of Freedom*, 2022. The fp32 network is the teacher, the quantized network its student. The student's weights,
scales and biases learn together by Adam and straight-through gradients. They start from the result of a method's
earlier steps, here codes, of GPTQ for example. Each step moves all layers, so a few hundred steps on two cores do what
layer-wise reconstruction needs thousands of steps per layer for.

The loss is the Kullback-Leibler divergence of the predictions, plus the squared error of the head's input as a share of
its variance. The second term is the paper's loss; it says more about an image than its class. A network soon learns a
few hundred images by heart. So the images are cropped and flipped at random. An eighth of them is held out and decides
which state is best; the state before training is a candidate too.

`finetune_jointly` is the last step of post-training methods, on the calibration images. The kind `qat_joint`
(`uniform.JointRecipe`) trains the same way for whole epochs, on the training images.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantstudy import params as P
from quantstudy.methods.trainable import everything_rounded, freeze_trained, make_trainable, split, train_to_best

BATCH_SIZE = 32
CODE_RATE = 0.03
SMALLEST_CROP = 0.5
"""The least share of an image's area that a crop shows."""


def finetune_jointly(
    reference: nn.Module,
    network: nn.Module,
    images: list[Tensor],
    steps: int,
    augmentation: P.CalibrationAugmentation = "crop_flip",
    head: str | None = None,
) -> dict[str, str]:
    """Train `network` to predict what `reference` predicts; its layers are frozen before and after.

    Args:
        reference: the fp32 network.
        network: the quantized network, changed in place.
        images: batches of float32 [N, C, H, W].
        steps: the most steps of training.
        augmentation: how the images are augmented.
        head: the name of the layer that makes the logits; its input is compared too.

    Returns:
        The layers whose codes and scales were not trained, each with the reason.
    """
    left = make_trainable(network)
    pixels = torch.cat(images)
    train, judge = split(len(pixels))
    kept = pixels[-judge:]
    with torch.no_grad():
        wanted = torch.cat([reference(x.clone()) for x in kept.split(BATCH_SIZE)]).log_softmax(1)
    generator = torch.Generator().manual_seed(0)
    with _inputs_of(reference, head) as plain, _inputs_of(network, head) as rounded:

        def loss() -> Tensor:
            chosen = torch.randint(train, (min(BATCH_SIZE, train),), generator=generator)
            x = augmented(pixels[chosen], augmentation, generator)
            with torch.no_grad():
                taught = reference(x.clone()).log_softmax(1)  # a network may write to its input
            divergence = F.kl_div(network(x).log_softmax(1), taught, log_target=True, reduction="batchmean")
            if not plain:
                return divergence
            spread = (plain[0] - plain[0].mean(0)).square().mean().clamp_min(1e-12)
            return divergence + (rounded[0] - plain[0]).square().mean() / spread

        train_to_best(network, CODE_RATE, steps, loss, lambda: _divergence(network, kept, wanted))
    freeze_trained(network)
    return left


@torch.no_grad()
def _divergence(network: nn.Module, images: Tensor, wanted: Tensor) -> float:
    with everything_rounded(network):
        found = torch.cat([network(x.clone()) for x in images.split(BATCH_SIZE)]).log_softmax(1)
    return float(F.kl_div(found, wanted, log_target=True, reduction="batchmean"))


@contextlib.contextmanager
def _inputs_of(network: nn.Module, name: str | None) -> Iterator[list[Tensor]]:
    """Yield a list that holds the last input of the named layer; without a name it stays empty."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, values: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
        seen[:] = [values[0] if values else keywords["input"]]

    if name is None:
        yield seen
        return
    with network.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True):
        yield seen


def augmented(images: Tensor, how: P.CalibrationAugmentation, generator: torch.Generator) -> Tensor:
    """Return images [N, C, H, W] flipped at random; `crop_flip` first crops them to half of their area or more."""
    count = len(images)
    if how == "none":
        return images
    side = torch.ones(count)
    if how == "crop_flip":
        side = (SMALLEST_CROP + (1 - SMALLEST_CROP) * torch.rand(count, generator=generator)).sqrt()
    sign = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    places = torch.zeros(count, 2, 3)
    places[:, 0, 0], places[:, 1, 1] = side * sign, side
    places[:, :, 2] = (2 * torch.rand(count, 2, generator=generator) - 1) * (1 - side)[:, None]
    grid = F.affine_grid(places, list(images.shape), align_corners=False).to(images)
    x = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    return x.contiguous(memory_format=torch.channels_last)
