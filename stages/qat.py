"""Fine-tune a study's model with one method's quantization in the loop, then freeze or cast it."""

import argparse
from collections.abc import Sequence

from quantstudy import layout
from quantstudy.data.batches import images_of
from quantstudy.data.container import load_split
from quantstudy.errors import run_stage
from quantstudy.files import sha256, write_json
from quantstudy.machine.device import DTYPES, describe, set_up, training_dtype
from quantstudy.methods.joint import parameter_groups, with_fixed_codes
from quantstudy.methods.lsq import estimate_batchnorm
from quantstudy.methods.registry import TRAINED, finish, settings_of
from quantstudy.network import models
from quantstudy.network.checkpoint import load_checkpoint, load_tensors
from quantstudy.params import QatCast, QatJoint, QatLsq, QatWithScales, load_params
from quantstudy.quantization.variant import save_variant
from quantstudy.training import loop as training
from quantstudy.training import parallel


def main(argv: Sequence[str] | None = None) -> None:
    """Write models/<study>/qat/<method>.pth and reports/<study>/curves/<method>.{csv,json}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", required=True, help="a row of studies in params.yaml")
    parser.add_argument("--method", required=True, help="a row of methods in params.yaml that trains")
    arguments = parser.parse_args(argv)
    name, method = arguments.study, arguments.method
    params = load_params()
    study, settings = params.study(name), settings_of(params, method, TRAINED)
    if parallel.launched("qat", ["--study", name, "--method", method], params.runtime.processes):
        return
    device = parallel.join(set_up(study.seed, tf32=True))

    fp32 = layout.model(name, "fp32")
    calibration = load_tensors(layout.calibration(name)) | {"image_size": study.data.image_size}
    is_cast, is_lsq, is_joint = (isinstance(settings, kind) for kind in (QatCast, QatLsq, QatJoint))
    distillation = settings.distillation if is_lsq else float(is_joint)
    model, seen = models.load_fp32(fp32, fold=not is_lsq), models.load_preprocessing(fp32)
    if getattr(settings, "needs_images", False):
        images = load_split(layout.split(name, "calibration"))
        calibration["images"] = images_of(images, seen, study.calibration.batch_size)
    variant = TRAINED[settings.kind](model, calibration, settings)
    if not is_joint:
        variant.requires_grad_(True)
    kept = with_fixed_codes(variant.network) if is_joint else []
    variant.to(device)

    split = load_split(layout.split(name, "train"))
    rows = settings.of_study(study.qat, method) if isinstance(settings, QatWithScales) else study.qat
    batches, validation = training.training_and_validation(split, seen, rows, study.seed, device)
    run = training.Run(
        name=f"{name} {method}",
        settings=rows,
        curve=layout.curve(name, method),
        resume=layout.resume(name, method),
        fingerprint=training.fingerprint(
            *(rows, settings, study.seed, seen),
            *(sha256(path) for path in (fp32, layout.calibration(name))),
            *(sha256(layout.split(name, part)) for part in ("train", "calibration")),
        ),
        dtype=DTYPES[settings.dtype] if is_cast else training_dtype("fp32", device),
        score_start=True,
        before_validation=(lambda model: estimate_batchnorm(model, batches)) if is_lsq else None,
        groups=parameter_groups(variant.network, rows.learning_rate) if is_joint else None,
        teacher=models.load_fp32(fp32).to(device) if distillation else None,
        distillation=distillation,
    )
    state = training.train(variant, batches, validation, run)
    if parallel.rank():
        return

    path = layout.model(name, method)
    save_variant(path, finish(variant.cpu(), model, settings), load_checkpoint(fp32), method)
    facts = training.summary(state, batches, validation) | {"arithmetic": describe(device, run.dtype)}
    if is_joint:
        facts["layers_that_keep_their_codes"] = kept
    write_json(layout.training_summary(name, method), facts)
    print(f"best epoch {state.best_epoch}: validation top-1 {state.best_score[0]:.2f} %")


if __name__ == "__main__":
    run_stage(main)
