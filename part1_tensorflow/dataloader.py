"""From the paths in a CSV file to batches, with tf.data and albumentations.

Article, section 3:
https://hphuongdhsp.github.io/ml-blog/tensorflow/semanticsegmentation/deeplearning/2022/08/02/segmentation-model-part1.html
"""

import argparse
import queue
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from keras2 import tf
from loading import ImageAndMask, Load, Pixels, call_numpy, load_from_cache, load_from_files
from transform import seed_transform, train_transform
from utils import stop

cv2.setNumThreads(1)  # tf.data has a thread for each core; OpenCV's own would only be in their way


def load_data_path(data_root: Path, csv_file: str) -> pd.DataFrame:
    """The table <data_root>/csv_file/<csv_file>, its paths (columns images and masks) with data_root before them.

    Leaves with a message if the file is missing or damaged, or if a path is none below data_root.
    """
    file = data_root / "csv_file" / csv_file
    again = f"run data_preparation.py --data_root {data_root} again, with the flags that you gave before"
    try:
        table = pd.read_csv(file, dtype=str, encoding="utf-8-sig", keep_default_na=False)
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


def augment(seed: int, workers: int) -> Callable[..., Pixels]:
    """A function that changes image and mask at random: always alike for the same seed, epoch and index, whichever
    thread gets to them first.
    """
    # A transform keeps the state of its random numbers, so no two threads may use one at a time.
    transforms: queue.SimpleQueue = queue.SimpleQueue()
    for _ in range(max(workers, 1)):
        transforms.put(train_transform())

    def aug_fn(image: np.ndarray, mask: np.ndarray, epoch: int, index: int) -> Pixels:
        transform = transforms.get()
        try:
            seed_transform(transform, seed, int(epoch), int(index))
            augmented = transform(image=image, mask=mask)
        finally:
            transforms.put(transform)
        return augmented["image"], augmented["mask"]

    return aug_fn


def shuffled_epochs(length: int, used: int, seed: int, epochs: range) -> tf.data.Dataset:
    """(epoch, index) of the photographs in the order of training, epoch after epoch.

    Numbers are shuffled, not pictures: all of them at once, at the price of 8 bytes each. An epoch
    uses the first `used` of its `length` photographs; those that would not fill a batch are left out.
    The order follows from seed and epoch alone, so a run that goes on at epoch 7 gets that of epoch 7.
    """

    def one_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
        order = tf.random.experimental.stateless_shuffle(tf.range(length, dtype=tf.int64), seed=[seed, epoch])
        return tf.data.Dataset.from_tensor_slices(order[:used]).map(lambda index: (epoch, index))

    return tf.data.Dataset.range(epochs.start, epochs.stop).flat_map(one_epoch)


def in_order(length: int) -> tf.data.Dataset:
    """(0, index) of the photographs for validation: once through. Nothing is augmented, so epochs do not matter."""
    return tf.data.Dataset.range(length).map(lambda index: (tf.zeros_like(index), index))


def tf_dataset(
    load: Load,
    image_size: int,
    order: tf.data.Dataset,
    batch_sizes: list[int],
    workers: int,
    aug_fn: Callable[..., Pixels] | None = None,
) -> tf.data.Dataset:
    """Batches of the photographs that `order` names.

    Args:
        order: elements (epoch, index).
        batch_sizes: of one batch after the other, again and again.
        workers: threads that load; 0 leaves it to TensorFlow.
        aug_fn: augments a photograph, see `augment`.

    Returns:
        Batches of images, uint8 (N, S, S, 3) in [0, 255], and masks, float32 (N, S, S, 1) in {0, 1}.
    """

    # All of Python's work in one call: each costs time, and in Python the threads wait for each other.
    def load_and_augment(epoch: int, index: int, *read: np.ndarray) -> Pixels:
        image, mask = load.finish(*read)
        return aug_fn(image, mask, epoch, index) if aug_fn else (image, mask)

    def process_data(epoch: tf.Tensor, index: tf.Tensor) -> ImageAndMask:
        return call_numpy(load_and_augment, [epoch, index, *load.read(index)], image_size)

    def mask_to_float(images: tf.Tensor, masks: tf.Tensor) -> ImageAndMask:
        return images, tf.cast(masks, tf.float32)[..., tf.newaxis]

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
) -> tf.data.Dataset:
    """The batches of one machine, each for one of its devices.

    Args:
        run_dir: where --cache disk goes.
        paths: all of them, of which each machine takes its share.
        context: which machine this is, of how many, and how many devices they have together.
        steps: of an epoch; a step takes one batch for each device.
        epochs: for training, its epochs, one after the other without a pause; None for validation.
    """
    machine, machines = context.input_pipeline_id, context.num_input_pipelines
    paths = paths[machine::machines]
    if epochs is None and args.limit_batches:
        paths = paths.iloc[evenly_spaced(len(paths), steps * args.batch_size // machines)]
    load = load_from_files(paths, args.image_size)
    if args.cache != "none":
        folder = run_dir / "cache" / ("valid" if epochs is None else "train") if args.cache == "disk" else None
        load = load_from_cache(load, len(paths), args.image_size, args.workers, folder)
    if epochs is not None:
        seed = args.seed + machine  # else all machines would shuffle and augment alike
        batch_size = context.get_per_replica_batch_size(args.batch_size)
        order = shuffled_epochs(len(paths), steps * args.batch_size // machines, seed, epochs)
        aug_fn = augment(seed, args.workers)
        return tf_dataset(load, args.image_size, order, [batch_size], args.workers, aug_fn)
    # Every photograph counts once in validation, and in each step every device needs at least one:
    # so they are dealt evenly, and the batches may differ by one.
    batches = np.array_split(paths, steps * context.num_replicas_in_sync // machines)
    sizes, order = [len(batch) for batch in batches], in_order(len(paths))
    return tf_dataset(load, args.image_size, order, sizes, args.workers)


def evenly_spaced(length: int, number: int) -> np.ndarray:
    """The places of `number` of `length` photographs, or of all if they are fewer, with some of each larger source."""
    return np.linspace(0, length - 1, min(number, length)).round().astype(int)


def sample_batch(paths: pd.DataFrame, number: int, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """`number` photographs, or all if there are fewer, as one batch."""
    paths = paths.iloc[evenly_spaced(len(paths), number)]
    load = load_from_files(paths, image_size)
    return next(tf_dataset(load, image_size, in_order(len(paths)), [number], workers=0).as_numpy_iterator())
