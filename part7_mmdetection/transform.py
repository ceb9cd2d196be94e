"""What happens to a photograph between its file and the network: MMDetection's pipelines.

A pipeline is a list of steps, and each step a dict: its class by name (`type`), and what that is to be told. In the
article, of MMDetection 2, `Normalize` and `Pad` were steps; in 3 the model's `data_preprocessor` does both, on the GPU.
"""

from typing import Any

from mmcv.transforms import BaseTransform
from mmdet.registry import TRANSFORMS

Step = dict[str, Any]

# What `predict.py` and the metrics have to know of a photograph.
META_KEYS = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")


@TRANSFORMS.register_module()
class CheckSize(BaseTransform):
    """Refuses a photograph of another size than its annotations tell: their masks, enlarged with it, could be huge."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        size, wanted = results["img_shape"], (results["height"], results["width"])
        if tuple(size) != wanted:
            raise ValueError(f"height and width are {size}, in the annotations {wanted}")
        return results


def train_transform(image_size: int) -> list[Step]:
    """Read, resize to about `image_size`, flip, crop, change colours: boxes and masks go with the photograph."""
    square = (image_size, image_size)
    return [
        {"type": "LoadImageFromFile"},
        {"type": "CheckSize"},
        {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
        {"type": "RandomResize", "scale": square, "ratio_range": (0.8, 1.2), "keep_ratio": True},
        # Hue, saturation, brightness; before the flip, whose negative strides OpenCV does not take.
        {"type": "YOLOXHSVRandomAug"},
        {"type": "RandomFlip", "prob": [0.25, 0.25, 0.25], "direction": ["horizontal", "vertical", "diagonal"]},
        # Of a photograph that became larger, a part; and boxes are drawn anew around what is left of the masks.
        {"type": "RandomCrop", "crop_size": square, "recompute_bbox": True, "allow_negative_crop": True},
        # keep_empty=False keeps a photograph on which no nail is left; True would drop it.
        {"type": "FilterAnnotations", "min_gt_bbox_wh": (1, 1), "keep_empty": False},
        {"type": "PackDetInputs", "meta_keys": META_KEYS},
    ]


def valid_transform(image_size: int, with_truth: bool = True) -> list[Step]:
    """Nothing random: the photograph, its longer side `image_size` pixels.

    The annotations are loaded after it is resized, so they keep the photograph's size, which predictions get again.
    """
    check: list[Step] = [{"type": "CheckSize"}] if with_truth else []
    truth: list[Step] = [{"type": "LoadAnnotations", "with_bbox": True, "with_mask": True}] if with_truth else []
    resize = {"type": "Resize", "scale": (image_size, image_size), "keep_ratio": True}
    return [{"type": "LoadImageFromFile"}, *check, resize, *truth, {"type": "PackDetInputs", "meta_keys": META_KEYS}]
