"""Flags, devices, precision and errors: what every part needs and no lesson is about."""

import argparse
import math
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

# torchrun --max-restarts calls the same command again when a process has died: it shall go on, and not begin anew.
RESTARTED = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def stop(message: str, code: int = 2) -> NoReturn:
    """Say what is wrong and what to do, without a traceback, and leave.

    Args:
        message: names the file or the flag, and the way out.
        code: 2 if the command was wrong, 1 if something went wrong while it ran.
    """
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


# --- flags -----------------------------------------------------------------------------------
# argparse puts the name of the flag in front of these messages and leaves with exit code 2.


def whole_number(lowest: int = 1) -> Any:
    """A parser for whole numbers of at least `lowest`."""

    def parse(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or not lowest <= int(text) < 2**32:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {lowest}")
        return int(text)

    return parse


def positive_number(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (0 < number < math.inf):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def fraction(text: str) -> float:
    """Parse a number between 0 and 1, both excluded."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (0 < number < 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return number


def image_side(text: str) -> int:
    """Parse the side of the network's input: a multiple of 32, because an encoder halves it five times."""
    if not text.isdecimal() or int(text) < 32 or int(text) % 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of 32 (such as 256, 384, 512)")
    return int(text)


def precision(text: str) -> str:
    """Parse --mixed_precision; "False" is a word here and not a truthy string."""
    values = {"true": "True", "false": "False", "fp16": "fp16", "bf16": "bf16"}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is none of True, False, fp16, bf16")
    return values[text.lower()]


def device(text: str) -> str:
    """Parse one word of --device: the number of a GPU, or "cpu"."""
    if text != "cpu" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither the number of a GPU nor 'cpu'")
    return text


def word(text: str) -> str:
    """Parse what may be any word, but not none: an unset variable of the shell leaves "" behind."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def any_path(text: str) -> Path:
    """Parse a path, of what is there or not yet. In --work_dir=~/runs, shells leave the ~ to us."""
    try:
        return Path(word(text)).expanduser()
    except RuntimeError as error:  # there is no user of this name
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def folder(text: str) -> Path:
    """Parse the path of a folder that is there."""
    path = any_path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder")
    return path


def train_parser(description: str | None, encoder: str) -> argparse.ArgumentParser:
    """The flags that train.py has in every part; `encoder` is the part's default."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--data_root", type=folder, required=True, help="the folder that data_preparation.py wrote to")
    add("--work_dir", type=any_path, default="work_dir", help="weights, logs and predictions go here (%(default)s)")
    add("--device", type=device, nargs="+", help="'0', '0 1' or 'cpu' ('cpu cpu' tries two devices without a GPU)")
    add("-b", "--batch_size", type=whole_number(), default=16, help="images a step, over all devices (%(default)s)")
    add("-e", "--epochs", type=whole_number(), default=100, help="(%(default)s)")
    add("--learning_rate", type=positive_number, default=1e-3, help="at the start; it falls (%(default)s)")
    add("--mixed_precision", type=precision, help="True, False, fp16 or bf16 (True on a GPU, False on a CPU)")
    add("--image_size", type=image_side, default=384, help="side of the network's input in pixels (%(default)s)")
    add("--encoder", type=word, default=encoder, help="the network's first half (%(default)s)")
    add("--encoder_weights", type=word, default="imagenet", help="imagenet, none, or where weights are (%(default)s)")
    add(
        "--workers",
        type=whole_number(0),
        default=len(os.sched_getaffinity(0)),
        help="threads or processes that load (%(default)s)",
    )
    add("--seed", type=whole_number(0), default=42, help="everything random follows from it (%(default)s)")
    add("--log", choices=["none", "tensorboard", "wandb"], default="none", help="beside metrics.csv (%(default)s)")
    add("--resume", action="store_true", default=RESTARTED, help="go on where the last run in work_dir stopped")
    add("--early_stopping", type=whole_number(), metavar="EPOCHS", help="stop after so many without a better IoU")
    add("--limit_batches", type=whole_number(), metavar="N", help="batches an epoch, for a first look")
    return parser


# --- devices and precision -------------------------------------------------------------------


def choose_devices(requested: Sequence[str] | None, gpus: Sequence[str]) -> list[str]:
    """Turn --device into device names.

    Args:
        requested: the words after --device, or None for the default.
        gpus: the names of the GPUs that the framework sees, in its order.

    Returns:
        Such as ["gpu:0", "gpu:1"], or ["cpu"].
    """
    if requested is None:
        if not gpus and shutil.which("nvidia-smi"):
            print("warning: this machine has an NVIDIA driver, but no GPU is found; training on the CPU")
        return ["gpu:0"] if gpus else ["cpu"]
    if set(requested) == {"cpu"}:
        return list(requested)
    if "cpu" in requested or len(set(requested)) < len(requested):
        stop(f"--device {' '.join(requested)}: give different GPUs, or only 'cpu'")
    for number in requested:
        if int(number) >= len(gpus):
            there = ", ".join(f"{i} ({name})" for i, name in enumerate(gpus)) or "none"
            stop(f"--device {number}: there is no such GPU. GPUs that are there: {there}. 'cpu' always works")
    return [f"gpu:{number}" for number in requested]


def choose_precision(requested: str | None, on_gpu: bool) -> str:
    """Turn --mixed_precision into "fp32", "fp16" or "bf16": True is fp16 on a GPU and bf16 on a CPU."""
    if requested is None:
        requested = str(on_gpu)
    chosen = {"True": "fp16" if on_gpu else "bf16", "False": "fp32"}.get(requested, requested)
    if chosen == "fp16" and not on_gpu:
        print("warning: CPUs calculate in fp16 several times slower than in fp32")
    if chosen == "bf16" and not on_gpu and not cpu_has_bf16():
        print("warning: this CPU only imitates bf16, many times slower than fp32; leave --mixed_precision away")
    return chosen


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 by itself, as far as Linux tells; elsewhere it is taken for granted."""
    about = Path("/proc/cpuinfo")
    flags = about.read_text().split() if about.exists() else ["bf16"]
    return not {"amx_bf16", "avx512_bf16", "bf16"}.isdisjoint(flags)  # of Intel, of Intel and AMD, of ARM


# --- leaving, and what to do next -----------------------------------------------------------------


def command(script: str, *words: object) -> str:
    """A command, ready to be pasted into a shell, that calls a script beside the one that runs now."""
    # sys.executable is absolute; what is in this folder, as .venv-tf/bin/python, reads better without it
    python = "python" if shutil.which("python") == sys.executable else sys.executable.removeprefix(f"{Path.cwd()}/")
    return shlex.join([python, str(Path(sys.argv[0]).with_name(script)), *map(str, words)])


def resume_command() -> str:
    """This very command with --resume."""
    # What part 7 starts by itself has a name that begins so; of a torchrun of the user's, the flags are not known here.
    if not os.environ.get("TORCHELASTIC_RUN_ID", "train.py").startswith("train.py"):
        return "the same torchrun command, with --resume at its end"
    return command("train.py", *[word for word in sys.argv[1:] if word != "--resume"], "--resume")


def treat_sigterm_like_ctrl_c() -> None:
    """Schedulers end a job with SIGTERM; it shall leave the same way as after Ctrl-C, and without a traceback."""

    def interrupt(signum: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt

    def say(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        if issubclass(kind, KeyboardInterrupt):  # before the first step, nothing else catches it
            print("error: interrupted", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, traceback)

    signal.signal(signal.SIGTERM, interrupt)
    sys.excepthook = say
