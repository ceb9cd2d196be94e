"""What happens after a batch and after an epoch: metrics, pictures, checkpoints, an early end.

Article, section 5.2 (logging):
https://hphuongdhsp.github.io/ml-blog/tensorflow/semanticsegmentation/deeplearning/2022/08/02/segmentation-model-part1.html
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

from errors import LOST
from image_files import overlay
from keras2 import tf
from model import random_generators
from runs import epochs_since_best, write_metrics
from utils import stop

GRID_EVERY = 5  # epochs from one grid of predictions to the next


class StopIfNotFinite(tf.keras.callbacks.Callback):
    """Ends the run at the first loss that is nan or infinite, before weights that make such losses are saved."""

    def on_train_batch_end(self, batch: int, logs: dict[str, float]) -> None:
        # logs["loss"] is the mean since the epoch began: one bad batch is enough to make it nan.
        self.check(logs["loss"], f"at step {batch + 1} of this epoch")

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        self.check(logs["val_loss"], "in validation")

    def check(self, loss: float, where: str) -> None:
        """Leave with a message if it is."""
        if not math.isfinite(loss):
            stop(
                f"the loss is {loss} {where}. Start again in another --work_dir, with a smaller --learning_rate, "
                "or with --mixed_precision False",
                code=1,
            )


class MetricsLog(tf.keras.callbacks.Callback):
    """Writes a row for each epoch to metrics.csv and, if asked for, to TensorBoard or W&B.

    `rows` starts with those of the epochs before --resume, so that early stopping counts on.
    """

    def __init__(
        self,
        run_dir: Path,
        rows: list[dict[str, float]],
        images_per_epoch: int,
        schedule: tf.keras.optimizers.schedules.LearningRateSchedule,
        args: argparse.Namespace,
    ) -> None:
        super().__init__()
        self.run_dir = run_dir
        self.rows = rows
        self.images_per_epoch = images_per_epoch
        self.schedule = schedule
        self.patience = args.early_stopping
        self.tensorboard = self.wandb = None
        if args.log == "tensorboard":
            self.tensorboard = tf.summary.create_file_writer(str(run_dir / "logs" / "tensorboard"))
        if args.log == "wandb":
            self.wandb = start_wandb(run_dir)

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self.began = time.perf_counter()

    def on_test_begin(self, logs: dict[str, float] | None = None) -> None:
        self.trained = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        row = {
            "epoch": epoch + 1,
            "train_loss": logs["loss"],
            "val_loss": logs["val_loss"],
            "val_iou": logs["val_iou"],
            "val_f1": logs["val_f1"],
            "learning_rate": float(self.schedule(self.model.optimizer.iterations)),
            "seconds": time.perf_counter() - self.began,
            "images_per_second": self.images_per_epoch / (self.trained - self.began),
            "train_iou": logs["iou"],
        }
        self.rows.append(row)
        write_metrics(self.run_dir, self.rows)
        if self.tensorboard:
            with self.tensorboard.as_default(step=epoch + 1):
                for name in list(row)[1:]:  # a curve of the epoch over the epochs tells nothing
                    tf.summary.scalar(name, row[name])
            self.tensorboard.flush()  # else a run that is killed loses its last two minutes
        if self.wandb:
            self.wandb.log(row, step=epoch + 1)
        if self.patience and epochs_since_best(self.rows) >= self.patience:
            print(f"no better IoU in {self.patience} epochs: stopping early")
            self.model.stop_training = True

    def log_image(self, image: np.ndarray, epoch: int) -> None:
        """Show a picture, uint8 (H, W, 3), in TensorBoard or W&B."""
        if self.tensorboard:
            with self.tensorboard.as_default(step=epoch + 1):
                tf.summary.image("photograph, truth, prediction", image[np.newaxis])
            self.tensorboard.flush()
        if self.wandb:
            import wandb

            self.wandb.log({"photograph, truth, prediction": wandb.Image(image)}, step=epoch + 1)


def start_wandb(run_dir: Path) -> Any:
    """A run of W&B with the flags of config.json; WANDB_MODE=offline needs no account."""
    import wandb  # only here: nobody else should need an account, or wait for the import

    config = json.loads((run_dir / "config.json").read_text())
    try:
        return wandb.init(project="nails-segmentation", dir=run_dir / "logs", config=config)
    except wandb.errors.Error as error:
        stop(f"--log wandb: {error}. Run 'wandb login' first, or set WANDB_MODE=offline")


class PredictionGrid(tf.keras.callbacks.Callback):
    """Draws some photographs for validation, their truth and the prediction, every few epochs.

    The picture is predictions/validation.png, and in TensorBoard or W&B one for each time.
    """

    def __init__(self, images: np.ndarray, masks: np.ndarray, log: MetricsLog) -> None:
        super().__init__()
        self.images, self.masks, self.log = images, masks, log

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        is_last = epoch + 1 == self.params["epochs"] or self.model.stop_training
        if (epoch + 1) % GRID_EVERY != 0 and not is_last:
            return
        preds = self.model.predict_on_batch(self.images)
        columns = [
            np.vstack([image, overlay(image, mask[..., 0] > 0.5), overlay(image, pred[..., 0] > 0.5)])
            for image, mask, pred in zip(self.images, self.masks, preds, strict=True)
        ]
        grid = np.hstack(columns)
        file = self.log.run_dir / "predictions" / "validation.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(grid).save(file, compress_level=1)  # training waits meanwhile
        self.log.log_image(grid, epoch)


class Checkpoints(tf.keras.callbacks.Callback):
    """Saves the weights of the best epoch, and after each epoch all that is needed to go on.

    `best.h5` holds the weights and, as an attribute, what predict.py has to know of the
    network. `last-N.*` is a checkpoint of TensorFlow after N epochs, with the optimizer. Both are
    written beside and then renamed, so a run that is killed while it saves leaves the ones before.
    """

    def __init__(self, model: tf.keras.Model, run_dir: Path, network: dict[str, Any]) -> None:
        """`network`: the arguments of `create_model` that predict.py needs."""
        super().__init__()
        self.weights_dir = run_dir / "weights"
        self.network = network
        self.epochs_done = tf.Variable(0, dtype=tf.int64)
        self.best_iou = tf.Variable(-1.0, dtype=tf.float64)
        self.checkpoint = tf.train.Checkpoint(
            model=model,
            optimizer=model.optimizer,
            dropout=random_generators(model),
            epochs_done=self.epochs_done,
            best_iou=self.best_iou,
        )
        self.manager = tf.train.CheckpointManager(
            self.checkpoint, self.weights_dir, max_to_keep=1, checkpoint_name="last"
        )

    def restore(self, weights_dir: Path) -> int:
        """Load the last checkpoint in `weights_dir`, if there is one; returns how many epochs are done.

        Leaves with a message if it is damaged.
        """
        last = tf.train.latest_checkpoint(weights_dir)
        # Killed while it saved for the first time, a run may have left the files of last-1, and begins anew.
        begun = [path.name for path in weights_dir.glob("last-*.index") if path.stem != "last-1"]
        try:
            if last:
                # "partial", because the loss scale of float16 is of no use to a run that goes on in another precision,
                # and TensorFlow would warn of it.
                self.checkpoint.restore(last).expect_partial()
            elif begun:
                raise ValueError(f"no file 'checkpoint', but {', '.join(begun)}")
        except (tf.errors.OpError, ValueError, IndexError) as error:  # the last one if the file is too short
            stop(f"--resume: {last or weights_dir} is damaged ({error}); start again in another --work_dir")
        return int(self.epochs_done.numpy())

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        try:
            self.remove_unfinished()
            if logs["val_iou"] > self.best_iou:
                self.best_iou.assign(logs["val_iou"])
                self.save_best()
            self.epochs_done.assign(epoch + 1)
            self.manager.save(checkpoint_number=epoch + 1)
        except LOST:
            raise
        except (tf.errors.OpError, RuntimeError) as error:  # RuntimeError is h5py's, of a full disk
            # Such as "{{…}} /path/last-2_temp/part-0; File too large [Op:SaveV2]".
            reason = str(error).split("; ")[-1].split(" [")[0]
            raise OSError(0, f"the checkpoint cannot be written, {reason}", str(self.weights_dir)) from error

    def remove_unfinished(self) -> None:
        """Remove what is left of a checkpoint in the middle of which a run ended: killed, or with a full disk."""
        (self.weights_dir / "new.h5").unlink(missing_ok=True)
        for folder in self.weights_dir.glob("last-*_temp"):  # TensorFlow's own, of last-*
            shutil.rmtree(folder)

    def save_best(self) -> None:
        """Write best.h5."""
        beside = self.weights_dir / "new.h5"
        self.model.save_weights(beside)
        with h5py.File(beside, "a") as file:
            file.attrs["network"] = json.dumps(self.network)
        beside.replace(self.weights_dir / "best.h5")
