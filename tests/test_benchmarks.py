"""The benchmarks measure what they say: peers learn, train.py and the bare loop are timed, and tables are written."""

import json
import os
import shutil
import signal
import subprocess
import time
from datetime import date
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from conftest import PARTS, ROOT, SMALL, python_of

BENCHMARKS = ROOT / "benchmarks"


@pytest.mark.parametrize(
    ("part", "peer"), [("part1_tensorflow", "keras_sequence.py"), ("part3_lightning", "smp_loop.py")]
)
def test_a_peer_trains(part: str, peer: str, data_root: Path, work_dir: Path) -> None:
    flags = ["--data_root", data_root, "--work_dir", work_dir, "--image_size", 64, "--batch_size", 8, "--workers", 1]
    words = [python_of(part), BENCHMARKS / "peers" / peer, *flags, "--epochs", 6, "--learning_rate", 3e-3]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    log = pd.read_csv(work_dir / "peer.csv")
    assert log["epoch"].tolist() == [1, 2, 3, 4, 5, 6]
    assert log["val_iou"].between(0, 1).all()
    if peer == "smp_loop.py":  # in Keras, BatchNorm has a momentum of 0.99: validation lags hundreds of steps behind
        assert log["val_iou"].max() > 0.1


@pytest.mark.parametrize(
    "part", ["part1_tensorflow", "part2_balanced_data", "part3_lightning", "part5_dali", "part7_mmdetection"]
)
def test_steps_of_train_and_of_the_bare_loop_are_timed(part: str, data_root: Path, work_dir: Path) -> None:
    more = []
    if part == "part7_mmdetection":
        data_root = prepare_again(part, data_root, work_dir)
        more = ["--config", ROOT / part / "configs" / "nail_mask_rcnn_small.py"]
    flags = ["--data_root", data_root, "--work_dir", work_dir, *SMALL, *more, "--epochs", 2, "--limit_batches", 6]
    log = work_dir.parent / "steps.csv"
    words = [python_of(part), BENCHMARKS / "steps.py", "--one", part, log, *flags]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = pd.read_csv(log)
    first_steps = steps.index[steps["ours"].isna()]  # of the two epochs: before these there is more to do
    assert len(steps) in (12, 14, 16) and first_steps.tolist() == [0, len(steps) // 2]
    assert 0.1 < (steps["ours"] / steps["bare"]).median() < 10


LOADERS = """
import sys
from turns import Measurer

def start(*bare):
    return Measurer([sys.argv[1], "loaders.py", "--one", "part2_balanced_data", *bare, *sys.argv[2:]])

limit, loader = start("bare"), start()
for _ in range(2):
    for process in (limit, loader):
        speed, cpu_seconds = process.ask("speed")
        assert 1 < speed < 10_000 and 1e-4 < cpu_seconds < 1, (speed, cpu_seconds)
assert 300 < loader.ask("memory") < 5000
waited = loader.ask("waiting")
assert 0 <= waited["waiting"] < 1 and waited["training_speed"][0] > 0, waited
"""


def test_a_loader_and_its_limit_are_measured(data_root: Path) -> None:
    flags = ["--data_root", data_root, *SMALL, "--workers", 2, "--optimizer", "adamw"]
    words = [python_of("part3_lightning"), "-c", LOADERS, python_of("part2_balanced_data"), *flags]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr


GPU = """
import sys
import results

results.ON_GPU = True  # only for what is asked for there: nothing trains here
from bare import parse_flags
from training import LENGTHS, PARTS

_, name, data_root = sys.argv
part = PARTS[name]
for choice, flags in part.choices.items():
    args = parse_flags(name, ["--data_root", data_root, *LENGTHS["gpu"].flags(), *part.flags, *flags])
    print(choice, args.mixed_precision, args.image_size, args.batch_size)
"""


@pytest.mark.parametrize("part", ["part1_tensorflow", "part4_kornia", "part5_dali", "part6_segformer"])
def test_train_takes_the_flags_of_the_table_of_a_gpu(part: str, data_root: Path) -> None:
    words = [python_of(part), "-c", GPU, part, data_root]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.endswith("384 16")]
    precisions = {line.split()[-3] for line in lines}
    assert precisions == ({"fp16"} if part in ("part4_kornia", "part5_dali") else {"fp32", "bf16", "fp16"}), done.stdout


TRAININGS = """
import sys
from pathlib import Path
import training
from training import FP32, MEASURED, Length, measure_in_turns, measure_one_by_one, starts_of

training.draw_data = lambda part, images: Path(sys.argv[1])
length = Length(epochs=4, images=0, image_size=64, batch_size=8, enough=0)
assert {len(starts_of(part, length, FP32)) for part in MEASURED} == {2}  # else there is nothing to compare

part = "part3_lightning"
for measure in measure_one_by_one, measure_in_turns:
    results = measure(part, length, starts_of(part, length, FP32))
    assert list(results) == ["smp's loop, torchvision", "train.py, float32"]
    for result in results.values():
        assert len(result.epoch_seconds) == 2 and 0 < min(result.epoch_seconds) < 100, result
        assert len(result.reached) == 3 and 0 < result.reached[-1] < 1, result
        assert 300 < result.megabytes < 5000, result
"""


def test_whole_trainings_are_measured(data_root: Path) -> None:
    words = [python_of("part3_lightning"), "-c", TRAININGS, data_root]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr


UNEQUAL = """
import sys
from pathlib import Path
from training import Length, cells_of, measure_one_by_one
from trainings import Training

ROWS = "import sys, time\\nfor line in ['val_iou', *[0.5] * 9]: print(line, flush=True); time.sleep(float(sys.argv[1]))"

def start(seconds, folder):
    log = folder / "rows.csv"
    return Training(["sh", "-c", f'exec {sys.executable} -c "$0" {seconds} > {log}', ROWS], log)

starts = {seconds: lambda folder, seconds=seconds: start(seconds, folder) for seconds in map(float, sys.argv[1:])}
length = Length(epochs=5, images=0, image_size=0, batch_size=0, enough=4)
first, second = measure_one_by_one("part3_lightning", length, starts).values()
print(len(first.epoch_seconds), len(second.epoch_seconds), cells_of(second, first, False)[1])
"""


@pytest.mark.parametrize("seconds", [(0.05, 2), (2, 0.05)])
def test_trainings_one_after_the_other_have_as_many_epochs(seconds: tuple[float, float]) -> None:
    words = [python_of("part3_lightning"), "-c", UNEQUAL, *seconds]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    first, second, ratio, *_ = done.stdout.split()
    assert first == second == ("4" if seconds[0] < seconds[1] else "2")
    assert (float(ratio) < 0.5) == (seconds[0] < seconds[1])


def test_two_networks_are_not_measured_on_one_core() -> None:
    core = min(os.sched_getaffinity(0))
    words = ["taskset", "-c", core, python_of("part3_lightning"), "processes.py"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=BENCHMARKS)
    assert (done.returncode, done.stdout) == (0, "there is only one core here: not measured\n"), done.stderr


def test_each_table_of_a_gpu_has_its_place() -> None:
    readme = (BENCHMARKS / "README.md").read_text()
    assert [part for part in PARTS if f"<!-- gpu_{part}: " not in readme] == ["part2_balanced_data"]  # has none


WAITING = """
import sys
from pathlib import Path
from training import share_of_waiting
from trainings import start_train

work_dir, flags = Path(sys.argv[1]), sys.argv[2:]
run = start_train("part3_lightning", work_dir, *flags, "--epochs", 2, "--profiler", "simple")
run.go_on(2)
run.finish()
waiting = share_of_waiting(run.log.parent)
assert 0.001 < waiting < 0.9, waiting
assert share_of_waiting(work_dir) is None
"""


def test_the_profiler_tells_how_long_training_waits(data_root: Path, work_dir: Path) -> None:
    flags = ["--data_root", data_root, *SMALL, "--workers", 1]
    words = [python_of("part3_lightning"), "-c", WAITING, work_dir, *flags]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr


def test_ctrl_c_while_photographs_are_drawn_leaves_no_process(tmp_path: Path) -> None:
    shutil.copytree(BENCHMARKS, tmp_path / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "sample_data.py", tmp_path)
    (tmp_path / ".venv-pt").symlink_to(ROOT / ".venv-pt")
    words = [python_of("part3_lightning"), "-c", "from results import draw_data; draw_data('part3_lightning', 2000)"]
    drawing = subprocess.Popen(list(map(str, words)), cwd=tmp_path / "benchmarks", start_new_session=True)
    folder = tmp_path / "data" / "bench" / "drawn_2000" / ".sample_data_tmp"
    while drawing.poll() is None and len(list(folder.rglob("*.*"))) < 8:
        time.sleep(0.1)
    os.killpg(drawing.pid, signal.SIGINT)
    assert drawing.wait(timeout=60) == 128 + signal.SIGINT
    time.sleep(1)
    assert subprocess.run(["pgrep", "-f", tmp_path], capture_output=True, text=True).stdout == ""


def prepare_again(part: str, data_root: Path, work_dir: Path) -> Path:
    """The raw photographs of data_root, prepared by another part."""
    data = work_dir.parent / "data"
    script = [python_of(part), ROOT / part / "data_preparation.py", "--data_root", data, "--raw", data_root]
    subprocess.run(list(map(str, script)), check=True, capture_output=True)
    return data


def test_tables_are_put_into_the_readme(tmp_path: Path) -> None:
    shutil.copytree(BENCHMARKS, tmp_path / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    readme, of_part = (tmp_path / folder / "README.md" for folder in ("benchmarks", "part1_tensorflow"))
    of_part.parent.mkdir()
    for file in (readme, of_part):
        file.write_text("before\n<!-- steps: written by a command -->\nold\n<!-- end of steps -->\nafter\n")
    for speed in (1, 2):
        rows = [["part1_tensorflow", f"{speed}"], ["part3_lightning", "3"]]
        code = f"""
from results import save
save("steps", "a machine", "a regime.", ["part", "speed"], {rows}, {{"part 1": [{speed}, 3]}}, "images/s", [])
"""
        subprocess.run([python_of("part3_lightning"), "-c", code], cwd=readme.parent, check=True)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("| part1_tensorflow | 2 |\n| part3_lightning | 3 |") == 1 and "| 1 |" not in text
    assert of_part.read_text() == (
        f"before\n<!-- steps: written by a command -->\na machine; {date.today()}. a regime.\n\n"
        "| speed |\n| --- |\n| 2 |\n\n<!-- end of steps -->\nafter\n"
    )
    assert json.loads((readme.parent / "steps.json").read_text())["rows"][0] == ["part1_tensorflow", "2"]
    with Image.open(readme.parent / "imgs" / "steps.png") as picture:
        assert picture.width > 100
