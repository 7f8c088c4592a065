"""The flags of a stage."""

import argparse
from collections.abc import Sequence


def flags(argv: Sequence[str] | None, description: str | None, **others: str) -> argparse.Namespace:
    """Return the values of `--study` and of the flags in `others`, which maps each to its help; all are required."""
    parser = argparse.ArgumentParser(description=description)
    for name, shown in {"study": "a row of studies in params.yaml", **others}.items():
        parser.add_argument(f"--{name}", required=True, help=shown)
    return parser.parse_args(argv)
