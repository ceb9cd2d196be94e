"""Whole trainings: train.py in each precision, and beside it what one would write without this project.

    .venv-pt/bin/python benchmarks/training.py
    .venv-pt/bin/python benchmarks/training.py --long

The peers are in peers/, each as the documentation of its library says. All train the same network from scratch on the
same photographs, as many steps, with the same batch and size. Those of a part take turns, epoch by epoch, and a ratio
is that of neighbours. Those of part 1, and all on a GPU, train one after the other. Seconds are those of an epoch, with
validation and saving, without the first one; memory is that of all processes, at the most; the IoU (part 7: segm mAP)
is the best of all epochs. A few epochs show how fast they are in float32; many (--long), what they reach, and in
bfloat16. The peer of part 6 needs accelerate (benchmarks/requirements.txt).

On a GPU there is only one length, the networks and photographs are larger, and there are no peers: float32 is compared
with float16, bfloat16 and --compile, and, in parts 4 and 5, the ways to load and augment. Also measured is the share
of all epochs in which the network waits for its loader, by Lightning's profiler; in the first one it has to wait for
the processes that load. Each part that is installed has a table of its own then, so that --parts can measure one anew.
"""

import argparse
import functools
import math
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from results import (
    CORES,
    ON_GPU,
    SMALL_MASK_RCNN,
    TF_PARTS,
    describe_machine,
    draw_data,
    multiplies_bf16,
    python_of,
    save,
    spread,
)
from trainings import MEMORY_DISK, Training, start_train
from turns import rounds


class Length(NamedTuple):
    """Of a training."""

    epochs: int
    images: int  # a fifth of them for validation
    image_size: int
    batch_size: int
    enough: float = math.inf  # seconds, after which no further epochs are measured; but at least two are

    def flags(self) -> list[Any]:
        """Those of train.py, and of the peers."""
        size = ["--image_size", self.image_size, "--batch_size", self.batch_size]
        return [*size, "--epochs", self.epochs, "--learning_rate", 2e-3]


LENGTHS = {  # by the table that they belong to
    "training": Length(epochs=4, images=60, image_size=96, batch_size=4, enough=15),
    "reached": Length(epochs=12, images=240, image_size=96, batch_size=8),
    "gpu": Length(epochs=6, images=1381, image_size=384, batch_size=16),  # as many to train with as the articles have
}
ENCODER = "efficientnet-b4" if ON_GPU else "resnet18"
BF16 = {"bfloat16": ["--mixed_precision", "bf16"]} if ON_GPU or multiplies_bf16() else {}
FP16 = {"float16": ["--mixed_precision", "fp16"]} if ON_GPU else {}
FP32 = {"float32": ["--mixed_precision", "False"]}
COMPILE = {"float16, `--compile`": ["--mixed_precision", "fp16", "--compile"]} if ON_GPU else {}
AUGMENT_ON, LOADERS = (("cpu", "device"), ("torch", "dali")) if ON_GPU else ((), ())
AUGMENT = {f"float16, `--augment_on {where}`": [*FP16["float16"], "--augment_on", where] for where in AUGMENT_ON}
LOAD = {f"float16, `--loader {loader}`": [*FP16["float16"], "--loader", loader] for loader in LOADERS}


class Part(NamedTuple):
    """What is measured for a part."""

    peer: str
    title: str  # of the peer
    flags: list[Any]  # of train.py
    choices: dict[str, list[Any]]  # further flags, by what the table calls them


UNET = ["--encoder", ENCODER, "--encoder_weights", "none"]
SCRATCH = ["--encoder_weights", "none"]
MASK_RCNN = ["--config", SMALL_MASK_RCNN]
PARTS = {
    "part1_tensorflow": Part(
        "keras_sequence.py",
        "Keras Sequence",
        ["--encoder", ENCODER.replace("-", ""), *SCRATCH, "--optimizer", "adamw"],
        FP32 | BF16 | FP16,
    ),
    "part3_lightning": Part(
        "smp_loop.py", "smp's loop, torchvision", [*UNET, "--loss", "dice"], FP32 | BF16 | FP16 | COMPILE
    ),
    "part4_kornia": Part("", "", [*UNET, "--loss", "dice"], AUGMENT),
    "part5_dali": Part("", "", [*UNET, "--loss", "dice"], LOAD),
    "part6_segformer": Part(
        "hf_trainer.py", "Hugging Face Trainer", [*SCRATCH, "--loss", "dice_bce"], FP32 | BF16 | FP16 | COMPILE
    ),
    "part7_mmdetection": Part(
        "mmdet_plain.py", "MMDetection's tools/train.py", ["--encoder", "resnet18", *SCRATCH, *MASK_RCNN], FP32 | FP16
    ),
}
WORKERS = CORES if ON_GPU else 2
ON_LIGHTNING = ["part3_lightning", "part4_kornia", "part5_dali", "part6_segformer"]
# After a stop, an epoch of a Keras Sequence takes twice as long: its loader waits with a timeout of 5 seconds. And on a
# GPU, what is used of its memory would be that of all.
ONE_BY_ONE = list(PARTS) if ON_GPU else ["part1_tensorflow"]
# Without a GPU, parts 4 and 5 have nothing to be compared with; with one, one may have TensorFlow only, or torch.
MEASURED = [part for part in PARTS if (python_of(part).exists() if ON_GPU else PARTS[part].peer)]


Start = Callable[[Path], Training]  # from the folder that it is to write to


class Result(NamedTuple):
    """What a training has used and reached."""

    epoch_seconds: list[float]
    megabytes: float
    gpu_megabytes: float
    reached: list[float]  # IoU, or segm mAP
    waiting: float | None  # share of the time, in parts 3 to 6 on a GPU


def start_peer(part: str, length: Length, work_dir: Path) -> Training:
    """What the part is compared with."""
    encoder = [] if part == "part6_segformer" else ["--encoder", PARTS[part].flags[1]]
    words = [python_of(part), Path(__file__).parent / "peers" / PARTS[part].peer, "--work_dir", work_dir]
    data = ["--data_root", draw_data(part, images=length.images), "--workers", WORKERS]
    log = work_dir / "peer.csv"
    return Training([*words, *data, *length.flags(), *encoder], log)


def start_ours(part: str, flags: list[Any], length: Length, work_dir: Path) -> Training:
    """train.py of a part."""
    data = ["--data_root", draw_data(part, images=length.images), "--workers", WORKERS]
    profiler = ["--profiler", "simple"] if ON_GPU and part in ON_LIGHTNING else []
    return start_train(part, work_dir, *data, *length.flags(), *PARTS[part].flags, *flags, *profiler)


def share_of_waiting(logs: Path) -> float | None:
    """How long training waited for its loader, of the time of all epochs; None if no profiler has watched it."""
    for profile in logs.glob("*profile*"):
        lines = profile.read_text()
        waited, total = (
            float(re.search(rf"{action}\s*\|[^|]*\|[^|]*\|\s*([\d.]+)", lines)[1])
            for action in (r"\.train_dataloader_next", "run_training_epoch")
        )
        return waited / total
    return None


def starts_of(part: str, length: Length, choices: dict[str, list[Any]]) -> dict[str, Start]:
    """What trains: the peer, and the part with each of these choices."""
    starts: dict[str, Start] = {}
    if PARTS[part].peer and not ON_GPU:
        starts[PARTS[part].title] = functools.partial(start_peer, part, length)
    for name, flags in choices.items():
        starts[f"train.py, {name}"] = functools.partial(start_ours, part, flags, length)
    return starts


def measure_one_by_one(part: str, length: Length, starts: dict[str, Start]) -> dict[str, Result]:
    """Let each of a part train alone, for as many epochs as the first one."""
    results, epochs, enough = {}, length.epochs, length.enough
    for name, start in starts.items():
        with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as folder:
            run = start(Path(folder))
            seconds = run.go_on(epochs, look=True, enough=enough)
            epochs, enough = len(seconds), math.inf
            if ON_GPU:
                run.finish()  # the profiler writes at the end
            run.end()
            results[name] = result_of(part, run, seconds[1:])
    return results


def measure_in_turns(part: str, length: Length, starts: dict[str, Start]) -> dict[str, Result]:
    """Let those of a part take turns."""
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as folder:
        runs: dict[str, Training] = {}
        for name, start in starts.items():
            runs[name] = start(Path(tempfile.mkdtemp(dir=folder)))
            runs[name].go_on(look=True)  # the first epoch does not count
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in rounds(2, length.epochs - 1, length.enough):
            for name, run in runs.items():
                seconds[name] += run.go_on()
                run.look()
        for run in runs.values():
            run.end()
        return {name: result_of(part, run, seconds[name]) for name, run in runs.items()}


def result_of(part: str, run: Training, seconds: list[float]) -> Result:
    """What a training has used and reached."""
    reached = run.metrics()["segm_mAP" if part == "part7_mmdetection" else "val_iou"].tolist()
    return Result(seconds, run.megabytes, run.gpu_megabytes, reached, share_of_waiting(run.log.parent))


def cells_of(result: Result, first: Result, shows_reached: bool) -> list[str]:
    """What the table says of a training, beside its name; it is compared with the first one of its part."""
    faster = spread(np.divide(first.epoch_seconds, result.epoch_seconds), ".2f") if result is not first else "1"
    cells = [spread(result.epoch_seconds, ".1f"), faster, f"{result.megabytes:,.0f}"]
    if ON_GPU:
        waiting = "" if result.waiting is None else f"{100 * result.waiting:.1f} %"
        cells += [f"{result.gpu_megabytes:,.0f}", waiting]
    return [*cells, f"{max(result.reached):.3f}"] if shows_reached else cells


def write_table(name: str, length: Length, results: dict[str, dict[str, Result]], shows_reached: bool) -> None:
    """Save what was measured of these parts as the table NAME."""
    rows, bars, figures = [], {}, {}
    for part, its in results.items():
        for who, result in its.items():
            rows.append([part, who, *cells_of(result, next(iter(its.values())), shows_reached)])
            bars[f"{part}, {who}"] = result.epoch_seconds
            figures[f"{part}, {who}"] = result._asdict()
    others = {"part6_segformer": "SegFormer with mit_b0", "part7_mmdetection": "Mask R-CNN with resnet18"}
    networks = ", ".join(dict.fromkeys(others.get(part, f"U-Net with {ENCODER}") for part in results))
    photographs = f"{length.images * 4 // 5} photographs for training and {length.images // 5} for validation"
    at_most = "" if shows_reached else "at most "
    size = f"{length.image_size} pixels, batch {length.batch_size}, {at_most}{length.epochs} epochs"
    columns = ["part", "who", "s an epoch, median (range)", "times as fast, median (range)", "MB"]
    columns += ["MB on the GPU", "waiting"] if ON_GPU else []
    columns += ["IoU, part 7: segm mAP"] if shows_reached else []
    packages = {"tensorflow" if part in TF_PARTS else "torch" for part in results}
    machine = describe_machine(*sorted(packages, reverse=True))
    save(name, machine, f"{networks}, from scratch; {photographs}; {size}.", columns, rows, bars, "s an epoch", figures)


def main() -> None:
    """Measure all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", help="12 epochs, not 4, and what they reach; 24 minutes")
    parser.add_argument(
        "--parts", nargs="+", choices=MEASURED, default=MEASURED, help="only these; without a GPU, only printed"
    )
    args = parser.parse_args()
    if args.long and ON_GPU:
        parser.error("argument --long: on a GPU there is only one length")
    table = "gpu" if ON_GPU else "reached" if args.long else "training"
    length, shows_reached = LENGTHS[table], table != "training"
    results = {}
    for part in args.parts:
        measure = measure_one_by_one if part in ONE_BY_ONE else measure_in_turns
        its = measure(part, length, starts_of(part, length, FP32 if table == "training" else PARTS[part].choices))
        results[part] = its
        for who, result in its.items():
            print(" | ".join([part, who, *cells_of(result, next(iter(its.values())), shows_reached)]), flush=True)
        if ON_GPU:
            write_table(f"gpu_{part}", length, {part: its}, shows_reached)
    if not ON_GPU and args.parts == MEASURED:
        write_table(table, length, results, shows_reached)


if __name__ == "__main__":
    main()
