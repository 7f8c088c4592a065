"""What Ray has for `tools/jobs.py`: the machines' cores and GPUs, and what a stage takes of them."""

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantstudy.errors import UserError
from quantstudy.params.project import Runtime

OBJECT_STORE = 2**27
"""Bytes; what travels between the processes is small."""


@dataclass(frozen=True)
class Size:
    """What a stage occupies.

    `alone` says that it may run beside nothing else on its machine. `threads` is what each of its processes is kept to;
    None leaves it to the stage, which then uses all cores, or as many as `runtime.threads` says.
    """

    cores: int
    gpus: int = 0
    alone: bool = False
    threads: int | None = None


@dataclass(frozen=True)
class Pool:
    """The cores and GPUs of each machine, and whether the only one is this, without a cluster."""

    machines: tuple[tuple[int, int], ...]
    local: bool

    @property
    def cores(self) -> int:
        """Of all machines."""
        return sum(cores for cores, _ in self.machines)

    @property
    def gpus(self) -> int:
        """Of all machines."""
        return sum(gpus for _, gpus in self.machines)

    def size(self, takes: object, runtime: Runtime) -> Size:
        """Return what a stage occupies that says what it `takes`: no more than some machine has.

        Raises:
            UserError: no machine has as many GPUs as a stage has processes.
        """
        if takes not in ("machine", "device", "devices"):
            return Size(1, threads=1)
        processes = runtime.processes if takes == "devices" else 1
        if self.gpus:
            fit = [(cores, gpus) for cores, gpus in self.machines if gpus >= processes]
            if not fit:
                most = max(gpus for _, gpus in self.machines)
                raise UserError(f"runtime.processes: {processes} is more than the {most} GPUs that a machine here has")
            share = max(1, min(cores // gpus for cores, gpus in fit))  # so it fits any of them
            return Size(min(processes * share, *(cores for cores, _ in fit)), processes, threads=share)
        largest = max(cores for cores, _ in self.machines)
        if takes == "machine":
            return Size(largest, alone=True)
        return Size(largest if processes > 1 else min(runtime.threads or largest, largest))


def at(node: str) -> Any:
    """Return Ray's option that places a task on one node, by its ID, and nowhere else."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def scratch() -> Path:
    """Return where Ray's own files lie while it runs for this project: its sockets need a short path."""
    digest = hashlib.sha256(str(Path.cwd()).encode()).hexdigest()
    return Path("/tmp") / f"quantstudy-{os.getuid()}-{digest[:8]}"


def connect(address: str | None, jobs: int | None) -> tuple[Pool, int]:
    """Start Ray on this machine, or join a cluster; return what it has and how many stages may run at once.

    Raises:
        UserError: Ray is not installed, or no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise UserError("--jobs: Ray is not installed; run `pip install '.[ray]'`") from None
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    cores = os.cpu_count() or 1
    try:
        if address:
            ray.init(address, **quiet)
        else:
            shutil.rmtree(scratch(), ignore_errors=True)
            quiet |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE, "_temp_dir": str(scratch())}
            ray.init("local", num_cpus=cores, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        hint = "; is RAY_AUTH_MODE set here as where Ray was started?" if address else ""
        raise UserError(f"--address: {address or 'local'}: {str(error).partition(chr(10))[0]}{hint}") from error
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    pool = Pool(tuple((int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in found), not address)
    return pool, jobs or max(pool.cores, pool.gpus)
