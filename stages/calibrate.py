"""Record the range and the histogram of every layer's input on the study's calibration images."""

from collections.abc import Sequence

from quantstudy import layout
from quantstudy.data.batches import Batches
from quantstudy.data.container import load_split
from quantstudy.errors import run_stage
from quantstudy.files import save_tensors
from quantstudy.machine.device import set_up
from quantstudy.network.checkpoint import model_file
from quantstudy.network.fp32 import load_fp32, load_preprocessing
from quantstudy.params import load_params
from quantstudy.quantization.observers import collect
from stages._flags import flags


def main(argv: Sequence[str] | None = None) -> None:
    """Write models/<study>/calibration.pt."""
    name = flags(argv, __doc__).study
    params = load_params()
    study = params.study(name)
    device = set_up(study.seed, params.runtime.threads)

    split = load_split(layout.split(name, "calibration"))
    fp32 = model_file(name, "fp32", study.model.architecture)
    batches = Batches(split, load_preprocessing(fp32), study.calibration.batch_size, device)
    model = load_fp32(fp32).to(device)
    statistics = collect(model, batches, study.calibration.bins)

    save_tensors(layout.calibration(name), statistics | {"study": name})
    print(f"{name}: {len(statistics['layers'])} layers observed on {statistics['images']} training images")


if __name__ == "__main__":
    run_stage(main)
