"""From the paths in a CSV file to batches: a LightningDataModule that augments them with Kornia.

Article:
https://hphuongdhsp.github.io/ml-blog/pytorchlightning/semanticsegmentation/deeplearning/kornia/2022/08/05/segmentation-model-part4.html
"""

import argparse
import math
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from augmentation import Augmentation
from model import Normalize
from shared_memory import stack
from transform import valid_transform
from utils import stop

cv2.setNumThreads(1)  # there is a worker for each core; OpenCV's own threads would only be in their way

EpochAndIndex = tuple[int, int]  # what the samplers draw: in which epoch, and which photograph
Sample = tuple[np.ndarray, np.ndarray, EpochAndIndex]


PREPARE_AGAIN = "run data_preparation.py again, with the same flags"


class DamagedFile(Exception):  # noqa: N818 - it is the file that is bad
    """A file that has become unusable since it was prepared; the message is its path, the reason and what to do."""


def load_data_path(data_root: Path, csv_file: str) -> pd.DataFrame:
    """The table <data_root>/csv_file/<csv_file>, its paths (columns images and masks) with data_root before them.

    Leaves with a message if the file is missing or damaged, or if a path is none below data_root.
    """
    file = data_root / "csv_file" / csv_file
    try:
        table = pd.read_csv(file, dtype=str, encoding="utf-8-sig", keep_default_na=False)
        paths = pd.concat([table["images"], table["masks"]])
    except FileNotFoundError:
        stop(f"{data_root} has no csv_file/{csv_file}; first run data_preparation.py --data_root {data_root}")
    except (KeyError, ValueError, OSError) as error:
        stop(f"{file} is damaged ({error}); {PREPARE_AGAIN}")
    if table.empty:
        stop(f"{file} names no photographs; {PREPARE_AGAIN}")
    for path in paths:
        if not path or path.startswith("/") or ".." in path.split("/"):
            stop(f"{file}: {path!r} is no file below {data_root}; {PREPARE_AGAIN}")
    return table.assign(images=f"{data_root}/" + table["images"], masks=f"{data_root}/" + table["masks"])


def read_png(path: str, flags: int) -> np.ndarray:
    """The pixels of a PNG file; raises DamagedFile."""
    try:
        content = np.fromfile(path, np.uint8)
        pixels = cv2.imdecode(content, flags) if content.size else None
    except OSError as error:
        raise DamagedFile(f"{path}: {error.strerror}; {PREPARE_AGAIN}") from error
    except cv2.error as error:
        raise DamagedFile(f"{path}: larger than OpenCV reads; {PREPARE_AGAIN}") from error
    if pixels is None:
        raise DamagedFile(f"{path}: empty or damaged; {PREPARE_AGAIN}")
    return pixels


class NailDataset(Dataset):
    """Photographs and their masks, resized to the network's input."""

    def __init__(self, paths: pd.DataFrame, image_size: int, classes: int) -> None:
        self.image_paths, self.mask_paths = paths["images"].tolist(), paths["masks"].tolist()
        self.image_size, self.classes = image_size, classes
        self.resize = valid_transform(image_size)
        self.cached: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.image_paths)

    def __getitem__(self, epoch_and_index: EpochAndIndex) -> Sample:
        """Image uint8 (S, S, 3) in [0, 255], and mask uint8 (S, S): 0 and 1, or the labels 0 to classes - 1."""
        _, index = epoch_and_index
        image, mask = (self.cached[0][index], self.cached[1][index]) if self.cached else self.load(index)
        return image, mask, epoch_and_index

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Read and resize photograph `index` and its mask; raises DamagedFile."""
        image = read_png(self.image_paths[index], cv2.IMREAD_COLOR_RGB)
        mask = read_png(self.mask_paths[index], cv2.IMREAD_GRAYSCALE)
        if mask.shape != image.shape[:2]:
            raise DamagedFile(f"{self.mask_paths[index]}: not as large as its photograph; {PREPARE_AGAIN}")
        highest = mask.max()
        if self.classes == 1 and highest in (0, 255):
            mask = mask // 255
        elif self.classes == 1 or highest >= self.classes:
            # On a GPU, a label that the network has no output for ends in an error that names nothing.
            way = (
                "leave --classes away" if highest == 255 else "give data_preparation.py and train.py the same --classes"
            )
            raise DamagedFile(
                f"{self.mask_paths[index]}: has the value {highest}, not of --classes {self.classes}; {way}"
            )
        resized = self.resize(image=image, mask=mask)
        return resized["image"], resized["mask"]

    def cache(self, workers: int) -> None:
        """Read and resize all photographs now and keep them; the loader's processes share this memory."""
        images = np.empty((len(self), self.image_size, self.image_size, 3), np.uint8)
        masks = np.empty(images.shape[:3], np.uint8)
        with ThreadPoolExecutor(workers or 1) as pool:
            loaded = tqdm(pool.map(self.load, range(len(self))), "caching", len(self), unit="image", disable=None)
            for index, (image, mask) in enumerate(loaded):
                images[index], masks[index] = image, mask
        self.cached = images, masks


class ShuffledEpochs(Sampler):
    """(epoch, index) of the photographs in the order of training; each of several processes gets its share.

    The order follows from seed and epoch alone, so a run that goes on at epoch 7 gets that of epoch 7.
    """

    def __init__(self, length: int, used: int, seed: int, rank: int = 0, ranks: int = 1) -> None:
        """An epoch uses the first `used` of its `length` photographs; what does not fill a batch is left out."""
        self.length, self.used, self.seed = length, used, seed
        self.rank, self.ranks = rank, ranks
        self.epoch = 0
        self.start = (0, 0)  # (epoch, number): in that epoch the first ones, so many, had their turn already

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[EpochAndIndex]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)[: self.used]
        epoch, done = self.start
        mine = order[self.rank :: self.ranks][done if self.epoch == epoch else 0 :]
        return ((self.epoch, int(index)) for index in mine)

    def __len__(self) -> int:
        return self.used // self.ranks


def collate(samples: list[Sample], augmentation: Augmentation | None = None) -> list[Any]:
    """A batch of images, masks, and the epoch and index of its first photograph.

    With `augmentation`, for --augment_on cpu, it is augmented here, in one of the loader's processes.
    """
    all_images, all_masks, places = zip(*samples, strict=True)
    if augmentation is None:
        return [stack(all_images), stack(all_masks), places[0]]
    images, masks = torch.from_numpy(np.stack(all_images)), torch.from_numpy(np.stack(all_masks))
    images, masks = augmentation(images, masks, *places[0])
    # Once more, to the memory that is shared.
    return [stack(list(images.numpy())), stack(list(masks.numpy())), places[0]]


def ignore_ctrl_c(worker: int) -> None:
    """A terminal sends Ctrl-C to all processes; the main one decides when the loader's have done their work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class NailDataModule(pl.LightningDataModule):
    """The loaders for training and validation."""

    def __init__(self, args: argparse.Namespace, train_paths: pd.DataFrame, valid_paths: pd.DataFrame) -> None:
        """`args`: the flags batch_size, image_size, classes, workers, cache, augment_on, seed and limit_batches."""
        super().__init__()
        self.args = args
        self.devices = len(args.device) * args.num_nodes
        if args.batch_size % self.devices:
            stop(f"--batch_size {args.batch_size} cannot be shared equally by {self.devices} devices")
        if len(train_paths) < args.batch_size:
            stop(f"--batch_size {args.batch_size}: there are only {len(train_paths)} photographs to train with")
        if len(valid_paths) < self.devices:
            stop(f"--device: {len(valid_paths)} photographs for validation are too few for {self.devices} devices")
        self.steps = len(train_paths) // args.batch_size
        if args.limit_batches:
            self.steps = min(self.steps, args.limit_batches)
            few = min(len(valid_paths), args.limit_batches * args.batch_size)
            # Evenly spread, because they are sorted: a first look shall see each larger source.
            valid_paths = valid_paths.iloc[np.linspace(0, len(valid_paths) - 1, few).round().astype(int)]
        self.train_dataset = NailDataset(train_paths, args.image_size, args.classes)
        self.valid_dataset = NailDataset(valid_paths, args.image_size, args.classes)
        self.normalize = Normalize()
        self.augmentation = Augmentation(args.seed)
        self.start = {"epoch": 0, "step": 0}

    def setup(self, stage: str) -> None:
        """Called once in every process."""
        if self.args.cache == "memory" and not self.train_dataset.cached:
            number = (len(self.train_dataset) + len(self.valid_dataset)) * len(self.args.device)  # each process has all
            needed = number * self.args.image_size**2 * 4
            there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            if needed > 0.9 * there:
                stop(f"--cache memory: it takes {needed / 1e9:.1f} GB, of {there / 1e9:.1f} GB; use --cache none")
            self.train_dataset.cache(self.args.workers)
            self.valid_dataset.cache(self.args.workers)

    def train_dataloader(self) -> DataLoader:
        """Batches of images, uint8 (N, S, S, 3), and masks, uint8 (N, S, S), in another order each epoch.

        With --augment_on cpu they are already as on_after_batch_transfer returns them.
        """
        trainer = self.trainer
        used = self.steps * self.args.batch_size
        sampler = ShuffledEpochs(len(self.train_dataset), used, self.args.seed, trainer.global_rank, trainer.world_size)
        sampler.start = self.start["epoch"], self.start["step"] * self.args.batch_size // self.devices
        # Lightning makes the loader's first batches before it sets the epoch.
        sampler.set_epoch(self.start["epoch"])
        augmentation = self.augmentation if self.args.augment_on == "cpu" else None
        return self.create_loader(self.train_dataset, sampler, partial(collate, augmentation=augmentation))

    def val_dataloader(self) -> DataLoader:
        """The same without chance, and each photograph exactly once: its share for each of several processes."""
        mine = range(self.trainer.global_rank, len(self.valid_dataset), self.trainer.world_size)
        return self.create_loader(self.valid_dataset, [(0, index) for index in mine])

    def create_loader(self, dataset: NailDataset, sampler: Any, collate_fn: Any = collate) -> DataLoader:
        """A loader whose processes live as long as the run."""
        workers = math.ceil(self.args.workers / len(self.args.device))  # those of the machine, dealt to its devices
        return DataLoader(
            dataset,
            self.args.batch_size // self.devices,
            sampler=sampler,
            collate_fn=collate_fn,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=ignore_ctrl_c,
            pin_memory=self.args.device[0] != "cpu",  # the copy to the GPU can then run while it computes
            generator=torch.Generator(),  # of its own: else it would draw from the numbers of dropout
        )

    def sample_batch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """`number` photographs for validation, evenly spread, or all if there are fewer, as one batch."""
        indices = np.linspace(0, len(self.valid_dataset) - 1, min(number, len(self.valid_dataset))).round()
        images, masks = zip(*[self.valid_dataset.load(int(index)) for index in indices], strict=True)
        return np.stack(images), np.stack(masks)

    def on_after_batch_transfer(self, batch: list[Any], dataloader_idx: int) -> tuple[torch.Tensor, ...]:
        """On the device: images travel there as uint8, a quarter of the bytes of float32, and are augmented there."""
        images, masks, (epoch, index) = batch
        if not self.trainer.training:
            return self.normalize.to(images.device)(images), masks.long()
        if self.args.augment_on == "cpu":
            return images, masks
        return self.augmentation.to(images.device)(images, masks, epoch, index)

    def state_dict(self) -> dict[str, int]:
        """Where a run that goes on from the checkpoint that is just being saved has to begin."""
        # Begun in this epoch; after its last step that is step 0 of the next.
        steps = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        epochs, step = divmod(self.trainer.current_epoch * self.steps + steps, self.steps)
        return {"epoch": epochs, "step": step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.start = state_dict
