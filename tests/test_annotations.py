"""Part 7, from a copied folder: how masks become annotations, and the operators that mmcv lacks."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import SMALL_MASK_RCNN, Part


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Part:
    return Part("part7_mmdetection", tmp_path_factory.mktemp("copied alone"))


# --- annotations -------------------------------------------------------------------------------


def make_pair(raw: Path, name: str, mask: np.ndarray) -> None:
    photograph = np.random.default_rng(int(name[-1])).integers(0, 256, (*mask.shape, 3))  # two alike are kept together
    for folder, pixels in [("images", photograph), ("masks", mask)]:
        (raw / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(raw / folder / f"{name}.png")


def decode(annotation: dict) -> np.ndarray:
    """COCO's run lengths, column by column, by the description of the format."""
    text, counts = annotation["segmentation"]["counts"].encode(), []
    position = 0
    while position < len(text):
        value = shift = 0
        more = True
        while more:
            byte = text[position] - 48
            value |= (byte & 0x1F) << 5 * shift
            more, position, shift = bool(byte & 0x20), position + 1, shift + 1
            if not more and byte & 0x10:
                value |= -1 << 5 * shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
    values = np.concatenate([np.full(number, index % 2) for index, number in enumerate(counts)])
    return values.reshape(annotation["segmentation"]["size"][::-1]).T


def test_annotations_are_the_pixels(part: Part, tmp_path: Path) -> None:
    mask = np.zeros((60, 80), np.uint8)
    mask[10:20, 5:15] = 255
    mask[13:16, 8:12] = 0  # a hole
    mask[0:7, 70:80] = 255  # at the border
    mask[40:42, 40:43] = 255  # a speck of 6 pixels
    mask[50:60, 20:30] = 255
    mask[45:50, 30:40] = 255  # touches the one before at a corner
    for index in range(5):
        make_pair(tmp_path / "raw", f"hand{index}", mask)
    printed = part.run("data_preparation.py", "--data_root", tmp_path / "nails", "--raw", tmp_path / "raw").stdout
    assert "15" in printed.split("instances:")[1].split("\n")[0] and "left out: 5," in printed
    content = json.loads((tmp_path / "nails" / "annotations" / "train.json").read_text())
    first = [one for one in content["annotations"] if one["image_id"] == 1]
    masks = [decode(one) for one in first]
    mask[40:42, 40:43] = 0
    assert np.array_equal(np.sum(masks, axis=0), mask // 255)
    for annotation, one in zip(first, masks, strict=True):
        rows, columns = np.nonzero(one)
        width, height = columns.max() - columns.min() + 1, rows.max() - rows.min() + 1
        assert annotation["bbox"] == [columns.min(), rows.min(), width, height]
        assert annotation["area"] == one.sum()  # of the mask, not of the box
    assert sorted(one["area"] for one in first) == [70, 88, 150]
    assert content["images"][0]["width"] == 80 and content["images"][0]["height"] == 60
    assert (tmp_path / "nails" / content["images"][0]["file_name"]).exists()


def test_noise_is_counted_and_crowds_are_told(part: Part, tmp_path: Path) -> None:
    noise, crowd = np.zeros((500, 500), np.uint8), np.zeros((500, 500), np.uint8)
    noise[::2, ::2] = 255  # 62,500 specks: a mask for each of them would take 16 GB
    noise[100:110, 100:110] = 255
    crowd[np.ix_(np.arange(500) % 10 < 5, np.arange(500) % 10 < 5)] = 255  # 2,500 squares of 25 pixels
    for index in range(4):
        make_pair(tmp_path / "raw", f"hand{index}", crowd if index == 3 else noise)
    printed = part.run("data_preparation.py", "--data_root", tmp_path / "nails", "--raw", tmp_path / "raw").stdout
    assert "instances: 2503; left out: " in printed
    assert "more than 1000 instances" in printed and "hand3.png" in printed


def test_own_annotations_are_not_replaced(part: Part, tmp_path: Path) -> None:
    root, mask = tmp_path / "nails", np.zeros((40, 40), np.uint8)
    mask[5:15, 5:10] = 255
    for index in range(5):
        make_pair(tmp_path / "raw", f"hand{index}", mask)
    args = ["--data_root", root, "--raw", tmp_path / "raw"]
    part.run("data_preparation.py", *args)
    part.run("data_preparation.py", *args, "--valid_fraction", 0.4)  # those that it made itself may go
    own = root / "annotations" / "train.json"
    content = json.loads(own.read_text())
    del content["info"]
    own.write_text(json.dumps(content))
    refused = part.run("data_preparation.py", *args, code=2)
    assert "annotations/train.json" in refused.stderr
    assert json.loads(own.read_text()) == content


def test_masks_that_number_their_instances_are_taken_as_they_are(part: Part, tmp_path: Path) -> None:
    mask = np.zeros((40, 40), np.uint8)
    mask[5:15, 5:10], mask[5:15, 10:15] = 3, 7  # two that touch
    mask[20:30, 5:10] = 3  # and one in two pieces
    for index in range(5):
        make_pair(tmp_path / "raw", f"hand{index}", mask)
    args = ["--data_root", tmp_path / "nails", "--raw", tmp_path / "raw", "--numbered"]
    part.run("data_preparation.py", *args)
    content = json.loads((tmp_path / "nails" / "annotations" / "valid.json").read_text())
    assert [one["area"] for one in content["annotations"]] == [100, 50]
    assert [one["bbox"] for one in content["annotations"]] == [[5, 5, 5, 25], [10, 5, 5, 10]]


READ_WRONG = """
import contextlib, json, sys
from pathlib import Path
import ops
from dataloader import read_annotations

root = Path(sys.argv[1])
content = json.loads((root / "annotations" / "train.json").read_text())
for changed, _ in json.loads(Path(sys.argv[2]).read_text()):
    file = root / "annotations" / "train.json"
    file.unlink(missing_ok=True)
    if changed:
        file.write_text(changed if isinstance(changed, str) else json.dumps(content | changed))
    with contextlib.suppress(SystemExit):
        read_annotations(root, "train")
"""


STEPS = "import sys, torch; print(torch.load(sys.argv[1], 'cpu', weights_only=True)['meta']['iter'])"


def test_cfg_options_can_leave_out_photographs_without_nails(part: Part, tmp_path: Path) -> None:
    mask = np.zeros((60, 80), np.uint8)
    mask[10:30, 20:50] = 255
    for index in range(10):
        make_pair(tmp_path / "raw", f"hand{index}", mask)
    part.run("data_preparation.py", "--data_root", tmp_path / "nails", "--raw", tmp_path / "raw")
    file = tmp_path / "nails" / "annotations" / "train.json"
    content = json.loads(file.read_text())
    with_nails = {image["id"] for image in content["images"][:4]}
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] in with_nails]
    file.write_text(json.dumps(content))
    args = ["--data_root", tmp_path / "nails", "--work_dir", tmp_path / "runs", *SMALL_MASK_RCNN, "--epochs", 1]
    part.run("train.py", *args, "--cfg_options", "train_dataloader.dataset.filter_cfg.filter_empty_gt=True")
    steps = part.run("-c", STEPS, part.run_dir(tmp_path / "runs") / "weights" / "last.pth").stdout
    assert len(content["images"]) == 8 and int(steps) == 1  # of four photographs


def test_what_is_wrong_with_own_annotations_is_told(part: Part, tmp_path: Path) -> None:
    root, mask = tmp_path / "nails", np.zeros((40, 40), np.uint8)
    mask[5:15, 5:10] = 255
    for index in range(5):
        make_pair(tmp_path / "raw", f"hand{index}", mask)
    part.run("data_preparation.py", "--data_root", root, "--raw", tmp_path / "raw")
    text = (root / "annotations" / "train.json").read_text()
    content = json.loads(text)
    nails = content["annotations"]
    wrong = [
        [{"images": [{"id": 1, "file_name": "gone.png", "width": 9, "height": 9}]}, "gone.png"],
        [{"images": [{"id": 1, "file_name": "../../etc/passwd", "width": 9, "height": 9}]}, "leads outside"],
        [{"images": [{"id": 1, "file_name": "/etc/passwd", "width": 9, "height": 9}]}, "leads outside"],
        [None, "there is no"],
        [text[:-9], "no COCO file"],
        [{"annotations": []}, "no annotations"],
        [{"categories": None}, "no COCO file"],
        [{"annotations": [{"id": 7, "image_id": 1}]}, "id 7: area"],
        [{"annotations": [one | {"category_id": 7} for one in nails]}, "category_id 7"],
        [{"annotations": [one | {"image_id": 700} for one in nails]}, "image_id 700"],
        [{"annotations": [one | {"iscrowd": 1} for one in nails]}, "iscrowd 1"],
        [{"images": content["images"][:1] * 2}, "an id occurs twice"],
    ]
    (part.folder / "read_wrong.py").write_text(READ_WRONG)
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    told = part.run("read_wrong.py", root, tmp_path / "wrong.json").stderr.splitlines()
    assert len(told) == len(wrong)
    for line, (_, said) in zip(told, wrong, strict=True):
        assert said in line and "train.json" in line


# --- operators ---------------------------------------------------------------------------------

OPERATORS = """
import ops
ops.provide_operators()
import numpy as np
import torch
from mmcv.ops import RoIAlign, nms, soft_nms

rng = np.random.default_rng(0)
corners = rng.uniform(0, 40, (200, 2))
boxes = np.hstack([corners, corners + rng.uniform(1, 20, (200, 2))]).astype(np.float32)
scores = rng.permutation(200).astype(np.float32)

def overlap(one, other):
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    both = np.prod(np.maximum(high - low, 0))
    return both / (np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]) - both)

kept = []
for index in np.argsort(-scores):
    if all(overlap(boxes[index], boxes[other]) <= 0.5 for other in kept):
        kept.append(index)
print(nms(torch.tensor(boxes), torch.tensor(scores), 0.5)[1].tolist() == kept, 50 < len(kept) < 200)

def bilinear(feature, y, x):
    height, width = feature.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return feature.sum() * 0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = feature[top, left] * (1 - (x - left)) + feature[top, right] * (x - left)
    lower = feature[bottom, left] * (1 - (x - left)) + feature[bottom, right] * (x - left)
    return upper * (1 - (y - top)) + lower * (y - top)

def reference(features, roi, scale, points):
    _, x1, y1, x2, y2 = (float(value) * scale - 0.5 for value in roi)
    cells = []
    for row in range(7):
        for column in range(7):
            found = [
                bilinear(features, y1 + (y2 - y1) / 7 * (row + (i + 0.5) / points),
                         x1 + (x2 - x1) / 7 * (column + (j + 0.5) / points))
                for i in range(points) for j in range(points)
            ]
            cells.append(sum(found) / len(found))
    return torch.stack(cells).view(7, 7)

torch.manual_seed(0)
features = torch.rand(2, 1, 20, 24, dtype=torch.float64).float().requires_grad_()
rois = torch.tensor([[0, 3.0, 4, 60, 50], [1, -8, -8, 30, 41], [1, 70, 60, 110, 90]])
ours = RoIAlign((7, 7), spatial_scale=0.25, sampling_ratio=2, aligned=True)(features, rois)
weights = torch.rand_like(ours)
gradient, = torch.autograd.grad((ours * weights).sum(), features)
theirs = torch.stack([reference(features[int(roi[0]), 0], roi, 0.25, 2) for roi in rois])[:, None]
expected, = torch.autograd.grad((theirs * weights).sum(), features)
print((ours - theirs).abs().max().item() < 1e-5, (gradient - expected).abs().max().item() < 1e-4)
try:
    soft_nms(torch.tensor(boxes), torch.tensor(scores))
except NotImplementedError as error:
    print(error)
"""


def test_operators_agree_with_a_reference_and_others_are_named(part: Part) -> None:
    (part.folder / "operators.py").write_text(OPERATORS)
    lines = part.run("operators.py").stdout.splitlines()
    assert lines[:2] == ["True True", "True True"]
    assert "softnms" in lines[2] and "make mmcv" in lines[2]
