"""What the tests share: a copy of a part in an empty folder, sample data, and a way to run its scripts."""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# So that their asserts tell what they compared.
pytest.register_assert_rewrite("bad_data_tests", "reliability_tests", "lightning_tests")

# A shell lets what it starts with & ignore Ctrl-C, and that is inherited: by the scripts under test as well.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
PARTS = sorted(path.name for path in ROOT.glob("part[1-7]_*"))
# The network that TensorFlow builds soonest, and that learns something, from scratch, in seconds.
SMALL = ["--encoder", "resnet18", "--encoder_weights", "none", "--image_size", "64", "--batch_size", "8"]
# Of part 7, the small config of the demo, at half its size.
SMALL_MASK_RCNN = ["--config", "configs/nail_mask_rcnn_small.py", "--encoder", "resnet18", "--encoder_weights", "none"]
SMALL_MASK_RCNN += ["--image_size", "128", "--batch_size", "4", "--workers", "1"]


def python_of(part: str) -> Path:
    """The interpreter of the environment that `part` belongs to."""
    return ROOT / (".venv-tf" if part[:5] in ("part1", "part2") else ".venv-pt") / "bin" / "python"


class Part:
    """A part that was copied to a folder of its own, where nothing else of the repository is."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder / name
        self.small, self.with_dropout, self.larger, self.learning_rate = SMALL, "efficientnet-b0", "resnet34", 3e-3
        if name[4] in "12":
            self.with_dropout = "efficientnetb0"
        if name == "part7_mmdetection":
            self.small = SMALL_MASK_RCNN
        if name == "part6_segformer":
            # Its logits have a quarter of the height and width. Of a flag that stands twice, the second one counts.
            self.small = [*SMALL, "--encoder", "mit_b0", "--image_size", "96", "--batch_size", "4"]
            self.with_dropout, self.larger, self.learning_rate = "mit_b0", "mit_b1", 2e-3
        self.ending = "h5" if name[4] in "12" else "pth" if name[4] == "7" else "ckpt"  # of its weights
        self.python = python_of(name)
        shutil.copytree(ROOT / name, self.folder, ignore=shutil.ignore_patterns("__pycache__"))
        self.warm: subprocess.Popen[str] | None = None
        self.forked: Forked | None = None

    def run_dir(self, work_dir: Path) -> Path:
        """Where its runs are: part2_balanced_data has <work_dir>/balanced."""
        return work_dir / self.name.split("_")[1]

    def start(self, script: str, *args: object, warm: bool = True, **env: str) -> "subprocess.Popen[str] | Forked":
        """Start one of its scripts in a process group of its own.

        With `warm`, train.py and predict.py find their libraries imported, and there may be only one of them at a time.
        """
        command = [script, *map(str, args)]
        if warm and script in ("train.py", "predict.py") and not env:
            if self.forked and self.forked.poll() is None:  # a test that failed has left it
                stop_group(self.forked.pid)
                self.forked.communicate()
            self.forked = Forked(self.forks(), command)
            return self.forked
        return subprocess.Popen(
            [str(self.python), *command],
            cwd=self.folder,
            env=os.environ | {"WANDB_MODE": "offline"} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(
        self, script: str, *args: object, code: int = 0, warm: bool = True, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run one of its scripts to its end, which has to be `code`, and without a traceback."""
        process = self.start(script, *args, warm=warm, **env)
        try:
            out, err = process.communicate(timeout=600)
        finally:
            stop_group(process.pid)
        assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
        assert "Traceback" not in err, err
        return subprocess.CompletedProcess([script, *args], process.returncode, out, err)

    def forks(self) -> subprocess.Popen[str]:
        """The process that has imported the libraries, and forks; see warm.py."""
        if self.warm is None:
            shutil.copy(ROOT / "tests" / "warm.py", self.folder)
            pipe, env = subprocess.PIPE, os.environ | {"WANDB_MODE": "offline"}
            modules = [str(self.python), "warm.py", "train", "predict"]
            self.warm = subprocess.Popen(modules, cwd=self.folder, env=env, stdin=pipe, stdout=pipe, text=True)
        return self.warm


class Forked:
    """A script that warm.py runs: as much of a Popen as the tests need."""

    def __init__(self, warm: subprocess.Popen[str], command: list[str]) -> None:
        self.warm, self.returncode = warm, None
        self.out, self.err = tempfile.NamedTemporaryFile(), tempfile.NamedTemporaryFile()  # noqa: SIM115
        warm.stdin.write(json.dumps([command, self.out.name, self.err.name]) + "\n")
        warm.stdin.flush()
        self.pid = int(warm.stdout.readline())

    def poll(self, timeout: float = 0) -> int | None:
        """Its exit code, or None if it is still running after so many seconds."""
        if self.returncode is None and select.select([self.warm.stdout], [], [], timeout)[0]:
            self.returncode = int(self.warm.stdout.readline())
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it has printed, and its errors."""
        if self.poll(timeout) is None:
            raise subprocess.TimeoutExpired("warm.py", timeout)
        return Path(self.out.name).read_text(), Path(self.err.name).read_text()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def stop_group(pid: int) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def wait_for_rows(metrics_csv: Path, rows: int, process: subprocess.Popen[str]) -> None:
    """Wait until a run has written so many epochs into its metrics.csv."""
    for _ in range(3000):
        if metrics_csv.exists() and len(metrics_csv.read_text().splitlines()) > rows:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise TimeoutError(metrics_csv)


@pytest.fixture(scope="session")
def part1(tmp_path_factory: pytest.TempPathFactory) -> Part:
    return Part("part1_tensorflow", tmp_path_factory.mktemp("copied alone"))  # a path with a space


@pytest.fixture(scope="session")
def data_root(part1: Part, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 sample photographs, prepared."""
    root = tmp_path_factory.mktemp("data") / "nails of a hand"
    command = [str(part1.python), str(ROOT / "sample_data.py"), "--data_root", str(root), "--images", "60"]
    subprocess.run(command, check=True, capture_output=True)
    part1.run("data_preparation.py", "--data_root", root)
    return root


@pytest.fixture
def work_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "work dir"
    shutil.rmtree(tmp_path, ignore_errors=True)  # checkpoints are large
