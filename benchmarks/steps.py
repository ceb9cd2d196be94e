"""What train.py costs beside the network: a step of it, against the barest loop that is right.

    .venv-pt/bin/python benchmarks/steps.py

In one process, train.py takes a step, with its progress bar, metrics and logs, and then the loop of bare.py takes one,
and so on in turn: the same network, batch and precision, and for both the same batches, which lie in memory as a loader
delivers them; on a GPU, train.py first has to bring them there. An overhead is that of the medians of a few steps. As
many parts as there are cores start together, and from the second step on each goes on alone. Needs all environments
(make setup).
"""

import argparse
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bare import KEPT_BATCHES, create_step, parse_flags

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
from trainings import MEMORY_DISK, Training, go_on_together

WARM_UP = 1  # step, after a first one, in which all start
GROUP = 4  # steps, whose medians are compared
# Groups: at least and at most so many; in between as many as these seconds are enough for.
LEAST, GROUPS, SECONDS = 2, 6, 24
HALF = ["--mixed_precision", "bf16"] if ON_GPU or multiplies_bf16() else ["--mixed_precision", "False"]
SMALL = ["--encoder_weights", "none", "--image_size", 128, "--batch_size", 8]
FLAGS: dict[str, list[Any]] = {
    "part1_tensorflow": ["--encoder", "resnet18", "--optimizer", "adamw", *HALF],
    "part2_balanced_data": ["--encoder", "resnet18", "--optimizer", "adamw", *HALF],
    "part3_lightning": ["--encoder", "resnet18", *HALF],
    "part4_kornia": ["--encoder", "resnet18", *HALF],
    "part5_dali": ["--encoder", "resnet18", *HALF],
    "part6_segformer": HALF,
    "part7_mmdetection": ["--encoder", "resnet18", "--config", SMALL_MASK_RCNN, "--mixed_precision", "False"],
}


class Watch:
    """Takes the time of each step of train.py, and after each that of a step of the bare loop.

    Each pair adds a row to a CSV file: the milliseconds of both. That of train.py is left out of the first step of an
    epoch, before which it has more to do.
    """

    def __init__(self, bare_step: Callable[[], object], log: Path) -> None:
        self.bare_step = bare_step
        self.began = math.nan  # the step of train.py that is going on, if it is not an epoch's first
        self.log = log
        log.write_text("ours,bare\n")

    def step_ended(self) -> None:
        """What train.py does from the end of one call to the next one is a step, all its callbacks included."""
        if ON_GPU and "torch" in sys.modules:  # Keras waits by itself, for the loss that it shows
            sys.modules["torch"].cuda.synchronize()
        ended = time.perf_counter()
        self.bare_step()
        ours, bare = ended - self.began, time.perf_counter() - ended
        with self.log.open("a") as log:
            log.write(f"{1000 * ours},{1000 * bare}\n")
        self.began = time.perf_counter()

    def epoch_ended(self) -> None:
        self.began = math.nan


class InMemory:
    """In the place of a loader: its first batches, again and again."""

    def __init__(self, loader: Any) -> None:
        self.dataset = getattr(loader, "dataset", None)
        self.length = len(loader)
        self.batches = list(itertools.islice(loader, KEPT_BATCHES))

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Any:
        return itertools.islice(itertools.cycle(self.batches), self.length)


def watch_keras(train: Any, watch: Watch) -> None:
    """Let train.py of parts 1 and 2 train on batches in memory, under this watch."""
    from keras2 import tf

    class Ticks(tf.keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any) -> None:
            watch.step_ended()

        def on_epoch_end(self, epoch: int, logs: Any) -> None:
            watch.epoch_ended()

    create_loader, fit = train.create_loader, tf.keras.Model.fit

    def in_memory(*words: Any) -> Any:
        loader = create_loader(*words)
        is_for_training = len(words) > len(["args", "run_dir", "paths", "context", "steps"])
        return loader.take(KEPT_BATCHES).cache().repeat() if is_for_training else loader

    train.create_loader = in_memory
    tf.keras.Model.fit = lambda *words, callbacks, **more: fit(*words, callbacks=[*callbacks, Ticks()], **more)


def watch_lightning(train: Any, watch: Watch) -> None:
    """The same for parts 3 to 6."""
    from pytorch_lightning.callbacks import Callback

    class Ticks(Callback):
        def on_train_batch_end(self, *words: Any) -> None:
            watch.step_ended()

        def on_train_epoch_end(self, *words: Any) -> None:
            watch.epoch_ended()

    create_trainer, train_dataloader = train.create_trainer, train.NailDataModule.train_dataloader
    train.create_trainer = lambda args, run_dir, callbacks: create_trainer(args, run_dir, [*callbacks, Ticks()])
    train.NailDataModule.train_dataloader = lambda data: InMemory(train_dataloader(data))


def watch_mmengine(watch: Watch) -> None:
    """The same for part 7."""
    from mmengine.hooks import Hook
    from mmengine.runner import Runner

    class Ticks(Hook):
        def after_train_iter(self, *words: Any, **more: Any) -> None:
            watch.step_ended()

        def after_train_epoch(self, *words: Any) -> None:
            watch.epoch_ended()

    from_cfg, build = Runner.from_cfg, Runner.build_dataloader  # a static method, which becomes one of the instance

    def with_ticks(config: Any) -> Runner:
        runner = from_cfg(config)
        runner.register_hook(Ticks())
        return runner

    def in_memory(runner: Runner, settings: Any, **more: Any) -> Any:
        loader = build(settings, **more)
        return InMemory(loader) if settings["sampler"]["shuffle"] else loader

    Runner.from_cfg, Runner.build_dataloader = with_ticks, in_memory


def measure(part: str, log: Path, flags: list[str]) -> None:
    """Train, and write to `log` what each step takes."""
    watch = Watch(create_step(parse_flags(part, flags)), log)
    import train

    if part in TF_PARTS:
        watch_keras(train, watch)
    elif part == "part7_mmdetection":
        watch_mmengine(watch)
    else:
        watch_lightning(train, watch)
    train.main()


def start(part: str, work_dir: Path) -> Training:
    """The process of a part, which adds a row to its log for each step."""
    log = work_dir / "steps.csv"
    work_dir.mkdir()
    more = ["--data_root", draw_data(part), "--work_dir", work_dir, "--epochs", 3]  # the end is not waited for
    return Training([python_of(part), __file__, "--one", part, log, *SMALL, *FLAGS[part], *more], log)


def milliseconds(run: Training) -> np.ndarray:
    """For each group of steps, the medians of train.py and of the bare loop; shape (groups, 2)."""
    *_, seconds = run.go_on(WARM_UP)
    groups = int(np.clip(SECONDS / seconds / GROUP, LEAST, GROUPS))
    skipped = run.rows() + 1  # the first one after its turn has begun took part of the time before that
    run.go_on(1 + groups * GROUP)
    steps = run.metrics().iloc[skipped : skipped + groups * GROUP].dropna().to_numpy()
    return np.array([np.median(group, axis=0) for group in np.array_split(steps, groups)])


def main() -> None:
    """Measure all parts, or, in the process that this starts for each, one."""
    if sys.argv[1:2] == ["--one"]:
        part, log, *flags = sys.argv[2:]
        measure(part, Path(log), flags)
        return
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows, bars, figures = [], {}, {}
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as folder:
        for part in FLAGS:
            draw_data(part)  # before the first one starts
        runs: dict[str, Training] = {}
        for first in range(0, len(FLAGS), CORES):  # all at the same time would take longer, with many threads a core
            started = {part: start(part, Path(folder) / part) for part in list(FLAGS)[first : first + CORES]}
            go_on_together(started.values())
            runs |= started
        for part, run in runs.items():
            values = milliseconds(run)
            run.end()
            figures[part] = values.tolist()
            overhead = 100 * (values[:, 0] / values[:, 1] - 1)
            ours, bare = np.median(values, axis=0)
            more_ms = np.median(values[:, 0] - values[:, 1])
            more = [f"{more_ms:z.1f}", spread(overhead, "z.1f") + " %"]  # z: no -0.0
            rows.append([part, f"{bare:.0f}", f"{ours:.0f}", *more])
            bars[f"{part}, bare loop"], bars[f"{part}, train.py"] = values[:, 1], values[:, 0]
            print(" | ".join(rows[-1]), flush=True)
    precision = f"{'bfloat16' if 'bf16' in HALF else 'float32'} (part 7: float32)"
    regime = f"128 pixels, batch 8, from scratch, {precision}; at most {GROUPS} times {GROUP} steps."
    columns = ["part", "bare loop, ms a step", "train.py, ms a step", "more, ms", "more, median (range)"]
    save("steps", describe_machine("torch", "tensorflow"), regime, columns, rows, bars, "ms a step", figures)


if __name__ == "__main__":
    main()
