"""Semantic and instance segmentation in one picture: part7_mmdetection/imgs/instances.png.

    .venv-pt/bin/python benchmarks/instances.py --data_root data/nails

Takes the first prepared photograph for validation whose nails would grow together if their mask was drawn too
large, and lets coco.py of part 7 find the instances of both masks.
"""

import argparse
import sys
from pathlib import Path

import cv2
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "part7_mmdetection"))

from coco import Mask, describe_instance, find_instances

COLOURS = plt.get_cmap("tab10").colors
LARGER = 41  # pixels of the disk that the mask is drawn larger with


def draw_instances(axes: plt.Axes, photograph: np.ndarray, instances: list[Mask]) -> None:
    """The photograph, darker, and each instance in a colour of its own, with its box."""
    picture = photograph / 255 * 0.5
    for instance, colour in zip(instances, COLOURS, strict=False):
        picture[instance > 0] = 0.3 * picture[instance > 0] + 0.7 * np.array(colour)
        x, y, width, height = describe_instance(instance)["bbox"]
        axes.add_patch(plt.Rectangle((x, y), width, height, fill=False, color=colour, linewidth=2))
    axes.imshow(picture)


def main() -> None:
    """Find a photograph, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", type=Path, required=True, help="prepared data")
    data_root = parser.parse_args().data_root
    disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (LARGER, LARGER))
    for file in sorted((data_root / "valid" / "masks").rglob("*.png")):
        mask = np.array(Image.open(file))
        larger = cv2.dilate(mask, disk)
        instances, _ = find_instances(mask, numbered=False, min_area=16)
        grown, _ = find_instances(larger, numbered=False, min_area=16)
        if 3 <= len(grown) < len(instances):
            break
    else:
        sys.exit(f"error: no nails in {data_root} grow together")
    photograph = np.array(Image.open(str(file).replace("masks", "images")))
    figure, axes = plt.subplots(1, 4, figsize=(14, 14 / 4 * mask.shape[0] / mask.shape[1] + 0.5), layout="constrained")
    axes[0].imshow(photograph)
    axes[0].set_title("photograph")
    axes[1].imshow(mask, cmap="gray")
    axes[1].set_title("semantic: nail or not")
    draw_instances(axes[2], photograph, instances)
    axes[2].set_title(f"instances: {len(instances)}")
    draw_instances(axes[3], photograph, grown)
    axes[3].set_title(f"mask drawn too large: {len(grown)} instances")
    for one in axes:
        one.axis("off")
    output = ROOT / "part7_mmdetection" / "imgs" / "instances.png"
    output.parent.mkdir(exist_ok=True)
    figure.savefig(output, dpi=80)
    print(
        f"{file.relative_to(data_root)}: {len(instances)} instances, {len(grown)} when drawn larger; drawn in {output}"
    )


if __name__ == "__main__":
    main()
