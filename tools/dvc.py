"""DVC, with code.yaml up to date: `python -m tools.dvc status` is `dvc status` that knows what the code does now.

`repro` first reports all mistakes in params.yaml.

`make setup` has the virtual environment's `dvc` run this. `python -m dvc` is DVC itself.
"""

import functools
import sys
from pathlib import Path

from dvc.cli import main

from quantstudy.errors import run_stage
from quantstudy.params import PARAMS_FILE, load_params
from tools.code import CODE_FILE, refresh

if __name__ == "__main__":
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / CODE_FILE).is_file() and (folder / "dvc.yaml").is_file():
            refresh(folder)
            if sys.argv[1:2] == ["repro"]:
                run_stage(functools.partial(load_params, folder / PARAMS_FILE))
            break
    sys.exit(main(sys.argv[1:]))
