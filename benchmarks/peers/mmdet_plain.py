"""What part 7 is compared with: MMDetection as its documentation says, a config and tools/train.py.

Follows the user guide "Train with customized datasets" and "Customize runtime settings" (mmdetection.readthedocs.io):
a config that inherits that of Mask R-CNN for COCO and names what is different. This script writes it into work_dir and
runs MMDetection's own tools/train.py with it. The network is that of part7_mmdetection/configs/nail_mask_rcnn_small.py,
the optimizer and the meaning of --learning_rate (for 16 photographs a step, --auto-scale-lr) are part 7's. What else
is the base's stays so: batches of 1 in validation, and its schedule, stretched from 12 epochs to --epochs, with a
warm-up of at most a tenth of the run, because that of the base, 500 steps, is longer than a run on so little data.

mmcv-lite is installed here, which has no compiled operators. So tools/train.py is not started as a file, but by a line
of Python that imports part7_mmdetection/ops.py before it, which takes nms and RoIAlign from torchvision.

    .venv-pt/bin/python benchmarks/peers/mmdet_plain.py --data_root DATA --work_dir DIR --epochs 5 --image_size 128 \
        --batch_size 4 --learning_rate 4e-3 --workers 2 --encoder resnet18
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PART = HERE.parents[1] / "part7_mmdetection"
# The depth of a ResNet, and the channels of its four stages.
ENCODERS = {
    "resnet18": (18, [64, 128, 256, 512]),
    "resnet34": (34, [64, 128, 256, 512]),
    "resnet50": (50, [256, 512, 1024, 2048]),
}

# Follows the lines with the settings that `write_config` takes from the flags and from the data.
CONFIG = """
_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"

# --- model ---
model = dict(
    # From scratch: no weights to fetch, and all layers learn.
    backbone=dict(depth=depth, init_cfg=None, frozen_stages=-1, norm_eval=False),
    neck=dict(in_channels=in_channels, out_channels=64),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[2])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        mask_roi_extractor=dict(out_channels=64),
        bbox_head=dict(num_classes=len(classes), in_channels=64, fc_out_channels=256),
        mask_head=dict(num_classes=len(classes), in_channels=64, conv_out_channels=64, num_convs=2),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)), rpn_proposal=dict(nms_pre=400, max_per_img=200), rcnn=dict(sampler=dict(num=50))
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100), rcnn=dict(max_per_img=30)),
)

# --- data ---
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="Resize", scale=(image_size, image_size), keep_ratio=True),
    dict(type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"]),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackDetInputs"),
]
valid_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(image_size, image_size), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
data = dict(metainfo=dict(classes=classes), data_root=data_root, data_prefix=dict(img=""))
loading = dict(num_workers=workers, persistent_workers=workers > 0)
train_dataloader = dict(
    batch_size=batch_size,
    batch_sampler=None,  # the base's, by aspect ratio, may drop a full batch, too, with drop_last
    drop_last=True,
    dataset=dict(ann_file="annotations/train.json", pipeline=train_pipeline, **data),
    **loading,
)
val_dataloader = dict(dataset=dict(ann_file="annotations/valid.json", pipeline=valid_pipeline, **data), **loading)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "/annotations/valid.json")
test_evaluator = val_evaluator

# --- schedule ---
train_cfg = dict(max_epochs=epochs)
randomness = dict(seed=42)  # as train.py
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=max(1, min(500, epochs * steps // 10))),
    dict(type="MultiStepLR", by_epoch=True, milestones=[round(epochs * 8 / 12), round(epochs * 11 / 12)], gamma=0.1),
]
optimizer = dict(type="AdamW", lr=learning_rate, weight_decay=0.01)
optim_wrapper = dict(_delete_=True, type="OptimWrapper", optimizer=optimizer, clip_grad=dict(max_norm=10))

# --- log ---
default_hooks = dict(checkpoint=dict(max_keep_ckpts=1, save_best="coco/segm_mAP"))
custom_imports = dict(imports=["mmdet_log"])
custom_hooks = [dict(type="PeerLog")]
"""


def parse_args() -> argparse.Namespace:
    """The flags that all peers share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    types = {"data_root": Path, "work_dir": Path, "epochs": int, "image_size": int, "batch_size": int}
    for name, kind in (types | {"learning_rate": float, "workers": int}).items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--encoder", choices=ENCODERS, default="resnet18")
    return parser.parse_args()


def write_config(args: argparse.Namespace) -> Path:
    """Write the config for these flags into work_dir."""
    data_root = args.data_root.resolve()
    annotations = json.loads((data_root / "annotations" / "train.json").read_text())
    depth, in_channels = ENCODERS[args.encoder]
    settings = {
        "depth": depth,
        "in_channels": in_channels,
        "classes": tuple(category["name"] for category in annotations["categories"]),
        "data_root": str(data_root),
        "image_size": args.image_size,
        "batch_size": args.batch_size,
        "workers": args.workers,
        "epochs": args.epochs,
        "steps": len(annotations["images"]) // args.batch_size,
        "learning_rate": args.learning_rate,
    }
    file = args.work_dir / "mask_rcnn_nails.py"
    file.write_text("".join(f"{name} = {value!r}\n" for name, value in settings.items()) + CONFIG)
    return file


def main() -> None:
    """Write the config, train with it."""
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    config = write_config(args)
    package = Path(importlib.util.find_spec("mmdet").origin).parent
    start = (
        f"import runpy, sys; sys.path[:0] = [{str(PART)!r}, {str(HERE)!r}]; import ops; "
        f"runpy.run_path({str(package / '.mim' / 'tools' / 'train.py')!r}, run_name='__main__')"
    )
    flags = ["--work-dir", str(args.work_dir), "--auto-scale-lr"]
    subprocess.run([sys.executable, "-c", start, str(config), *flags], check=True)


if __name__ == "__main__":
    main()
