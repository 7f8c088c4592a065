"""Gather the data that the HTML report shows for a study."""

from collections.abc import Sequence

from quantstudy import layout
from quantstudy.data.container import load_split
from quantstudy.errors import run_stage
from quantstudy.files import write_json
from quantstudy.params import load_params
from quantstudy.report.page_data import page_data
from quantstudy.report.results import load_results
from stages._flags import flags


def main(argv: Sequence[str] | None = None) -> None:
    """Write reports/pages/<study>.json."""
    name = flags(argv, __doc__).study
    params = load_params()
    params.study(name)

    data = page_data(params, name, load_results(params, name), load_split(layout.split(name, "test")))
    write_json(layout.page(name), data, indent=None)
    print(f"{name}: {len(data['variants'])} variants, {layout.page(name).stat().st_size / 1e6:.2f} MB of data")


if __name__ == "__main__":
    run_stage(main)
