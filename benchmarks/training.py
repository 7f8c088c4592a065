"""Images per second of this project's training loop against a plain one, on the same network, images and machine.

The plain loop is torchvision's reference training (https://github.com/pytorch/vision/tree/main/references/classification)
without its logging: a DataLoader with a worker process per core, transforms image by image (random resized crop, flip,
to tensor, normalize), float32 in the default memory format, SGD. This project's loop has its own crop and flip. Both
start from decoded images in memory, take the same batch size and SGD, and train on every image once an epoch. They take
turns, an epoch each, after one that does not count; the table gives the median images per second, and the median and
extremes of the rounds' ratios.

    python -m benchmarks.training --architecture mobilenet_v2 --pixels 96
    python -m benchmarks.training --architecture vgg11 --pixels 32
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torchvision.transforms as T
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from quantstudy import params as P
from quantstudy.data.batches import Batches
from quantstudy.data.container import Split
from quantstudy.machine.device import pick_device, training_dtype
from quantstudy.machine.hardware import describe_machine
from quantstudy.network.architectures import build
from quantstudy.training import loop as training

CLASSES = 10
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Images(Dataset[tuple[Tensor, int]]):
    """Decoded images with the reference's transforms."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        crop = T.RandomResizedCrop(images.shape[-1])
        self.images = [T.functional.to_pil_image(image) for image in images]
        self.labels = labels.tolist()
        self.transform = T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def plain_loop(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> Callable[[], None]:
    """Return what trains an epoch as the reference's loop does."""
    device = pick_device()
    model.to(device).train()
    workers = os.cpu_count() or 1
    loader = DataLoader(Images(images, labels), batch_size, shuffle=True, num_workers=workers, persistent_workers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    def epoch() -> None:
        for inputs, targets in loader:
            loss = nn.functional.cross_entropy(model(inputs.to(device)), targets.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def own_loop(model: nn.Module, split: Split, batch_size: int, folder: Path) -> tuple[Callable[[], object], Batches]:
    """Return what trains an epoch with this project's loop, and the batches that it waits for."""
    device = pick_device()
    model.to(device, memory_format=training.MEMORY_FORMAT)
    preprocessing = P.Preprocessing(image_size=split.side, mean=MEAN, std=STD)
    batches = Batches(split, preprocessing, batch_size, device, shuffle=True, augmentation="crop_flip")
    validation = Batches(split, preprocessing, batch_size, device, indices=torch.arange(1))
    settings = P.Training(epochs=1, learning_rate=0.01, batch_size=batch_size)
    dtype = training_dtype("auto", device)
    run = training.Run("own", settings, folder / "curve.csv", folder / "resume.pt", "", dtype)
    return lambda: training.train(model, batches, validation, run), batches


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="mobilenet_v2")
    parser.add_argument("--pixels", type=int, default=96)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (args.images, 3, args.pixels, args.pixels), dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (args.images,))
    split = Split(labels, tuple(map(str, range(CLASSES))), args.pixels, images)
    with tempfile.TemporaryDirectory() as folder:
        own, batches = own_loop(build(args.architecture, CLASSES), split, args.batch, Path(folder))
        plain = plain_loop(build(args.architecture, CLASSES), images, labels, args.batch)
        rates: dict[str, list[float]] = {"plain loop": [], "this project": []}
        for round_ in range(args.rounds + 1):
            for name, loop in (("plain loop", plain), ("this project", own)):
                started = time.perf_counter()
                loop()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if round_:
                    rates[name].append(args.images / (time.perf_counter() - started))
    waiting = 100 * batches.seconds_waiting / sum(args.images / rate for rate in rates["this project"])
    ratios = sorted(a / b for a, b in zip(rates["this project"], rates["plain loop"], strict=True))
    print(f"{describe_machine()}\n{args.architecture}, {args.pixels} px, batch {args.batch}, {args.images} images")
    for name, found in rates.items():
        print(f"{name:14}{statistics.median(found):8.1f} images/s")
    middle = statistics.median(ratios)
    print(f"ratio {middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), waiting for data {waiting:.1f} % of the time")


if __name__ == "__main__":
    main()
