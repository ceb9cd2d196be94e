"""Runs a script with bfloat16 as a CPU that has it would calculate: `python imitated.py train.py FLAGS`.

PyTorch and TensorFlow imitate it on other CPUs too, but ten times as slowly as float32. Here the operations with many
products, the convolutions and matrices, take arguments that were rounded to bfloat16, add up in float32, and round
what comes out: that is what AMX and AVX512-BF16 do. All else, autocast included, is the library's own.
"""

import functools
import importlib.util
import runpy
import sys
from collections.abc import Callable
from typing import Any


def imitate_in_torch() -> None:
    import torch
    from torch.nn import functional

    def rounding(function: Callable) -> Callable:
        def rounded(value: Any) -> Any:
            is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.bfloat16().float() if is_float else value

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_autocast_enabled("cpu"):
                return function(*args, **kwargs)
            with torch.autocast("cpu", enabled=False):
                return function(*map(rounded, args), **{name: rounded(kwargs[name]) for name in kwargs}).bfloat16()

        return call

    torch.matmul = rounding(torch.matmul)
    for name in ["conv2d", "linear", "scaled_dot_product_attention"]:
        setattr(functional, name, rounding(getattr(functional, name)))


def imitate_in_tensorflow() -> None:
    import tensorflow.compat.v2 as tf  # where tf_keras has it from

    convolution = tf.nn.convolution

    def call(images: Any, kernel: Any, *args: Any, **kwargs: Any) -> Any:
        if images.dtype != tf.bfloat16:
            return convolution(images, kernel, *args, **kwargs)
        found = convolution(tf.cast(images, tf.float32), tf.cast(kernel, tf.float32), *args, **kwargs)
        return tf.cast(found, tf.bfloat16)

    tf.nn.convolution = call


if __name__ == "__main__":
    sys.path.insert(0, "")  # the part's folder, as if it were the script's
    sys.argv = sys.argv[1:]
    if importlib.util.find_spec("torch"):
        imitate_in_torch()
    else:
        imitate_in_tensorflow()
    runpy.run_path(sys.argv[0], run_name="__main__")
