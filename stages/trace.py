"""Write the ONNX graph of a study's network, without weights: every variant's export starts from it."""

from collections.abc import Sequence

from quantstudy import layout
from quantstudy.errors import run_stage
from quantstudy.network.checkpoint import load_checkpoint
from quantstudy.network.fp32 import load_preprocessing
from quantstudy.runtimes.onnx_graph import network_graph
from quantstudy.runtimes.onnx_model import save_onnx
from stages._flags import flags


def main(argv: Sequence[str] | None = None) -> None:
    """Write models/<study>/graph.onnx."""
    name = flags(argv, __doc__).study

    fp32 = layout.model(name, "fp32")
    facts, path = load_checkpoint(fp32), layout.graph(name)
    graph = network_graph(facts["architecture"], facts["classes"], load_preprocessing(fp32).shape)
    save_onnx(path, graph)
    print(f"{path}: {len(graph.graph.node)} operators, {path.stat().st_size / 1e3:.1f} kB")


if __name__ == "__main__":
    run_stage(main)
