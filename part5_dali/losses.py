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
        errors: of each pixel, (..., P), 0 or more.
        truth: 1 where the pixel belongs to the class, else 0, (..., P); it may have more dimensions in front.

    Returns:
        0 or more, in the shape of `truth` without P.
    """
    errors, order = errors.sort(descending=True)
    truth = truth.gather(-1, order.expand_as(truth))
    area = truth.sum(-1, keepdim=True)
    intersection = area - truth.cumsum(-1)
    union = area + (1 - truth).cumsum(-1)
    loss_so_far = 1 - intersection / union
    growth = torch.diff(loss_so_far, prepend=torch.zeros_like(area))
    return (errors * growth).sum(-1)  # not errors @ growth, which mixed precision would round to 16 bits


def symmetric_lovasz(logits: Tensor, masks: Tensor) -> Tensor:
    """The mean of the Lovász hinge losses of the foreground and of the background, image by image.

    The foreground's stands in for 1 - IoU of the nails; the background's makes the network sure of what is none. A
    pixel errs by what its margin lacks to 1, and by the same in both: so one sort does for both.

    Args:
        logits: (N, 1, H, W).
        masks: (N, 1, H, W), 0 and 1.
    """
    margins = (logits * (2 * masks - 1)).flatten(1)
    truth = masks.flatten(1)
    return lovasz_extension(torch.relu(1 - margins), torch.stack([truth, 1 - truth])).mean()


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
