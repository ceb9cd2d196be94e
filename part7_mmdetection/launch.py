"""Several processes, one for each device: started here by torchrun, or from outside by one of MMEngine's launchers."""

import logging
import os
import signal
import sys
import threading
import time
import uuid
from typing import NoReturn

import mmengine.device.utils
import torch
from mmengine.dist import init_dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from utils import resume_command, stop


def launch(devices: list[str]) -> NoReturn:
    """Run this very command once for each device, and leave with the exit code of the first one that failed, or 0."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")  # their numbers, if somebody has chosen before us
    numbers = [int(name.removeprefix("gpu:")) for name in devices if name != "cpu"]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[number] if visible[0] else str(number) for number in numbers)
    logging.disable(logging.ERROR)  # torchrun's own tracebacks, below what a process has already said
    torchrun = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=len(devices),
        run_id=f"train.py {uuid.uuid4().hex}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(torchrun, sys.executable)("-u", *sys.argv)
        sys.exit(0)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        if code < 0:  # by a signal, of which it could not speak
            stop(f"a process of this run was killed by signal {-code}. Go on with\n    {resume_command()}", code=1)
        sys.exit(code)
    except SignalException:  # of which the first process has spoken
        sys.exit(130)


def stop_when_parent_is_gone() -> None:
    """Wait until the process that has started this one has ended, however it did, and stop as after Ctrl-C."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def join_processes(launcher: str, on_gpu: bool) -> None:
    """Meet the other processes of this run, and take the GPU that is this process's own."""
    threading.Thread(target=stop_when_parent_is_gone, daemon=True).start()
    if on_gpu:
        init_dist(launcher, backend="nccl")
    elif launcher == "slurm":
        stop("--launcher slurm: there is no GPU here; on CPUs, start the processes with torchrun")
    else:
        use_device("cpu")
        torch.distributed.init_process_group("gloo")  # init_dist would look for a GPU


def use_device(name: str) -> None:
    """Train on this one, "cpu" or "gpu:1". MMEngine takes the first GPU wherever there is one."""
    if name == "cpu":
        mmengine.device.utils.DEVICE = "cpu"
    else:
        torch.cuda.set_device(int(name.removeprefix("gpu:")))
