"""`python -m quantstudy results`: print the result table of every study in `run`, and where its plots are."""

import argparse

from quantstudy import layout
from quantstudy.errors import UserError, run_stage
from quantstudy.params import load_params


def main() -> None:
    """Print what the last run wrote; nothing is computed."""
    parser = argparse.ArgumentParser(prog="python -m quantstudy", description=__doc__)
    parser.add_argument("command", choices=["results"])
    parser.parse_args()
    for study in load_params().run:
        folder = layout.report(study)
        table = folder / "results.md"
        if not table.is_file():
            raise UserError(f"{table}: no such file; run `dvc repro` first")
        print(f"\n## {study}\n\n{table.read_text(encoding='utf-8')}")
        print("plots:", *sorted(str(path) for path in folder.glob("*.png")), sep="\n  ")
        print(f"  {folder / 'outlier_quant_results'}/ (one histogram a layer)")


if __name__ == "__main__":
    run_stage(main)
