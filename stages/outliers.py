"""Show the outliers of every layer's input: statistics, and histograms with the clipping thresholds."""

from collections.abc import Sequence

from quantstudy import layout
from quantstudy.errors import run_stage
from quantstudy.files import write_json
from quantstudy.params import load_params
from quantstudy.report.histograms import layer_statistics, load_histograms, plot_histograms
from stages._flags import flags


def main(argv: Sequence[str] | None = None) -> None:
    """Write reports/<study>/activation_stats.json and reports/<study>/outlier_quant_results/hist_*.png."""
    name = flags(argv, __doc__).study
    params = load_params()
    params.study(name)
    percentiles = sorted(params.outliers.percentiles, reverse=True)

    layers, images = load_histograms(name)
    statistics = {layer: layer_statistics(values, percentiles) for layer, values in layers.items()}
    write_json(layout.report(name) / "activation_stats.json", {"images": images, "layers": statistics})

    folder = layout.report(name) / "outlier_quant_results"
    plot_histograms(folder, layers, percentiles)

    longest = max(map(len, layers))
    widest = f"{percentiles[0]:g}"
    print(f"{'input of':<{longest}}       min       max  kurtosis  range over that of the {widest}th percentile")
    for layer, row in statistics.items():
        kurtosis, ratio = row["kurtosis"] or 0.0, row["percentiles"][widest]["range_ratio"] or 0.0
        print(f"{layer:<{longest}}  {row['min']:8.3g}  {row['max']:8.3g}  {kurtosis:8.1f}  {ratio:.2f}")
    print(f"{len(layers)} histograms of {images} calibration images are in {folder}/")


if __name__ == "__main__":
    run_stage(main)
