"""The network, its loss, its metrics and its optimizer: a LightningModule.

Article:
https://hphuongdhsp.github.io/ml-blog/pytorchlightning/semanticsegmentation/deeplearning/2022/08/04/segmentation-model-part3.html
"""

import math
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytorch_lightning as pl
import segmentation_models_pytorch as smp
import timm
import torch
from huggingface_hub import constants as hub
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from losses import create_loss

# Configurations with a name, for --model. A line makes a new one.
MODELS = {
    "smp_unet_resnet34": {"arch": "Unet", "encoder": "resnet34"},
    "smp_unet_efficientnet_b4": {"arch": "Unet", "encoder": "efficientnet-b4"},
    "smp_unetplusplus_resnet34": {"arch": "UnetPlusPlus", "encoder": "resnet34"},
    "smp_fpn_resnet34": {"arch": "FPN", "encoder": "resnet34"},
    "smp_deeplabv3plus_resnet50": {"arch": "DeepLabV3Plus", "encoder": "resnet50"},
    "smp_segformer_mit_b0": {"arch": "Segformer", "encoder": "mit_b0"},
    "timm_unet_convnext_tiny": {"arch": "Unet", "encoder": "tu-convnext_tiny"},
}
ARCHS = {arch.__name__: arch for arch in smp.MODEL_ARCHITECTURES_MAPPING.values()}
ENCODERS = smp.encoders.get_encoder_names()

# Of the photographs of ImageNet, in [0, 1]: what encoders with pretrained weights expect.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def is_encoder(name: str) -> bool:
    """Whether smp has this encoder, or timm a network of this name (tu-resnet18 is timm's resnet18)."""
    return timm.is_model(name.removeprefix("tu-")) if name.startswith("tu-") else name in ENCODERS


def go_offline_without_network() -> None:
    """Without network, fail at once: the hub's client would try again and again, for half a minute."""
    try:
        urllib.request.urlopen(hub.ENDPOINT, timeout=5)
    except HTTPError:
        pass  # an answer, if not a friendly one
    except OSError:
        hub.HF_HUB_OFFLINE = True


def create_network(arch: str, encoder: str, classes: int, encoder_weights: str | None = None) -> nn.Module:
    """A network from normalised images, float (N, 3, H, W), to logits, float (N, classes, H, W).

    Args:
        arch: one of `ARCHS`.
        encoder: one of smp's encoders, or tu-<name> for one of timm's.
        classes: 1 for nail or not, else the number of labels, the background among them.
        encoder_weights: "imagenet", a file with the encoder's state_dict, or None to start from scratch.

    Raises:
        OSError: the weights cannot be fetched or read.
        KeyError, RuntimeError, ValueError: there are no such weights, or they do not fit, or this
            architecture cannot be built on this encoder.
    """
    named = encoder_weights if encoder_weights == "imagenet" else None
    if named:
        go_offline_without_network()
    network = ARCHS[arch](encoder, encoder_weights=named, classes=classes)
    if encoder_weights and not named:
        network.encoder.load_state_dict(torch.load(encoder_weights, map_location="cpu", weights_only=True))
    # Convolutions are faster when the channels of a pixel lie side by side in memory.
    return network.to(memory_format=torch.channels_last)


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
        arch: str,
        encoder: str,
        classes: int,
        image_size: int,
        loss: str = "lovasz",
        learning_rate: float = 1e-3,
        seed: int = 42,
        encoder_weights: str | None = None,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="encoder_weights")  # whoever loads a checkpoint has trained ones
        self.network = create_network(arch, encoder, classes, encoder_weights)
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
        """AdamW, whose learning rate falls along a cosine to a hundredth over the steps of the whole run."""
        # fused: all weights in one go. Lightning cannot shorten gradients for it in mixed precision.
        fused = self.trainer.gradient_clip_val is None
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams["learning_rate"], fused=fused)
        # trainer.estimated_stepping_batches would start the loader, whose threads would disturb RecordPasses.
        epoch_steps = math.ceil(self.trainer.datamodule.steps / self.trainer.accumulate_grad_batches)
        steps = self.trainer.max_epochs * epoch_steps

        def factor(step: int) -> float:
            return 0.01 + 0.99 * (1 + math.cos(math.pi * min(step / steps, 1))) / 2

        # "step", because it is steps that `factor` counts; Lightning would call it once an epoch.
        schedule = {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


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
