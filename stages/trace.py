"""Write the ONNX graph of a study's network, without weights: every variant's export starts from it."""

from collections.abc import Sequence

from quantstudy import layout
from quantstudy.errors import run_stage
from quantstudy.network.checkpoint import model_file
from quantstudy.network.fp32 import load_fp32, load_preprocessing
from quantstudy.runtimes.onnx_graph import graph_of
from quantstudy.runtimes.onnx_model import save_onnx
from stages._flags import flags


def main(argv: Sequence[str] | None = None) -> None:
    """Write models/<study>/graph.onnx."""
    name = flags(argv, __doc__).study

    fp32 = model_file(name, "fp32")
    path = layout.graph(name)
    graph = graph_of(load_fp32(fp32), load_preprocessing(fp32).shape)
    save_onnx(path, graph, name)
    print(f"{path}: {len(graph.graph.node)} operators, {path.stat().st_size / 1e3:.1f} kB")


if __name__ == "__main__":
    run_stage(main)
