"""What train.py costs beside the network: a step of it, against the barest loop that is right.

    .venv-pt/bin/python benchmarks/steps.py

In one process, train.py takes a step, with its progress bar, metrics and logs, and then the loop of bare.py takes one,
and so on in turn: the same network, batch and precision, and for both the same batches, which lie in memory as a loader
delivers them; on a GPU, train.py first has to bring them there. An overhead is that of the medians of an epoch. Needs
all environments (make setup).
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bare import KEPT_BATCHES, create_step, parse_flags

from results import (
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
from trainings import MEMORY_DISK
from turns import InTerminal

STEPS, EPOCHS = 8, 5  # the first epoch does not count
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
    """Takes the time of each step of train.py, and after each that of a step of the bare loop."""

    def __init__(self, bare_step: Callable[[], object]) -> None:
        self.bare_step = bare_step
        self.began: float | None = None  # the step of train.py that is going on, if it is not an epoch's first
        self.seconds: list[list[float]] = []  # of the steps of this epoch, in train.py and in the bare loop
        self.milliseconds: list[list[float]] = []  # the medians of both, for each epoch

    def step_ended(self) -> None:
        """What train.py does from the end of one call to the next one is a step, all its callbacks included."""
        if ON_GPU and "torch" in sys.modules:  # Keras waits by itself, for the loss that it shows
            sys.modules["torch"].cuda.synchronize()
        ended = time.perf_counter()
        self.bare_step()
        now = time.perf_counter()
        if self.began is not None:
            self.seconds.append([ended - self.began, now - ended])
        self.began = now

    def epoch_ended(self) -> None:
        self.milliseconds.append((1000 * np.median(self.seconds, axis=0)).tolist())
        self.began, self.seconds = None, []


class InMemory:
    """In the place of a loader: its first batches, again and again."""

    def __init__(self, loader: Any) -> None:
        self.dataset = getattr(loader, "dataset", None)
        self.batches = list(itertools.islice(loader, KEPT_BATCHES))

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Any:
        return itertools.islice(itertools.cycle(self.batches), STEPS)


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


def measure(part: str, flags: list[str]) -> list[list[float]]:
    """Milliseconds of a step, in train.py and in the bare loop, for each epoch."""
    watch = Watch(create_step(parse_flags(part, flags)))
    import train

    if part in TF_PARTS:
        watch_keras(train, watch)
    elif part == "part7_mmdetection":
        watch_mmengine(watch)
    else:
        watch_lightning(train, watch)
    train.main()
    return watch.milliseconds[1:]


def main() -> None:
    """Measure all parts, or, in the process that this starts for each, one."""
    if sys.argv[1:2] == ["--one"]:
        part, result, *flags = sys.argv[2:]
        Path(result).write_text(json.dumps(measure(part, flags)))
        return
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows, bars, figures = [], {}, {}
    for part, flags in FLAGS.items():
        with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as folder:
            result = Path(folder) / "result.json"
            more = [
                "--data_root",
                draw_data(part, images=80),
                "--work_dir",
                folder,
                "--epochs",
                EPOCHS,
                "--limit_batches",
                STEPS,
            ]
            run = InTerminal([python_of(part), __file__, "--one", part, result, *SMALL, *flags, *more])
            if run.process.wait():
                raise run.ended()
            run.end()
            milliseconds = np.array(json.loads(result.read_text()))
        figures[part] = milliseconds.tolist()
        overhead = 100 * (milliseconds[:, 0] / milliseconds[:, 1] - 1)
        ours, bare = np.median(milliseconds, axis=0)
        more_ms = np.median(milliseconds[:, 0] - milliseconds[:, 1])
        rows.append([part, f"{bare:.0f}", f"{ours:.0f}", f"{more_ms:.1f}", spread(overhead, ".1f") + " %"])
        bars[f"{part}, bare loop"], bars[f"{part}, train.py"] = milliseconds[:, 1], milliseconds[:, 0]
        print(" | ".join(rows[-1]), flush=True)
    precision = f"{'bfloat16' if 'bf16' in HALF else 'float32'} (part 7: float32)"
    regime = f"128 pixels, batch 8, from scratch, {precision}; {EPOCHS - 1} epochs of {STEPS} steps."
    columns = ["part", "bare loop, ms a step", "train.py, ms a step", "more, ms", "more, median (range)"]
    save("steps", describe_machine("torch", "tensorflow"), regime, columns, rows, bars, "ms a step", figures)


if __name__ == "__main__":
    main()
