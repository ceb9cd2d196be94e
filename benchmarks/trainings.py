"""Trainings whose epochs are measured, and that can take turns: train.py of a part, or what it is compared with."""

import math
import shutil
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pandas as pd

from results import ON_GPU, ROOT, ask_gpu, python_of
from turns import InTerminal
from usage import session_megabytes

LOOK_EVERY = 4  # seconds from one look at the memory to the next; one of a training takes a tenth of a second, and more
# Where they can, they write their checkpoints to memory, because what a disk does, it does later. Some systems have
# little of it there, such as Docker's 64 MB.
MEMORY_DISK = "/dev/shm" if Path("/dev/shm").is_dir() and shutil.disk_usage("/dev/shm").free > 4e9 else None
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1"}  # variables, for a network on one core


class Training(InTerminal):
    """A training that, once it has started, goes on only while an epoch of it is measured."""

    def __init__(self, words: Sequence[Any], log: Path, **environment: str) -> None:
        """`log`: the CSV file to which it adds a row after each epoch (in steps.py: after each step)."""
        self.log = log
        self.megabytes = self.gpu_megabytes = 0.0  # the most that was seen
        super().__init__(words, **environment)

    def rows(self) -> int:
        """How many its log has."""
        return len(self.log.read_text().splitlines()) - 1 if self.log.exists() else 0

    def go_on(self, rows: int = 1, look: bool = False, enough: float = math.inf) -> list[float]:
        """Let it train until its log has so many more rows, and return the seconds of each.

        Args:
            look: at its memory meanwhile, for which the system goes through all its pages.
            enough: seconds, after which three rows will do: a first one, which does not count, and two that do.

        Raises:
            SystemExit: it has ended instead.
        """
        time.sleep(0.1)  # what the one before it has left for the system to do
        seconds: list[float] = []
        with self.turn():
            done, began, looked = self.rows(), time.perf_counter(), time.perf_counter()
            while len(seconds) < rows and (len(seconds) < 3 or sum(seconds) < enough):
                time.sleep(0.005)
                if look and time.perf_counter() - looked > LOOK_EVERY:
                    self.look()
                    looked = time.perf_counter()
                has_ended, now = self.process.poll() is not None, time.perf_counter()
                if self.rows() > done + len(seconds):  # asked after it: a row that it has left still counts
                    seconds.append(now - began)
                    began = now
                elif has_ended:
                    raise self.ended()
        return seconds

    def finish(self) -> None:
        """Let it do what it does after its last epoch, such as writing what its profiler has seen."""
        with self.turn():
            self.process.wait()
        self.end()

    def look(self) -> None:
        """See how much memory it has now, with all its processes."""
        self.megabytes = max(self.megabytes, session_megabytes(self.process.pid))
        if ON_GPU:
            self.gpu_megabytes = max(self.gpu_megabytes, float(ask_gpu("memory.used")))

    def metrics(self) -> pd.DataFrame:
        """What it has logged."""
        return pd.read_csv(self.log)


def start_train(part: str, work_dir: Path, *flags: Any, **environment: str) -> Training:
    """train.py of a part."""
    log = work_dir / part.split("_")[1] / "logs" / "metrics.csv"
    return Training([python_of(part), ROOT / part / "train.py", "--work_dir", work_dir, *flags], log, **environment)


def go_on_together(trainings: Collection[Training], rows: int = 1, look: bool = False) -> None:
    """Let all train at the same time until each log has so many more rows.

    Args:
        look: at the memory of each meanwhile.

    Raises:
        SystemExit: one of them has ended instead, or this script is to end; then all have ended.
    """
    with ThreadPoolExecutor(max_workers=len(trainings)) as pool:
        try:
            for done in as_completed([pool.submit(training.go_on, rows, look) for training in trainings]):
                done.result()
        except BaseException:
            for training in trainings:  # else their threads would be waited for
                training.end()
            raise
