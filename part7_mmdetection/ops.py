"""The compiled operators of mmcv that Mask R-CNN and RTMDet-Ins need, nms and RoIAlign, from torchvision.

mmcv has no wheels, only source, and compiling that is where most installations of MMDetection fail. mmcv-lite is a
wheel, and all of mmcv but its compiled module, `mmcv._ext`. torchvision has both operators, for CPU and CUDA. So import
this file before anything of mmcv or mmdet; where a full mmcv is installed, it does nothing.
"""

import importlib.machinery
import importlib.util
import os
import sys
import types
from typing import Any, NoReturn

import torch
import torchvision
from torch import Tensor

# mmdet imports albumentations where it is installed, and that asks the network for its newest version.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Indices of the boxes that stay, int64 (K,), the best first: none overlaps a better one that stays.

    Args:
        boxes: float (N, 4): x1, y1, x2, y2.
        scores: float (N,).
        iou_threshold: more than this is an overlap.
        offset: 1 if a box of one pixel has x1 = x2, as in MMDetection 1, else 0.
    """
    corner = boxes.new_tensor([0, 0, offset, offset])
    return torchvision.ops.nms(boxes + corner, scores, iou_threshold)


def roi_align_forward(
    features: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Cut regions out of feature maps and resize them, into `output`; called as mmcv calls its own.

    Args:
        features: float (N, C, H, W).
        rois: float (K, 5): number in the batch, x1, y1, x2, y2, in pixels of the image.
        output: float (K, C, aligned_height, aligned_width), is written to.
        argmax_y, argmax_x: of pool_mode 0, which is not to be had here.
        spatial_scale: from pixels of the image to those of the features.
        sampling_ratio: points for a pixel of the output, along each side; 0: as many as there are features.
        pool_mode: 1 for the mean of these points, 0 for their maximum.
        aligned: whether the centre of the first pixel lies at 0.5 (MMDetection 2 and 3) or at 0.

    Raises:
        NotImplementedError: pool_mode is 0.
    """
    if pool_mode != 1:
        missing("roi_align with pool_mode='max'")
    size = aligned_height, aligned_width
    output.copy_(torch.ops.torchvision.roi_align(features, rois, spatial_scale, *size, sampling_ratio, aligned))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_features: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """The gradient with respect to the features, into `grad_features`; arguments as above."""
    arguments = spatial_scale, aligned_height, aligned_width, *grad_features.shape, sampling_ratio, aligned
    # torchvision has no kernel for bfloat16 here.
    grad_features.copy_(torch.ops.torchvision._roi_align_backward(grad_output.float(), rois.float(), *arguments))


def missing(name: str) -> NoReturn:
    """What every other compiled operator does here."""
    raise NotImplementedError(
        f"{name} is an operator that only the full mmcv has; make mmcv, in the folder above this part, compiles it"
    )


class Operators(types.ModuleType):
    """Stands for `mmcv._ext`. mmcv asks for all of its operators when it is imported, and calls few."""

    nms = staticmethod(nms)
    roi_align_forward = staticmethod(roi_align_forward)
    roi_align_backward = staticmethod(roi_align_backward)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: missing(name)


def provide_operators() -> None:
    """Let mmcv find these operators, unless it has its own."""
    if importlib.util.find_spec("mmcv._ext"):
        return
    operators = Operators("mmcv._ext")
    operators.__spec__ = importlib.machinery.ModuleSpec("mmcv._ext", None)
    sys.modules["mmcv._ext"] = operators


provide_operators()
