"""The network, its loss, its metrics and its optimizer.

Article, sections 4 and 5.1:
https://hphuongdhsp.github.io/ml-blog/tensorflow/semanticsegmentation/deeplearning/2022/08/02/segmentation-model-part1.html
"""

from collections.abc import Callable

import numpy as np

from keras2 import rectified_adam, sm, tf


def create_model(encoder: str, image_size: int, encoder_weights: str | None) -> tf.keras.Model:
    """A U-Net on top of `encoder`.

    Args:
        encoder: one of `sm.get_available_backbone_names()`.
        image_size: side of the square input, a multiple of 32.
        encoder_weights: "imagenet", a file of weights for the encoder, or None to start from scratch.

    Returns:
        A model from uint8 RGB images (N, image_size, image_size, 3) in [0, 255] to float32
        probabilities (N, image_size, image_size, 1) in [0, 1].
    """
    unet = sm.Unet(encoder, input_shape=(image_size, image_size, 3), encoder_weights=encoder_weights, classes=1)
    # Validation uses running means of the batches' statistics. Keras' encoders let them follow over 100 to
    # 1000 steps, too slowly for a small data set: it is the network of long ago that would be validated.
    for layer in unet.layers:
        if isinstance(layer, tf.keras.layers.BatchNormalization):
            layer.momentum = 0.9  # ten steps, PyTorch's default

    # Under mixed precision the last layer has to be float32. float16 ends at 65,504, and Dice adds up more
    # pixels than that. And next to 1 comes 0.9995 (in bfloat16 0.996), so the probability of a pixel that the
    # network is sure of is 1, and the focal loss takes the logarithm of 1 - 1. So cut the sigmoid off, and
    # put another one on.
    logits = unet.layers[-2].output
    probabilities = tf.keras.layers.Activation("sigmoid", dtype="float32", name="probabilities")(logits)
    unet = tf.keras.Model(unet.input, probabilities, name="unet")

    # The normalisation is part of the network. So images travel to the device as uint8, a quarter
    # of the bytes of float32, and whoever has the weights has the right normalisation as well.
    images = tf.keras.Input((image_size, image_size, 3), dtype="uint8", name="images")
    return tf.keras.Model(images, unet(normalization(encoder)(images)))


def random_generators(model: tf.keras.Model) -> list[tf.random.Generator]:
    """The random numbers of the dropout layers, which Keras leaves out of its checkpoints."""
    dropouts = [layer for layer in model.get_layer("unet").layers if isinstance(layer, tf.keras.layers.Dropout)]
    return [layer._random_generator._generator for layer in dropouts]


def normalization(encoder: str) -> tf.keras.layers.Layer:
    """The preprocessing that the weights of `encoder` were trained with, as a layer: uint8 in, float32 out.

    Each encoder of segmentation_models has its own (mean and deviation, [-1, 1], BGR, none), as a
    function for NumPy. All of them are linear, so one black, red, green and blue pixel tell all.
    """
    preprocess = sm.get_preprocessing(encoder)
    black = preprocess(np.zeros((1, 3), np.float32))
    red_green_blue = preprocess(255 * np.eye(3, dtype=np.float32))
    matrix = (red_green_blue - black) / 255

    def normalize(images: tf.Tensor) -> tf.Tensor:
        return tf.tensordot(tf.cast(images, tf.float32), tf.constant(matrix), axes=1) + black

    return tf.keras.layers.Lambda(normalize, dtype="float32", name="normalization")


def create_loss() -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """Dice + focal loss of masks and probabilities, both float32 (N, H, W, 1), as in the article.

    Dice (Milletari et al., V-Net, 2016) looks at the area as a whole, so it does not mind that most
    pixels are background. Focal (Lin et al., Focal Loss for Dense Object Detection, 2017) looks at
    single pixels, the hard ones above all.
    """
    return sm.losses.DiceLoss() + sm.losses.BinaryFocalLoss()


class PixelCounts(tf.keras.metrics.Metric):
    """What IoU and F1 are made of: foreground pixels, summed over an epoch.

    A mean over batches, as `sm.metrics.IOUScore` takes it, would depend on the batch size. Sums are
    also what several devices can add up.
    """

    def __init__(self, name: str, **kwargs: object) -> None:
        super().__init__(name=name, dtype="float64", **kwargs)  # float32 cannot count past 16.7 million
        self.intersection = self.add_weight("intersection", initializer="zeros")
        self.areas = self.add_weight("areas", initializer="zeros")  # of the mask plus of the prediction

    def update_state(self, masks: tf.Tensor, preds: tf.Tensor, sample_weight: None = None) -> None:
        """Add a batch: masks in {0, 1} and probabilities in [0, 1], both (N, H, W, 1)."""
        masks, preds = masks > 0.5, preds > 0.5
        self.intersection.assign_add(tf.math.count_nonzero(masks & preds, dtype=self.dtype))
        self.areas.assign_add(tf.math.count_nonzero(masks, dtype=self.dtype))
        self.areas.assign_add(tf.math.count_nonzero(preds, dtype=self.dtype))


class IoU(PixelCounts):
    """Intersection over union of the foreground. No nail and none predicted: 1."""

    def __init__(self, name: str = "iou", **kwargs: object) -> None:
        super().__init__(name=name, **kwargs)

    def result(self) -> tf.Tensor:
        """A scalar in [0, 1]."""
        union = self.areas - self.intersection
        return tf.where(union > 0, tf.math.divide_no_nan(self.intersection, union), 1.0)


class F1(PixelCounts):
    """The F1 score, or Dice coefficient, of the foreground. No nail and none predicted: 1."""

    def __init__(self, name: str = "f1", **kwargs: object) -> None:
        super().__init__(name=name, **kwargs)

    def result(self) -> tf.Tensor:
        """A scalar in [0, 1]."""
        return tf.where(self.areas > 0, tf.math.divide_no_nan(2 * self.intersection, self.areas), 1.0)


def create_schedule(learning_rate: float, steps: int) -> tf.keras.optimizers.schedules.LearningRateSchedule:
    """From `learning_rate` along a cosine down to a hundredth of it, over the `steps` of the whole run.

    The optimizer counts the steps and is saved with its count, so a run that goes on goes on here too.
    """
    return tf.keras.optimizers.schedules.CosineDecay(learning_rate, decay_steps=steps, alpha=0.01)


def create_optimizer(
    name: str, schedule: tf.keras.optimizers.schedules.LearningRateSchedule
) -> tf.keras.optimizers.Optimizer:
    """RectifiedAdam ("radam", as in the article) or AdamW ("adamw")."""
    if name == "radam":
        return rectified_adam()(schedule)  # Liu et al., On the Variance of the Adaptive Learning Rate, 2019
    return tf.keras.optimizers.AdamW(schedule)  # Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019
