"""What part 1 is compared with: a `Sequence` and `fit`, as users of segmentation_models and Keras 2 write them.

Follows the example notebooks of segmentation_models (github.com/qubvel/segmentation_models, examples): OpenCV reads,
albumentations augments, a `Sequence` makes batches, `fit` trains, ReduceLROnPlateau lowers the learning rate. How a
`Sequence` is loaded by several workers is in the documentation of Keras 2 (tf.keras.Model.fit).

    .venv-tf/bin/python benchmarks/peers/keras_sequence.py --data_root DATA --work_dir DIR --epochs 5 --image_size 128 \
        --batch_size 8 --learning_rate 3e-3 --workers 2 --encoder resnet18
"""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TF_USE_LEGACY_KERAS"] = "1"  # Keras 2, for which segmentation_models is written
os.environ["SM_FRAMEWORK"] = "tf.keras"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else albumentations asks the network for its newest version

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import segmentation_models as sm
import tensorflow as tf

Batch = tuple[np.ndarray, np.ndarray]


def parse_args() -> argparse.Namespace:
    """The flags that all peers share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    types = {"data_root": Path, "work_dir": Path, "epochs": int, "image_size": int, "batch_size": int}
    for name, kind in (types | {"learning_rate": float, "workers": int}).items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--encoder", default="resnet18")
    return parser.parse_args()


def train_transform(image_size: int) -> A.Compose:
    """Resize, then flips, affine, colour, and sometimes blur or noise."""
    return A.Compose(
        [
            A.Resize(image_size, image_size),
            A.HorizontalFlip(p=0.5),
            A.VerticalFlip(p=0.5),
            A.Affine(rotate=(-30, 30), scale=(0.8, 1.2), translate_percent=(-0.1, 0.1), p=0.5),
            A.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05, p=0.5),
            A.GaussianBlur(p=0.1),
            A.GaussNoise(std_range=(0.01, 0.05), p=0.1),
        ]
    )


class NailSequence(tf.keras.utils.Sequence):
    """Batches of images, float32 (N, S, S, 3) as the encoder wants them, and masks, float32 (N, S, S, 1) of 0 and 1."""

    def __init__(
        self, data_root: Path, csv_file: str, transform: A.Compose, train: bool, preprocess: Callable, batch_size: int
    ) -> None:
        """`train`: shuffle after each epoch, and leave the last batch out if it is not full."""
        paths = pd.read_csv(data_root / "csv_file" / csv_file)
        self.image_paths = [str(data_root / path) for path in paths["images"]]
        self.mask_paths = [str(data_root / path) for path in paths["masks"]]
        self.transform, self.preprocess = transform, preprocess
        self.batch_size, self.train = batch_size, train
        self.indexes = np.arange(len(paths))
        self.on_epoch_end()

    def __len__(self) -> int:
        batches = len(self.indexes) / self.batch_size
        return math.floor(batches) if self.train else math.ceil(batches)

    def __getitem__(self, index: int) -> Batch:
        chosen = self.indexes[index * self.batch_size : (index + 1) * self.batch_size]
        images, masks = zip(*[self.load(i) for i in chosen], strict=True)
        return self.preprocess(np.stack(images).astype(np.float32)), np.stack(masks).astype(np.float32)[..., np.newaxis]

    def load(self, i: int) -> Batch:
        """One image, uint8 (S, S, 3), and its mask, uint8 (S, S) of 0 and 1."""
        image = cv2.cvtColor(cv2.imread(self.image_paths[i]), cv2.COLOR_BGR2RGB)
        mask = cv2.imread(self.mask_paths[i], cv2.IMREAD_GRAYSCALE) // 255
        transformed = self.transform(image=image, mask=mask)
        return transformed["image"], transformed["mask"]

    def on_epoch_end(self) -> None:
        if self.train:
            np.random.shuffle(self.indexes)


class PeerLog(tf.keras.callbacks.Callback):
    """Writes the IoU in validation to peer.csv, after each epoch."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        file.write_text("epoch,val_iou\n")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        with self.file.open("a") as file:
            file.write(f"{epoch + 1},{logs['val_iou']}\n")


def main() -> None:
    """Data, model, fit."""
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    tf.keras.utils.set_random_seed(42)  # as train.py
    preprocess = sm.get_preprocessing(args.encoder)
    size = args.image_size
    settings = {"preprocess": preprocess, "batch_size": args.batch_size}
    train_loader = NailSequence(args.data_root, "train.csv", train_transform(size), train=True, **settings)
    valid_loader = NailSequence(args.data_root, "valid.csv", A.Compose([A.Resize(size, size)]), train=False, **settings)

    model = sm.Unet(args.encoder, encoder_weights=None, classes=1, activation="sigmoid")
    # sm.metrics.IOUScore is a mean over batches; this one of Keras counts pixels over the whole set, as the parts do.
    iou = tf.keras.metrics.BinaryIoU(target_class_ids=[1], threshold=0.5, name="iou")
    model.compile(tf.keras.optimizers.AdamW(args.learning_rate), sm.losses.DiceLoss(), [iou])

    weights = str(args.work_dir / "best.weights.h5")
    best = {"monitor": "val_iou", "mode": "max", "save_best_only": True, "save_weights_only": True}
    log = PeerLog(args.work_dir / "peer.csv")
    model.fit(
        train_loader,
        epochs=args.epochs,
        validation_data=valid_loader,
        callbacks=[log, tf.keras.callbacks.ModelCheckpoint(weights, **best), tf.keras.callbacks.ReduceLROnPlateau()],
        workers=args.workers,
    )


if __name__ == "__main__":
    main()
