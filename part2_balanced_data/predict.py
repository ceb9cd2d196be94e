"""Predict: weights and photographs in, masks, overlays and a table of metrics out."""

import quick_imports  # first: it makes the imports below faster

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import cv2
import h5py
import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from image_files import BadFile, find_images, overlay, printable, read_image, read_mask, refuse_name, stem_below
from keras2 import tf
from model import create_model
from transform import valid_transform
from utils import any_path, choose_devices, device, folder, stop

quick_imports.end()


def parse_args() -> argparse.Namespace:
    """The flags; --images and --masks are made the folders that hold the files."""
    parser = argparse.ArgumentParser(description="Find the nails on photographs.", allow_abbrev=False)
    add = parser.add_argument
    add("--weights", type=any_path, required=True, help="best.h5 of a run of train.py")
    add("--images", type=any_path, required=True, help="a photograph, a folder of them, or prepared data")
    add("--masks", type=folder, help="the true masks, with the names of their photographs; prepared data has its own")
    add("--output_dir", type=any_path, help="(predictions/ of the run that made the weights)")
    add("--device", type=device, nargs=1, help="the number of a GPU, or cpu (0 where there is a GPU, else cpu)")
    args = parser.parse_args()
    if not args.weights.is_file():
        parser.error(f"argument --weights: {str(args.weights)!r} is not a file; training writes weights/best.*")
    if not args.images.exists():
        parser.error(f"argument --images: {str(args.images)!r} is not there")
    if args.output_dir and args.output_dir.exists() and not args.output_dir.is_dir():
        parser.error(f"argument --output_dir: {str(args.output_dir)!r} is a file, not a folder")
    if args.output_dir is None:
        run_dir = args.weights.resolve().parent.parent if args.weights.resolve().parent.name == "weights" else Path()
        args.output_dir = run_dir / "predictions"
    for prepared in [args.images / "valid" / "images", args.images / "images"]:
        if prepared.is_dir():
            args.images = prepared
            break
    beside = args.images.parent / "masks"
    if args.masks is None and args.images.name == "images" and beside.is_dir():
        args.masks = beside
    output_dir = args.output_dir.resolve()
    for path in [args.images, args.masks]:
        if path and path.is_dir() and output_dir.is_relative_to(path.resolve()):
            parser.error(f"argument --output_dir: {str(args.output_dir)!r} lies in {path}; choose another folder")
    if args.images.is_file() and output_dir == args.images.resolve().parent:
        parser.error("argument --output_dir: the photograph lies there; choose another folder")
    metrics_csv = output_dir / "metrics.csv"
    if metrics_csv.is_file() and not metrics_csv.read_text(errors="replace").startswith("file,source,"):
        parser.error(f"argument --output_dir: {metrics_csv} is not of predict.py; choose another folder")
    return args


def load_model(weights: Path) -> tuple[tf.keras.Model, int]:
    """The network that `weights` were trained with, with them in it, and the side of its input."""
    try:
        with h5py.File(weights) as file:
            network = json.loads(file.attrs["network"])
        model = create_model(network["encoder"], network["image_size"], encoder_weights=None)
        model.load_weights(weights)
    except (OSError, KeyError, ValueError) as error:
        stop(f"--weights {weights}: not a file that train.py of this part wrote ({error})")
    return model, network["image_size"]


def predict_mask(model: tf.keras.Model, image: np.ndarray, image_size: int) -> np.ndarray:
    """The nails on a photograph, uint8 (H, W, 3), of any size: bool (H, W)."""
    square = valid_transform(image_size)(image=image)["image"]
    probabilities = model.predict_on_batch(square[np.newaxis])[0, :, :, 0]
    # Enlarge the probabilities, not the mask: their outline stays smooth.
    height, width = image.shape[:2]
    return cv2.resize(probabilities, (width, height), interpolation=cv2.INTER_LINEAR) > 0.5


def compare(mask: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Foreground pixels, bool (H, W), of prediction and truth: in both, in either, and in all together."""
    return {"intersection": (mask & truth).sum(), "union": (mask | truth).sum(), "areas": mask.sum() + truth.sum()}


def add_scores(counts: pd.DataFrame) -> pd.DataFrame:
    """Add the columns iou and f1 to rows of pixel counts; where there is nothing to find and nothing found: 1."""
    iou = (counts["intersection"] / counts["union"]).fillna(1.0)
    f1 = (2 * counts["intersection"] / counts["areas"]).fillna(1.0)
    return counts.assign(iou=iou, f1=f1)


def scores_by_source(per_image: pd.DataFrame) -> pd.DataFrame:
    """A row for each source and one for all of them: pixels are summed over the photographs of a row.
    Then, of each column, the mean over the sources and the lowest of them.

    iou_per_image is the mean over photographs, in which a small nail weighs as much as a large one.
    """
    rows = [*per_image.groupby("source", sort=False), ("all", per_image)]
    counts = [images[["intersection", "union", "areas"]].sum() for _, images in rows]
    table = add_scores(pd.DataFrame(counts, index=pd.Index([name for name, _ in rows], name="source")))
    table["iou_per_image"] = [images["iou"].mean() for _, images in rows]
    table = table[["iou", "f1", "iou_per_image"]]
    of_sources = table.iloc[:-1]
    table = pd.concat([table, of_sources.mean().to_frame("macro").T, of_sources.min().to_frame("worst").T])
    table.insert(0, "images", [len(images) for _, images in rows] + 2 * [len(per_image)])
    return table.rename_axis("source")


def main() -> None:
    """Predict every photograph, then measure those whose truth is known."""
    args = parse_args()
    gpus = tf.config.list_physical_devices("GPU")
    chosen = choose_devices(args.device, [gpu.name for gpu in gpus])[0]
    visible = [] if chosen == "cpu" else [gpus[int(chosen.removeprefix("gpu:"))]]
    tf.config.set_visible_devices(visible, "GPU")
    for gpu in visible:
        tf.config.experimental.set_memory_growth(gpu, True)  # leave memory to a training beside
    model, image_size = load_model(args.weights)

    images = args.images if args.images.is_dir() else args.images.parent
    paths = find_images(images) if args.images.is_dir() else [args.images]
    if not paths:
        stop(f"--images {args.images}: there are no photographs in it")
    names = [stem_below(images, path) for path in paths]
    for name, number in Counter(names).items():
        if number > 1:
            stop(f"--images: there are {number} photographs named {name}; rename all but one")
    masks = {stem_below(args.masks, path): path for path in find_images(args.masks)} if args.masks else {}

    rows, failed = [], 0
    for path, name in zip(tqdm(paths, unit="image", disable=None), names, strict=True):
        reading = path
        try:
            refuse_name(path)
            photograph = read_image(path)
            reading = masks.get(name)
            truth = read_mask(reading, photograph).pixels > 0 if reading else None
        except BadFile as error:
            tqdm.write(f"skipped {printable(reading)}: {error}", file=sys.stderr)
            failed += 1
            continue
        mask = predict_mask(model, photograph.pixels, image_size)
        output = args.output_dir / name
        output.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask.astype(np.uint8) * 255).save(f"{output}_mask.png")
        Image.fromarray(overlay(photograph.pixels, mask)).save(f"{output}_overlay.png")
        if truth is not None:
            source = "_".join(name.split("/")[:-1]) or "0"
            rows.append({"file": path.relative_to(images).as_posix(), "source": source} | compare(mask, truth))

    print(f"{len(paths) - failed} masks and overlays are in {args.output_dir}")
    if args.masks and len(paths) - failed > len(rows):
        print(f"{len(paths) - failed - len(rows)} photographs have no mask in {args.masks} and do not count below")
    if not rows and (args.output_dir / "metrics.csv").exists():
        print("nothing was measured: the metrics.csv there is of an earlier run")
    if rows:
        per_image = add_scores(pd.DataFrame(rows))
        table = scores_by_source(per_image)
        per_image.to_csv(args.output_dir / "metrics.csv", index=False)
        table.to_csv(args.output_dir / "metrics_by_source.csv")
        print(f"metrics against {args.masks}, in the photographs' own size:\n\n{table.to_string(float_format='%.4f')}")
    elif args.masks and not failed:
        stop(f"--masks {args.masks}: none of its {len(masks)} files has the name of a photograph", code=1)
    if failed:
        stop(f"{failed} of {len(paths)} photographs, or their masks, could not be read: see above", code=1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        stop("interrupted; what is predicted so far stays", code=130)
    except OSError as error:
        stop(str(error), code=1)
