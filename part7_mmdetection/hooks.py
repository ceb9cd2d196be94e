"""What happens between the steps of MMEngine's Runner: chance, signals, metrics, pictures, checkpoints."""

import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmdet.visualization import DetLocalVisualizer
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from PIL import Image
from torch.utils.data import get_worker_info
from tqdm import tqdm

from runs import epochs_since_best, write_metrics
from utils import stop

GRID_EVERY = 5  # epochs from one grid of predictions to the next


@HOOKS.register_module()
class SeedSteps(Hook):
    """Let what is drawn at random follow from seed, epoch and step, so that a run that goes on draws the same."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def before_train_epoch(self, runner: Runner) -> None:
        runner.train_dataloader.dataset.epoch.fill_(runner.epoch)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        # Mask R-CNN draws at random which boxes it learns from.
        place = [self.seed, runner.rank, runner.epoch, batch_idx]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))


@HOOKS.register_module()
class StopOnSignal(Hook):
    """After Ctrl-C or SIGTERM, finishes the step or the validation, and stops. A second Ctrl-C stops at once."""

    signals = 0  # that have come to this process

    def before_train(self, runner: Runner) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.take_note)

    def take_note(self, number: int, frame: Any) -> None:
        """Remember the signal; after_train_iter does what it asks for."""
        if get_worker_info():
            return  # one of the processes that load: the main one decides when they have done their work
        StopOnSignal.signals += 1
        # A scheduler's SIGTERM ends the processes that load, too; torch's handler would raise in the middle of a step.
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        if self.signals > 1 and number == signal.SIGINT:  # a scheduler may send SIGTERM twice, and means the same
            raise KeyboardInterrupt
        if self.signals == 1 and is_main_process():
            print("\nstopping after this step or the running validation; Ctrl-C again stops at once", flush=True)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        signaled = torch.tensor(self.signals > 0, dtype=torch.float32)
        all_reduce(signaled, "max")  # the processes have to stop together
        if signaled:
            raise KeyboardInterrupt


@HOOKS.register_module()
class EpochEnd(Hook):
    """After each epoch: a line, a row of metrics.csv, the checkpoints; and the end, if it gets no better.

    MMEngine's own CheckpointHook may be killed while it writes its file, and forgets which epoch was the best when the
    folder has been moved. Here a checkpoint is written beside and renamed, and the rows tell which is the best.
    """

    priority = "LOWEST"

    def __init__(self, run_dir: str, rows: list[dict[str, float]], patience: int | None, about: str) -> None:
        """`patience`: epochs without a better one until the run ends; `about`: what `describe` in model.py says."""
        self.run_dir, self.rows, self.patience, self.about = Path(run_dir), rows, patience, about

    def before_train_epoch(self, runner: Runner) -> None:
        self.began, self.images = time.perf_counter(), 0
        self.losses: list[torch.Tensor] = []
        hidden = None if is_main_process() else True  # None: seen in a terminal, but not in a file
        self.bar = tqdm(
            total=len(runner.train_dataloader), desc=f"epoch {runner.epoch + 1}", leave=False, disable=hidden
        )

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        refuse_not_finite([outputs["loss"]], f"the loss is nan or infinite at step {batch_idx + 1} of this epoch")
        self.losses.append(outputs["loss"].detach())
        self.images += len(data_batch["inputs"]) * runner.world_size
        self.bar.update()

    def after_train_epoch(self, runner: Runner) -> None:
        # What the last step made of the weights has not been through a loss yet.
        refuse_not_finite(list(runner.model.parameters()), "weights are nan or infinite")
        self.bar.close()
        self.trained = time.perf_counter()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Only what torch reads without executing it: no history of the logs, and the network as JSON."""
        checkpoint["message_hub"] = {"log_scalars": {}, "runtime_info": {}, "resumed_keys": {}}
        checkpoint["meta"] = {name: checkpoint["meta"][name] for name in ["epoch", "iter", "seed", "dataset_meta"]}
        checkpoint["meta"]["network"] = self.about

    def after_val_epoch(self, runner: Runner, metrics: Any = None) -> None:
        train_loss = torch.stack(self.losses).mean()
        all_reduce(train_loss, "mean")
        row = {
            "epoch": runner.epoch,
            "train_loss": train_loss.item(),
            "val_loss": None,  # MMDetection's networks give boxes in validation, and no loss
            "val_iou": float(metrics["union/iou"]),
            "val_f1": float(metrics["union/f1"]),
            "learning_rate": runner.optim_wrapper.get_lr()["lr"][0],
            "seconds": time.perf_counter() - self.began,
            "images_per_second": self.images / (self.trained - self.began),
            "bbox_mAP": metrics["coco/bbox_mAP"],
            "segm_mAP": metrics["coco/segm_mAP"],
        }
        self.rows.append(row)
        since_best = epochs_since_best(self.rows, "segm_mAP")
        if is_main_process():
            write_metrics(self.run_dir, self.rows)
            self.save(runner, is_best=since_best == 0)
            print(
                f"epoch {row['epoch']}/{runner.max_epochs}: loss {row['train_loss']:.4f}, in validation "
                f"bbox mAP {row['bbox_mAP']:.3f}, segm mAP {row['segm_mAP']:.3f}, IoU {row['val_iou']:.4f}; "
                f"{row['seconds']:.1f} s",
                flush=True,
            )
        runner.visualizer.add_scalars({name: value for name, value in row.items() if value is not None}, runner.epoch)
        if self.patience and since_best >= self.patience:
            if is_main_process():
                print(f"no better segm mAP in {self.patience} epochs: stopping early")
            runner.train_loop.stop_training = True

    def save(self, runner: Runner, is_best: bool) -> None:
        """Write last.pth with all that is needed to go on, and best.pth without what only training needs."""
        weights = self.run_dir / "weights"
        meta = {"epoch": runner.epoch, "iter": runner.iter}
        runner.save_checkpoint(str(weights), "last.tmp", meta=meta)
        best_beside = weights / "new.tmp"
        best_beside.unlink(missing_ok=True)  # of a run that ended while it wrote it
        if is_best:
            everything = torch.load(weights / "last.tmp", map_location="cpu", weights_only=True)
            try:
                with best_beside.open("wb") as file:
                    torch.save({name: everything[name] for name in ["meta", "state_dict"]}, file)
            except RuntimeError as error:  # torch's, when it closes what it could not write
                raise (error.__context__ or error) from None
            best_beside.replace(weights / "best.pth")
        # Last of all: if the run is killed before this, --resume repeats the epoch, and writes its best.pth again.
        (weights / "last.tmp").replace(weights / "last.pth")


def refuse_not_finite(values: list[torch.Tensor], what: str) -> None:
    """Leave with a message, that begins with `what`, if any of these numbers is nan or infinite in any process."""
    finite = torch.stack([torch.isfinite(one).all() for one in values]).all().float()
    all_reduce(finite, "mean")  # the processes have to stop together, or wait for each other for ever
    if finite < 1:
        stop(
            f"{what}. Start again in another --work_dir, with a smaller --learning_rate, or with "
            "--mixed_precision False",
            code=1,
        )


def create_artist(classes: Sequence[str]) -> DetLocalVisualizer:
    """What draws instances: so thin that the nail below is still seen, and in a colour that hands do not have."""
    artist = DetLocalVisualizer(line_width=3, alpha=0.3)
    artist.dataset_meta = {"classes": classes, "palette": [(0, 190, 255)] * len(classes)}
    return artist


@HOOKS.register_module()
class PredictionGrid(Hook):
    """Draws some photographs for validation with what was found, every few epochs.

    The picture is predictions/validation.png, truth above; in TensorBoard or W&B there is one for each time.
    """

    def __init__(self, run_dir: str, number: int = 8) -> None:
        self.file, self.number = Path(run_dir) / "predictions" / "validation.png", number

    def before_val_epoch(self, runner: Runner) -> None:
        self.samples: list[Any] = []

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.samples += outputs[: self.number - len(self.samples)]

    def after_val_epoch(self, runner: Runner, metrics: Any = None) -> None:
        is_due = runner.epoch % GRID_EVERY == 0 or runner.epoch == runner.max_epochs
        if not is_main_process() or not is_due:
            return
        artist = create_artist(runner.val_dataloader.dataset.metainfo["classes"])
        columns = []
        for sample in self.samples:
            photograph = mmcv.imread(sample.img_path, channel_order="rgb")
            artist.add_datasample("", photograph, sample, pred_score_thr=0.5, draw_gt=True)
            both = np.hsplit(artist.get_image(), 2)  # truth on the left
            cells = [mmcv.imrescale(picture, (256, 256)) for picture in both]
            columns.append(np.vstack([mmcv.impad(cell, shape=(256, 256), pad_val=(255, 255, 255)) for cell in cells]))
        grid = np.hstack(columns)
        self.file.parent.mkdir(exist_ok=True)
        Image.fromarray(grid).save(self.file, compress_level=1)  # training waits meanwhile
        runner.visualizer.add_image("truth, prediction", grid, step=runner.epoch)
