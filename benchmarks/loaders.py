"""Images per second of each part's loader with its training augmentation, and how long a network waits for it.

    .venv-pt/bin/python sample_data.py --data_root data/bench --images 320
    .venv-pt/bin/python part5_dali/data_preparation.py --data_root data/bench --npy
    .venv-pt/bin/python benchmarks/loaders.py --data_root data/bench

Each loader runs in a process of its own, in its part's environment: alone for some passes over the same photographs,
once more for its memory, and then while a network trains. What is counted are augmented batches on the network's
device: of bytes, which are normalised on the network's side, but in part 4, whose augmentation ends with that, of
normalised floats. The limit of the machine is as many processes as there are cores, which do nothing but decode,
resize and augment as parts 1 to 3 do. Prints a table and writes loaders.json. Needs all environments (make setup).
"""

import argparse
import functools
import json
import logging
import multiprocessing
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from machine import describe_machine, multiplies_bf16, spread

ROOT = Path(__file__).parents[1]
CORES = len(os.sched_getaffinity(0))
ON_GPU = Path("/proc/driver/nvidia").exists()
LOADERS = {  # what the table calls it: its part, its flags
    "the limit: nothing else": ("part3_lightning", ["bare"]),
    "part 1, tf.data": ("part1_tensorflow", []),
    "part 3, DataLoader and albumentations": ("part3_lightning", []),
    "part 4, Kornia, `--augment_on cpu`": ("part4_kornia", ["--augment_on", "cpu"]),
    "part 4, Kornia, `--augment_on device`": ("part4_kornia", []),
    "part 5, DALI, png": ("part5_dali", []),
    "part 5, DALI, npy": ("part5_dali", ["--data_format", "npy"]),
}
IMAGE_SIZE, BATCH_SIZE, REPEATS, WARM_UP, STEPS = 384, 16, 5, 2, 8
FLAGS = ["--encoder", "resnet18", "--encoder_weights", "none", "--image_size", IMAGE_SIZE, "--batch_size", BATCH_SIZE]

Batches = Iterator[Any]


# --- what is measured, in the process of one loader ------------------------------------------


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def memory_now() -> float:
    """MB of this process and its children; what several share is counted once."""
    total = 0
    for process in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def peak_memory(one_pass: Callable[[], object]) -> float:
    """The highest of memory_now during a pass, in MB."""
    found, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            found.append(memory_now())

    watcher = threading.Thread(target=watch)
    watcher.start()
    one_pass()
    done.set()
    watcher.join()
    return max(found)


def bare_pass(dataset: Any, used: int) -> None:
    """Load and augment `used` photographs in as many processes as there are cores, and drop them."""

    def work(first: int) -> None:
        for index in range(first, used, CORES):
            dataset[0, index]

    processes = [multiprocessing.Process(target=work, args=(first,)) for first in range(CORES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def tensorflow_loader(flags: list[str]) -> tuple[Callable[[], Batches], int, Callable[[], Callable]]:
    """Part 1: a function that begins an epoch, its steps, and one that makes a training step."""
    import train

    from keras2 import tf

    args = parse(train, flags)
    if ON_GPU or multiplies_bf16():
        tf.keras.mixed_precision.set_global_policy("mixed_bfloat16")
    paths = train.load_data_path(args.data_root, "train.csv")
    steps = len(paths) // BATCH_SIZE
    loader = train.create_loader(args, None, paths, tf.distribute.InputContext(), steps, range(1000))
    batches = iter(loader)  # it goes through all epochs without a pause

    def make_step() -> Callable:
        model = train.create_network(args)
        model.compile(train.create_optimizer("adamw", 1e-3), train.create_loss())
        return lambda batch: model.train_on_batch(*batch)

    return lambda: batches, steps, make_step


def torch_loader(flags: list[str]) -> tuple[Callable[[], Batches], int, Callable[[], Callable]]:
    """Parts 3 to 5: a function that begins an epoch, its steps, and one that makes a training step."""
    import torch
    import train

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    args = parse(train, flags)
    form = [args.data_format] if "data_format" in args else []
    paths = train.load_data_path(args.data_root, "train.csv", *form)
    data = train.NailDataModule(args, paths, paths)
    data.trainer = train.create_trainer(args, args.work_dir, [])
    data.trainer.training = True
    loader, device = data.train_dataloader(), data.trainer.strategy.root_device
    is_part4 = args.part == "part4_kornia"

    def epoch() -> Batches:
        for batch in loader:
            on_device = data.transfer_batch_to_device(batch, device, 0)
            yield data.on_after_batch_transfer(on_device, 0) if is_part4 else on_device
            if ON_GPU:
                torch.cuda.synchronize()

    def make_step() -> Callable:
        model = train.create_model(args).to(device)
        optimizer = torch.optim.AdamW(model.parameters())

        def step(batch: Any) -> None:
            images, masks = batch if is_part4 else data.on_after_batch_transfer(batch, 0)
            with torch.autocast(device.type, torch.bfloat16, enabled=ON_GPU or multiplies_bf16()):
                logits = model(images)
            model.loss_fn(logits.float(), masks).backward()
            optimizer.step()
            optimizer.zero_grad()
            if ON_GPU:
                torch.cuda.synchronize()

        return step

    return epoch, data.steps, make_step


def parse(train: Any, flags: list[str]) -> argparse.Namespace:
    """The flags of a part's train.py."""
    sys.argv[1:] = flags
    args = train.parse_args()
    args.device, args.mixed_precision = ["gpu:0" if ON_GPU else "cpu"], "fp32"
    args.part = Path(train.__file__).parent.name
    return args


def measure(part: str, flags: list[str]) -> dict[str, Any]:
    """All figures of one loader."""
    sys.path.insert(0, str(ROOT / part))
    if flags[0] == "bare":
        import train

        args = parse(train, flags[1:])
        paths = train.load_data_path(args.data_root, "train.csv")
        steps = len(paths) // BATCH_SIZE
        dataset = train.NailDataModule(args, paths, paths).train_dataset
        one_pass = functools.partial(bare_pass, dataset, steps * BATCH_SIZE)
    else:
        begin, steps, make_step = (tensorflow_loader if part == "part1_tensorflow" else torch_loader)(flags)

        def one_pass() -> None:
            batches = begin()
            for _ in range(steps):
                next(batches)

    images = steps * BATCH_SIZE
    one_pass()  # warm-up
    speed, cpu = [], []
    for _ in range(REPEATS):
        began, cpu_began = time.perf_counter(), cpu_seconds() + workers_cpu()
        one_pass()
        speed.append(images / (time.perf_counter() - began))
        cpu.append((cpu_seconds() + workers_cpu() - cpu_began) / images)
    figures: dict[str, Any] = {"images": images, "speed": speed, "cpu": cpu, "memory": peak_memory(one_pass)}
    if flags[0] != "bare":
        figures |= waiting(begin, steps, make_step())
    return figures


def workers_cpu() -> float:
    """CPU seconds of the processes that this one has not waited for yet: a DataLoader's live on."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def waiting(begin: Callable[[], Batches], steps: int, step: Callable) -> dict[str, Any]:
    """Train with the loader: images per second, and the share of the time that is spent waiting for it."""
    assert steps >= WARM_UP + STEPS, "too few photographs"
    batches = begin()
    waited, total = [], []
    for number in range(WARM_UP + STEPS):
        began = time.perf_counter()
        batch = next(batches)
        loaded = time.perf_counter()
        step(batch)
        if number >= WARM_UP:
            waited.append(loaded - began)
            total.append(time.perf_counter() - began)
    return {"training_speed": [BATCH_SIZE / seconds for seconds in total], "waiting": sum(waited) / sum(total)}


# --- all loaders -----------------------------------------------------------------------------


def run(part: str, flags: list[str], data_root: Path) -> dict[str, Any]:
    """Measure one loader in a process of its own."""
    python = ROOT / (".venv-tf" if part == "part1_tensorflow" else ".venv-pt") / "bin" / "python"
    common = ["--data_root", data_root, "--workers", CORES, *FLAGS]
    words = [python, __file__, "--one", part, *flags, *common]
    done = subprocess.run([str(word) for word in words], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(name: str, figures: dict[str, Any], limit: float) -> str:
    """A line of the table."""
    speed = np.array(figures["speed"])
    cells = [name, spread(speed, ".0f"), f"{np.median(speed) / limit:.2f}"]
    cells += [f"{1000 * np.median(figures['cpu']):.1f}", f"{figures['memory']:.0f}"]
    if "waiting" in figures:
        cells += [f"{np.median(figures['training_speed']):.1f}", f"{100 * figures['waiting']:.1f} %"]
    return "| " + " | ".join([*cells, "", ""][:7]) + " |"


def main() -> None:
    """Measure all loaders, or, in the process that this starts for each, one."""
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3:])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True)
    data_root = parser.parse_args().data_root
    sizes = pd.read_csv(data_root / "csv_file" / "train.csv")[["width", "height"]].median().astype(int).tolist()
    about = {
        "date": str(date.today()),
        "machine": describe_machine("torch"),
        "regime": f"{IMAGE_SIZE} pixels from about {sizes[0]} x {sizes[1]}, batch {BATCH_SIZE}, {CORES} workers",
        "rows": {},
    }
    print("| loader | alone, images/s | of the limit | CPU ms an image | MB | training, images/s | waiting |")
    print("|---|---|---|---|---|---|---|")
    limit = 0.0
    for name, (part, flags) in LOADERS.items():
        figures = run(part, flags, data_root)
        about["rows"][name] = figures
        limit = limit or float(np.median(figures["speed"]))
        print(row(name, figures, limit), flush=True)
    (Path(__file__).parent / "loaders.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
