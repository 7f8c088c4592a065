"""Images per second of this project's training loop against a plain one, on the same network, images and machine.

The plain loop is torchvision's reference training (https://github.com/pytorch/vision/tree/main/references/classification)
without its logging: a DataLoader with a worker process per core, transforms image by image (random resized crop, flip,
to tensor, normalize), float32 in the default memory format, SGD. This project's loop is `quantstudy.training.loop`, with
its crop and flip. Both start from decoded images in memory, take the same batch size and SGD, and train on every image
once an epoch. They take turns, an epoch each, after one that does not count; the table gives the median images per
second, and the median and extremes of the rounds' ratios.

    python -m benchmarks.training --architecture mobilenet_v2 --pixels 96
    python -m benchmarks.training --architecture vgg11 --pixels 32
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
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
from quantstudy.network.models import build
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


class Plain:
    """The reference's loop."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> None:
        self.device = pick_device()
        self.model = model.to(self.device).train()
        workers = os.cpu_count() or 1
        self.loader = DataLoader(
            Images(images, labels), batch_size, shuffle=True, num_workers=workers, persistent_workers=True
        )
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        self.criterion = nn.CrossEntropyLoss()

    def epoch(self) -> None:
        """Train on every image once."""
        for images, labels in self.loader:
            images, labels = images.to(self.device), labels.to(self.device)
            loss = self.criterion(self.model(images), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


class Own:
    """This project's loop, an epoch at a time."""

    def __init__(self, model: nn.Module, split: Split, batch_size: int, folder: Path) -> None:
        device = pick_device()
        self.model = model.to(device, memory_format=training.MEMORY_FORMAT)
        size = split.images.shape[-1] if split.images is not None else 0
        seen = P.Preprocessing(image_size=size, mean=MEAN, std=STD)
        self.batches = Batches(split, seen, batch_size, device, shuffle=True, augmentation="crop_flip")
        self.validation = Batches(split, seen, batch_size, device, indices=torch.arange(1))
        self.settings = P.Training(epochs=1, learning_rate=0.01, batch_size=batch_size)
        self.folder, self.dtype = folder, training_dtype("auto", device)

    def epoch(self) -> None:
        """Train on every image once."""
        run = training.Run("own", self.settings, self.folder / "c.csv", self.folder / "r.pt", "", self.dtype)
        training.train(self.model, self.batches, self.validation, run)


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
        own = Own(build(args.architecture, CLASSES), split, args.batch, Path(folder))
        plain = Plain(build(args.architecture, CLASSES), images, labels, args.batch)
        rates: dict[str, list[float]] = {"plain loop": [], "this project": []}
        for round_ in range(args.rounds + 1):
            for name, loop in (("plain loop", plain), ("this project", own)):
                started = time.perf_counter()
                loop.epoch()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if round_:
                    rates[name].append(args.images / (time.perf_counter() - started))
    waiting = 100 * own.batches.seconds_waiting / sum(args.images / rate for rate in rates["this project"])
    ratios = sorted(a / b for a, b in zip(rates["this project"], rates["plain loop"], strict=True))
    print(f"{describe_machine()}\n{args.architecture}, {args.pixels} px, batch {args.batch}, {args.images} images")
    for name, found in rates.items():
        print(f"{name:14}{statistics.median(found):8.1f} images/s")
    middle = statistics.median(ratios)
    print(f"ratio {middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), waiting for data {waiting:.1f} % of the time")


if __name__ == "__main__":
    main()
