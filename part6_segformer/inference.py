"""From weights and a photograph to probabilities: with PyTorch or ONNX, in one piece or tile by tile."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from transform import valid_transform
from utils import choose_devices, stop

Floats = NDArray[np.floating]
Pixels = NDArray[np.uint8]
FLIPS: list[tuple[int, ...]] = [(), (1,), (2,), (1, 2)]  # axes of a batch (N, H, W, ...)


class Network(NamedTuple):
    """A trained network, and what has to be known of it."""

    probabilities: Callable[[Pixels], Floats]  # from images (N, S, S, 3) to (N, classes, S, S) in [0, 1]
    image_size: int  # S
    classes: int  # 1: the probability of a nail; more: of each label


def load_network(weights: Path, device: list[str] | None) -> Network:
    """What train.py saved, or export.py made of it (.onnx); leaves with a message if it is neither.

    torch is imported here and not above, because an ONNX file does not need it.
    """
    if weights.suffix == ".onnx":
        if device not in (None, ["cpu"]):
            stop("--device: ONNX files run on the CPU here; leave --device away")
        return load_onnx(weights)
    import torch

    from model import Normalize, load_model

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    name = choose_devices(device, gpus)[0].replace("gpu", "cuda")
    try:
        model = load_model(weights).to(name)
    except ValueError as error:
        stop(f"--weights: {error}")
    normalize = Normalize(model.hparams["mean"], model.hparams["std"]).to(name)

    def probabilities(images: Pixels) -> Floats:
        with torch.inference_mode():
            logits = model(normalize(torch.from_numpy(images).to(name)))
            probabilities = logits.sigmoid() if model.hparams["classes"] == 1 else logits.softmax(dim=1)
        return probabilities.cpu().numpy()

    return Network(probabilities, model.hparams["image_size"], model.hparams["classes"])


def load_onnx(weights: Path) -> Network:
    """What export.py wrote, run by onnxruntime on the CPU."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(weights, providers=["CPUExecutionProvider"])
        about = session.get_modelmeta().custom_metadata_map
        image_size, classes = int(about["image_size"]), int(about["classes"])
    except Exception as error:  # onnxruntime has an exception of its own for each of a dozen faults
        stop(f"--weights {weights}: not a file that export.py of this part wrote ({str(error).splitlines()[0]})")
    return Network(lambda images: session.run(None, {"images": images})[0], image_size, classes)


def predict_labels(network: Network, image: Pixels, tta: bool = False, tile: int | None = None) -> Pixels:
    """The label of each pixel of a photograph, uint8 (H, W, 3), of any size: uint8 (H, W).

    Args:
        tta: take the mean over the four flips of the photograph (test-time augmentation).
        tile: look at squares with this side, in pixels of the photograph, and not at all of it at once.
    """
    height, width = image.shape[:2]
    if tile and max(height, width) > tile:
        probabilities = predict_tiles(network, image, tta, tile)
    else:
        probabilities = predict_probabilities(network, image, tta)
    if network.classes == 1:
        return (probabilities[..., 0] > 0.5).astype(np.uint8)
    return probabilities.argmax(axis=2).astype(np.uint8)


def predict_probabilities(network: Network, image: Pixels, tta: bool) -> Floats:
    """Probabilities (H, W, classes) for a photograph, seen by the network at once, in its own input's size."""
    square = valid_transform(network.image_size)(image=image)["image"][np.newaxis]
    flips = FLIPS if tta else [()]
    flipped = network.probabilities(np.concatenate([np.flip(square, axes) for axes in flips]))
    upright = [np.flip(one.transpose(1, 2, 0)[np.newaxis], axes)[0] for one, axes in zip(flipped, flips, strict=True)]
    # Enlarge the probabilities, not the labels: outlines stay smooth.
    height, width = image.shape[:2]
    enlarged = cv2.resize(np.mean(upright, axis=0), (width, height), interpolation=cv2.INTER_LINEAR)
    return np.reshape(enlarged, (height, width, network.classes))


def predict_tiles(network: Network, image: Pixels, tta: bool, tile: int) -> Floats:
    """Probabilities (H, W, classes) for a photograph, from tiles that overlap by half.

    A network is least sure at the edge of what it sees. So each tile's weight falls from its middle to its
    edges, where that of its neighbours rises: the result has no seams.
    """
    height, width = image.shape[:2]
    sums = np.zeros((height, width, network.classes), np.float32)
    weights = np.zeros((height, width, 1), np.float32)
    for top in tile_starts(height, tile):
        for left in tile_starts(width, tile):
            part = np.s_[top : top + tile, left : left + tile]
            probabilities = predict_probabilities(network, image[part], tta)
            weight = np.outer(ramp(probabilities.shape[0]), ramp(probabilities.shape[1]))[..., np.newaxis]
            sums[part] += weight * probabilities
            weights[part] += weight
    return sums / weights


def tile_starts(length: int, tile: int) -> list[int]:
    """Where tiles begin so that neighbours overlap by at least half and the last one ends at `length`."""
    number = max(math.ceil((length - tile) / (tile / 2)), 0) + 1
    return np.linspace(0, max(length - tile, 0), number).round().astype(int).tolist()


def ramp(length: int) -> Floats:
    """Weights that rise evenly to the middle and fall again; all are above 0."""
    return np.minimum(np.arange(1, length + 1), np.arange(length, 0, -1)) / length
