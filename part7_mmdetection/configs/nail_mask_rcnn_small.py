"""Mask R-CNN, narrow enough to be trained by two CPU cores; meant for `--encoder resnet18` and 128 to 192 pixels."""

_base_ = "nail_mask_rcnn.py"

coco_weights = None  # nobody has trained this network

width = 64  # channels after the backbone, of 256

model = dict(
    neck=dict(out_channels=width),
    rpn_head=dict(in_channels=width, feat_channels=width, anchor_generator=dict(scales=[2])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=width),
        mask_roi_extractor=dict(out_channels=width),
        bbox_head=dict(in_channels=width, fc_out_channels=256),
        mask_head=dict(in_channels=width, conv_out_channels=width, num_convs=2),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=400, max_per_img=200),
        rcnn=dict(sampler=dict(num=50)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100), rcnn=dict(max_per_img=30)),
)
