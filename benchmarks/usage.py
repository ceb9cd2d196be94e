"""What a process uses, with those that it has started: CPU seconds and memory."""

import multiprocessing
import os
import re
import resource
import threading
from collections.abc import Callable
from pathlib import Path


def cpu_seconds() -> float:
    """Of this process and those that it has started, whether they have ended or, like a DataLoader's, live on."""
    of_workers = workers_cpu()  # first: it waits for those that have ended, and then they count among the children
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return of_workers + sum(one.ru_utime + one.ru_stime for one in used)


def workers_cpu() -> float:
    """CPU seconds of those that live."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def session_megabytes(session: int) -> float:
    """MB of all processes of a session: what they share counts once; of files (libraries), what the largest has."""
    own, libraries = 0, 0
    for folder in Path("/proc").iterdir():
        try:
            if not folder.name.isdigit() or os.getsid(int(folder.name)) != session:
                continue
            about = (folder / "smaps_rollup").read_text() + (folder / "status").read_text()
        except OSError:  # it has just ended
            continue
        kilobytes = dict(re.findall(r"^(Pss_Anon|Pss_Shmem|RssFile):\s+(\d+)", about, re.MULTILINE))
        own += int(kilobytes.get("Pss_Anon", 0)) + int(kilobytes.get("Pss_Shmem", 0))
        libraries = max(libraries, int(kilobytes.get("RssFile", 0)))
    return (own + libraries) / 1024


def peak_memory(one_pass: Callable[[], object]) -> float:
    """The most MB during a pass, of this process and those that it has started."""
    found, done = [], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            found.append(session_megabytes(os.getsid(0)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        one_pass()
    finally:
        done.set()
        watcher.join()
    return max(found)
