"""Augmentation of whole batches with Kornia, on the device that trains.

Article:
https://hphuongdhsp.github.io/ml-blog/pytorchlightning/semanticsegmentation/deeplearning/kornia/2022/08/05/segmentation-model-part4.html
"""

import kornia.augmentation as K
import numpy as np
import torch
from torch import Tensor, nn

from model import MEAN, STD


class Augmentation(nn.Module):
    """What may differ between two photographs of the same hand: part 3's augmentation, step by step, in Kornia.

    Kornia moves image and mask together, and takes a mask's pixels from their nearest neighbour, so that a
    mask of 0 and 1 stays one. Masks are not touched by changes of colour.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.steps = K.AugmentationSequential(
            K.RandomHorizontalFlip(p=0.5),
            K.RandomVerticalFlip(p=0.5),
            K.RandomAffine(
                degrees=30,
                scale=(0.8, 1.2, 0.8, 1.2),  # across and along, each for itself
                translate=(0.1, 0.1),
                padding_mode="reflection",  # black corners would be a hint about the angle
                p=0.5,
            ),
            K.ColorJitter(brightness=(0.8, 1.2), contrast=(0.8, 1.2), saturation=(0.8, 1.2), hue=(-0.05, 0.05), p=0.5),
            K.RandomGaussianBlur(kernel_size=5, sigma=(0.3, 1.0), p=0.1),
            K.RandomGaussianNoise(std=0.03, p=0.1),  # of images in [0, 1]; here the strength is always the same
            data_keys=["input", "mask"],
        )
        self.normalize = K.Normalize(MEAN, STD)

    @torch.no_grad()
    def forward(self, images: Tensor, masks: Tensor, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Augment and normalise a batch.

        Args:
            images: uint8 (N, H, W, 3) in [0, 255].
            masks: labels, uint8 (N, H, W).
            epoch: together with the seed and `index`, what the numbers at random follow from.
            index: of the batch's first photograph, which is in no other batch of this epoch.

        Returns:
            Images, float32 (N, 3, H, W) of mean 0 and deviation 1, and masks, int64 (N, H, W).
        """
        # Kornia draws from torch's own random numbers; a run that goes on shall draw what it would have drawn.
        torch.manual_seed(int(np.random.SeedSequence([self.seed, epoch, index]).generate_state(1)[0]))
        images, masks = self.steps(images.permute(0, 3, 1, 2) / 255, masks.unsqueeze(1))
        # Last of all: the changes of colour want images in [0, 1]. Noise leads out of it.
        return self.normalize(images.clamp(0, 1)), masks.squeeze(1).long()
