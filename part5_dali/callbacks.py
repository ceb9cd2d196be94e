"""What happens after a batch and after an epoch: metrics, pictures, checkpoints, an early end.

Article:
https://hphuongdhsp.github.io/ml-blog/pytorchlightning/semanticsegmentation/deeplearning/2022/08/04/segmentation-model-part3.html
"""

import argparse
import json
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import Callback, RichProgressBar
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from image_files import overlay
from model import Normalize, to_labels
from runs import epochs_since_best, write_metrics
from utils import stop

GRID_EVERY = 5  # epochs from one grid of predictions to the next
READ_EVERY = 20  # steps from one look at what a GPU has worked out to the next


def create_logger(args: argparse.Namespace, run_dir: Path) -> Logger | bool:
    """The logger of --log, in the first of several processes; WANDB_MODE=offline needs no account."""
    if rank_zero_only.rank > 0:
        return False
    if args.log == "tensorboard":
        return TensorBoardLogger(run_dir / "logs", name="", version="tensorboard")
    if args.log == "wandb":
        id_file = run_dir / "logs" / "wandb_id.txt"  # a run that goes on, goes on in W&B as well
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        config = json.loads((run_dir / "config.json").read_text())
        project = {"project": "nails-segmentation", "id": id_file.read_text(), "resume": "allow"}
        return WandbLogger(save_dir=run_dir / "logs", config=config, **project)
    return False


def is_time_to_read(trainer: pl.Trainer) -> bool:
    """Whether to look, after this step, at what the device has worked out.

    Python hands over a step while the GPU still works on the one before. To read a result, it waits until the GPU has
    finished; then the GPU waits for Python. Read after each step, a step took 1.2 to 1.4 times as long
    (benchmarks/README.md).
    """
    on_gpu = trainer.strategy.root_device.type != "cpu"
    return not on_gpu or trainer.global_step % READ_EVERY == 1 or trainer.is_last_batch


def on_any_process(trainer: pl.Trainer, happened: bool) -> bool:
    """Whether it happened in any of the processes: they have to stop together, or wait for each other for ever."""
    return trainer.strategy.reduce_boolean_decision(happened, all=False)


class ProgressBar(RichProgressBar):
    """Lightning's, that is not drawn a hundred times a second, and does not read the loss after each step.

    What is logged with prog_bar=True, Lightning reads after each step, with and without a bar.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=10, leave=False)
        self.metrics: dict[str, Any] = {}  # as they were read last

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        if is_time_to_read(trainer) and (loss := trainer.callback_metrics.get("train_loss")) is not None:
            self.metrics = {"train_loss": loss.item()}
        return self.metrics


class StopIfNotFinite(Callback):
    """Ends the run after a loss that is nan or infinite, before weights that make such losses are saved."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []  # of the steps since the last look

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"])
        if is_time_to_read(trainer):
            self.check_steps(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.losses:  # that nobody has looked at: the run is interrupted within an epoch
            self.check_steps(trainer)

    def check_steps(self, trainer: pl.Trainer) -> None:
        """Leave with a message if a loss since the last look is nan or infinite."""
        losses, self.losses = torch.stack(self.losses), []
        self.check(trainer, losses, f"by step {trainer.fit_loop.batch_idx + 1} of this epoch")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.check(trainer, trainer.callback_metrics["val_loss"], "in validation")

    def check(self, trainer: pl.Trainer, losses: torch.Tensor, when: str) -> None:
        """Leave with a message if one of these losses is nan or infinite."""
        if on_any_process(trainer, not torch.isfinite(losses).all()):
            stop(
                f"the loss is nan or infinite {when}. Start again in another --work_dir, with a smaller "
                "--learning_rate, with --gradient_clip 1, or with --mixed_precision False",
                code=1,
            )


class MetricsLog(Callback):
    """Prints a line and writes a row of metrics.csv for each epoch.

    `rows` starts with those of the epochs before --resume, so that early stopping, after `patience` epochs
    without a better one, counts on.
    """

    def __init__(self, run_dir: Path, rows: list[dict[str, float]], patience: int | None) -> None:
        self.run_dir = run_dir
        self.rows = rows
        self.patience = patience
        self.losses: list[torch.Tensor] = []  # of the steps of this epoch

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses = [loss.cpu() for loss in state_dict["losses"]]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on_train_epoch_start(trainer, pl_module)  # not called for an epoch that goes on in its middle

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.began, self.images = time.perf_counter(), 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning has divided it, so that the gradients of several batches become a mean.
        self.losses.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)
        self.images += len(batch[0]) * trainer.world_size

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.trained = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        train_loss = torch.stack([loss.to(pl_module.device) for loss in self.losses]).mean()
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
        row = {
            "epoch": trainer.current_epoch + 1,
            "train_loss": trainer.strategy.reduce(train_loss, reduce_op="mean").item(),
            "val_loss": metrics.pop("val_loss"),
            "val_iou": metrics.pop("val_iou"),
            "val_f1": metrics.pop("val_f1"),
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "seconds": time.perf_counter() - self.began,
            "images_per_second": self.images / (self.trained - self.began),
            **metrics,
        }
        self.losses = []
        self.rows.append(row)
        if trainer.is_global_zero:
            write_metrics(self.run_dir, self.rows)
        more = {name: row[name] for name in ["train_loss", "learning_rate", "seconds", "images_per_second"]}
        for logger in trainer.loggers:  # they have got those of validation from the module
            logger.log_metrics(more, trainer.global_step)
        trainer.print(
            f"epoch {row['epoch']}/{trainer.max_epochs}: loss {row['train_loss']:.4f}, in validation "
            f"{row['val_loss']:.4f}, IoU {row['val_iou']:.4f}, F1 {row['val_f1']:.4f}; {row['seconds']:.1f} s"
        )
        if self.patience and epochs_since_best(self.rows) >= self.patience:
            trainer.print(f"no better IoU in {self.patience} epochs: stopping early")
            trainer.should_stop = True


class PredictionGrid(Callback):
    """Draws some photographs for validation, their truth and the prediction, every few epochs.

    The picture is predictions/validation.png, and in TensorBoard or W&B one for each time.
    """

    def __init__(self, run_dir: Path, images: np.ndarray, masks: np.ndarray) -> None:
        """`images`: uint8 (N, S, S, 3); `masks`: uint8 (N, S, S) of labels."""
        self.run_dir, self.images, self.masks = run_dir, images, masks

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        is_due = epoch % GRID_EVERY == 0 or epoch == trainer.max_epochs
        if trainer.sanity_checking or not trainer.is_global_zero or not is_due:
            return
        normalize = Normalize().to(pl_module.device)
        with trainer.precision_plugin.forward_context():  # as in training, whose kernels are loaded already
            logits = pl_module(normalize(torch.from_numpy(self.images).to(pl_module.device)))
        preds = to_labels(logits).cpu().numpy()
        columns = [
            np.vstack([image, overlay(image, mask), overlay(image, pred)])
            for image, mask, pred in zip(self.images, self.masks, preds, strict=True)
        ]
        grid = np.hstack(columns)
        file = self.run_dir / "predictions" / "validation.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(grid).save(file, compress_level=1)  # training waits meanwhile
        title = "photograph, truth, prediction"
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(title, grid, trainer.global_step, dataformats="HWC")
            elif isinstance(logger, WandbLogger):
                logger.log_image(title, [grid], trainer.global_step)
