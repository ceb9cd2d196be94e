"""200 epochs of a part on a few photographs: do memory, open files, threads or logs grow?

    .venv-tf/bin/python tests/long_run.py part3_lightning

Looks at the process and all that it starts once a second, and compares the second fifth of the run with the last.
"""

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from conftest import PARTS, ROOT, Part, stop_group

EPOCHS = 200


def family(pid: int) -> list[Path]:
    """The folders in /proc of a process and of those that it has started, directly or not."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
    found = [pid]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return [Path("/proc") / str(process) for process in found]


def look(pid: int, run_dir: Path) -> list[float] | None:
    """MB in memory, open files, threads, kB of logs; None if one of the processes has just ended."""
    try:
        folders = family(pid)
        # Pss: what processes share counts once. Pss_File is left out: other programs may share the libraries.
        rollups = [(folder / "smaps_rollup").read_text() for folder in folders]
        names = ["Pss_Anon:", "Pss_Shmem:"]
        memory = sum(int(text.split(name)[1].split()[0]) for text in rollups for name in names) / 1000
        files = sum(len(list((folder / "fd").iterdir())) for folder in folders)
        threads = sum(len(list((folder / "task").iterdir())) for folder in folders)
        logs = sum(path.stat().st_size for path in (run_dir / "logs").rglob("*") if path.is_file()) / 1000
        return [memory, files, threads, logs]
    except (OSError, IndexError):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        part, data_root = Part(args.part, folder), folder / "nails"
        draw = [part.python, ROOT / "sample_data.py", "--data_root", data_root, "--images", 24]
        subprocess.run(list(map(str, draw)), check=True, capture_output=True)
        part.run("data_preparation.py", "--data_root", data_root)
        flags = [*part.small, "--batch_size", 4, "--epochs", EPOCHS, "--limit_batches", 2, "--log", "tensorboard"]
        command = [part.python, "train.py", "--data_root", data_root, "--work_dir", folder / "runs", *flags]
        run_dir, printed = part.run_dir(folder / "runs"), folder / "printed.txt"
        with printed.open("w") as output:
            process = subprocess.Popen(
                list(map(str, command)), cwd=part.folder, stdout=output, stderr=output, start_new_session=True
            )
        seen = []
        try:
            while process.poll() is None:
                time.sleep(1)
                found = look(process.pid, run_dir)
                if found and (run_dir / "logs" / "metrics.csv").exists():
                    seen.append(found)
        finally:  # also after Ctrl-C
            stop_group(process.pid)
        assert process.returncode == 0, printed.read_text()[-3000:]
        assert len(pd.read_csv(run_dir / "logs" / "metrics.csv")) == EPOCHS
        fifths = np.array_split(np.array(seen), 5)
        second, last = (np.median(fifths[number], axis=0) for number in (1, 4))
        cells = [f"{a:,.0f} to {b:,.0f}" for a, b in zip(second, last, strict=True)]
        print("part | MB | open files | threads | kB of logs")
        print(" | ".join([args.part, *cells]))


if __name__ == "__main__":
    main()
