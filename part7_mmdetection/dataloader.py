"""From COCO annotations to batches: the part of MMDetection's config that is about data.

Article:
https://hphuongdhsp.github.io/ml-blog/pytorchlightning/intancesegmentation/deeplearning/mmdetection/2022/08/07/segmentation-model-part6.html
"""

import argparse
import json
import os
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS, METRICS
from mmengine.evaluator import BaseMetric
from numpy.typing import NDArray

from coco import compare, no_garbage, quiet, scores
from transform import train_transform, valid_transform
from utils import stop

PREPARE_AGAIN = "run data_preparation.py again, with the same flags"


class DamagedFile(Exception):  # noqa: N818 - it is the file that is bad
    """A photograph that has become unusable, or does not go with its annotations; the message begins with its path."""


annotations_read: dict[str, Any] = {}  # by read_annotations, of COCO files that a dataset or a metric still needs


def take_annotations(file: str, is_last: bool) -> Any:
    """The content of a COCO file, which is read again only if `read_annotations` has not: 100,000 photographs' take
    seconds. `is_last`: nobody else is going to ask for it.
    """
    content = annotations_read.get(file) or json.loads(Path(file).read_bytes())
    if is_last:
        annotations_read.pop(file, None)
    return content


@DATASETS.register_module()
class NailDataset(CocoDataset):
    """MMDetection's dataset, whose augmentation follows from seed, epoch and photograph.

    Neither the number of workers nor --resume then changes a batch. Without this class, workers that start anew in each
    epoch would draw the same numbers each time.
    """

    def __init__(self, *args: Any, seed: int, number: int, **kwargs: Any) -> None:
        """`seed`: of the augmentation. `number`: of photographs that are used, evenly spread over all.

        MMDetection's own `indices` are for that, too, but would stand in the config one by one, and MMEngine formats it
        whole with each checkpoint.
        """
        self.seed, self.number = seed, number
        # SeedSteps in hooks.py counts it, in memory that the workers share: they live through all epochs.
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        super().__init__(*args, **kwargs)

    def load_data_list(self) -> Any:
        """What MMDetection makes of the annotations of each photograph that is used.

        Its own load_data_list asks pycocotools for each of all photographs, which takes longer than to read the file.
        """
        with no_garbage():
            content = take_annotations(self.ann_file, is_last=not self.test_mode)  # NailCocoMetric needs those, too
            self.cat_ids = [entry["id"] for entry in content["categories"] if entry["name"] in self.metainfo["classes"]]
            self.cat2label = {category: label for label, category in enumerate(self.cat_ids)}
            of_image = defaultdict(list)
            for annotation in content["annotations"]:
                of_image[annotation["image_id"]].append(annotation)
            photographs = []
            for index in np.linspace(0, len(content["images"]) - 1, self.number).round().astype(int):
                image = content["images"][index]
                about = {"raw_img_info": {**image, "img_id": image["id"]}, "raw_ann_info": of_image[image["id"]]}
                photographs.append(self.parse_data_info(about))
            return photographs

    def filter_data(self) -> Any:
        """All of them, because photographs without nails teach as well; or what a config's filter_cfg leaves."""
        if self.filter_cfg:
            with_nails = [photograph["img_id"] for photograph in self.data_list if photograph["instances"]]
            self.cat_img_map = dict.fromkeys(self.cat_ids, with_nails)  # MMDetection takes all categories' together
        return super().filter_data()

    def prepare_data(self, idx: int) -> Any:
        """The photograph of this number and its annotations, after the pipeline."""
        numbers = np.random.SeedSequence([self.seed, int(self.epoch), idx]).generate_state(4)
        np.random.seed(numbers)
        random.seed(int(numbers[0]))
        try:
            return super().prepare_data(idx)
        except Exception as error:  # whatever step it stops: the name of the photograph is what helps
            path = self.get_data_info(idx)["img_path"]
            reason = f"{type(error).__name__}: {error}".splitlines()[0].replace(path, "it")
            raise DamagedFile(f"{path}: it, or its annotations, cannot be used ({reason}); {PREPARE_AGAIN}") from error


@METRICS.register_module()
class UnionMetric(BaseMetric):
    """IoU and F1 of all instances of a photograph together, as in parts 1 to 6: pixels summed over all photographs."""

    default_prefix = "union"

    def process(self, data_batch: Any, data_samples: Any) -> None:
        """Count the pixels of a batch, with all instances that are surer than not."""
        for sample in data_samples:
            preds, truth = sample["pred_instances"], sample["gt_instances"]["masks"].masks  # (K, H, W), (L, H, W)
            nails = preds["masks"][preds["scores"] >= 0.5].any(dim=0).cpu().numpy()
            self.results.append(compare(nails, truth.any(axis=0) if len(truth) else np.zeros_like(nails)))

    def compute_metrics(self, results: list[NDArray[np.int64]]) -> dict[str, float]:
        """IoU and F1 of what all processes have counted."""
        return scores(np.sum(results, axis=0))


@METRICS.register_module()
class NailCocoMetric(CocoMetric):
    """COCO's metrics without the tables that pycocotools prints; 0, and not absent, where nothing is found."""

    def __init__(self, ann_file: str, **settings: Any) -> None:
        super().__init__(**settings)
        self._coco_api = COCO()
        with quiet(), no_garbage():
            self._coco_api.dataset = take_annotations(ann_file, is_last=True)
            self._coco_api.createIndex()

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """mAP and its kin, over the photographs that were looked at: --limit_batches leaves some out."""
        self.img_ids = [prediction["img_id"] for _, prediction in results]
        with quiet():
            found = super().compute_metrics(results)
        return {f"{metric}_mAP": 0.0 for metric in self.metrics} | dict(found)


COCO_KEYS = {
    "categories": ["id", "name"],
    "images": ["id", "file_name", "width", "height"],
    "annotations": ["id", "image_id", "category_id", "bbox", "area", "segmentation", "iscrowd"],
}


def read_annotations(data_root: Path, side: str) -> dict[str, Any]:
    """The COCO file annotations/<side>.json; leaves with a message if it is damaged or names what is not there."""
    file = data_root / "annotations" / f"{side}.json"
    way = (
        "data_preparation.py of this part makes it of photographs and masks, from where they are: --raw FOLDER; "
        "or put your own COCO file there"
    )
    try:
        with no_garbage():
            content = json.loads(file.read_bytes())
        missing = {
            f"{kind}, id {entry.get('id')}: {key}"
            for kind, keys in COCO_KEYS.items()
            for entry in content[kind]
            for key in keys
            if key not in entry
        }
    except FileNotFoundError:
        stop(f"--data_root {data_root}: there is no annotations/{side}.json; {way}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        stop(f"{file} is no COCO file ({type(error).__name__}: {error}); {way}")
    if missing:
        stop(f"{file} lacks {len(missing)} entries, as {min(missing)}")
    for kind in COCO_KEYS:
        if not content[kind]:
            stop(f"{file} has no {kind}; {way}")
        if len({entry["id"] for entry in content[kind]}) < len(content[kind]):
            stop(f"{file}: among its {kind}, an id occurs twice")
    for name in [image["file_name"] for image in content["images"]]:
        if name.startswith("/") or ".." in name.split("/"):
            stop(f"{file}: {name!r} leads outside of {data_root}")
        if not os.path.isfile(f"{data_root}/{name}"):  # noqa: PTH113 - a Path for each takes three times as long
            way = f"file_name has to be a path below {data_root}; or {PREPARE_AGAIN}"
            stop(f"{file}: {data_root / name} is not there; {way}")
    refuse_lost_annotations(content, file)
    annotations_read[str(file)] = content
    return content


def refuse_lost_annotations(content: dict[str, Any], file: Path) -> None:
    """Leave with a message if annotations are of an image or a category that is not there, or none can be found."""
    for kind, name in [("images", "image_id"), ("categories", "category_id")]:
        ids = {entry["id"] for entry in content[kind]}
        lost = [annotation for annotation in content["annotations"] if annotation[name] not in ids]
        if lost:
            stop(f"{file}: annotation {lost[0]['id']} has {name} {lost[0][name]}, and its {kind} no such id")
    if all(annotation["iscrowd"] for annotation in content["annotations"]):
        stop(f"{file}: all annotations have iscrowd 1, and are neither learned nor counted; an instance has 0")


def data_config(args: argparse.Namespace, processes: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The loaders and the metrics of a config, and COCO's categories, in the order of the network's labels.

    Leaves with a message if the data is not there, or cannot be trained with.

    Args:
        args: the flags data_root, batch_size, image_size, workers, seed and limit_batches.
        processes: over which a batch is spread.
    """
    contents = {side: read_annotations(args.data_root, side) for side in ("train", "valid")}
    lengths = {side: len(content["images"]) for side, content in contents.items()}
    categories = contents["train"]["categories"]
    if contents["valid"]["categories"] != categories:
        stop(f"{args.data_root}/annotations: train.json and valid.json have different categories")
    if args.batch_size % processes:
        stop(f"--batch_size {args.batch_size} cannot be shared equally by {processes} devices")
    if lengths["train"] < args.batch_size:
        stop(f"--batch_size {args.batch_size}: there are only {lengths['train']} photographs to train with")

    def loader(side: str, pipeline: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
        photographs = lengths[side]
        dataset = {
            "type": "NailDataset",
            "seed": args.seed,
            "number": min(photographs, (args.limit_batches or photographs) * args.batch_size),
            "metainfo": {"classes": [category["name"] for category in categories]},
            "data_root": str(args.data_root),
            "ann_file": f"annotations/{side}.json",
            "data_prefix": {"img": ""},
            "pipeline": pipeline,
            "test_mode": side == "valid",
        }
        workers = args.workers // int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        return {
            "batch_size": args.batch_size // processes,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "sampler": {"type": "DefaultSampler", "shuffle": side == "train"},
            "dataset": dataset,
            **settings,
        }

    metric = {
        "type": "NailCocoMetric",
        "ann_file": str(args.data_root / "annotations" / "valid.json"),
        "metric": ["bbox", "segm"],
        "prefix": "coco",
    }
    config = {
        "train_dataloader": loader("train", train_transform(args.image_size), drop_last=True),
        "val_dataloader": loader("valid", valid_transform(args.image_size)),
        "val_evaluator": [metric, {"type": "UnionMetric"}],
        "test_dataloader": None,
        "test_evaluator": None,
        "test_cfg": None,
    }
    return config, categories
