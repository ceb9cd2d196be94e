"""Turn photographs and masks as they come into train/, valid/ and csv_file/, and tell what is wrong with them.

Section 2 of
https://hphuongdhsp.github.io/ml-blog/tensorflow/semanticsegmentation/deeplearning/2022/08/02/segmentation-model-part1.html
"""

import argparse
import hashlib
import multiprocessing
import os
import shutil
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_summary import listing, print_found, print_summary
from image_files import BadFile, Picture, printable, read_image, read_mask, refuse_name
from pairs import Pair, collect_pairs, find_layout, read_groups, reject_clashes, split, use_groups
from prepared import move_to_sides, npy_of, refuse_overlap, swap, write_csv_files
from utils import any_path, command, folder, fraction, stop, treat_sigterm_like_ctrl_c, whole_number


def parse_flags() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Prepare photographs and masks for training.", allow_abbrev=False)
    add = parser.add_argument
    add("--data_root", type=any_path, required=True, help="train/, valid/ and csv_file/ are written here")
    add("--raw", type=folder, help="the photographs and masks; never changed (the folder of --data_root)")
    add(
        "--groups",
        type=any_path,
        metavar="FILE.csv",
        help="columns file and group: a group is never split, and is a source",
    )
    add("--valid_fraction", type=fraction, help="share of each source that is for validation (0.2)")
    add("--folds", type=whole_number(2), metavar="K", help="write a fold for each pair; fold 0 is for validation")
    add("--classes", type=whole_number(), default=1, metavar="N", help="keep the labels 0 to N-1 of masks (1)")
    add(
        "--max_size",
        type=whole_number(32),
        metavar="PIXELS",
        help="shrink larger photographs: their longer side (never)",
    )
    add("--npy", action="store_true", help="write arrays as well, .npy beside .png, and csv_file/npy_*.csv (part 5)")
    add("--seed", type=whole_number(0), default=42, help="of the split (%(default)s)")
    add("--strict", action="store_true", help="write nothing if any file has to be rejected")
    args = parser.parse_args()
    if args.folds and args.valid_fraction:
        parser.error("--folds and --valid_fraction: give one of them; fold 0 of --folds 5 is a fifth")
    return args


# --- one pair, in a worker process -----------------------------------------------------------


def start_worker() -> None:
    """Leave Ctrl-C to the main process, and do not outlive it when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=leave_with_parent, daemon=True).start()


def leave_with_parent() -> None:
    """Wait for the end of the main process, however it ends, and leave."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def prepare_pair(pair: Pair, raw: Path, new: Path, classes: int, max_size: int | None, npy: bool) -> Pair:
    """Read, check, repair and write one pair. Returns it with what was found out.

    Args:
        pair: a photograph and its mask.
        raw: neither file may lie outside, which a link can.
        new: the folder to write to.
        classes: if more than 1, the labels of the mask are kept.
        max_size: of the longer side, in pixels; None leaves all as large as they are.
        npy: write them as arrays as well.

    Raises:
        OSError: they cannot be written.
    """
    file = pair.image
    try:
        refuse_path(file, raw)
        image = read_image(file)
        file = pair.mask
        refuse_path(file, raw)
        mask = read_mask(file, image, classes)
    except BadFile as error:
        pair.rejected = (file, str(error))
        return pair
    if max_size and max(mask.pixels.shape) > max_size:
        image, mask = shrink(image, max_size, cv2.INTER_AREA), shrink(mask, max_size, cv2.INTER_NEAREST)
        image.repairs.append("pair shrunk to --max_size")
    write_png(new / pair.target("images"), image.pixels[..., ::-1])  # OpenCV writes BGR
    write_png(new / pair.target("masks"), mask.pixels)
    if npy:
        np.save(npy_of(new / pair.target("images")), image.pixels)
        np.save(npy_of(new / pair.target("masks")), mask.pixels)
    pair.height, pair.width = mask.pixels.shape
    pair.foreground = round(float((mask.pixels > 0).mean()), 6)
    pair.digest = hashlib.sha256(f"{pair.width}".encode() + image.pixels.tobytes()).hexdigest()
    pair.repairs = image.repairs + mask.repairs
    return pair


def refuse_path(path: Path, raw: Path) -> None:
    """Raise BadFile for a link that leads out of the raw data, and for a name that no CSV file can hold."""
    if not path.resolve().is_relative_to(raw):
        raise BadFile("link that leads outside the raw folder")
    refuse_name(path)


def shrink(picture: Picture, max_size: int, interpolation: int) -> Picture:
    """Give the longer side of a photograph or a mask `max_size` pixels."""
    height, width = picture.pixels.shape[:2]
    share = max_size / max(height, width)
    size = max(round(width * share), 1), max(round(height * share), 1)
    return picture._replace(pixels=cv2.resize(picture.pixels, size, interpolation=interpolation).astype(np.uint8))


def write_png(file: Path, pixels: NDArray[np.uint8]) -> None:
    """Write a PNG with little compression: it is written once and read a thousand times."""
    level = [cv2.IMWRITE_PNG_COMPRESSION, 1]
    method = [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]
    _, encoded = cv2.imencode(".png", pixels, level + method)  # half the time of the default, and 5 % larger
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(encoded.tobytes())  # cv2.imwrite does not raise when the disk is full


def prepare_pairs(pairs: list[Pair], **settings: Any) -> list[Pair]:
    """Prepare all pairs on all cores, with a progress bar if there is a terminal; `settings` are of `prepare_pair`."""
    with ProcessPoolExecutor(initializer=start_worker) as workers:
        try:
            results = workers.map(partial(prepare_pair, **settings), pairs, chunksize=4)
            return list(tqdm(results, total=len(pairs), unit=" pairs", disable=None))
        except BaseException:  # also Ctrl-C: finish what is begun, begin nothing more
            workers.shutdown(cancel_futures=True)
            raise


# --- the whole of it -------------------------------------------------------------------------


def prepare(args: argparse.Namespace, root: Path, new: Path, old: Path) -> None:
    """Do the work: write to `new`, and put that in the place of the prepared folders at the end."""
    if old.exists():  # the last run was killed while it did that
        swap(root, new, old)
    shutil.rmtree(new, ignore_errors=True)
    raw = (args.raw or args.data_root).resolve()
    data = find_layout(raw)
    if data.is_split and (args.groups or args.folds or args.valid_fraction):
        stop(f"{raw} is split already and stays so: leave --groups, --folds and --valid_fraction away")
    refuse_overlap(root, data)
    collect_pairs(data)
    if args.groups:
        use_groups(data, read_groups(args.groups))
    reject_clashes(data)
    print_found(raw, data)

    new.mkdir(parents=True)
    done = prepare_pairs(data.pairs, raw=raw, new=new, classes=args.classes, max_size=args.max_size, npy=args.npy)
    data.rejected |= dict(pair.rejected for pair in done if pair.rejected)
    rejected = {printable(path.relative_to(raw)): reason for path, reason in data.rejected.items()}
    pairs = [pair for pair in done if not pair.rejected]
    if args.strict and rejected:
        stop(f"--strict: nothing is written, because {len(rejected)} files are rejected:{listing(rejected)}")
    if not pairs:
        stop(f"nothing usable is left, so nothing is written. Rejected are {len(rejected)} files:{listing(rejected)}")
    if not data.is_split:
        split(pairs, args.valid_fraction or 0.2, args.folds, by_total=bool(args.groups), seed=args.seed)
        move_to_sides(pairs, new)
    for side in ["train", "valid"]:
        if not any(pair.side == side for pair in pairs):
            stop(f"nothing usable is left in {raw / side}, so nothing is written:{listing(rejected)}")
    write_csv_files(pairs, rejected, new / "csv_file", args.npy)
    print_summary(pairs, rejected, args.folds)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the swap takes a moment and shall not be left half-way
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    swap(root, new, old)
    print(f"\nwritten to {root}: train/, valid/ and csv_file/")
    print(f"next: {command('train.py', '--data_root', args.data_root)}")


def main() -> None:
    """Prepare the data, and leave nothing half-done."""
    args = parse_flags()
    treat_sigterm_like_ctrl_c()
    root = args.data_root.resolve()
    new, old = root / ".prepared_new", root / ".prepared_old"
    try:
        prepare(args, root, new, old)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave the rest of this one undone
        stop("interrupted; the prepared data is what it was before", 130)
    except BrokenProcessPool:
        stop("a worker process was killed, probably for want of memory; the prepared data is what it was before", 1)
    except OSError as error:
        stop(f"{error.strerror or error}: {error.filename or root}; the prepared data is what it was before", 1)
    finally:
        if not old.exists():
            shutil.rmtree(new, ignore_errors=True)


if __name__ == "__main__":
    main()
