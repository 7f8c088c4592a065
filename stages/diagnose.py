"""Write down the machine: GPU, CPU, versions, the low-bit kernels that really run here, and what is missing."""

import argparse
from collections.abc import Sequence

import yaml

from quantstudy import layout
from quantstudy.errors import run_stage
from quantstudy.files import write_json
from quantstudy.measure.environment import environment


def main(argv: Sequence[str] | None = None) -> None:
    """Write reports/environment.json and print it for a reader."""
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    facts = environment()
    write_json(layout.ENVIRONMENT, facts)
    print(yaml.safe_dump(facts, sort_keys=False, width=120), end="")
    print(f"written to {layout.ENVIRONMENT}")


if __name__ == "__main__":
    run_stage(main)
