"""From the paths in the sources' CSV files to batches that are balanced by source, with tf.data.

Article: https://hphuongdhsp.github.io/ml-blog/tensorflow/semanticsegmentation/deeplearning/imbalanceddata/2022/08/03/segmentation-model-part2.html
"""

import argparse
import queue
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from keras2 import tf
from loading import Load, Pixels, call_numpy, load_from_cache, load_from_files
from transform import seed_transform, strong_transform, train_transform
from utils import stop

cv2.setNumThreads(1)  # tf.data has a thread for each core; OpenCV's own would only be in their way

Example = tuple[tf.Tensor, tf.Tensor, tf.Tensor]  # an image, its mask, and the number of its source


def load_data_path(data_root: Path, csv_file: str) -> pd.DataFrame:
    """The table <data_root>/csv_file/<csv_file>, its paths (columns images and masks) with data_root before them.

    Leaves with a message if the file is missing or damaged, or if a path is none below data_root.
    """
    file = data_root / "csv_file" / csv_file
    again = f"run data_preparation.py --data_root {data_root} again, with the flags that you gave before"
    try:
        table = pd.read_csv(file, dtype=str, encoding="utf-8-sig", keep_default_na=False)[["images", "masks", "source"]]
        paths = pd.concat([table["images"], table["masks"]])
    except FileNotFoundError:
        stop(f"{data_root} has no csv_file/{csv_file}; first run data_preparation.py --data_root {data_root}")
    except (KeyError, ValueError, OSError) as error:
        stop(f"{file} is damaged ({error}); {again}")
    if table.empty:
        stop(f"{file} names no photographs; {again}")
    for path in paths:
        if not path or path.startswith("/") or ".." in path.split("/"):
            stop(f"{file}: {path!r} is no file below {data_root}; {again}")
    return table.assign(images=f"{data_root}/" + table["images"], masks=f"{data_root}/" + table["masks"])


def load_source_paths(data_root: Path) -> pd.DataFrame:
    """The table of <data_root>/csv_file/train<source>.csv for each source that train.csv names."""
    sources = load_data_path(data_root, "train.csv")["source"].unique()
    tables = [load_data_path(data_root, f"train{source}.csv").assign(source=source) for source in sources]
    return pd.concat(tables, ignore_index=True)


def augment(seed: int, workers: int, strong: np.ndarray) -> Callable[..., Pixels]:
    """A function that changes image and mask at random: always alike for the same seed, draw and index, whichever
    thread gets to them first. `strong` tells for each photograph whether it gets the strong augmentation.
    """
    # A transform keeps the state of its random numbers, so no two threads may use one at a time.
    transforms: queue.SimpleQueue = queue.SimpleQueue()
    for _ in range(max(workers, 1)):
        transforms.put((train_transform(), strong_transform()))

    def aug_fn(image: np.ndarray, mask: np.ndarray, draw: int, index: int) -> Pixels:
        usual_and_strong = transforms.get()
        transform = usual_and_strong[int(strong[index])]
        try:
            seed_transform(transform, seed, int(draw), int(index))
            augmented = transform(image=image, mask=mask)
        finally:
            transforms.put(usual_and_strong)
        return augmented["image"], augmented["mask"]

    return aug_fn


def balanced_draws(numbers: Sequence[int], weights: Sequence[float], seed: int) -> tf.data.Dataset:
    """(draw, index) without end: draw 0, 1, 2, … chooses a source by its weight, and then its next photograph.

    Numbers are drawn, not pictures: no photograph is loaded before it is needed, and a run that goes
    on can skip the draws of the epochs before.

    Args:
        numbers: the number of the source (or class) of each photograph, 0 or more.
        weights: the probability of source 0, 1, …; a source with 0 is left out.
        seed: the same seed gives the same draws.
    """
    datasets, probabilities = [], []
    for number, weight in enumerate(weights):
        indices = np.flatnonzero(np.asarray(numbers) == number)
        if weight > 0:
            # A source starts again, in a new order, as soon as each of its photographs was drawn. So a
            # small source never ends an epoch, and none of its photographs is favoured.
            dataset = tf.data.Dataset.from_tensor_slices(indices).shuffle(len(indices), seed + number).repeat()
            datasets.append(dataset)
            probabilities.append(weight)
    return tf.data.Dataset.sample_from_datasets(datasets, probabilities, seed).enumerate()


def in_order(length: int) -> tf.data.Dataset:
    """(0, index) of the photographs for validation: once through. Nothing is augmented, so draws do not matter."""
    return tf.data.Dataset.range(length).map(lambda index: (tf.zeros_like(index), index))


def tf_dataset(
    load: Load,
    image_size: int,
    numbers: pd.Series,
    order: tf.data.Dataset,
    batch_sizes: list[int],
    workers: int,
    aug_fn: Callable[..., Pixels] | None = None,
) -> tf.data.Dataset:
    """Batches of the photographs that `order` names.

    Args:
        numbers: of the source of each photograph.
        order: elements (draw, index).
        batch_sizes: of one batch after the other, again and again.
        workers: threads that load; 0 leaves it to TensorFlow.
        aug_fn: augments a photograph, see `augment`.

    Returns:
        Batches: images uint8 (N, S, S, 3) in [0, 255], masks float32 (N, S, S, 1) in {0, 1}, sources int64 (N,).
    """
    number_of = tf.constant(numbers.tolist(), tf.int64)

    # All of Python's work in one call: each costs time, and in Python the threads wait for each other.
    def load_and_augment(draw: int, index: int, *read: np.ndarray) -> Pixels:
        image, mask = load.finish(*read)
        return aug_fn(image, mask, draw, index) if aug_fn else (image, mask)

    def process_data(draw: tf.Tensor, index: tf.Tensor) -> Example:
        image, mask = call_numpy(load_and_augment, [draw, index, *load.read(index)], image_size)
        return image, mask, number_of[index]

    def mask_to_float(images: tf.Tensor, masks: tf.Tensor, sources: tf.Tensor) -> Example:
        return images, tf.cast(masks, tf.float32)[..., tf.newaxis], sources

    # More calls than threads: photographs leave in order, and a thread shall not idle behind one that takes longer.
    in_parallel = {"num_parallel_calls": 2 * workers, "deterministic": True} if workers else {}
    dataset = order.map(process_data, **in_parallel).batch(batch_sizes[0])
    if len(batch_sizes) > 1:
        dataset = dataset.rebatch(batch_sizes)
    dataset = dataset.map(mask_to_float)  # now, because bytes are faster to put together than floats
    options = tf.data.Options()
    options.threading.private_threadpool_size = workers
    # The next batches are made while the network learns from this one.
    return dataset.prefetch(tf.data.AUTOTUNE).with_options(options)


def create_loader(
    args: argparse.Namespace,
    run_dir: Path,
    paths: pd.DataFrame,
    context: tf.distribute.InputContext,
    steps: int,
    epochs: range | None = None,
    plan: pd.DataFrame | None = None,
) -> tf.data.Dataset:
    """The batches of one machine, each for one of its devices.

    Args:
        run_dir: where --cache disk goes.
        paths: of the photographs, with the number of their source.
        context: which machine this is, of how many, and how many devices they have together.
        steps: of an epoch; a step takes one batch for each device.
        epochs: for training, its epochs, one after the other without a pause; None for validation.
        plan: for training, the weight and the augmentation of each source, see `plan_balance`.
    """
    machine, machines = context.input_pipeline_id, context.num_input_pipelines
    if epochs is None:
        paths = paths[machine::machines]
    if epochs is None and args.limit_batches:
        paths = paths.iloc[evenly_spaced(len(paths), steps * args.batch_size // machines)]
    load = load_from_files(paths, args.image_size)
    if args.cache != "none":
        folder = run_dir / "cache" / ("valid" if epochs is None else "train") if args.cache == "disk" else None
        load = load_from_cache(load, len(paths), args.image_size, args.workers, folder)
    if epochs is not None and plan is not None:
        draws = balanced_draws(paths["number"], plan["weight"], args.seed)
        draws = draws.skip(epochs.start * steps * args.batch_size)  # those of an earlier run
        draws = draws.shard(machines, machine)  # all machines draw alike, and each takes every n-th draw
        batch_size = context.get_per_replica_batch_size(args.batch_size)
        aug_fn = augment(args.seed, args.workers, plan["strong"].to_numpy()[paths["number"]])
        return tf_dataset(load, args.image_size, paths["number"], draws, [batch_size], args.workers, aug_fn)
    # Every photograph counts once in validation, and in each step every device needs at least one:
    # so they are dealt evenly, and the batches may differ by one.
    batches = np.array_split(paths, steps * context.num_replicas_in_sync // machines)
    sizes, order = [len(batch) for batch in batches], in_order(len(paths))
    return tf_dataset(load, args.image_size, paths["number"], order, sizes, args.workers)


def evenly_spaced(length: int, number: int) -> np.ndarray:
    """The places of `number` of `length` photographs, or of all if they are fewer, with some of each larger source."""
    return np.linspace(0, length - 1, min(number, length)).round().astype(int)


def sample_batch(paths: pd.DataFrame, number: int, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """`number` photographs, or all if there are fewer, as one batch."""
    paths = paths.iloc[evenly_spaced(len(paths), number)]
    load = load_from_files(paths, image_size)
    dataset = tf_dataset(load, image_size, paths["number"], in_order(len(paths)), [number], workers=0)
    return next(dataset.as_numpy_iterator())[:2]
