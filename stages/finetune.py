"""Fine-tune a study's fp32 model and keep the epoch that is best on a validation part of the training split."""

from collections.abc import Sequence

from torch import nn

from quantstudy import layout
from quantstudy import params as P
from quantstudy.data.container import load_split
from quantstudy.errors import UserError, run_stage
from quantstudy.files import sha256, write_json
from quantstudy.machine.device import set_up, training_dtype
from quantstudy.network.architectures import build, check_architecture, check_logits
from quantstudy.network.fp32 import save_fp32
from quantstudy.network.weights import LoadReport, load_pretrained
from quantstudy.params import load_params
from quantstudy.training import loop as training
from quantstudy.training import parallel
from stages._flags import flags


def main(argv: Sequence[str] | None = None) -> None:
    """Write models/<study>/fp32.pth and reports/<study>/curves/finetune.{csv,json}."""
    name = flags(argv, __doc__).study
    params = load_params()
    study = params.study(name)
    if parallel.launched("finetune", ["--study", name], params.runtime.processes):
        return
    device = parallel.join(set_up(study.seed, params.runtime.threads, tf32=True))

    split = load_split(layout.split(name, "train"))
    preprocessing, classes = split.preprocessing, len(split.classes)
    key = f"studies.{name}.training.epochs"
    batches, validation = training.training_and_validation(
        split, preprocessing, study.training, study.seed, device, key
    )
    model, loaded = _start(study, name, classes, preprocessing.shape)
    print(loaded)
    model.to(device, memory_format=training.MEMORY_FORMAT)

    run = training.Run(
        name=f"{name} fp32",
        settings=study.training,
        curve=layout.curve(name, "finetune"),
        resume=layout.resume(name, "finetune"),
        fingerprint=training.fingerprint(
            __file__, study.model, preprocessing, study.training, study.seed, sha256(layout.split(name, "train"))
        ),
        dtype=training_dtype(study.training.precision, device),
    )
    state = training.train(model, batches, validation, run)
    if parallel.rank():
        return
    path = layout.model(name, "fp32")
    save_fp32(path, model, study.model.architecture, classes, preprocessing, split.classes, name)
    start = {
        "weights": loaded.source,
        "weights_loaded": len(loaded.loaded),
        "weights_random": loaded.random if loaded.loaded else "all",
    }
    write_json(layout.training_summary(name, "finetune"), start | training.summary(state, batches, validation))
    if state.rows:
        print(f"best epoch {state.best_epoch}: validation top-1 {state.best_score[0]:.2f} %")


def _start(study: P.Study, name: str, classes: int, shape: tuple[int, int, int]) -> tuple[nn.Module, LoadReport]:
    """Build the study's network, and load the weights that its training starts from or keeps."""
    key = f"studies.{name}.model"
    check_architecture(study.model.architecture, study.model.code_sha256, key)
    model = build(study.model.architecture, classes, shape, f"{key}.architecture")
    check_logits(model, classes, shape, f"{key}.architecture", trains=study.training.epochs > 0)
    loaded = load_pretrained(model, study.model, name)
    if not study.training.epochs and loaded.missing:
        gaps = f"{len(loaded.missing)} tensors have a random start, {loaded.missing[0]} for one"
        raise UserError(f"studies.{name}.training.epochs: 0 keeps the weights of {key}.weights, but {gaps}")
    return model, loaded


if __name__ == "__main__":
    run_stage(main)
