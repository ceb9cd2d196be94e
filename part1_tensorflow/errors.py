"""What ends a training before its time, in words."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from keras2 import tf
from loading import UNREADABLE, find_damaged_file
from utils import resume_command, stop

# What the collective operations raise when a process or a machine that they wait for is gone.
LOST = (tf.errors.UnavailableError, tf.errors.AbortedError)
FULL = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG]  # the disk, one's share of it, or what a file may have


@contextlib.contextmanager
def errors_in_words(weights_dir: Path, train_paths: pd.DataFrame, valid_paths: pd.DataFrame) -> Iterator[None]:
    """Leave with a message instead of a traceback when training is interrupted, or meets what is not its fault.

    Args:
        weights_dir: where checkpoints are, named after the epochs that are done.
        train_paths, valid_paths: tables with the columns images and masks, to look for a damaged file in.
    """
    go_on = f"Then go on with\n    {resume_command()}"
    try:
        yield
    except KeyboardInterrupt:
        saved = (tf.train.latest_checkpoint(weights_dir) or "last-0").rsplit("-", 1)[1]
        stop(f"interrupted; epochs that are saved: {saved}. Go on with\n    {resume_command()}", code=130)
    except (tf.errors.ResourceExhaustedError, MemoryError):
        stop("out of memory; try a smaller --batch_size or --image_size, or --mixed_precision True", code=1)
    except LOST:
        stop(f"another process of this run has ended: see what it says, or what has killed it. {go_on}", code=1)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        room = f". Make room in {weights_dir}" if error.errno in FULL else ""
        stop(f"{error.strerror or error}{where}{room}. {go_on}", code=1)
    except UNREADABLE:
        damaged = find_damaged_file(train_paths) or find_damaged_file(valid_paths)
        if damaged is None:
            raise
        stop(f"{damaged}; run data_preparation.py again, with the flags that you gave before. {go_on}", code=1)
