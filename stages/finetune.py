"""Fine-tune a study's fp32 model and keep the epoch that is best on a validation part of the training split."""

import argparse
from collections.abc import Sequence

from quantstudy import layout, models, training
from quantstudy.data.batches import Batches, validation_indices
from quantstudy.data.container import load_split
from quantstudy.errors import run_stage
from quantstudy.files import sha256, write_json
from quantstudy.params import load_params
from quantstudy.runtime import set_up, training_dtype


def main(argv: Sequence[str] | None = None) -> None:
    """Write models/<study>/fp32.pth and reports/<study>/curves/finetune.{csv,json}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", required=True)
    arguments = parser.parse_args(argv)

    name = arguments.study
    study = load_params().study(name)
    device = set_up(study.seed)
    settings = study.training

    split = load_split(layout.split(name, "train"))
    kept, held_out = validation_indices(split.labels, settings.validation_fraction, study.seed)
    batches = Batches(
        split,
        study.data,
        settings.batch_size,
        device,
        indices=kept,
        shuffle=True,
        augmentation=settings.augmentation,
        seed=study.seed,
    )
    validation = Batches(split, study.data, 2 * settings.batch_size, device, indices=held_out)

    model = models.build(study.model.architecture, len(split.classes))
    loaded = models.load_pretrained(model, study.model, name)
    print(loaded)
    model.to(device, memory_format=training.MEMORY_FORMAT)

    run = training.Run(
        name=f"{name} fp32",
        settings=settings,
        curve=layout.curve(name, "finetune"),
        resume=layout.resume(name, "finetune"),
        fingerprint=training.fingerprint(study, sha256(layout.split(name, "train"))),
        dtype=training_dtype(settings.precision, device),
    )
    state = training.train(model, batches, validation, run)
    models.save_fp32(layout.model(name, "fp32"), model, study.model.architecture, len(split.classes))
    summary = {
        "weights": loaded.source,
        "weights_loaded": len(loaded.loaded),
        "weights_random": loaded.random if loaded.loaded else "all",
        "train_images": batches.images,
        "validation_images": validation.images,
        "best_epoch": state.best_epoch,
        "validation_top1": state.best_score[0],
    }
    write_json(layout.training_summary(name, "finetune"), summary)
    print(f"best epoch {state.best_epoch}: validation top-1 {state.best_score[0]:.2f} %")


if __name__ == "__main__":
    run_stage(main)
