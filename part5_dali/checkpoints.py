"""What a run leaves to go on from, also when it is interrupted; and what it then says."""

import contextlib
import errno
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint
from pytorch_lightning.plugins import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only

from callbacks import on_any_process
from dataloader import DamagedFile
from runs import epochs_since_best
from utils import resume_command, stop

# What gloo and NCCL say when a process that they wait for is gone.
LOST = ["Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "remote process"]
ENDED = "another process of this run has ended: see what it says, or what has killed it"
OUT_OF_MEMORY = "out of memory; try a smaller --batch_size or --image_size, or --mixed_precision True"
FULL = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG]  # the disk, one's share of it, or what a file may have


def epochs_done(last: Path) -> int:
    """How many epochs were finished when this checkpoint was saved; 0 if there is none.

    Leaves with a message if it is damaged. No code that may be in it is executed.
    """
    if not last.exists():
        return 0
    try:
        # Lightning files what a data module saves under the name of its class.
        return int(torch.load(last, map_location="cpu", weights_only=True)["NailDataModule"]["epoch"])
    except Exception as error:  # torch has no list of what it raises on a file that is none of its own
        reason = type(error).__name__
        stop(f"--resume: {last} is damaged, or not of train.py ({reason}); start again in another --work_dir")


class PlainCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints straight to their file.

    Lightning's own makes them twice in memory first, so that no half one is left; `save_beside` sees to that here.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write it; raises OSError if the disk is full."""
        try:
            with Path(path).open("wb") as file:
                torch.save(checkpoint, file)
        except RuntimeError as error:  # torch's, when it closes what it could not write
            raise (error.__context__ or error) from None


def save_beside(trainer: pl.Trainer, last: Path) -> Path:
    """Save all that is needed to go on, in a file to be renamed: a kill in between leaves the one before."""
    beside = last.with_suffix(".tmp")
    trainer.save_checkpoint(beside)
    return beside


class Checkpoints(Checkpoint):
    """Saves after each epoch all that is needed to go on, and the weights of the best epoch.

    Lightning's own ModelCheckpoint forgets its best score when the folder has been moved, and then overwrites
    the best weights; here the rows of metrics.csv tell which epoch is the best. As a Checkpoint it comes
    after all other callbacks.
    """

    def __init__(self, last: Path, rows: list[dict[str, float]]) -> None:
        self.last, self.best = last, last.with_name("best.ckpt")
        self.rows = rows
        self.saved: dict[str, Any] = {}  # what the checkpoint that was just written holds

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        trainer.strategy.checkpoint_io = PlainCheckpointIO()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.saved = checkpoint  # with --ema, averages have the place of the weights by now

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        beside = save_beside(trainer, self.last)
        saved, self.saved = self.saved, {}
        if not trainer.is_global_zero:
            return
        best_beside = self.best.with_name("new.tmp")
        best_beside.unlink(missing_ok=True)  # of a run that ended while it wrote it
        if epochs_since_best(self.rows) == 0:
            best = {name: saved[name] for name in ["hyper_parameters", "epoch", "pytorch-lightning_version"]}
            best["state_dict"] = {name: tensor.cpu() for name, tensor in saved["state_dict"].items()}
            trainer.strategy.checkpoint_io.save_checkpoint(best, best_beside)
            best_beside.replace(self.best)
        # Last of all: of a run that is killed before this, --resume repeats the epoch, and its best.ckpt as well.
        beside.replace(self.last)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save what was learned since the epoch began, if the exception came between two steps (a damaged file).

        One that comes within a step leaves weights that are half-way, and one in only one of several processes
        leaves the others where they cannot save. Then the last epoch's checkpoint has to do.
        """
        batches = trainer.fit_loop.epoch_loop.batch_progress.current
        within_epoch = trainer.training and 0 < batches.completed < trainer.num_training_batches
        between_steps = batches.ready == batches.completed and batches.completed % trainer.accumulate_grad_batches == 0
        if trainer.world_size == 1 and within_epoch and between_steps:
            save_beside(trainer, self.last).replace(self.last)


class Interrupted(Exception):  # noqa: N818 - the user's wish, not an error
    """A signal came, and what is needed to go on is saved."""


class StopOnSignal(Callback):
    """After Ctrl-C or SIGTERM, finishes the step, saves and raises Interrupted. A second Ctrl-C stops at once."""

    signals = 0  # that have come to this process

    def __init__(self, last: Path) -> None:
        self.last = last

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):  # only now: fit() has just set Lightning's own
            signal.signal(number, self.take_note)

    def take_note(self, number: int, frame: Any) -> None:
        """Remember the signal; on_train_batch_end does what it asks for."""
        StopOnSignal.signals += 1
        # A scheduler's SIGTERM ends the processes that load, too; torch's handler would raise in the middle of a step.
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        if self.signals > 1 and number == signal.SIGINT:  # a scheduler may send SIGTERM twice, and means the same
            raise KeyboardInterrupt
        if self.signals == 1 and rank_zero_only.rank == 0:
            print("\nstopping after this step or the running validation; Ctrl-C again stops at once", flush=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not on_any_process(trainer, self.signals > 0):
            return
        # Not after an epoch's last step: its validation comes first, and on_train_epoch_start stops the run. And not
        # while gradients add up, which no checkpoint holds.
        if not trainer.is_last_batch and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            beside = save_beside(trainer, self.last)
            if trainer.is_global_zero:
                beside.replace(self.last)
            raise Interrupted

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if on_any_process(trainer, self.signals > 0):
            raise Interrupted  # the epoch before is saved, by Checkpoints


def lacks_memory(error: BaseException) -> bool:
    """Whether it is torch's error for a full GPU or CPU, or comes from one: a recording (compiling.py) that is broken
    off by that ends in an error of its own.
    """
    says_so = "out of memory" in str(error) or "DefaultCPUAllocator" in str(error)
    return says_so or (error.__context__ is not None and lacks_memory(error.__context__))


@contextlib.contextmanager
def errors_in_words(last: Path) -> Iterator[None]:
    """Leave with a message instead of a traceback when training is interrupted, or meets what is not its fault."""
    go_on = f"Then go on with\n    {resume_command()}"

    def in_words(record: logging.LogRecord) -> bool:
        record.msg = f"error: {ENDED}. {go_on}"
        return True

    # With one process gone, the others may wait for it for ever. Lightning kills them, and this is its last message.
    logging.getLogger("lightning_fabric.strategies.launchers.subprocess_script").addFilter(in_words)
    try:
        yield
    except MemoryError:
        stop(OUT_OF_MEMORY, code=1)
    except DamagedFile as error:
        damaged = str(error).splitlines()[-1].removeprefix("dataloader.DamagedFile: ")  # below a worker's traceback
        stop(f"{damaged}. {go_on}" if last.exists() else damaged, code=1)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        room = f". Make room in {last.parent}" if error.errno in FULL else ""
        stop(f"{error.strerror or error}{where}{room}. {go_on}", code=1)
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            few = "a part of the network has only one value of a channel in each batch, and cannot normalise it"
            stop(f"{few}; give --batch_size 2 or more for each device, or a larger --image_size")
        raise
    except RuntimeError as error:
        if "DataLoader worker" in str(error) and StopOnSignal.signals:  # schedulers end all processes of a job
            leave_interrupted(last)
        if "DataLoader worker" in str(error):
            reason = "by a signal, or for want of memory (fewer --workers need less)"
            stop(f"a process that loads photographs was killed, {reason}. {go_on}", code=1)
        if lacks_memory(error):
            stop(OUT_OF_MEMORY, code=1)
        if any(words in str(error) for words in LOST):
            stop(f"{ENDED}. {go_on}", code=1)
        raise
    except (KeyboardInterrupt, Interrupted, SystemExit) as error:
        # Lightning makes exit code 1 of a KeyboardInterrupt; other exits have said their reason.
        if isinstance(error, SystemExit) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        leave_interrupted(last)
    except Exception as error:
        if type(error).__module__.startswith("wandb"):  # which is only imported for those who want it
            stop(f"--log wandb: {error}. Run 'wandb login' first, or set WANDB_MODE=offline")
        raise


def leave_interrupted(last: Path) -> NoReturn:
    """Say what is saved, and how to go on."""
    if rank_zero_only.rank > 0:  # the first process speaks for all
        raise SystemExit(0) from None
    where = f"saved in {last}. Go on with" if last.exists() else "nothing is saved yet. Start again with"
    stop(f"interrupted; {where}\n    {resume_command()}", code=130)
