"""Turn a study's data source into four files: the training, validation, calibration and test splits."""

from collections.abc import Sequence

from quantstudy import layout
from quantstudy.data.container import save_splits
from quantstudy.data.prepare import prepare
from quantstudy.errors import run_stage
from quantstudy.params import load_params
from stages._flags import flags


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch the study's images, draw validation and calibration images from the training split, write all splits."""
    name = flags(argv, __doc__).study
    study = load_params().study(name)

    splits = prepare(study.data, name, study.calibration, study.seed, study.training.validation_fraction)
    files = {layout.split(name, part): split for part, split in splits.items()}
    save_splits(files)
    for path, split in files.items():
        print(f"{path}: {len(split)} images, {path.stat().st_size / 1e6:.1f} MB")
    height, width = study.data.size
    print(f"{name}: {len(splits['test'].classes)} classes, {width} by {height} pixels")


if __name__ == "__main__":
    run_stage(main)
