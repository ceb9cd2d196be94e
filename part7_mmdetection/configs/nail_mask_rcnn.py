"""Mask R-CNN for nails: what differs from MMDetection's own one for COCO (He et al., 2017).

A config is a Python file whose variables are the settings. `_base_` is executed first, and a dict here is merged into
the one of the same name there. What a run is told by flags, its data, classes, encoder and epochs, is put in by
train.py; here is what the flags do not say.
"""

_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"

# What `--encoder_weights coco` begins with: the same network, as MMDetection has trained it.
coco_weights = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_2x_coco.py"

model = dict(
    # Nails are small: the smallest anchors have 16 pixels a side instead of 32.
    rpn_head=dict(anchor_generator=dict(scales=[4])),
    # A photograph has a handful of nails, not hundreds of things: a quarter of the proposals suffices.
    train_cfg=dict(rpn_proposal=dict(nms_pre=1000, max_per_img=500), rcnn=dict(sampler=dict(num=128))),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=250), rcnn=dict(max_per_img=50)),
)

# The base has SGD, whose learning rate has to be tuned again for each batch and network. AdamW is more forgiving.
optim_wrapper = dict(
    _delete_=True,  # instead of merging: SGD's momentum means nothing to AdamW
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.01, fused=True),  # fused: all weights in one go
    clip_grad=dict(max_norm=10),
)
