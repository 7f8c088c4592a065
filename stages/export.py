"""Write a variant as an ONNX file, and check it against the PyTorch model on the test images."""

from collections.abc import Sequence

from quantstudy import layout
from quantstudy.data.container import load_split
from quantstudy.errors import run_stage, unknown
from quantstudy.files import write_json
from quantstudy.machine.device import set_up
from quantstudy.measure.agreement import check
from quantstudy.network.checkpoint import load_checkpoint, model_file
from quantstudy.network.fp32 import load_preprocessing
from quantstudy.params import load_params
from quantstudy.quantization.variant import load_any
from quantstudy.runtimes.onnx_graph import load_graph
from quantstudy.runtimes.onnx_model import described, save_onnx, to_onnx
from quantstudy.runtimes.onnx_tuning import exported_model
from quantstudy.runtimes.sessions import PACKAGES
from stages._flags import flags


def main(argv: Sequence[str] | None = None) -> None:
    """Write models/<study>/onnx/<variant>.{onnx,json} and reports/<study>/onnx/<variant>.json."""
    arguments = flags(argv, __doc__, variant="fp32, or a method of ptq or qat in params.yaml")
    name, variant = arguments.study, arguments.variant
    params = load_params()
    study = params.study(name)
    if variant not in params.variants:
        raise unknown("variant", variant, params.variants)
    set_up(study.seed, params.measure.threads)

    source, path = model_file(name, variant, study.model.architecture), layout.onnx(name, variant)
    model = load_any(source)
    graph = load_graph(layout.graph(name), name)
    plain = to_onnx(model, graph)
    timed = {runtime: exported_model(model, graph, runtime) for runtime in PACKAGES}
    facts = check(model, plain, timed, load_split(layout.split(name, "test")), load_preprocessing(source))
    save_onnx(path, described(plain, load_checkpoint(source)))
    sizes = {"size_mb": path.stat().st_size / 1e6, "pth_size_mb": source.stat().st_size / 1e6}
    write_json(layout.onnx_report(name, variant), sizes | facts)
    shares = facts["agreement"].items()
    agreement = ", ".join(f"{runtime} {found:.2f} %, {facts['sqnr_db'][runtime]:.1f} dB" for runtime, found in shares)
    print(f"{path}: {sizes['size_mb']:.3f} MB; agreement with PyTorch: {agreement or 'not checked'}")
    for line in facts["remarks"]:
        print(f"  {line}")


if __name__ == "__main__":
    run_stage(main)
