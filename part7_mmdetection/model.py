"""The part of MMDetection's config that is about the network, and trained networks read back.

Article:
https://hphuongdhsp.github.io/ml-blog/pytorchlightning/intancesegmentation/deeplearning/mmdetection/2022/08/07/segmentation-model-part6.html
"""

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.error import URLError

import torch
from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config
from torch import nn
from torchvision.models import get_model_weights

from utils import stop

# The depth of a ResNet, and the channels of its four stages.
ENCODERS = {
    "resnet18": (18, [64, 128, 256, 512]),
    "resnet34": (34, [64, 128, 256, 512]),
    "resnet50": (50, [256, 512, 1024, 2048]),
    "resnet101": (101, [256, 512, 1024, 2048]),
}

# MMEngine's own checkpoints hold the history of their logs, which cannot be read without executing what the file says.
TAKE_OUT = (
    "if you trust who made it, take the weights out: "
    "python -c 'import sys, torch; x = torch.load(sys.argv[1], weights_only=False); "
    'torch.save({"state_dict": x["state_dict"]}, sys.argv[2])\' FILE.pth WEIGHTS.pth'
)

# Of backbones that freeze their first layers, and keep the averages of BatchNorm, because they were trained before.
LEARN_ALL = {"frozen_stages": -1, "norm_eval": False}


def adapt_model(config: Config, classes: int, encoder: str, encoder_weights: str, fetch_weights: bool) -> None:
    """Let a config's model have this encoder, so many classes, and these weights.

    A run that goes on has its weights already, and they are not fetched again; what follows from where they came from,
    such as which layers learn, stays the same.

    Leaves with a message if the weights cannot be had, or do not go with the encoder.
    """
    backbone, start = config.model.backbone, encoder_weights
    if backbone.type == "ResNet":
        backbone.depth, config.model.neck.in_channels = ENCODERS[encoder]
        if start == "coco" and config.get("coco_weights") and encoder != "resnet50":
            stop(f"--encoder_weights coco: they are for --encoder resnet50, not {encoder}")
    replace_everywhere(config.model, "num_classes", classes)
    backbone.init_cfg = None
    if start == "none":
        # What was never trained has nothing to keep: let all of it learn.
        backbone.update({key: value for key, value in LEARN_ALL.items() if key in backbone})
    if start == "none" or not fetch_weights:
        return
    if start == "imagenet":
        if backbone.type != "ResNet":
            stop(f"--encoder_weights imagenet: only for a ResNet; {backbone.type} starts with coco, none or a file")
        backbone.init_cfg = {"type": "Pretrained", "checkpoint": str(fetch(imagenet_url(encoder), start))}
    elif start == "coco":
        if not config.get("coco_weights"):
            stop("--encoder_weights coco: this config has no coco_weights; start with imagenet, none or a file")
        config.load_from = str(fetch(get_config(config.coco_weights, pretrained=True).model_path, start))
    else:
        config.load_from = start


def replace_everywhere(settings: Any, key: str, value: Any, instead_of: Any = None) -> None:
    """Set `key` to `value` in a dict and in all that it holds; or only where it is `instead_of`."""
    for name, inner in settings.items():
        if name == key and instead_of in (None, inner):
            settings[name] = value
        for deeper in inner if isinstance(inner, (list, tuple)) else [inner]:
            if isinstance(deeper, dict):
                replace_everywhere(deeper, key, value, instead_of)


def imagenet_url(encoder: str) -> str:
    """Where torchvision has the weights of a ResNet: its first ones, which MMDetection's configs are tuned to."""
    return get_model_weights(encoder).IMAGENET1K_V1.url


def fetch(url: str, weights: str) -> Path:
    """The file behind a URL, from torch's cache or the network; what comes from there has its checksum checked.

    Leaves with a message that names `weights` if it cannot be had.
    """
    name, checksum = url.rsplit("/", 1)[1].rsplit("-", 1)
    name = f"{name.replace('-', '_')}-{checksum}"  # torch takes what follows the first - for the checksum
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    try:
        torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, file_name=name, weights_only=True)
    except (URLError, OSError) as error:
        stop(
            f"--encoder_weights {weights}: they cannot be downloaded ({error}). Without network, start from scratch "
            f"with --encoder_weights none, or give a file with --encoder_weights FILE, or put it there: {file}"
        )
    except (RuntimeError, EOFError, UnpicklingError):
        stop(f"--encoder_weights {weights}: {file} is damaged, or holds more than weights; delete it, or {TAKE_OUT}")
    return file


def read_checkpoint(file: Path, flag: str) -> dict[str, Any]:
    """What is in a checkpoint. torch executes nothing of it: weights_only.

    Leaves with a message that begins with `flag` if it is none, or holds more than weights and plain values.
    """
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError:
        stop(f"{flag} {file}: not a checkpoint, or more than weights is in it, such as code; {TAKE_OUT}")
    except Exception as error:  # torch has no list of what it raises on a file that is none of its own
        stop(f"{flag} {file}: not a checkpoint, as train.py writes into weights/ ({type(error).__name__})")
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        stop(f"{flag} {file}: a checkpoint without weights (state_dict)")
    return checkpoint


def epochs_done(last: Path) -> int:
    """How many epochs were finished when this checkpoint was saved; 0 if there is none."""
    if not last.exists():
        return 0
    epoch = dict(read_checkpoint(last, "--resume").get("meta", {})).get("epoch")
    if not isinstance(epoch, int):
        stop(f"--resume: {last} is not of train.py; start again in another --work_dir")
    return epoch


def refuse_other_weights(model: nn.Module, file: Path) -> None:
    """Leave with a message if a checkpoint has code in it, which MMEngine would execute, or is not of this encoder."""
    saved = read_checkpoint(file, "--encoder_weights")["state_dict"]
    # MMEngine would take what fits, and be silent about the rest.
    own = {name.removeprefix("module."): weights.shape for name, weights in model.state_dict().items()}
    for name, shape in own.items():
        if name.startswith("backbone.") and (name not in saved or saved[name].shape != shape):
            stop(f"--encoder_weights {file}: not of this network, whose {name} is {tuple(shape)}")


def describe(config: Config, categories: list[dict[str, Any]], image_size: int) -> str:
    """What predict.py has to know of a network, as JSON. In a config as MMEngine saves it, code could hide."""
    model = config.model.to_dict()
    model["backbone"]["init_cfg"] = None
    try:
        refuse_imports(model)
    except ValueError as error:
        stop(f"--config: {error}, and predict.py would refuse such a network")
    return json.dumps({"model": model, "categories": categories, "image_size": image_size})


def load_model(weights: Path) -> tuple[nn.Module, list[dict[str, Any]], int]:
    """A network that train.py has saved, its categories ("id", "name"), and the size of its photographs.

    Leaves with a message if the file is none of train.py. No code that may be in it is executed.
    """
    checkpoint = read_checkpoint(weights, "--weights")
    try:
        network = json.loads(checkpoint["meta"]["network"])
        refuse_imports(network["model"])
        model = MODELS.build(ConfigDict(network["model"]))
        model.load_state_dict(checkpoint["state_dict"])
        return model.eval(), network["categories"], network["image_size"]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"there is no {error} in it" if isinstance(error, KeyError) else str(error).strip().splitlines()[0]
        stop(f"--weights {weights}: not what this version of train.py writes ({reason})")


def refuse_imports(settings: Any) -> None:
    """Raise ValueError if a `type` is no name of MMDetection's: MMEngine would import and call os.system, too."""
    if isinstance(settings, dict):
        if "." in str(settings.get("type", "")):
            raise ValueError(f"it wants to import {settings['type']}")
        settings = list(settings.values())
    if isinstance(settings, list):
        for inner in settings:
            refuse_imports(inner)
