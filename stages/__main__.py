"""`python -m stages ptq --study ...` runs `stages/ptq.py`, in a warm process where there is one."""

import sys
from pathlib import Path

from tools.warm import ask, run_here

STAGES = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))

if len(sys.argv) < 2 or sys.argv[1] not in STAGES:
    sys.exit(f"usage: python -m stages STAGE ...; STAGE is one of {', '.join(STAGES)}")
status = ask(sys.argv[1:])
sys.exit(run_here(sys.argv[1:]) if status is None else status)
