"""Data-parallel training: several processes of one stage, each on its own GPU or its share of the CPU's cores.

With `runtime.processes` above 1, a training stage starts itself again under torchrun. A stage that torchrun has already
started, on one machine or several (https://docs.pytorch.org/docs/stable/elastic/run.html), joins its group.
DistributedDataParallel averages the gradients, over NCCL, or gloo without a GPU. Each global batch is divided among the
processes, so batch size and learning rate mean the same with any number of processes. BatchNorm sees its process's
share; the running statistics are the first process's, as in torchvision's reference training.
"""

import os
import subprocess
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn

from quantstudy.errors import UserError, run_stage


def launched(stage: str, arguments: Sequence[str], processes: int) -> bool:
    """Run a stage in `processes` processes, unless one is enough or it already runs so; return whether it was run.

    Raises:
        UserError: the processes failed; what they printed says why.
    """
    if processes == 1 or distributed.is_torchelastic_launched():
        return False
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise UserError(f"runtime.processes: {processes} is more than the {torch.cuda.device_count()} GPUs here")
    cores = max((os.cpu_count() or 1) // processes, 1)
    command = [sys.executable, "-m", __name__, "--standalone", f"--nproc-per-node={processes}"]
    environment = {"OMP_NUM_THREADS": str(cores)} | os.environ
    with subprocess.Popen([*command, "-m", f"stages.{stage}", *arguments], env=environment) as torchrun:
        try:
            status = torchrun.wait()
        finally:
            torchrun.terminate()  # if this process is told to end, torchrun has to end the others
    if status:
        raise UserError(f"runtime.processes: {processes} processes of {stage} failed with status {status}")
    return True


def join(device: torch.device) -> torch.device:
    """Join the group of a process that torchrun started; return the process's own device."""
    if not distributed.is_torchelastic_launched():
        return device
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def rank() -> int:
    """Return the number of this process in its group; the first, 0, writes the files."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world() -> int:
    """Return the number of processes in the group."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def averaging(model: nn.Module) -> nn.Module:
    """Wrap `model` so that its gradients are averaged over the processes; a single process gets it as it is."""
    if world() == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)  # a layer may never run


def share_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers, so that all evaluate the same model."""
    if world() > 1:
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of `values` over the processes."""
    if world() > 1:
        distributed.all_reduce(values)
    return values


if __name__ == "__main__":
    from torch.distributed.run import main

    run_stage(main)
