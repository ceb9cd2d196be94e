"""The losses of --loss. The article's, the symmetric Lovász hinge, is written out; the others come from libraries.

Article:
https://hphuongdhsp.github.io/ml-blog/pytorchlightning/semanticsegmentation/deeplearning/2022/08/04/segmentation-model-part3.html
"""

from collections.abc import Callable

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


def lovasz_extension(errors: Tensor, truth: Tensor) -> Tensor:
    """How much IoU a set of errors costs, for errors of any size (Berman et al., The Lovász-Softmax loss, 2018).

    For errors of exactly 0 and 1 this is 1 - IoU. In between it is the tightest convex function with these values:
    sort the pixels by their error, the largest first, and weigh each error with what 1 - IoU grows by when that
    pixel becomes wrong as well as all before it (algorithm 1 of the paper).

    Args:
        errors: of each pixel, (P,), 0 or more.
        truth: (P,), 1 where the pixel belongs to the class, else 0.

    Returns:
        A scalar, 0 or more.
    """
    errors, order = torch.sort(errors, descending=True)
    truth = truth[order]
    intersection = truth.sum() - truth.cumsum(0)
    union = truth.sum() + (1 - truth).cumsum(0)
    loss_so_far = 1 - intersection / union
    growth = torch.diff(loss_so_far, prepend=loss_so_far.new_zeros(1))
    return errors @ growth


def lovasz_hinge(logits: Tensor, truth: Tensor) -> Tensor:
    """The Lovász hinge loss of one image: logits (P,), truth (P,) of 0 and 1. A pixel errs unless its margin is 1."""
    margin = logits * (2 * truth - 1)
    return lovasz_extension(torch.relu(1 - margin), truth)


def symmetric_lovasz(logits: Tensor, masks: Tensor) -> Tensor:
    """The mean of the Lovász hinge losses of the foreground and of the background, image by image.

    The foreground's stands in for 1 - IoU of the nails; the background's makes the network sure of what is none.

    Args:
        logits: (N, 1, H, W).
        masks: (N, 1, H, W), 0 and 1.
    """
    losses = [
        lovasz_hinge(logit, truth) + lovasz_hinge(-logit, 1 - truth)
        for logit, truth in zip(logits.flatten(1), masks.flatten(1), strict=True)
    ]
    return torch.stack(losses).mean() / 2


def lovasz_softmax(logits: Tensor, masks: Tensor) -> Tensor:
    """The same for several classes: the mean over those that an image has. logits (N, C, H, W), masks (N, H, W)."""
    losses = []
    for probabilities, labels in zip(logits.softmax(dim=1).flatten(2), masks.flatten(1), strict=True):
        for label in labels.unique():
            truth = (labels == label).float()
            losses.append(lovasz_extension((truth - probabilities[label]).abs(), truth))
    return torch.stack(losses).mean()


def cross_entropy(mode: str) -> nn.Module:
    """Of every pixel alike, so that the large background weighs most."""
    return nn.BCEWithLogitsLoss() if mode == "binary" else nn.CrossEntropyLoss()


def dice_and_cross_entropy(mode: str) -> Loss:
    """Dice looks at the area as a whole, cross-entropy at each pixel: a common choice where one alone gets stuck."""
    dice, pixels = smp.losses.DiceLoss(mode), cross_entropy(mode)
    return lambda logits, masks: dice(logits, masks) + pixels(logits, masks)


# A line makes a new --loss: from "binary" or "multiclass" to a function of logits and masks.
LOSSES: dict[str, Callable[[str], Loss]] = {
    "lovasz": lambda mode: symmetric_lovasz if mode == "binary" else lovasz_softmax,
    "dice": smp.losses.DiceLoss,
    "focal": smp.losses.FocalLoss,
    "dice_bce": dice_and_cross_entropy,
    "jaccard": smp.losses.JaccardLoss,
    "tversky": lambda mode: smp.losses.TverskyLoss(mode, alpha=0.3, beta=0.7),  # what is missed costs more than twice
    "cross_entropy": cross_entropy,
}


def create_loss(name: str, classes: int) -> Loss:
    """A function of logits, (N, classes, H, W), and masks of labels, int64 (N, H, W)."""
    if classes > 1:
        return LOSSES[name]("multiclass")
    loss_fn = LOSSES[name]("binary")
    return lambda logits, masks: loss_fn(logits, masks[:, None].float())
