"""Resizing with albumentations, photograph by photograph. What augments whole batches is in augmentation.py."""

import os

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else it asks the network for its newest version

import albumentations as A
import cv2


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
