"""What benchmarks compare takes turns, epoch by epoch or question by question, and leaves nothing behind."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from conftest import ROOT, python_of

BENCHMARKS = ROOT / "benchmarks"

COUNTER = """
import sys, time
from pathlib import Path
while True:
    with Path(sys.argv[1]).open("a") as file:
        file.write("x")
    time.sleep(0.01)
"""

TURNS = """
import sys, time
from pathlib import Path
from turns import InTurns

count = Path(sys.argv[2])
length = lambda: count.stat().st_size if count.exists() else 0
counter = InTurns([sys.executable, "-c", sys.argv[1], count])
for turn in range(2):
    with counter.turn():
        while length() < 5 * (turn + 1):
            time.sleep(0.01)
    time.sleep(0.1)
    before = length()
    time.sleep(0.5)
    assert length() == before, "it went on after its turn"
print(counter.process.pid)
"""


def test_what_is_compared_takes_turns(tmp_path: Path) -> None:
    words = [python_of("part3_lightning"), "-c", TURNS, COUNTER, tmp_path / "count"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    assert not Path("/proc", done.stdout.strip()).exists(), "it was left behind"


ROUNDS = """
import time
from turns import rounds

assert list(rounds(2, 5, 60)) == [0, 1, 2, 3, 4]
done = []
for number in rounds(2, 5, 0.1):
    time.sleep(0.07)
    done.append(number)
assert done == [0, 1], done  # 0.14 seconds are over
assert len([time.sleep(0.1) for _ in rounds(3, 5, 0.1)]) == 3  # at least
"""


def test_a_slow_machine_measures_fewer_rounds() -> None:
    words = [python_of("part3_lightning"), "-c", ROUNDS]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr


TRAININGS = """
import sys
from pathlib import Path
from trainings import Training, go_on_together

def start(number, *more):
    folder = Path(sys.argv[1]) / f"{number}"
    words = [sys.executable, "peers/smp_loop.py", *sys.argv[2:], "--work_dir", folder, *more]
    return Training(words, folder / "peer.csv")

first, second = start(1), start(2)
go_on_together([first, second])
assert (first.rows(), second.rows()) == (1, 1)
assert first.metrics()["val_iou"][0] == second.metrics()["val_iou"][0], "its seed is not fixed"
assert len(first.go_on(2)) == 2
assert second.go_on()[0] > 0
assert (first.rows(), second.rows()) == (3, 2)
first.look()
assert 300 < first.megabytes < 5000, first.megabytes
start(3, "--encoder", "resnet0").go_on()
"""


def test_trainings_take_turns_epoch_by_epoch(data_root: Path, tmp_path: Path) -> None:
    flags = ["--data_root", data_root, "--image_size", 64, "--batch_size", 8, "--workers", 1]
    words = [python_of("part3_lightning"), "-c", TRAININGS, tmp_path, *flags, "--epochs", 9, "--learning_rate", 3e-3]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=BENCHMARKS)
    assert done.returncode == 1 and "AssertionError" not in done.stderr, done.stderr
    assert "ended with 1" in done.stderr and "Wrong encoder name `resnet0`" in done.stderr, done.stderr


TOGETHER = """
import sys
from pathlib import Path
from trainings import Training, go_on_together

go_on_together([Training(["sleep", seconds], Path("no log")) for seconds in sys.argv[1:]])
"""


@pytest.mark.parametrize("signals", [True, False])
def test_when_trainings_that_go_on_together_end_none_is_left(signals: bool) -> None:
    """They end by a signal, or because one of them does."""
    seconds = ["186", "187"] if signals else ["188", "3"]
    words = [str(python_of("part3_lightning")), "-c", TOGETHER, *seconds]
    together = subprocess.Popen(words, cwd=BENCHMARKS, stderr=subprocess.PIPE, text=True)
    if signals:
        while together.poll() is None and not runs("sleep 187"):
            time.sleep(0.1)
        time.sleep(1)  # until it waits for them
        together.send_signal(signal.SIGTERM)
    assert together.wait(timeout=60) == (128 + signal.SIGTERM if signals else 1)
    assert signals or "sleep 3\nended with 0" in together.stderr.read()
    assert not runs(f"sleep {seconds[0]}")


def runs(command: str) -> bool:
    """Whether there is a process of this command."""
    return subprocess.run(["pgrep", "-fx", command], capture_output=True).returncode == 0


def test_a_measurer_answers_and_says_when_it_cannot(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        'from turns import answer\nprint("not an answer")\nanswer(lambda question: {"speed": 1.5}[question])\n'
    )
    code = f"""
import os, sys
from turns import Measurer
os.environ["PYTHONPATH"] = "."
measurer = Measurer([sys.executable, {str(script)!r}])
assert measurer.ask("speed") == 1.5
measurer.ask("nonsense")
"""
    done = subprocess.run(
        [python_of("part3_lightning"), "-c", code], capture_output=True, text=True, cwd=BENCHMARKS, timeout=60
    )
    assert done.returncode == 1 and "script.py\nended with 1" in done.stderr, done.stderr
