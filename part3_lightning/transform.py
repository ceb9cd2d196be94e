"""Augmentation with albumentations.

The same as in part 1, whose article explains it in section 3.3:
https://hphuongdhsp.github.io/ml-blog/tensorflow/semanticsegmentation/deeplearning/2022/08/02/segmentation-model-part1.html
"""

import os
import random

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else it asks the network for its newest version

import albumentations as A
import cv2
import numpy as np


def train_transform() -> A.Compose:
    """What may differ between two photographs of the same hand. Keeps the size.

    Albumentations moves image and mask together, and takes a mask's pixels from their nearest
    neighbour, so that a mask of 0 and 1 stays one. Masks are not touched by changes of colour.
    """
    return A.Compose(
        [
            A.HorizontalFlip(p=0.5),
            A.VerticalFlip(p=0.5),
            A.Affine(
                rotate=(-30, 30),
                scale=(0.8, 1.2),
                translate_percent=(-0.1, 0.1),
                border_mode=cv2.BORDER_REFLECT_101,  # black corners would be a hint about the angle
                p=0.5,
            ),
            A.ColorJitter(brightness=(0.8, 1.2), contrast=(0.8, 1.2), saturation=(0.8, 1.2), hue=(-0.05, 0.05), p=0.5),
            A.GaussianBlur(blur_limit=0, sigma_limit=(0.3, 1.0), p=0.1),
            A.GaussNoise(std_range=(0.01, 0.05), p=0.1),  # as a fraction of 255
        ],
        strict=True,  # an argument that it does not know is an error, not a warning
    )


def seed_transform(transform: A.Compose, *place: int) -> None:
    """Let what `transform` draws next follow from some numbers, such as seed, epoch and photograph.

    All its steps share two generators, because albumentations uses NumPy's and Python's, and draw one after the other.
    `Compose.set_random_seed` would give each step its own with the same seed: those that happen half of the time would
    happen either all together or not at all.
    """
    generator = np.random.default_rng(place)
    transform.set_random_state(generator, random.Random(int(generator.integers(2**32))))


def valid_transform(image_size: int) -> A.Compose:
    """Nothing random: the photograph, whatever its shape, as the square that the network wants."""
    return A.Compose(
        [
            A.Resize(
                image_size,
                image_size,
                interpolation=cv2.INTER_AREA,  # shrinking without aliasing
                # Plain INTER_NEAREST takes the upper left pixel, not the middle one: masks would be off by
                # half a pixel of the small picture, and by a flip to the other side.
                mask_interpolation=cv2.INTER_NEAREST_EXACT,
            )
        ],
        strict=True,
    )
