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
    return SegmentationModel(images, unet(normalization(encoder)(images)))


class SegmentationModel(tf.keras.Model):
    """A model that is fed images, masks and the numbers of their sources.

    Keras takes the third for weights of the photographs, and hands them to loss and weighted_metrics.
    Here only the metrics shall have them.
    """

    def compute_loss(
        self, x: tf.Tensor, y: tf.Tensor, y_pred: tf.Tensor, sample_weight: tf.Tensor | None = None
    ) -> tf.Tensor:
        """The loss of `create_loss`, all photographs alike."""
        return super().compute_loss(x, y, y_pred)


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
    """What IoU and F1 are made of: foreground pixels of each source, summed over an epoch.

    A mean over batches, as `sm.metrics.IOUScore` takes it, would depend on the batch size. Sums are
    also what several devices can add up.
    """

    def __init__(self, sources: int, name: str, **kwargs: object) -> None:
        super().__init__(name=name, dtype="float64", **kwargs)  # float32 cannot count past 16.7 million
        self.sources = sources
        self.photographs = self.add_weight("photographs", [sources], initializer="zeros")
        self.intersection = self.add_weight("intersection", [sources], initializer="zeros")
        self.areas = self.add_weight("areas", [sources], initializer="zeros")  # of the mask plus of the prediction

    def reset_state(self) -> None:
        """Count from 0 again, before each epoch. Keras' own version can only reset scalars."""
        tf.keras.backend.batch_set_value([(weight, np.zeros(self.sources)) for weight in self.weights])

    def update_state(self, masks: tf.Tensor, preds: tf.Tensor, sample_weight: tf.Tensor) -> None:
        """Add a batch: masks in {0, 1} and probabilities in [0, 1], both (N, H, W, 1).

        sample_weight (N,): here the number of each photograph's source. Keras chose the name, and casts
        it to the type of preds: float32, which is exact.
        """
        masks, preds = masks > 0.5, preds > 0.5
        is_of_source = tf.one_hot(tf.cast(sample_weight, tf.int32), self.sources, axis=0, dtype=self.dtype)

        def count(pixels: tf.Tensor) -> tf.Tensor:
            return tf.math.count_nonzero(pixels, axis=(1, 2, 3), dtype=self.dtype)

        self.photographs.assign_add(tf.reduce_sum(is_of_source, axis=1))
        self.intersection.assign_add(tf.linalg.matvec(is_of_source, count(masks & preds)))
        self.areas.assign_add(tf.linalg.matvec(is_of_source, count(masks) + count(preds)))


class IoU(PixelCounts):
    """Intersection over union of the foreground. No nail and none predicted: 1."""

    def __init__(self, sources: int, name: str = "iou", **kwargs: object) -> None:
        super().__init__(sources, name, **kwargs)

    def result(self) -> dict[str, tf.Tensor]:
        """Scalars in [0, 1]: of all pixels, the mean over the sources, and that of the worst source."""
        seen = tf.boolean_mask(iou(self.intersection, self.areas), self.photographs > 0)
        overall = iou(tf.reduce_sum(self.intersection), tf.reduce_sum(self.areas))
        return {"iou": overall, "macro_iou": tf.reduce_mean(seen), "worst_iou": tf.reduce_min(seen)}

    def by_source(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each source: how many photographs were counted, and their IoU."""
        return self.photographs.numpy(), iou(self.intersection, self.areas).numpy()


def iou(intersection: tf.Tensor, areas: tf.Tensor) -> tf.Tensor:
    """Intersection over union; 1 where there is no union."""
    union = areas - intersection
    return tf.where(union > 0, tf.math.divide_no_nan(intersection, union), 1.0)


class F1(PixelCounts):
    """The F1 score, or Dice coefficient, of the foreground. No nail and none predicted: 1."""

    def __init__(self, sources: int, name: str = "f1", **kwargs: object) -> None:
        super().__init__(sources, name, **kwargs)

    def result(self) -> tf.Tensor:
        """A scalar in [0, 1], of all pixels."""
        intersection, areas = tf.reduce_sum(self.intersection), tf.reduce_sum(self.areas)
        return tf.where(areas > 0, tf.math.divide_no_nan(2 * intersection, areas), 1.0)


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
