"""What ends a training before its time, in words."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

import torch
from mmengine.dist import get_rank

from dataloader import DamagedFile
from hooks import StopOnSignal
from utils import resume_command, stop

# What gloo and NCCL say when a process that they wait for is gone.
LOST = ["Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "remote process"]
OUT_OF_MEMORY = "out of memory; try a smaller --batch_size or --image_size, or --mixed_precision True"
FULL = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG]  # the disk, one's share of it, or what a file may have


@contextlib.contextmanager
def errors_in_words(last: Path) -> Iterator[None]:
    """Leave with a message instead of a traceback when training is interrupted, or meets what is not its fault."""
    try:
        with interruptions_as_such():
            yield
    except KeyboardInterrupt:
        if get_rank() > 0:  # the first process speaks for all
            raise SystemExit(0) from None
        stop(f"interrupted\n{go_on(last)}", code=130)
    except (torch.OutOfMemoryError, MemoryError):
        stop(OUT_OF_MEMORY, code=1)
    except DamagedFile as error:
        damaged = str(error).splitlines()[-1].removeprefix("dataloader.DamagedFile: ")  # below a worker's traceback
        stop(f"{damaged}\n{go_on(last)}", code=1)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        room = f". Make room in {last.parent}" if error.errno in FULL else ""
        stop(f"{error.strerror or error}{where}{room}\n{go_on(last)}", code=1)
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            reason = "by a signal, or for want of memory (fewer --workers need less; in a container, see --shm-size)"
            stop(f"a process that loads photographs was killed, {reason}\n{go_on(last)}", code=1)
        if "DefaultCPUAllocator" in str(error):  # of memory that is not a GPU's
            stop(OUT_OF_MEMORY, code=1)
        if any(words in str(error) for words in LOST):
            what = "another process of this run has ended"
            stop(f"{what}: see what it says, or what has killed it\n{go_on(last)}", code=1)
        raise
    except Exception as error:
        if type(error).__module__.startswith("wandb"):  # which is only imported for those who want it
            stop(f"--log wandb: {error}. Run 'wandb login' first, or set WANDB_MODE=offline")
        raise


@contextlib.contextmanager
def config_errors_in_words(config: str) -> Iterator[None]:
    """Leave with a message where a config, or --cfg_options, names what is not there, or leaves out what is needed."""
    try:
        yield
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        stop(f"--config {config}, or --cfg_options: {type(error).__name__}: {error}")


@contextlib.contextmanager
def interruptions_as_such() -> Iterator[None]:
    """Raise KeyboardInterrupt instead of what an interrupted library makes of it, as an error about half a file."""
    try:
        yield
    except Exception as error:
        cause = error.__context__  # what was being handled when it was raised
        while cause and not isinstance(cause, KeyboardInterrupt):
            cause = cause.__context__
        # Schedulers end all processes of a job, also those that load.
        if cause or (StopOnSignal.signals and "DataLoader worker" in str(error)):
            raise KeyboardInterrupt from None
        raise


def go_on(last: Path) -> str:
    """What is saved, and the command to go on with."""
    where = f"The last whole epoch is in {last}. Go on with" if last.exists() else "Nothing is saved. Start with"
    return f"{where}\n    {resume_command()}"
