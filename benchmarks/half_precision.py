"""Why the sigmoid has to be float32: the losses of part 1 on probabilities of 16 bits.

.venv-tf/bin/python benchmarks/half_precision.py
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "part1_tensorflow"))

from keras2 import sm, tf


def main() -> None:
    """Print Dice and focal loss of four predictions that are confident and mostly right."""
    dice_loss, focal_loss = sm.losses.DiceLoss(), sm.losses.BinaryFocalLoss()
    print("pixels      sigmoid in   Dice loss   focal loss")
    for side in (64, 384):
        rng = np.random.default_rng(0)
        masks = (rng.random((4, side, side, 1)) < 0.03).astype(np.float32)
        logits = np.where(masks > 0, 3, -3) + rng.normal(0, 4, masks.shape)
        for dtype in ("float32", "float16", "bfloat16"):
            probabilities, truth = tf.sigmoid(tf.cast(logits, dtype)), tf.cast(masks, dtype)
            dice, focal = float(dice_loss(truth, probabilities)), float(focal_loss(truth, probabilities))
            print(f"4 x {side:3d}^2   {dtype:9s}   {dice:9.3f}   {focal:10.3f}")


if __name__ == "__main__":
    main()
