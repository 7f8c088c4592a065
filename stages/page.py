"""Gather what the HTML report shows of a study."""

import argparse
from collections.abc import Sequence

from quantstudy import layout
from quantstudy.data.container import load_split
from quantstudy.errors import run_stage
from quantstudy.files import write_json
from quantstudy.params import load_params
from quantstudy.report.page_data import page_data
from quantstudy.report.results import load_results


def main(argv: Sequence[str] | None = None) -> None:
    """Write reports/pages/<study>.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", required=True, help="a row of studies in params.yaml")
    name = parser.parse_args(argv).study
    params = load_params()
    params.study(name)

    data = page_data(params, name, load_results(params, name), load_split(layout.split(name, "test")))
    write_json(layout.page(name), data, indent=None)
    print(f"{name}: {len(data['variants'])} variants, {layout.page(name).stat().st_size / 1e6:.2f} MB of data")


if __name__ == "__main__":
    run_stage(main)
