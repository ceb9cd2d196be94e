"""From the number of a photograph to its pixels and those of its mask: from their files, or from a cache.

Article, section 3:
https://hphuongdhsp.github.io/ml-blog/tensorflow/semanticsegmentation/deeplearning/2022/08/02/segmentation-model-part1.html
"""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from keras2 import tf
from transform import valid_transform
from utils import stop

ImageAndMask = tuple[tf.Tensor, tf.Tensor]
Pixels = tuple[np.ndarray, np.ndarray]  # an image and its mask as arrays
CACHE_FILES = ["images.uint8", "masks.uint8"]
UNREADABLE = (
    tf.errors.InvalidArgumentError,
    tf.errors.NotFoundError,
    tf.errors.PermissionDeniedError,
    tf.errors.FailedPreconditionError,  # it is a folder
)


class Load(NamedTuple):
    """How photograph `index` becomes an image (S, S, 3) and a mask (S, S) of 0 and 1, both uint8, in two steps.

    S is the image_size.
    """

    read: Callable[[tf.Tensor], Sequence[tf.Tensor]]  # in TensorFlow, from the index
    finish: Callable[..., Pixels]  # in Python, from what `read` has returned, now arrays


def load_image_and_mask_from_path(image_path: tf.Tensor, mask_path: tf.Tensor) -> ImageAndMask:
    """Read two PNG files: an RGB image (H, W, 3) and a mask (H, W) of 0 and 255, both uint8."""
    image = tf.io.decode_png(tf.io.read_file(image_path), channels=3)
    mask = tf.io.decode_png(tf.io.read_file(mask_path), channels=1)
    return image, mask[..., 0]


def call_numpy(function: Callable, inputs: Sequence[tf.Tensor], image_size: int) -> ImageAndMask:
    """Call a Python function, which makes an image and a mask of this size, from within tf.data.

    TensorFlow cannot see what comes out of Python, and the network wants to know the shapes.
    """
    # stateful=False: the same inputs give the same outputs, so TensorFlow need not keep the calls in order
    image, mask = tf.numpy_function(function, inputs, [tf.uint8, tf.uint8], stateful=False)
    image.set_shape((image_size, image_size, 3))
    mask.set_shape((image_size, image_size))
    return image, mask


def load_from_files(paths: pd.DataFrame, image_size: int) -> Load:
    """Read photograph `index` and its mask and resize them, each time anew."""
    images, masks = tf.constant(paths["images"].tolist()), tf.constant(paths["masks"].tolist())
    transform = valid_transform(image_size)

    def resize(image: np.ndarray, mask: np.ndarray) -> Pixels:
        if mask.max() not in (0, 255):
            raise ValueError("a mask with labels")  # find_damaged_file tells which
        resized = transform(image=image, mask=mask // 255)
        return resized["image"], resized["mask"]

    return Load(lambda index: load_image_and_mask_from_path(images[index], masks[index]), resize)


def load_from_cache(load: Load, length: int, image_size: int, workers: int, folder: Path | None) -> Load:
    """Load each of `length` photographs once with `load`, and serve the results from then on.

    Args:
        folder: for the files of the cache, which every run writes anew; None keeps it in memory.
    """
    size = length * image_size**2 * 4
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        for file in CACHE_FILES:  # left by the run that this one resumes: they would take the room twice
            (folder / file).unlink(missing_ok=True)
    room = shutil.disk_usage(folder).free if folder else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > 0.9 * room:
        stop(f"--cache: {length} photographs take {size / 1e9:.1f} GB, of {room / 1e9:.1f} GB; use --cache none")

    def make_array(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.memmap(folder / name, np.uint8, "w+", shape=shape) if folder else np.empty(shape, np.uint8)

    images = make_array(CACHE_FILES[0], (length, image_size, image_size, 3))
    masks = make_array(CACHE_FILES[1], (length, image_size, image_size))

    def load_once(index: tf.Tensor) -> ImageAndMask:
        return call_numpy(load.finish, load.read(index), image_size)

    def from_cache(index: int) -> Pixels:
        return images[index], masks[index]

    loaded = tf.data.Dataset.range(length).map(load_once, num_parallel_calls=workers or None).as_numpy_iterator()
    for index, (image, mask) in enumerate(tqdm(loaded, "caching", length, unit="image", disable=None)):
        images[index], masks[index] = image, mask
    return Load(lambda index: [index], from_cache)  # TensorFlow has nothing to read


def find_damaged_file(paths: pd.DataFrame) -> str | None:
    """What is wrong with the first file that is so, beginning with its path; it has become so since it was prepared.

    tf.data says that a file is damaged, but not which, so this looks for it when that has happened.
    """
    for image_path, mask_path in zip(paths["images"], paths["masks"], strict=True):
        pixels = []
        for path, channels in [(image_path, 3), (mask_path, 1)]:
            try:
                pixels.append(tf.io.decode_png(tf.io.read_file(path), channels).numpy())
            except UNREADABLE:
                return f"{path} is missing or damaged"
        image, mask = pixels
        if image.shape[:2] != mask.shape[:2]:
            return f"{mask_path} has another size than its photograph"
        if mask.max() not in (0, 255):
            return f"{mask_path} has other values than 0 and 255"
    return None
