"""`python -m quantstudy results` prints the tables of the studies in `run`; `readme` puts tables into README.md.

README marks a place with `<!-- results: <study> -->` and `<!-- end -->`; what stands between is replaced by the
study's `results.md`, so that no table there is typed by hand. `<!-- peers: <study> -->` is the place of the comparison
with other tools.
"""

import argparse
import re
from pathlib import Path

from quantstudy import layout
from quantstudy.errors import UserError, run_stage
from quantstudy.files import write_text
from quantstudy.params import load_params

README = Path("README.md")
PLACE = re.compile(r"(<!-- (results|peers): (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Print or place what the last run wrote; nothing is computed."""
    parser = argparse.ArgumentParser(prog="python -m quantstudy", description=__doc__)
    parser.add_argument("command", choices=["results", "readme"])
    if parser.parse_args().command == "readme":
        write_text(README, with_tables(README.read_text(encoding="utf-8")))
    else:
        for study in load_params().run:
            print_results(study)


def print_results(study: str) -> None:
    """Print a study's table and the paths of its plots."""
    folder = layout.report(study)
    print(f"\n## {study}\n\n{table('results', study)}")
    print("plots:", *sorted(str(path) for path in folder.glob("*.png")), sep="\n  ")
    print(f"  {folder / 'outlier_quant_results'}/ (one histogram a layer)")


def with_tables(readme: str) -> str:
    """Return README's text with every marked table as the reports have it."""
    return PLACE.sub(lambda found: f"{found[1]}{table(found[2], found[3])}{found[4]}", readme)


def table(kind: str, study: str) -> str:
    """Return a study's result table, or that of the comparison with other tools, Markdown."""
    path = layout.report(study) / "results.md" if kind == "results" else layout.peers(study, "md")
    if not path.is_file():
        raise UserError(f"{path}: no such file; run `{'dvc repro' if kind == 'results' else 'make peers'}` first")
    return path.read_text(encoding="utf-8")


if __name__ == "__main__":
    run_stage(main)
