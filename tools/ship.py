"""`make ship`: run the search of one study as a DVC experiment, with the goal that you give.

`python -m tools.ship --study X --max-drop 0.5` adds the study to the lists `ship` and `run` if it is not there, and
sets the keys of its goal that you give. Then `dvc exp run` runs everything that the search needs. The changes to the
params stay.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from pydantic import ValidationError

from quantstudy import params as P
from quantstudy.errors import UserError, run_stage
from quantstudy.params import load_params
from quantstudy.params.mistakes import mistakes

KEYS = ("max_drop", "minimize", "may_train")


def main(argv: Sequence[str] | None = None) -> None:
    """Replace this process by `dvc exp run` of the search."""
    arguments = arguments_of(argv)
    os.execvp(sys.executable, [sys.executable, "-m", "tools.dvc", *arguments])


def arguments_of(argv: Sequence[str] | None = None) -> list[str]:
    """Return DVC's arguments; raise `UserError` for an unknown study and for a goal that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", required=True, help="a row of studies in params.yaml")
    parser.add_argument("--max-drop", type=float, help="percentage points; without it the goal's own")
    parser.add_argument("--minimize", choices=["size", "latency", "bit_operations"], help="likewise")
    parser.add_argument("--may-train", choices=["true", "false"], help="likewise")
    given = parser.parse_args(argv)
    params = load_params()
    known = params.study(given.study).goal
    asked = {key: value for key in KEYS if (value := getattr(given, key)) is not None}
    truth = {"may_train": asked["may_train"] == "true"} if "may_train" in asked else {}
    try:
        P.Goal.model_validate((known.model_dump() if known else {}) | asked | truth)
    except ValidationError as error:
        raise UserError(*(f"studies.{given.study}.goal.{line}" for line in mistakes(error, P.Goal))) from None
    changes = {
        key: ",".join([*names, given.study])
        for key, names in (("run", params.run), ("ship", params.ship))
        if given.study not in names
    }
    overrides = [f"{key}=[{names}]" for key, names in changes.items()]
    overrides += [f"++studies.{given.study}.goal.{key}={value}" for key, value in asked.items()]
    return ["exp", "run", *(word for override in overrides for word in ("-S", override)), f"search@{given.study}"]


if __name__ == "__main__":
    run_stage(main)
