"""From masks to COCO annotations: a box, an area and a mask for each instance, all counted from the pixels.

Article:
https://hphuongdhsp.github.io/ml-blog/pytorchlightning/intancesegmentation/deeplearning/mmdetection/2022/08/07/segmentation-model-part6.html
"""

import contextlib
import gc
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from prepared import MADE_BY

MANY = 1000  # more instances than this in one mask are rather noise than nails
CATEGORIES = [{"id": 1, "name": "nail"}]
Mask = NDArray[np.uint8]
Annotations = list[dict[str, Any]]


def find_instances(mask: Mask, numbered: bool, min_area: int) -> tuple[list[Mask], int]:
    """Tell the instances in a mask apart.

    Args:
        mask: (H, W), 0 is background.
        numbered: each value is an instance of its own; else each connected part is one, touching corners included.
        min_area: what has fewer pixels is a speck.

    Returns:
        A mask of 0 and 1, (H, W), for each instance, and the number of specks.
    """
    numbers = mask if numbered else cv2.connectedComponents((mask > 0).astype(np.uint8), connectivity=8)[1]
    areas = np.bincount(numbers.ravel())
    found = [number for number in np.flatnonzero(areas) if number > 0]
    large = [number for number in found if areas[number] >= min_area]
    return [(numbers == number).astype(np.uint8) for number in large], len(found) - len(large)


def encode(mask: Mask) -> dict[str, Any]:
    """A mask of 0 and 1, (H, W), as run lengths."""
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))


def describe_instance(instance: Mask, category: int = 1) -> dict[str, Any]:
    """Box, area and mask, (H, W) of 0 and 1, as COCO writes them.

    The mask is a run-length encoding, which is exact and has no trouble with holes. A contour goes through the
    middles of the pixels at the border: as a polygon it would lose half a pixel on each side.
    """
    encoded = encode(instance)
    return {
        "bbox": coco_mask.toBbox(encoded).tolist(),  # x, y, width, height
        "area": int(coco_mask.area(encoded)),
        "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode()},
        "category_id": category,
        "iscrowd": 0,
    }


def write_annotations(root: Path, numbered: bool, min_area: int) -> tuple[int, int, list[str]]:
    """Write annotations/<side>.json and csv_file/<side>_info.csv for prepared masks.

    Args:
        root: of prepared data.
        numbered, min_area: see `find_instances`.

    Returns:
        The numbers of instances and of specks, of both sides together, and the masks with more than `MANY` instances.

    Raises:
        OSError: they cannot be written.
    """
    (root / "annotations").mkdir()
    number_of_instances = number_of_specks = 0
    crowded = []
    for side in ["train", "valid"]:
        table = pd.read_csv(root / "csv_file" / f"{side}.csv")
        images, unions = [], []
        annotations: Annotations = []
        for image_id, row in enumerate(table.itertuples(), start=1):
            images.append({"id": image_id, "file_name": row.images, "width": row.width, "height": row.height})
            mask = np.array(Image.open(root / row.masks))
            instances, specks = find_instances(mask, numbered, min_area)
            for instance in instances:
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, **describe_instance(instance)})
            unions.append(encode(np.any([np.zeros_like(mask), *instances], axis=0)))
            number_of_specks += specks
            crowded += [row.masks] if len(instances) > MANY else []
        content = {
            "info": {"description": MADE_BY},
            "images": images,
            "annotations": annotations,
            "categories": CATEGORIES,
        }
        file = root / "annotations" / f"{side}.json"
        file.write_text(json.dumps(content))
        check_annotations(file, unions)
        table[["images", "masks", "width", "height"]].to_csv(
            root / "csv_file" / f"{side}_info.csv", index=False, lineterminator="\n"
        )
        number_of_instances += len(annotations)
    return number_of_instances, number_of_specks, crowded


def check_annotations(file: Path, unions: list[dict[str, Any]]) -> None:
    """Read a COCO file back, as MMDetection will: the instances of each image have to cover what they should.

    Args:
        unions: of the instances of each image, run-length encoded.

    Raises:
        OSError: they do not.
    """
    coco = read_coco(file)
    for image_id, union in enumerate(unions, start=1):
        instances = [coco.annToRLE(annotation) for annotation in coco.imgToAnns[image_id]]
        is_same = coco_mask.merge(instances)["counts"] == union["counts"] if instances else not coco_mask.area(union)
        if not is_same:
            raise OSError(f"{file} is not as it was written")


def quiet() -> contextlib.AbstractContextManager[Any]:
    """Keeps to itself what pycocotools prints."""
    return contextlib.redirect_stdout(io.StringIO())


@contextlib.contextmanager
def no_garbage() -> Iterator[None]:
    """While many annotations are read: Python's garbage collector would look through all of them again and again."""
    gc.disable()
    try:
        yield
    finally:
        # Nor later: it looks through everything only when there is a quarter more, and with many annotations that
        # would leave what a training drops lying about for long.
        gc.freeze()
        gc.enable()


def read_coco(file: Path) -> COCO:
    """A COCO file, with an index."""
    with quiet(), no_garbage():
        return COCO(file)


def mean_average_precision(truth: list[Annotations], found: list[Annotations]) -> dict[str, float]:
    """COCO's metrics: bbox_mAP, segm_mAP, and segm_mAP_50, for which an IoU of 0.5 suffices.

    Args:
        truth: for each image, its annotations as `describe_instance` makes them.
        found: the same with a "score" each.

    Returns:
        Numbers from 0 to 1; nan if there is nothing to be found.
    """
    annotations = [
        {**annotation, "image_id": image_id, "id": number}
        for number, (image_id, annotation) in enumerate(flatten(truth), start=1)
    ]
    results = [{**result, "image_id": image_id} for image_id, result in flatten(found)]
    both = [*flatten(truth), *flatten(found)]
    sizes = {image_id: annotation["segmentation"]["size"] for image_id, annotation in both}
    names = ["bbox_mAP", "segm_mAP", "segm_mAP_50"]
    if not annotations or not results:
        return dict.fromkeys(names, 0.0 if annotations else float("nan"))
    with quiet():
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image_id, "height": size[0], "width": size[1]} for image_id, size in sizes.items()],
            "annotations": annotations,
            "categories": [{"id": number} for number in {one["category_id"] for one in annotations + results}],
        }
        coco.createIndex()
        stats = {}
        for kind in ["bbox", "segm"]:
            evaluation = COCOeval(coco, coco.loadRes(results), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            stats[kind] = evaluation.stats
    return dict(zip(names, [stats["bbox"][0], stats["segm"][0], stats["segm"][1]], strict=True))


def compare(pred: NDArray[np.bool_], truth: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Intersection, union, and sum of both areas, in pixels, of nail or not: two masks, (H, W)."""
    return np.array([(pred & truth).sum(), (pred | truth).sum(), pred.sum() + truth.sum()])


def scores(counts: NDArray[np.int64]) -> dict[str, float]:
    """IoU and F1, as in the other parts, of what `compare` counts; 1 if there is nothing, and nothing was found."""
    intersection, union, areas = counts
    return {"iou": intersection / union if union else 1.0, "f1": 2 * intersection / areas if areas else 1.0}


def flatten(of_images: list[Annotations]) -> list[tuple[int, dict[str, Any]]]:
    """Each annotation with the number of its image."""
    return [(number, annotation) for number, annotations in enumerate(of_images) for annotation in annotations]
