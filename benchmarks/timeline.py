"""Where the time goes in part 1: a plain loop that loads and then trains, against tf.data.

    .venv-tf/bin/python benchmarks/timeline.py --data_root data/nails

Both loops call the same functions of dataloader.py for the same photographs, and note when each
call began and ended. Draws the repeat of median length of each into part1_tensorflow/imgs/timeline.png, prints the
median and range of all, and writes timeline.json.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "part1_tensorflow"))

from dataloader import augment, load_data_path, tf_dataset
from keras2 import tf
from loading import Load, load_from_files
from model import create_loss, create_model
from results import describe_machine, spread

ENCODER, IMAGE_SIZE, BATCH_SIZE, STEPS, REPEATS, WORKERS = "mobilenetv2", 32, 32, 6, 7, 2
Batch = tuple[np.ndarray, np.ndarray]
Span = tuple[float, float]  # begin and end in seconds


def timed(load: Load, augmentation: Callable, spans: list[Span]) -> Load:
    """`load` and `augmentation` in one that also notes when it began and ended."""

    def read(index: tf.Tensor) -> list[tf.Tensor]:
        began = tf.numpy_function(lambda _: np.float64(time.perf_counter()), [index], tf.float64)
        with tf.control_dependencies([began]):
            index = tf.identity(index)  # all that follows needs it, so nothing starts before the clock does
        return [began, index, *load.read(index)]

    def finish(began: float, index: int, *read: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        image_and_mask = augmentation(*load.finish(*read), 0, index)
        spans.append((float(began), time.perf_counter()))
        return image_and_mask

    return Load(read, finish)


def plain_batches(load: Load) -> Iterator[Batch]:
    """The naive pipeline: the photographs of a batch one after the other, when it is asked for."""
    for step in range(STEPS):
        indices = tf.range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE, dtype=tf.int64)
        pairs = [load.finish(*(tensor.numpy() for tensor in load.read(index))) for index in indices]
        images, masks = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
        yield images, masks[..., np.newaxis].astype(np.float32)


def tf_data_batches(load: Load) -> Iterator[Batch]:
    """The pipeline of part 1."""
    order = tf.data.Dataset.range(STEPS * BATCH_SIZE).map(lambda index: (tf.zeros_like(index), index))
    return tf_dataset(load, IMAGE_SIZE, order, [BATCH_SIZE], WORKERS).as_numpy_iterator()


def run(model: tf.keras.Model, batches: Iterator[Batch]) -> tuple[float, list[Span]]:
    """Train with all batches: when that began, and when each step did and ended."""
    spans = []
    began = time.perf_counter()
    for images, masks in batches:
        step_began = time.perf_counter()
        model.train_on_batch(images, masks)  # returns when the loss is known
        spans.append((step_began, time.perf_counter()))
    return began, spans


def lanes(spans: list[Span]) -> list[list[Span]]:
    """Spread spans that overlap over as many lanes as run at a time."""
    found: list[list[Span]] = []
    for span in sorted(spans):
        free = next((lane for lane in found if lane[-1][1] <= span[0]), None)
        if free is None:
            found.append([span])
        else:
            free.append(span)
    return found


def draw(recorded: dict[str, tuple[float, list[Span], list[Span]]], file: Path) -> None:
    """A panel for each loop, with the loading above the training, on one axis of time."""
    figure, panels = plt.subplots(len(recorded), figsize=(10, 3.6), sharex=True, layout="constrained")
    for axes, (name, (began, loads, steps)) in zip(panels, recorded.items(), strict=True):
        rows = [("load", lane, "tab:orange") for lane in lanes(loads)] + [("train", steps, "tab:blue")]
        for height, (_, spans, colour) in enumerate(reversed(rows)):
            bars = [(start - began, 0.97 * (end - start)) for start, end in spans]  # a gap between neighbours
            axes.broken_barh(bars, (height - 0.4, 0.8), color=colour)
        axes.set_yticks(range(len(rows)), [name for name, _, _ in reversed(rows)])
        axes.set_title(f"{name}: {STEPS} steps in {steps[-1][1] - began:.2f} s", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("seconds")
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True)
    args = parser.parse_args()
    paths = load_data_path(args.data_root, "train.csv")
    # Repeated if there are too few: a photograph that was read before comes from the system's memory anyway.
    paths = paths.iloc[np.resize(np.arange(len(paths)), STEPS * BATCH_SIZE)]

    tf.keras.utils.set_random_seed(0)
    model = create_model(ENCODER, IMAGE_SIZE, encoder_weights=None)
    model.compile("adam", create_loss())
    spans: list[Span] = []
    load = timed(load_from_files(paths, IMAGE_SIZE), augment(0, WORKERS), spans)
    pipelines = {"plain loop": plain_batches, "tf.data": tf_data_batches}
    for batches in pipelines.values():  # warm up: TensorFlow builds its graphs
        run(model, batches(load))

    recorded: dict[str, list] = {name: [] for name in pipelines}
    for _ in range(REPEATS):
        for name, batches in pipelines.items():
            spans.clear()
            began, steps = run(model, batches(load))
            recorded[name].append((began, spans.copy(), steps))

    about = {
        "date": str(date.today()),
        "machine": describe_machine("tensorflow"),
        "regime": f"{ENCODER} from scratch, {IMAGE_SIZE} pixels, batch {BATCH_SIZE}, float32, {STEPS} steps, "
        f"{REPEATS} repeats in turns, {WORKERS} loader threads",
    }
    print(f"{about['machine']}\n{about['regime']}\n")
    print("| | seconds for all steps, median (range) | share of it waiting for data |\n|---|---|---|")
    seconds, middle = {}, {}
    for name, repeats in recorded.items():
        seconds[name] = np.array([steps[-1][1] - began for began, _, steps in repeats])
        training = [sum(end - start for start, end in steps) for _, _, steps in repeats]
        waiting = 1 - training / seconds[name]
        middle[name] = repeats[np.argsort(seconds[name])[REPEATS // 2]]
        about[name] = {"seconds": seconds[name].tolist(), "share_waiting": waiting.tolist()}
        print(f"| {name} | {spread(seconds[name], '.2f')} | {spread(waiting, '.0%')} |")
    print(f"\nplain loop : tf.data = {spread(seconds['plain loop'] / seconds['tf.data'], '.2f')}")
    draw(middle, ROOT / "part1_tensorflow" / "imgs" / "timeline.png")
    (Path(__file__).parent / "timeline.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
