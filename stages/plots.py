"""Turn a study's metrics into its result tables and plots."""

from collections.abc import Sequence

from quantstudy import layout
from quantstudy.errors import run_stage
from quantstudy.params import load_params
from quantstudy.report.lines import plot_scaling_law, plot_training_curves, read_curve
from quantstudy.report.results import load_results
from quantstudy.report.tables import scaling_law, write_tables
from quantstudy.report.tradeoffs import plot_accuracy_vs_latency, plot_accuracy_vs_size
from stages._flags import flags


def main(argv: Sequence[str] | None = None) -> None:
    """Write the tables and plots of reports/<study>/ and print the result table."""
    name = flags(argv, __doc__).study
    params = load_params()
    params.study(name)
    folder = layout.report(name)

    results = load_results(params, name)
    finetune = read_curve(layout.curve(name, "finetune"))
    qat = {method: read_curve(layout.curve(name, method)) for method in params.qat}
    table = write_tables(params, name, results)

    plot_scaling_law(folder / "scaling_law_plot.png", name, scaling_law(params, results))
    plot_accuracy_vs_size(folder / "accuracy_vs_size_plot.png", name, results)
    plot_accuracy_vs_latency(folder / "accuracy_vs_latency_plot.png", name, results)
    plot_training_curves(folder / "training_curves.png", name, finetune, qat)

    print(table)
    print(f"tables and plots are in {folder}/")


if __name__ == "__main__":
    run_stage(main)
