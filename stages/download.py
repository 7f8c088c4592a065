"""Turn a study's data source into three files: the training, calibration and test splits."""

from collections.abc import Sequence

from quantstudy import layout
from quantstudy.data.container import save_splits
from quantstudy.data.prepare import prepare
from quantstudy.data.sampling import calibration_indices
from quantstudy.errors import run_stage
from quantstudy.params import load_params
from stages._flags import flags


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch the study's images, draw the calibration images from the training split, write all three splits."""
    name = flags(argv, __doc__).study
    study = load_params().study(name)

    train, test = prepare(study.data, name)
    calibration = train.subset(calibration_indices(len(train), study.calibration, study.seed, name))

    splits = {"train": train, "calibration": calibration, "test": test}
    files = {layout.split(name, part): split for part, split in splits.items()}
    save_splits(files)
    for path, split in files.items():
        print(f"{path}: {len(split)} images, {path.stat().st_size / 1e6:.1f} MB")
    print(f"{name}: {len(train.classes)} classes, {train.side} pixels a side")


if __name__ == "__main__":
    run_stage(main)
