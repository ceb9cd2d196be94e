"""Export: a checkpoint of train.py → an ONNX file, which runs without PyTorch (predict.py --weights best.onnx)."""

import quick_imports  # first: it makes the imports below faster

import argparse
import contextlib
import io
import logging
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from model import Normalize, SegmentationModel, load_model
from utils import any_path, stop

quick_imports.end()

TOLERANCE = 1e-4  # the largest difference between the probabilities of PyTorch and ONNX that passes


class PhotographsToProbabilities(nn.Module):
    """All that predict.py does between a photograph of the right size and probabilities, for the file to contain."""

    def __init__(self, model: SegmentationModel) -> None:
        super().__init__()
        self.normalize = Normalize(model.hparams["mean"], model.hparams["std"])
        self.network = model.network
        self.classes = model.hparams["classes"]

    def forward(self, images: Tensor) -> Tensor:
        """From uint8 (N, S, S, 3) to float32 (N, classes, S, S) in [0, 1]."""
        logits = self.network(self.normalize(images))
        return logits.sigmoid() if self.classes == 1 else logits.softmax(dim=1)


def largest_difference(file: Path, network: nn.Module, image_size: int) -> float:
    """Between the probabilities of an ONNX file and of PyTorch, for batches of one and of three random images."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    differences = []
    for number in (1, 3):
        images = random.integers(0, 256, (number, image_size, image_size, 3), np.uint8)
        with torch.inference_mode():
            expected = network(torch.from_numpy(images)).numpy()
        differences.append(np.abs(session.run(None, {"images": images})[0] - expected).max())
    return float(max(differences))


def main() -> None:
    """Export, compare, and only then give the file its name."""
    parser = argparse.ArgumentParser(description="Write a trained network as ONNX.", allow_abbrev=False)
    parser.add_argument("--weights", type=any_path, required=True, help="best.ckpt of a run of train.py")
    parser.add_argument("--output", type=any_path, help="(model.onnx beside the weights)")
    args = parser.parse_args()
    output = args.output or args.weights.with_name("model.onnx")
    if not output.parent.is_dir():
        parser.error(f"argument --output: {str(output.parent)!r} is not a folder")
    try:
        model = load_model(args.weights)
    except ValueError as error:
        stop(f"--weights: {error}")
    network = PhotographsToProbabilities(model).eval()
    image_size = model.hparams["image_size"]

    example = torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8)
    logging.disable(logging.WARNING)  # the exporter tells every step
    warnings.filterwarnings("ignore")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                input_names=["images"],
                output_names=["probabilities"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).splitlines()[0]
        stop(f"PyTorch's exporter cannot translate this network ({model.hparams['encoder']}): {reason}", code=1)
    # What predict.py has to know of the network.
    about = {name: model.hparams[name] for name in ["encoder", "classes", "image_size"]}
    program.model.metadata_props.update({name: str(value) for name, value in about.items()})
    beside = output.with_suffix(".tmp")
    program.save(beside)
    difference = largest_difference(beside, network, image_size)
    if not difference <= TOLERANCE:  # nan is no agreement, either
        beside.unlink()
        stop(f"the probabilities of ONNX and PyTorch differ by {difference:.1e}, more than {TOLERANCE}", code=1)
    beside.replace(output)
    print(f"written to {output}: uint8 images (N, {image_size}, {image_size}, 3) to probabilities")
    print(f"the largest difference to PyTorch is {difference:.1e}")


if __name__ == "__main__":
    main()
