"""Predict: weights and photographs in, masks, overlays and a table of metrics out."""

import quick_imports  # first: it makes the imports below faster

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from image_files import TINTS, BadFile, find_images, overlay, printable, read_image, read_mask, refuse_name, stem_below
from inference import load_network, predict_labels
from utils import any_path, device, folder, stop, whole_number, word

quick_imports.end()


def parse_args() -> argparse.Namespace:
    """The flags; --images and --masks are made the folders that hold the files."""
    parser = argparse.ArgumentParser(description="Find the nails on photographs.", allow_abbrev=False)
    add = parser.add_argument
    add("--weights", type=any_path, required=True, help="best.ckpt of a run of train.py, or what export.py made of it")
    add("--images", type=any_path, required=True, help="a photograph, a folder of them, or prepared data")
    add("--masks", type=folder, help="the true masks, with the names of their photographs; prepared data has its own")
    add("--fold", type=word, metavar="K", help="of prepared data: fold K, for weights of train.py --fold K")
    add("--output_dir", type=any_path, help="(predictions/ of the run that made the weights)")
    add("--tta", action="store_true", help="take the mean over the four flips of each photograph: 4 times the work")
    add("--tile", type=whole_number(32), metavar="SIZE", help="look at squares of SIZE pixels, one after the other")
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
        if prepared.is_dir() and not args.fold:
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


Files = dict[str, Path]  # by their name below the folder, without ending


def find_files(args: argparse.Namespace) -> tuple[Files, Files]:
    """The photographs to look at, and the masks that are known."""
    if args.fold:
        return find_fold(args.images, args.fold)
    images = args.images if args.images.is_dir() else args.images.parent
    paths = find_images(images) if args.images.is_dir() else [args.images]
    if not paths:
        stop(f"--images {args.images}: there are no photographs in it")
    names = [stem_below(images, path) for path in paths]
    for name, number in Counter(names).items():
        if number > 1:
            stop(f"--images: there are {number} photographs named {name}; rename all but one")
    masks = {stem_below(args.masks, path): path for path in find_images(args.masks)} if args.masks else {}
    return dict(zip(names, paths, strict=True)), masks


def find_fold(data_root: Path, fold: str) -> tuple[Files, Files]:
    """The photographs of one fold of prepared data, which lie in train/ or in valid/, and their masks."""
    try:
        tables = [
            pd.read_csv(data_root / "csv_file" / f"{side}.csv", dtype=str, keep_default_na=False)
            for side in ("train", "valid")
        ]
        table = pd.concat(tables)
        table = table[table["fold"] == fold]
        paths = [*table["images"], *table["masks"]]
        names = [str(Path(path.split("/images/", 1)[1]).with_suffix("")) for path in table["images"]]
    except (OSError, ValueError, LookupError) as error:
        stop(f"--fold: {data_root} is no data that data_preparation.py has prepared ({error})")
    if any(path.startswith("/") or ".." in path.split("/") for path in paths):
        stop(f"--fold: the tables in {data_root}/csv_file lead outside of {data_root}")
    if table.empty:
        stop(f"--fold {fold}: {data_root} has no such fold")
    photographs, masks = ([data_root / path for path in table[column]] for column in ["images", "masks"])
    return dict(zip(names, photographs, strict=True)), dict(zip(names, masks, strict=True))


def save_mask(labels: NDArray[np.uint8], classes: int, file: str) -> None:
    """Write a mask, (H, W): 0 and 255, or of several classes the labels as they are, shown in colours."""
    if classes == 1:
        return Image.fromarray(labels * 255).save(file)
    picture = Image.fromarray(labels, mode="L")
    picture.putpalette([0, 0, 0, *[value for tint in TINTS for value in tint]])
    picture.save(file)


def compare(labels: NDArray[np.uint8], truth: NDArray[np.uint8], classes: int) -> NDArray[np.int64]:
    """Intersection, union, and sum of both areas, in pixels, of each class but the background: (3, C)."""
    pairs = [(labels == label, truth == label) for label in range(1, max(classes, 2))]
    counts = [((one & other).sum(), (one | other).sum(), one.sum() + other.sum()) for one, other in pairs]
    return np.array(counts).T


def scores(counts: NDArray[np.int64]) -> dict[str, float]:
    """IoU and F1, each the mean over the classes; a class that is nowhere, and nowhere predicted, has 1.

    As in model.py, but with NumPy, because ONNX files need no torch.
    """
    intersection, union, areas = counts
    iou = np.where(union > 0, intersection / np.maximum(union, 1), 1.0)
    f1 = np.where(areas > 0, 2 * intersection / np.maximum(areas, 1), 1.0)
    classes = {f"iou/{label}": value for label, value in enumerate(iou, start=1)} if len(iou) > 1 else {}
    return {"iou": iou.mean(), "f1": f1.mean()} | classes


def scores_by_source(per_image: pd.DataFrame, counts: list[NDArray[np.int64]]) -> pd.DataFrame:
    """A row for each source and one for all of them: pixels are summed over the photographs of a row.

    iou_per_image is the mean over photographs, in which a small nail weighs as much as a large one.
    """
    rows = {}
    for source, images in [*per_image.groupby("source", sort=False), ("all", per_image)]:
        total = np.sum([counts[index] for index in images.index], axis=0)
        rows[source] = {"images": len(images)} | scores(total) | {"iou_per_image": images["iou"].mean()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("source")


def main() -> None:
    """Predict every photograph, then measure those whose truth is known."""
    args = parse_args()
    network = load_network(args.weights, args.device)

    photographs, masks = find_files(args)

    rows, counts, failed = [], [], 0
    for name, path in tqdm(photographs.items(), unit="image", disable=None):
        reading = path
        try:
            refuse_name(path)
            photograph = read_image(path)
            reading = masks.get(name)
            truth = read_mask(reading, photograph, network.classes).pixels if reading else None
        except BadFile as error:
            tqdm.write(f"skipped {printable(reading)}: {error}", file=sys.stderr)
            failed += 1
            continue
        labels = predict_labels(network, photograph.pixels, args.tta, args.tile)
        output = args.output_dir / name
        output.parent.mkdir(parents=True, exist_ok=True)
        save_mask(labels, network.classes, f"{output}_mask.png")
        Image.fromarray(overlay(photograph.pixels, labels)).save(f"{output}_overlay.png")
        if truth is not None:
            source = "_".join(name.split("/")[:-1]) or "0"
            counts.append(compare(labels, truth if network.classes > 1 else truth // 255, network.classes))
            rows.append({"file": name + path.suffix, "source": source} | scores(counts[-1]))

    done = len(photographs) - failed
    print(f"{done} masks and overlays are in {args.output_dir}")
    if masks and done > len(rows):
        print(f"{done - len(rows)} photographs have no mask in {args.masks} and do not count below")
    if not rows and (args.output_dir / "metrics.csv").exists():
        print("nothing was measured: the metrics.csv there is of an earlier run")
    if rows:
        per_image = pd.DataFrame(rows)
        table = scores_by_source(per_image, counts)
        per_image.to_csv(args.output_dir / "metrics.csv", index=False)
        table.to_csv(args.output_dir / "metrics_by_source.csv")
        print(f"metrics in the photographs' own size:\n\n{table.to_string(float_format='%.4f')}")
    elif args.masks and not failed:
        stop(f"--masks {args.masks}: none of its {len(masks)} files has the name of a photograph", code=1)
    if failed:
        stop(f"{failed} of {len(photographs)} photographs, or their masks, could not be read: see above", code=1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        stop("interrupted; what is predicted so far stays", code=130)
    except OSError as error:
        stop(str(error), code=1)
