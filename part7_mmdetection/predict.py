"""Predict: weights and photographs in; instances, masks, cut-out nails, COCO results and a table of metrics out.

Article (its test.py is this with --masks):
https://hphuongdhsp.github.io/ml-blog/pytorchlightning/intancesegmentation/deeplearning/mmdetection/2022/08/07/segmentation-model-part6.html
"""

import quick_imports  # first: it makes the imports below faster

import argparse
import glob
import json
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import ops  # noqa: F401 - before all else: it gives mmcv the operators that it was not compiled with

# isort: split
import cv2
import numpy as np
import pandas as pd
import torch
from mmcv.transforms import Compose
from mmdet.utils import register_all_modules
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from coco import Annotations, compare, describe_instance, find_instances, mean_average_precision, scores
from hooks import create_artist
from image_files import BadFile, find_images, printable, read_image, read_mask, refuse_name, stem_below
from model import load_model
from transform import valid_transform
from utils import any_path, choose_devices, device, folder, fraction, stop, whole_number

quick_imports.end()

Files = dict[str, Path]  # by their name below the folder, without ending


def parse_args() -> argparse.Namespace:
    """The flags; --images and --masks are made the folders that hold the files."""
    parser = argparse.ArgumentParser(description="Find each nail on photographs.", allow_abbrev=False)
    add = parser.add_argument
    add("--weights", type=any_path, required=True, help="best.pth of a run of train.py")
    add("--images", type=any_path, required=True, help="a photograph, a folder of them, or prepared data")
    add("--masks", type=folder, help="the true masks, with the names of their photographs; prepared data has its own")
    add("--numbered", action="store_true", help="each value of a true mask is an instance; else each connected part is")
    add(
        "--min_area",
        type=whole_number(),
        default=16,
        metavar="PIXELS",
        help="true instances below it do not count (16)",
    )
    add("--score", type=fraction, default=0.5, help="draw, cut out and number what is at least so likely (%(default)s)")
    add("--output_dir", type=any_path, help="(predictions/ of the run that made the weights)")
    add("--device", type=device, nargs=1, help="the number of a GPU, or cpu (0 where there is a GPU, else cpu)")
    args = parser.parse_args()
    if not args.weights.is_file():
        parser.error(f"argument --weights: {str(args.weights)!r} is not a file; training writes weights/best.pth")
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


def find_files(args: argparse.Namespace) -> tuple[Files, Files]:
    """The photographs to look at, and the masks that are known."""
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


class Detector:
    """A trained network, and what it takes to show it a photograph."""

    def __init__(self, weights: Path, device: list[str] | None) -> None:
        gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        self.name = choose_devices(device, gpus)[0].replace("gpu", "cuda")
        model, self.categories, image_size = load_model(weights)
        self.model = model.to(self.name)
        _, *steps = valid_transform(image_size, with_truth=False)  # the photograph is read already
        self.pipeline = Compose([{"type": "LoadImageFromNDArray"}, *steps])

    def find(self, photograph: NDArray[np.uint8]) -> Any:
        """What MMDetection finds on a photograph, uint8 (H, W, 3), RGB: the likeliest instance first.

        Its pred_instances have `bboxes` (K, 4) as x1, y1, x2, y2, `scores` (K,), `labels` (K,) and `masks` (K, H, W).

        Raises:
            BadFile: nothing is left of its shorter side when the longer one is as long as the network wants it.
        """
        try:
            sample = self.pipeline({"img": np.ascontiguousarray(photograph[..., ::-1]), "img_id": 0})
        except cv2.error as error:
            raise BadFile("too narrow for the network") from error
        batch = {name: [sample[name]] for name in ["inputs", "data_samples"]}
        with torch.inference_mode():
            return self.model.test_step(batch)[0].cpu()


def save_pictures(photograph: NDArray[np.uint8], masks: NDArray[np.bool_], output: Path) -> None:
    """Write the union as x_mask.png, the numbers of instances as x_instances.png, and each one, cut out, to crops/.

    Args:
        photograph: uint8 (H, W, 3).
        masks: (K, H, W), the surest first.
        output: path and name of these files, without the end (`_mask.png` and so on).
    """
    numbers = np.zeros(photograph.shape[:2], np.uint8 if len(masks) < 256 else np.uint16)
    for number in range(len(masks), 0, -1):  # where two overlap, the likelier one is seen
        numbers[masks[number - 1]] = number
    Image.fromarray((numbers > 0).astype(np.uint8) * 255).save(f"{output}_mask.png")
    Image.fromarray(numbers).save(f"{output}_instances.png")
    crops = output.parent / "crops"
    crops.mkdir(exist_ok=True)
    for file in crops.glob(f"{glob.escape(output.name)}_*.png"):  # of an earlier prediction, which may have found more
        if file.stem.removeprefix(f"{output.name}_").isdigit():
            file.unlink()
    for number, mask in enumerate(masks, start=1):
        rows, columns = np.nonzero(mask)
        part = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        cut_out = np.dstack([photograph, mask.astype(np.uint8) * 255])[part]  # transparent around the nail
        Image.fromarray(cut_out).save(crops / f"{output.name}_{number}.png")


def scores_by_source(
    per_image: pd.DataFrame, counts: list[NDArray[np.int64]], truths: list[Annotations], results: list[Annotations]
) -> pd.DataFrame:
    """A row for each source and one for all: pixels are summed, and instances compared, over the photographs of a row.

    `counts` (see `compare`), `truths` and `results` have an entry for each row of `per_image`.
    iou_per_image is the mean over photographs, in which a small nail weighs as much as a large one.
    """
    rows = {}
    for source, images in [*per_image.groupby("source", sort=False), ("all", per_image)]:
        total = np.sum([counts[index] for index in images.index], axis=0)
        precision = mean_average_precision(
            [truths[index] for index in images.index], [results[index] for index in images.index]
        )
        rows[source] = {"images": len(images)} | scores(total) | {"iou_per_image": images["iou"].mean()} | precision
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("source")


def main() -> None:
    """Predict every photograph, then measure those whose truth is known."""
    args = parse_args()
    warnings.filterwarnings("ignore", module="mmengine")  # of boxes that reach over the edge
    register_all_modules()
    detector = Detector(args.weights, args.device)
    artist = create_artist([category["name"] for category in detector.categories])
    photographs, masks = find_files(args)

    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows, counts, truths, results, all_results, failed, number = [], [], [], [], [], 0, 0
    for image_id, (name, path) in enumerate(tqdm(photographs.items(), unit="image", disable=None), start=1):
        reading = path
        try:
            refuse_name(path)
            photograph = read_image(path)
            reading = masks.get(name)
            truth = read_mask(reading, photograph, 256 if args.numbered else 1).pixels if reading else None
            reading = path
            sample = detector.find(photograph.pixels)
        except BadFile as error:
            hint = "; if each label is an instance, add --numbered" if "several labels" in str(error) else ""
            tqdm.write(f"skipped {printable(reading)}: {error}{hint}", file=sys.stderr)
            failed += 1
            continue
        found = sample.pred_instances
        found = found[found.masks.flatten(1).any(dim=1)]  # a box may have no mask in it
        found_masks, found_scores = found.masks.numpy(), found.scores.tolist()
        corners = found.bboxes.numpy()
        boxes = np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]]).tolist()  # x, y, width, height
        instances = [
            {**describe_instance(mask.astype(np.uint8), detector.categories[label]["id"]), "bbox": box, "score": score}
            for mask, label, box, score in zip(found_masks, found.labels, boxes, found_scores, strict=True)
        ]
        all_results += [{"image_id": image_id, "file": name + path.suffix, **instance} for instance in instances]

        output = args.output_dir / name
        output.parent.mkdir(parents=True, exist_ok=True)
        likely = found_masks[np.array(found_scores) >= args.score]
        number += len(likely)
        save_pictures(photograph.pixels, likely, output)
        artist.add_datasample(
            "", photograph.pixels, sample, draw_gt=False, pred_score_thr=args.score, out_file=f"{output}_overlay.png"
        )
        if truth is not None:
            counts.append(compare(likely.any(axis=0), truth > 0))
            truths.append([describe_instance(one) for one in find_instances(truth, args.numbered, args.min_area)[0]])
            results.append([{**instance, "category_id": 1} for instance in instances])  # masks tell no classes apart
            source = "_".join(name.split("/")[:-1]) or "0"
            numbers = {"instances": len(truths[-1]), "found": len(likely)}
            rows.append({"file": name + path.suffix, "source": source} | scores(counts[-1]) | numbers)

    done = len(photographs) - failed
    (args.output_dir / "coco_results.json").write_text(json.dumps(all_results))
    print(f"found {number} instances on {done} photographs, with a score of {args.score} or more")
    print(f"masks, overlays and crops/ are in {args.output_dir}")
    if masks and done > len(rows):
        print(f"{done - len(rows)} photographs have no mask in {args.masks} and do not count below")
    if rows:
        per_image = pd.DataFrame(rows)
        table = scores_by_source(per_image, counts, truths, results)
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
