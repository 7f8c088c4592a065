"""Build the HTML report of the studies in `run`: one page with every script inlined."""

import argparse
from collections.abc import Sequence

from quantstudy import layout
from quantstudy.errors import UserError, run_stage
from quantstudy.files import read_json, write_text
from quantstudy.params import load_params
from quantstudy.report.html import build_page


def main(argv: Sequence[str] | None = None) -> None:
    """Write reports/report.html."""
    argparse.ArgumentParser(description=__doc__).parse_args(argv)

    studies = []
    for name in load_params().run:
        studies.append(found := read_json(layout.page(name)))
        if not isinstance(found, dict) or found.get("study") != name:
            raise UserError(f"{layout.page(name)}: not the page of {name}; run the stage page again")
    write_text(layout.REPORT, build_page(studies))
    print(f"{layout.REPORT}: {len(studies)} studies, {layout.REPORT.stat().st_size / 1e6:.2f} MB, opens offline")


if __name__ == "__main__":
    run_stage(main)
