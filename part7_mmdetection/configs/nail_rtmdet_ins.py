"""RTMDet-Ins, tiny: one stage instead of two, faster than Mask R-CNN (Lyu et al., 2022).

Its encoder, CSPNeXt, is part of the config; `--encoder` does not apply.
"""

_base_ = "mmdet::rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py"

coco_weights = "mmdet::rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py"

# Photographs of a batch differ in shape, so they are padded to that of the largest one, and their masks, too. The base
# pads in its pipeline.
model = dict(data_preprocessor=dict(pad_mask=True, pad_size_divisor=32))

optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05, fused=True),  # fused: all weights in one go
    # As in the base: biases and norms have no weight decay.
    paramwise_cfg=dict(norm_decay_mult=0, bias_decay_mult=0, bypass_duplicate=True),
    clip_grad=dict(max_norm=10),
)

# The base switches its pipeline 20 epochs before the end, and averages the weights. Ours is one pipeline, without.
custom_hooks = []

# Without nails on any photograph of a batch, the layers that draw masks get no gradient: several processes would wait.
find_unused_parameters = True
