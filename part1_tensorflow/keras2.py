"""TensorFlow with Keras 2, for which segmentation_models and tensorflow-addons are written.

Keras 2 lives on as the package tf-keras. TensorFlow decides at the first use of tf.keras which Keras
that is, so every file of this part takes `tf` from here, where the decision comes first.
"""

import os
import sys
import warnings

os.environ["TF_USE_LEGACY_KERAS"] = "1"
os.environ["SM_FRAMEWORK"] = "tf.keras"
# The log of TensorFlow's C++ code is long, above all where there is no GPU. What really goes wrong is
# raised as an exception too. To see why it does not find a GPU, set this to 0.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# TensorFlow by itself uses oneDNN, which makes convolutions faster, on newer CPUs only. With it, a training step took
# 0.71 of the time on one that has AVX2 only (benchmarks/README.md).
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import segmentation_models as sm
import tensorflow as tf
from tf_keras.src.engine import keras_tensor  # noqa: F401  what tensorflow-addons looks for, see below

# Dropout then draws from generators that can be saved, so that a run that goes on draws what it would have drawn.
tf.keras.backend.experimental.enable_tf_random_generator()

__all__ = ["build_optimizer", "rectified_adam", "sm", "tf"]


def rectified_adam() -> type[tf.keras.optimizers.Optimizer]:
    """RectifiedAdam of tensorflow-addons, which is imported only by those who use it.

    tensorflow-addons 0.23, the last one, looks for Keras 2 under the name that it had then
    (https://github.com/tensorflow/addons/issues/2865), so that name has to be there.
    """
    sys.modules.setdefault("keras.src.engine", sys.modules["tf_keras.src.engine"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces the end of its life at every start
        import tensorflow_addons as tfa
    return tfa.optimizers.RectifiedAdam


def build_optimizer(model: tf.keras.Model) -> None:
    """Create the variables that the optimizer keeps for each weight, which it does by itself in the first step.

    TensorFlow records a step as a graph, and once more if variables were created meanwhile.
    """
    optimizer, weights = model.optimizer, model.trainable_variables
    if hasattr(optimizer, "build"):
        optimizer.build(weights)
    else:  # RectifiedAdam, or the LossScaleOptimizer around it: Keras' older optimizers have it under this name only
        optimizer._create_all_weights(weights)
