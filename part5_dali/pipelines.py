"""What NVIDIA DALI does for a batch: read, decode, resize and augment, in threads of its own, or on the GPU.

Article:
https://hphuongdhsp.github.io/ml-blog/pytorchlightning/semanticsegmentation/deeplearning/dali/2022/08/06/segmentation-model-part5.html
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.pipeline import DataNode
from nvidia.dali.plugin.pytorch import DALIGenericIterator

from utils import stop

Batches = list[list[tuple[str, str]]]  # of paths: a photograph and its mask
AHEAD = 2  # batches that DALI makes while the network is busy with another


def path_bytes(batches: Batches) -> Iterator[tuple[list[np.ndarray], ...]]:
    """The paths as DALI takes them: batch by batch, images and masks, each a list of bytes."""
    for batch in batches:
        yield tuple([np.frombuffer(path.encode(), np.uint8) for path in paths] for paths in zip(*batch, strict=True))


def load(batches: Batches, image_size: int, classes: int) -> tuple[DataNode, ...]:
    """The base of both pipelines: files that are read, decoded and resized.

    Returns:
        Images, uint8 (S, S, 3) RGB in [0, 255]; masks, uint8 (S, S, 1), labels from 0 to classes - 1; and, always on
        the CPU, what the files held: height and width of image and mask, and the highest value of the mask.
    """
    on_gpu = Pipeline.current().device_id is not None
    # One source for both. Two readers, each with its own shuffling, can get out of step.
    image_path, mask_path = fn.external_source(path_bytes(batches), num_outputs=2, dtype=types.UINT8, ndim=1)
    image_file, mask_file = fn.io.file.read(image_path), fn.io.file.read(mask_path)
    if batches[0][0][0].endswith(".npy"):
        images = fn.reshape(fn.decoders.numpy(image_file), layout="HWC")
        masks = fn.expand_dims(fn.reshape(fn.decoders.numpy(mask_file), layout="HW"), axes=2, new_axis_names="C")
    else:
        # "mixed" begins on the CPU and ends on the GPU. JPEGs it decodes there, PNGs still on the CPU.
        images = fn.decoders.image(image_file, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
        masks = fn.decoders.image(mask_file, output_type=types.GRAY)
    highest = fn.cast(fn.reductions.max(masks, axes=[0, 1]), dtype=types.INT64)
    found = fn.cat(images.shape()[:2], masks.shape()[:2], highest)
    if classes == 1:
        masks = fn.cast(masks // 255, dtype=types.UINT8)
    if on_gpu:
        images, masks = images.gpu(), masks.gpu()
    size = [image_size, image_size]
    images = fn.resize(images, size=size, interp_type=types.INTERP_LINEAR)  # shrinking without aliasing
    masks = fn.resize(masks, size=size, interp_type=types.INTERP_NN)
    return images, masks, found


@pipeline_def
def valid_pipeline(batches: Batches, image_size: int, classes: int) -> tuple[DataNode, ...]:
    """Nothing random: the photographs, whatever their shape, as the squares that the network wants."""
    return load(batches, image_size, classes)


@pipeline_def(enable_conditionals=True)  # an `if` is then asked for each photograph of a batch
def train_pipeline(batches: Batches, image_size: int, classes: int) -> tuple[DataNode, ...]:
    """What may differ between two photographs of the same hand: part 3's augmentation, step by step, in DALI.

    What moves an image moves its mask by the same numbers. Masks are not touched by changes of colour.
    """
    images, masks, found = load(batches, image_size, classes)

    horizontal, vertical = fn.random.coin_flip(), fn.random.coin_flip()
    images = fn.flip(images, horizontal=horizontal, vertical=vertical)
    masks = fn.flip(masks, horizontal=horizontal, vertical=vertical)

    if fn.random.coin_flip():
        middle = [image_size / 2, image_size / 2]
        matrix = fn.transforms.rotation(angle=fn.random.uniform(range=[-30, 30]), center=middle)
        matrix = fn.transforms.scale(matrix, scale=fn.random.uniform(range=[0.8, 1.2], shape=[2]), center=middle)
        offset = fn.random.uniform(range=[-0.1 * image_size, 0.1 * image_size], shape=[2])
        matrix = fn.transforms.translation(matrix, offset=offset)
        # Without fill_value the border goes on outside; black corners would be a hint about the angle.
        images = fn.warp_affine(
            images, matrix=matrix, inverse_map=False, fill_value=None, interp_type=types.INTERP_LINEAR
        )
        masks = fn.warp_affine(masks, matrix=matrix, inverse_map=False, fill_value=None, interp_type=types.INTERP_NN)

    if fn.random.coin_flip():
        images = fn.color_twist(
            images,
            brightness=fn.random.uniform(range=[0.8, 1.2]),
            contrast=fn.random.uniform(range=[0.8, 1.2]),
            saturation=fn.random.uniform(range=[0.8, 1.2]),
            hue=fn.random.uniform(range=[-18, 18]),  # degrees: a twentieth of the circle
        )
    if fn.random.coin_flip(probability=0.1):
        images = fn.gaussian_blur(images, sigma=fn.random.uniform(range=[0.3, 1.0]), window_size=5)
    if fn.random.coin_flip(probability=0.1):
        images = fn.noise.gaussian(images, stddev=fn.random.uniform(range=[0.01 * 255, 0.05 * 255]))
    return images, masks, found


class LightningWrapper:
    """What Lightning takes for a DataLoader: it can be gone through again and again, has a length and a sampler.

    The article's wrapper is one DALI iterator for the whole run. Here each epoch has its own, which costs some
    hundredths of a second: an epoch that was abandoned, as by Lightning's sanity check, leaves nothing behind,
    and what an epoch draws at random follows from seed and epoch, also after --resume.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: Sequence[tuple[int, int]] | Any,
        batch_size: int,
        threads: int,
        device_id: int | None = None,
        rank: int = 0,
        start: tuple[int, int] = (0, 0),
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            dataset: a NailDataset; it knows the paths, and what a file should be.
            sampler: (epoch, index) of this process's photographs, in their order.
            batch_size: of this process.
            threads: of the CPU, for this process.
            device_id: the number of the GPU, or None.
            rank: the number of this process.
            start: (epoch, n): skip the first n batches of that epoch.
        """
        self.dataset, self.sampler, self.batch_size = dataset, sampler, batch_size
        self.batch_sampler = None  # Lightning asks for it, as DataLoaders have one
        self.threads, self.device_id, self.rank, self.start = threads, device_id, rank, start

    def __len__(self) -> int:
        return math.ceil(len(self.sampler) / self.batch_size)

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        """Batches of images, uint8 (N, S, S, 3), and masks, uint8 (N, S, S); the last one may be smaller."""
        places = list(self.sampler)
        epoch = places[0][0]
        indices = [index for _, index in places]
        batches = [indices[first : first + self.batch_size] for first in range(0, len(indices), self.batch_size)]
        done = self.start[1] if epoch == self.start[0] else 0
        # By default its first batch is made here, outside of the `try` below.
        pipelines, names = [self.build(batches, epoch)], ["images", "masks", "found"]
        iterator = DALIGenericIterator(pipelines, names, prepare_first_batch=False)
        for number, batch in enumerate(batches):
            try:
                output = next(iterator)[0]
            except RuntimeError:
                # DALI does not always name the file. It is in this batch, or in one of those it makes ahead.
                first = number * self.batch_size
                for index in indices[first : first + (AHEAD + 1) * self.batch_size]:
                    self.dataset.load(index)
                raise
            for index, found in zip(batch, output["found"].tolist(), strict=True):
                if not self.dataset.is_as_it_should_be(index, found):
                    self.dataset.load(index)
                    raise RuntimeError(f"{self.dataset.image_paths[index]}: DALI and OpenCV read different things")
            # What had its turn is gone through once more, so that DALI's random numbers come to where they were.
            if number >= done:
                yield [output["images"], output["masks"].squeeze(3)]

    def build(self, batches: list[list[int]], epoch: int) -> Pipeline:
        """The pipeline of an epoch; leaves with a message if DALI cannot use the GPU."""
        pairs = list(zip(self.dataset.image_paths, self.dataset.mask_paths, strict=True))
        make_pipeline = valid_pipeline if self.dataset.seed is None else train_pipeline
        place = [self.dataset.seed or 0, self.rank, epoch]
        try:
            pipeline = make_pipeline(
                [[pairs[index] for index in batch] for batch in batches],
                self.dataset.image_size,
                self.dataset.classes,
                batch_size=self.batch_size,
                num_threads=self.threads,
                device_id=self.device_id,
                prefetch_queue_depth=AHEAD,
                seed=int(np.random.SeedSequence(place).generate_state(1)[0]),
            )
            pipeline.build()
        except RuntimeError as error:
            if self.device_id is None:
                raise
            reason = str(error).strip().splitlines()[-1]
            stop(f"--device {self.device_id}: DALI cannot use this GPU ({reason}); use --loader torch, or --device cpu")
        return pipeline
