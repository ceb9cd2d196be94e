"""SegFormer from Hugging Face transformers, its loss, its metrics and its optimizer: a LightningModule.

Article:
https://hphuongdhsp.github.io/ml-blog/pytorchlightning/semanticsegmentation/deeplearning/maskrcnn/huggingface/2022/08/08/segmentation-model-part7.html
"""

import json
import math
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytorch_lightning as pl
import torch
from huggingface_hub import constants
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix
from transformers import SegformerConfig, SegformerForSemanticSegmentation
from transformers.utils import logging as transformers_logging

from losses import create_loss

# The six of the paper (Xie et al., 2021), as the authors' code has them, in the words of transformers. nvidia/mit-b0
# and so on have encoders that were trained on ImageNet.
ENCODERS = {
    "mit_b0": {"depths": [2, 2, 2, 2], "hidden_sizes": [32, 64, 160, 256], "decoder_hidden_size": 256},
    "mit_b1": {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 256},
    "mit_b2": {"depths": [3, 4, 6, 3], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768},
    "mit_b3": {"depths": [3, 4, 18, 3], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768},
    "mit_b4": {"depths": [3, 8, 27, 3], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768},
    "mit_b5": {"depths": [3, 6, 40, 3], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768},
}

# How much slower than the head a pretrained encoder learns. The authors' own configurations have 0.00006 for the
# encoder, and ten times that for the head (github.com/NVlabs/SegFormer, local_configs).
ENCODER_FACTOR = 0.1

# Of the photographs of ImageNet, in [0, 1]: what encoders with pretrained weights expect.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def go_offline_without_network() -> None:
    """Without network, fail at once: the hub's client would try again and again, for half a minute."""
    if constants.HF_HUB_OFFLINE:
        return
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=5)
    except HTTPError:
        pass  # an answer, if not a friendly one
    except OSError:
        constants.HF_HUB_OFFLINE = True


class SegFormer(nn.Module):
    """transformers' SegFormer, with logits as large as the image and, for nail or not, a single one."""

    def __init__(self, model: SegformerForSemanticSegmentation, classes: int) -> None:
        """`model` has two parts: `model.segformer`, the encoder, and `model.decode_head`."""
        super().__init__()
        self.model = model
        self.classes = classes

    def forward(self, images: Tensor) -> Tensor:
        """From normalised images, float (N, 3, H, W), to logits, float (N, classes, H, W)."""
        logits = self.model(pixel_values=images).logits  # (N, labels, H / 4, W / 4)
        if self.classes == 1:
            # transformers' pipeline takes the label with the highest logit, so background has one, too. The softmax
            # of two is the sigmoid of their difference.
            logits = logits[:, 1:] - logits[:, :1]
        # Enlarged before the loss sees it: in a mask that is shrunk instead, thin things are lost.
        return functional.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)


def name_labels(classes: int) -> dict[int, str]:
    """The names that transformers is to show for the labels of a network."""
    return {0: "background"} | (
        {1: "nail"} if classes == 1 else {label: f"label {label}" for label in range(1, classes)}
    )


def find_config(encoder: str, classes: int) -> dict[str, Any]:
    """The configuration of a SegFormer, as transformers saves it: plain values.

    Args:
        encoder: one of `ENCODERS`, or the name of a SegFormer on the hub, or of a folder with one.
        classes: 1 for nail or not, else the number of labels, the background among them.

    Raises:
        OSError: it cannot be fetched or read.
        ValueError: it is none of SegFormer.
    """
    labels = {"id2label": name_labels(classes), "label2id": {name: i for i, name in name_labels(classes).items()}}
    if encoder in ENCODERS:
        config = SegformerConfig(**ENCODERS[encoder], **labels)
    else:
        found, _ = SegformerConfig.get_config_dict(encoder)
        if found.get("model_type") != "segformer":
            raise ValueError(f"{encoder} has no SegFormer, but {found.get('model_type')}")
        config = SegformerConfig.from_dict(found | labels)
    return json.loads(config.to_json_string(use_diff=False))


def create_network(config: dict[str, Any], classes: int, pretrained: str | None = None) -> SegFormer:
    """A network from normalised images, float (N, 3, H, W), to logits, float (N, classes, H, W).

    Args:
        config: what `find_config` returns.
        classes: 1 for nail or not, else the number of labels, the background among them.
        pretrained: the name on the hub, or the folder, of a SegFormer whose weights to begin with. Of the head, what
            does not fit to these labels starts from scratch. None: all of it does.

    Raises:
        OSError: the weights cannot be fetched or read.
        ValueError: they are of another encoder.
    """
    settings = SegformerConfig.from_dict(config)
    if not pretrained:
        return SegFormer(start_like_the_authors(SegformerForSemanticSegmentation(settings)), classes)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # instead of a long table of what did not fit
    model, report = SegformerForSemanticSegmentation.from_pretrained(
        pretrained, config=settings, ignore_mismatched_sizes=True, dtype=torch.float32, output_loading_info=True
    )
    transformers_logging.set_verbosity(verbosity)
    unlike = [*report["missing_keys"], *report["unexpected_keys"], *(name for name, *_ in report["mismatched_keys"])]
    if any(name.startswith("segformer.") for name in unlike):  # of the encoder
        raise ValueError(f"{pretrained} has not the weights of this encoder, but of another one")
    # from_pretrained leaves it in the mode of evaluation, and Lightning would leave it there, too: no dropout, and a
    # BatchNorm in the head that never learns mean and variance.
    return SegFormer(model, classes).train()


def start_like_the_authors(model: SegformerForSemanticSegmentation) -> SegformerForSemanticSegmentation:
    """Draw the weights of the encoder's convolutions anew, as the authors' mix_transformer.py does.

    transformers draws all weights with a deviation of 0.02, which is meant for linear layers. A depthwise 3 x 3
    convolution then shrinks what it is given to a sixteenth, and learning from scratch takes long to get going.
    """
    for module in model.segformer.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    return model


class Normalize(nn.Module):
    """What encoders expect: photographs of mean 0 and deviation 1."""

    def __init__(self, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> None:
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """From uint8 (N, H, W, 3) in [0, 255] to float32 (N, 3, H, W); in memory the channels stay last."""
        return (images.permute(0, 3, 1, 2) - self.mean) / self.std


class SegmentationModel(pl.LightningModule):
    """Training and validation of a network. What `__init__` is given is saved in each checkpoint."""

    def __init__(
        self,
        encoder: str,
        classes: int,
        image_size: int,
        config: dict[str, Any],
        loss: str = "lovasz",
        learning_rate: float = 1e-3,
        seed: int = 42,
        encoder_factor: float = 1.0,
        pretrained: str | None = None,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="pretrained")  # whoever loads a checkpoint has trained weights
        self.network = create_network(config, classes, pretrained)
        self.loss_fn = create_loss(loss, classes)
        self.val_loss = MeanMetric()
        # It adds up pixels over the whole validation set, and over all processes.
        self.confusion = MulticlassConfusionMatrix(max(classes, 2), validate_args=False)

    def forward(self, images: Tensor) -> Tensor:
        """From normalised images (N, 3, H, W) to logits (N, classes, H, W)."""
        return self.network(images)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let dropout follow from seed and step, so that a run that goes on drops what it would have dropped."""
        place = [self.hparams["seed"], self.global_rank, self.current_epoch, batch_idx]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, masks = batch
        # float() because sums over many pixels need more than the 16 bits of mixed precision
        loss = self.loss_fn(self(images).float(), masks)
        self.log("train_loss", loss, logger=False)  # for the progress bar; loggers get the mean of the epoch
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, masks = batch
        logits = self(images).float()
        self.val_loss.update(self.loss_fn(logits, masks), weight=len(images))
        self.confusion.update(to_labels(logits), masks)

    def on_validation_epoch_end(self) -> None:
        """In Lightning 1 this was validation_epoch_end, and was given the outputs of all steps."""
        iou, f1 = scores(self.confusion.compute())
        metrics = {"val_loss": self.val_loss.compute(), "val_iou": iou.mean(), "val_f1": f1.mean()}
        if len(iou) > 1:
            metrics |= {f"val_iou/{label}": value for label, value in enumerate(iou, start=1)}
        self.log_dict(metrics)
        self.val_loss.reset()
        self.confusion.reset()

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW, whose learning rates fall along a cosine to a hundredth over the steps of the whole run."""
        learning_rate = self.hparams["learning_rate"]
        head = {"params": self.network.model.decode_head.parameters(), "lr": learning_rate}
        encoder_rate = learning_rate * self.hparams["encoder_factor"]
        encoder = {"params": self.network.model.segformer.parameters(), "lr": encoder_rate}
        # fused: all weights in one go. Lightning cannot shorten gradients for it in mixed precision.
        optimizer = torch.optim.AdamW([head, encoder], fused=self.trainer.gradient_clip_val is None)
        # trainer.estimated_stepping_batches would start the loader, whose threads would disturb RecordPasses.
        epoch_steps = math.ceil(self.trainer.datamodule.steps / self.trainer.accumulate_grad_batches)
        steps = self.trainer.max_epochs * epoch_steps

        def factor(step: int) -> float:
            return 0.01 + 0.99 * (1 + math.cos(math.pi * min(step / steps, 1))) / 2

        # "step", because it is steps that `factor` counts; Lightning would call it once an epoch.
        schedule = {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def name_pretrained(encoder: str, encoder_weights: str) -> str | None:
    """Where the weights of these flags are: a name on the hub, or a folder; None is from scratch."""
    if encoder_weights == "none":
        return None
    if encoder_weights == "imagenet":
        return encoder.replace("mit_b", "nvidia/mit-b") if encoder in ENCODERS else encoder
    return encoder_weights


def needs_hub(encoder: str, encoder_weights: str) -> bool:
    """Whether these flags ask for weights or a configuration that are not in a folder here."""
    wanted = [name_pretrained(encoder, encoder_weights), None if encoder in ENCODERS else encoder]
    return any(name and not Path(name).is_dir() for name in wanted)


def new_model(encoder: str, encoder_weights: str, classes: int, **settings: Any) -> SegmentationModel:
    """A model as the flags of these names ask for; `settings` are others of SegmentationModel.

    Raises:
        OSError: weights or configuration cannot be fetched or read.
        ValueError: they are of something else.
    """
    if needs_hub(encoder, encoder_weights):
        go_offline_without_network()
    settings["pretrained"] = name_pretrained(encoder, encoder_weights)
    settings["encoder_factor"] = ENCODER_FACTOR if settings["pretrained"] else 1.0
    return SegmentationModel(encoder, classes, config=find_config(encoder, classes), **settings)


def to_labels(logits: Tensor) -> Tensor:
    """From logits (N, C, H, W) to labels, int64 (N, H, W). One logit above 0 is a probability above 0.5."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(dim=1)


def scores(confusion: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and F1 of each class but the background, from counted pixels (C, C), truth in rows.

    A class that is nowhere, neither in truth nor in prediction, has 1.
    """
    intersection = confusion.diag()[1:].double()
    areas = (confusion.sum(dim=0) + confusion.sum(dim=1))[1:].double()  # of truth and prediction together
    union = areas - intersection
    iou = torch.where(union > 0, intersection / union, 1.0)
    return iou, torch.where(areas > 0, 2 * intersection / areas, 1.0)


def load_model(weights: Path) -> SegmentationModel:
    """The model that train.py saved in best.ckpt or last.ckpt. No code that may be in the file is executed.

    Raises:
        ValueError: it is no such file.
    """
    try:
        checkpoint = torch.load(weights, map_location="cpu", weights_only=True)
        model = SegmentationModel(**checkpoint["hyper_parameters"])
        model.load_state_dict(checkpoint["state_dict"])
    except Exception as error:  # torch has no list of what it raises on a file that is none of its own
        raise ValueError(f"{weights} is no best.ckpt or last.ckpt that train.py of this part wrote") from error
    return model.eval()
