"""Images per second of each part's loader with its training augmentation, and how long a network waits for it.

    .venv-pt/bin/python benchmarks/loaders.py

Each loader runs in a process of its own, in its part's environment: some passes over the photographs, in turns with its
limit, and then while a network trains. What is counted are augmented batches, in parts 3 to 5 on the network's device:
of bytes, which are normalised on the network's side, but in part 4, whose augmentation ends with that, of normalised
floats. A limit of the machine is as many processes as there are cores, which do nothing but decode, resize and augment:
there is one for parts 1 and 3 to 6, whose augmentation is that of part 3, with albumentations, one for part 2, whose
small sources are augmented more, and one for part 7. What is compared starts up to three times, one group after the
other, because processes of the same code differ by several percent. Needs all environments (make setup).
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from bare import (
    Step,
    bare_load,
    bare_pass,
    mmdet_config,
    mmdet_step,
    parse_flags,
    set_precision,
    tensorflow_loader,
    tensorflow_model,
    torch_data,
    torch_step,
)

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
from turns import Measurer, answer, rounds
from usage import cpu_seconds, peak_memory

ADAMW = ["--optimizer", "adamw"]
CONFIG = ["--config", SMALL_MASK_RCNN]
LIMITS: dict[str, tuple[str, list[Any]]] = {  # what the table calls it: its part, its flags
    "limit of part 2": ("part2_balanced_data", ["bare"]),
    "limit of parts 1 and 3 to 6": ("part3_lightning", ["bare"]),
    "limit of part 7": ("part7_mmdetection", ["bare", *CONFIG]),
}
LOADERS: dict[str, dict[str, tuple[str, list[Any]]]] = {  # for each limit, the loaders that are compared with it
    "limit of part 2": {"part 2, tf.data, balanced": ("part2_balanced_data", ADAMW)},
    "limit of parts 1 and 3 to 6": {
        "part 1, tf.data": ("part1_tensorflow", ADAMW),
        "part 1, `--cache memory`": ("part1_tensorflow", [*ADAMW, "--cache", "memory"]),
        "parts 3 and 6, DataLoader": ("part3_lightning", []),
        "parts 3 and 6, `--cache memory`": ("part3_lightning", ["--cache", "memory"]),
        "part 4, Kornia, `--augment_on cpu`": ("part4_kornia", ["--augment_on", "cpu"]),
        "part 4, Kornia, `--augment_on device`": ("part4_kornia", []),
        "part 5, DALI, png": ("part5_dali", []),
        "part 5, DALI, npy": ("part5_dali", ["--data_format", "npy"]),
    },
    "limit of part 7": {"part 7, MMDetection": ("part7_mmdetection", CONFIG)},
}
DECODE_NOTHING = {"--cache", "npy"}  # so there is no limit that they could be compared with
# Not measured while a network trains: on a CPU it does not wait for these parts' loaders as they are, either.
VARIANTS: set[str] = set() if ON_GPU else DECODE_NOTHING
IMAGES, IMAGE_SIZE, BATCH_SIZE = max(240, 80 * CORES), 384, 16
BATCHES = IMAGES * 4 // 5 // BATCH_SIZE  # of a pass
START_ONCE = {*DECODE_NOTHING, "part4_kornia", "part5_dali"}  # not compared, or far from the limit
# At least and at most so many; in between none after so many seconds. Of a start's passes, a first one does not count.
STARTS, PASSES, PASSES_ONCE = (1, 3, 240), (3, 29, 6), (2, 3, 5)
# While it trains. A GPU first has to use up what was loaded before its first step; on a CPU, a step takes longer
# than to load several batches, and a quarter of a batch is enough.
TRAINING_BATCH_SIZE = BATCH_SIZE if ON_GPU else BATCH_SIZE // 4
FIRST_STEPS, STEPS = (2 * CORES, (2 * CORES, 2 * CORES, 0)) if ON_GPU else (1, (1, 4, 5))
FLAGS = ["--encoder", "resnet18", "--encoder_weights", "none", "--image_size", IMAGE_SIZE, "--batch_size", BATCH_SIZE]
HALF = ON_GPU or multiplies_bf16()

Batches = Iterator[Any]
Create = Callable[[argparse.Namespace], tuple[Callable[[], Batches], Callable[[], Step]]]  # of a loader and a network


# --- what is measured, in the process of one loader ------------------------------------------


def tensorflow_epochs(args: argparse.Namespace) -> tuple[Callable[[], Batches], Callable[[], Step]]:
    """Parts 1 and 2: a function that begins an epoch, and one that makes a training step."""
    set_precision(half=HALF)
    batches = iter(tensorflow_loader(args, BATCHES, range(1000)))  # it goes through all epochs without a pause

    def make_step() -> Step:
        model = tensorflow_model(args)
        return lambda batch: model.train_on_batch(*batch[:2])

    return lambda: batches, make_step


def torch_epochs(args: argparse.Namespace) -> tuple[Callable[[], Batches], Callable[[], Step]]:
    """The same for parts 3 to 5."""
    import torch

    data = torch_data(args)
    if args.cache == "memory":
        data.train_dataset.cache(args.workers)
    loader, device = data.train_dataloader(), data.trainer.strategy.root_device
    is_part4 = args.part == "part4_kornia"

    def epoch() -> Batches:
        for batch in loader:
            on_device = data.transfer_batch_to_device(batch, device, 0)
            if is_part4:
                on_device = data.on_after_batch_transfer(on_device, 0)
            if ON_GPU:
                torch.cuda.synchronize()
            yield on_device

    def make_step() -> Step:
        step = torch_step(args, data, "bf16" if HALF else "as it is")
        return step if is_part4 else lambda batch: step(data.on_after_batch_transfer(batch, 0))

    return epoch, make_step


def mmdet_epochs(args: argparse.Namespace) -> tuple[Callable[[], Batches], Callable[[], Step]]:
    """The same for part 7."""
    from mmengine.runner import Runner

    config = mmdet_config(args)
    loader = Runner.build_dataloader(config.train_dataloader, seed=0)
    return lambda: iter(loader), lambda: mmdet_step(args, config)


def answer_questions(part: str, flags: list[str]) -> None:
    """Tell the "speed" of a pass through the photographs, its "memory", and the share of "waiting" in training."""
    is_bare = flags[0] == "bare"
    args = parse_flags(part, flags[is_bare:])
    if is_bare:
        load, epochs = bare_load(args, BATCHES * BATCH_SIZE), itertools.count()

        def one_pass() -> float:
            return bare_pass(load, next(epochs), BATCHES * BATCH_SIZE)

    else:
        create = tensorflow_epochs if part in TF_PARTS else torch_epochs
        if part == "part7_mmdetection":
            create = mmdet_epochs
        begin, _ = create(args)

        def one_pass() -> float:
            """Images per second, while all workers are busy."""
            delivered = [time.perf_counter() for _ in itertools.islice(begin(), BATCHES)]
            return (BATCHES - 2 * CORES) * BATCH_SIZE / (delivered[-1 - CORES] - delivered[CORES - 1])

    def speed() -> list[float]:
        """Images per second, and CPU seconds for each."""
        began = cpu_seconds()
        return [one_pass(), (cpu_seconds() - began) / BATCHES / BATCH_SIZE]

    questions: dict[str, Callable[[], Any]] = {
        "ready": lambda: True,
        "speed": speed,
        "memory": lambda: peak_memory(one_pass),
    }
    if not is_bare:
        questions["waiting"] = lambda: waiting(create, args)
    answer(lambda question: questions[question]())


def waiting(create: Create, args: argparse.Namespace) -> dict[str, Any]:
    """Train with a loader like that: images per second, and the share of the time that is spent waiting for it."""
    args.batch_size = TRAINING_BATCH_SIZE
    begin, make_step = create(args)
    step, batches = make_step(), begin()
    waited, total = [], []
    for batch in itertools.islice(batches, FIRST_STEPS):
        step(batch)
    for _ in rounds(*STEPS):
        began = time.perf_counter()
        batch = next(batches)
        waited.append(time.perf_counter() - began)
        step(batch)
        total.append(time.perf_counter() - began)
    speeds = [TRAINING_BATCH_SIZE / seconds for seconds in total]
    return {"training_speed": speeds, "waiting": sum(waited) / sum(total)}


# --- all loaders -----------------------------------------------------------------------------


def start(part: str, flags: list[Any]) -> Measurer:
    """The process of a loader or of a limit."""
    data = ["--data_root", draw_data(part, images=IMAGES), "--workers", CORES]
    return Measurer([python_of(part), __file__, "--one", part, *flags, *data, *FLAGS])


def measure_loader(loader: Measurer, limit: Measurer) -> dict[str, Any]:
    """What both answer to "speed" in turns, pass by pass, and the loader's memory."""
    figures = {"memory": loader.ask("memory")}  # of its first pass, which does not count else
    if DECODE_NOTHING & set(loader.words):
        return figures | {"passes": [loader.ask("speed") for _ in rounds(*PASSES_ONCE)]}
    passes = PASSES_ONCE if START_ONCE & set(loader.words) else PASSES
    turns = [[process.ask("speed") for process in (loader, limit)] for _ in rounds(*passes)]
    return figures | {"passes": [ours for ours, _ in turns], "limit": [its for _, its in turns]}


def measure_start(limit_name: str, is_first: bool) -> dict[str, dict[str, Any]]:
    """The passes of a limit and of the loaders that are compared with it; in the first start all that is measured."""
    limit, loaders = start(*LIMITS[limit_name]), {}
    for name, (part, flags) in LOADERS[limit_name].items():
        if is_first or not START_ONCE & {part, *flags}:
            loaders[name] = start(part, flags)
    for process in [limit, *loaders.values()]:
        process.ask("ready")
    figures: dict[str, dict[str, Any]] = {limit_name: {"memory": limit.ask("memory"), "passes": []}}
    for name, loader in loaders.items():
        figures[name] = measure_loader(loader, limit)
        print(f"{name}: {figures[name]['passes'][-1][0]:.0f} images/s in its last pass", flush=True)
        figures[limit_name]["passes"] += figures[name].get("limit", [])
        if is_first and not VARIANTS & set(loader.words):
            figures[name] |= loader.ask("waiting")
        loader.end()
    limit.end()
    return figures


def measure_all() -> dict[str, dict[str, Any]]:
    """The figures of all limits and loaders, with the passes of all starts."""
    figures: dict[str, dict[str, Any]] = {}
    for number in rounds(*STARTS):
        for limit_name in LIMITS:
            for name, found in measure_start(limit_name, is_first=number == 0).items():
                known = figures.get(name, {})
                for passes in {"passes", "limit"} & set(known):
                    found[passes] = known[passes] + found[passes]
                found["memory"] = max(found["memory"], known.get("memory", 0))
                figures[name] = known | found
    return figures


def cells_of(name: str, found: dict[str, Any]) -> list[str]:
    """A row of the table."""
    speed, cpu = np.transpose(found["passes"])
    of_the_limit = spread(speed / np.array(found["limit"])[:, 0], ".2f") if "limit" in found else ""
    cells = [name, spread(speed, ".0f"), of_the_limit, f"{1000 * np.median(cpu):.1f}", f"{found['memory']:.0f}"]
    if "waiting" in found:
        return [*cells, f"{np.median(found['training_speed']):.1f}", f"{100 * found['waiting']:.1f} %"]
    return [*cells, "", ""]


def main() -> None:
    """Measure all loaders, or, in the process that this starts for each, one."""
    if sys.argv[1:2] == ["--one"]:
        answer_questions(sys.argv[2], sys.argv[3:])
        return
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    figures = measure_all()
    rows = [cells_of(name, found) for name, found in figures.items()]
    bars = {name: np.array(found["passes"])[:, 0] for name, found in figures.items()}
    print("\n".join(" | ".join(row) for row in rows))
    columns = ["loader", "alone, images/s", "of the limit, median (range)", "CPU ms an image", "MB"]
    columns += ["training, images/s", "waiting"]
    regime = f"{IMAGE_SIZE} pixels from about 400 x 500, batch {BATCH_SIZE}, {CORES} workers; training: resnet18, "
    regime += f"batch {TRAINING_BATCH_SIZE}, {'bfloat16 (part 7: float32)' if HALF else 'float32'}."
    save("loaders", describe_machine("torch", "tensorflow"), regime, columns, rows, bars, "images/s", figures)


if __name__ == "__main__":
    main()
