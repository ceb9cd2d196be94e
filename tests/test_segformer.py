"""Part 6, from a copied folder: training, and what only SegFormer has."""

import json
from pathlib import Path

import pandas as pd
import pytest

from conftest import ROOT, Part
from lightning_tests import (  # noqa: F401 - they are run for `part`
    test_killed_or_interrupted_and_resumed_ends_like_an_uninterrupted_run,
    test_predict_and_export,
    test_several_classes,
    test_training_finds_nails_and_leaves_what_it_should,
    test_two_processes_give_the_metrics_of_one,
    test_two_processes_train,
    trained,
)
from reliability_tests import (  # noqa: F401 - all of them are run for part 3, which has the same code
    run,
    small_root,
    test_a_full_disk_leaves_the_last_checkpoint,
    test_chance_follows_from_the_seed_alone,
)


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Part:
    return Part("part6_segformer", tmp_path_factory.mktemp("copied alone"))


READ_BACK = """
import sys
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from transformers import SegformerForSemanticSegmentation, SegformerImageProcessor, pipeline
run_dir, photographs, predicted = map(Path, sys.argv[1:])
folder = run_dir / "transformers"

# Plain transformers: the same logits as the checkpoint's.
from model import Normalize, load_model
model = load_model(run_dir / "weights" / "best.ckpt")
plain = SegformerForSemanticSegmentation.from_pretrained(folder).eval()
processor = SegformerImageProcessor.from_pretrained(folder)
image = Image.open(next(photographs.rglob("*.png")))
pixels = processor(image, return_tensors="pt")["pixel_values"]
size = model.hparams["image_size"]
with torch.no_grad():
    logits = plain(pixels).logits
    difference = torch.nn.functional.interpolate(logits[:, 1:] - logits[:, :1], (size, size), mode="bilinear")
    print((difference - model(pixels)).abs().max().item() < 1e-5, plain.config.id2label == {0: "background", 1: "nail"})
# The processor normalises as training does. It shrinks with another filter.
square = np.array(image.resize((size, size)))[None]
same_size = processor(Image.fromarray(square[0]), return_tensors="pt")["pixel_values"]
print((Normalize()(torch.from_numpy(square)) - same_size).abs().max().item() < 1e-4)

# A pipeline finds what predict.py finds.
segment = pipeline("image-segmentation", model=str(folder))
counts = []
for path in sorted(photographs.rglob("*.png")):
    found = {one["label"]: np.array(one["mask"]) > 0 for one in segment(Image.open(path))}
    ours = np.array(Image.open(predicted / path.relative_to(photographs).with_name(path.stem + "_mask.png")))
    theirs = found.get("nail", np.zeros_like(ours)) > 0
    counts.append([(theirs & (ours > 0)).sum(), (theirs | (ours > 0)).sum()])
print(np.divide(*np.sum(counts, axis=0)))
"""


def test_plain_transformers_reads_the_trained_network(part: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, "--work_dir", work_dir, *part.small, "--loss", "dice_bce"]
    part.run("train.py", *args, "--learning_rate", 2e-3, "--epochs", 16)
    run_dir = part.run_dir(work_dir)
    folder = run_dir / "transformers"
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    best = pd.read_csv(run_dir / "logs" / "metrics.csv")["val_iou"].max()
    assert f"{best:.4f}" in (folder / "README.md").read_text()
    part.run("predict.py", "--weights", run_dir / "weights" / "best.ckpt", "--images", data_root)
    (part.folder / "read_back.py").write_text(READ_BACK)
    args_back = [run_dir, data_root / "valid" / "images", run_dir / "predictions"]
    logits, normalised, iou = part.run("read_back.py", *args_back).stdout.splitlines()
    assert logits == "True True" and normalised == "True"
    assert float(iou) > 0.9  # another filter shrinks the photographs, and logits are enlarged, not probabilities

    # A run may begin with the weights of another one, and its head learns ten times faster than its encoder.
    again = [*args, "--work_dir", work_dir / "again", "--epochs", 1, "--encoder_weights", folder]
    part.run("train.py", *again)
    (part.folder / "rates.py").write_text(RATES)
    head, encoder, left_out, same = part.run("rates.py", folder, run_dir / "weights" / "best.ckpt").stdout.split()
    assert float(head) == pytest.approx(10 * float(encoder)) and left_out == "0" and same == "True"
    # One of another size is refused, instead of starting from scratch without a word.
    refused = part.run("train.py", *again, "--encoder", "mit_b1", "--work_dir", work_dir / "other", code=2)
    assert "another" in refused.stderr and "Without network" not in refused.stderr
    # And so is one with more blocks, of which a smaller one could take the first.
    deeper = (
        "from model import *; from transformers import *; config = find_config('mit_b0', 1) | {'depths': [3] * 4}; "
    )
    deeper += "SegformerForSemanticSegmentation(SegformerConfig.from_dict(config)).save_pretrained('deeper')"
    part.run("-c", deeper)
    refused = part.run("train.py", *again, "--encoder_weights", "deeper", "--work_dir", work_dir / "other", code=2)
    assert "another" in refused.stderr
    # One of other labels starts with a new head.
    other = "from model import *; network = create_network(find_config('mit_b0', 3), 3, __import__('sys').argv[1]); "
    other += "print(tuple(network(torch.zeros(2, 3, 64, 96)).shape))"
    assert "(2, 3, 64, 96)" in part.run("-c", other, folder).stdout


RATES = """
import sys
from pathlib import Path
from types import SimpleNamespace
import torch
from model import load_model, new_model
model = new_model("mit_b0", sys.argv[1], 1, image_size=64)
assert all(module.training for module in model.modules())  # from_pretrained leaves them in evaluation
data = SimpleNamespace(steps=10)
model._trainer = SimpleNamespace(datamodule=data, max_epochs=1, accumulate_grad_batches=1, gradient_clip_val=None)
head, encoder = model.configure_optimizers()["optimizer"].param_groups
everything = {id(weights) for weights in model.network.parameters()}
both = [id(weights) for group in (head, encoder) for weights in group["params"]]
print(head["lr"], encoder["lr"], len(everything.symmetric_difference(both)))
trained = load_model(Path(sys.argv[2])).network.state_dict()
print(all(torch.equal(weights, trained[name]) for name, weights in model.network.state_dict().items()))
"""


SHAPES = """
import torch
from model import ENCODERS, create_network, find_config
network = create_network(find_config("mit_b0", 1), 1).eval()
images = torch.zeros(1, 3, 384, 384)
with torch.no_grad():
    found = network.model.segformer(images, output_hidden_states=True).hidden_states
    for stage, (states, shrunk) in enumerate(zip(found, network.model.config.sr_ratios), start=1):
        _, channels, height, width = states.shape
        pixels = 384 // height
        print(f"| {stage} | {channels} | {height} x {width} | {pixels} x {pixels} pixels |", end="")
        print(f" {height // shrunk} x {width // shrunk} |")
    _, labels, height, width = network.model(images).logits.shape
    print(f"| head | {labels} | {height} x {width} | 4 x 4 pixels | |")
    print(tuple(network(images).shape))
depthwise = [module.weight.std() for module in network.modules() if getattr(module, "groups", 1) > 1]
print(len(depthwise), all(0.4 < deviation < 0.55 for deviation in depthwise))  # the root of 2 / 9, not 0.02
for encoder in ENCODERS:
    with torch.device("meta"):
        network = create_network(find_config(encoder, 1), 1)
    print(f"| {encoder} | {sum(weights.numel() for weights in network.parameters()) / 1e6:.1f} |")
"""


def test_shapes_and_sizes_are_those_of_the_readme(part: Part) -> None:
    (part.folder / "shapes.py").write_text(SHAPES)
    lines = part.run("shapes.py").stdout.splitlines()
    readme = (ROOT / "part6_segformer" / "README.md").read_text()
    assert len(lines) == 13
    assert lines[5:7] == ["(1, 1, 384, 384)", "8 True"]
    for line in lines[:5] + lines[7:]:
        assert line in readme, line


def test_without_network_the_ways_out_are_named(part: Part, data_root: Path, work_dir: Path) -> None:
    args = ["--data_root", data_root, "--work_dir", work_dir]
    nowhere = {"HF_HOME": str(work_dir / "empty"), "https_proxy": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    for encoder in ["mit_b0", "nvidia/segformer-b0-finetuned-ade-512-512"]:
        done = part.run("train.py", *args, "--encoder", encoder, code=2, **nowhere)
        for way in ["--encoder_weights none", "--encoder_weights FOLDER", "HF_HOME"]:
            assert way in done.stderr
        assert "Retrying" not in done.stderr
    wrong = part.run("train.py", *args, "--encoder", "resnet18", code=2)
    assert "--encoder" in wrong.stderr and "mit_b0" in wrong.stderr
    other = work_dir / "bert"
    other.mkdir(parents=True)
    (other / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "bert" in part.run("train.py", *args, "--encoder", other, code=2).stderr
    for wanted, said in [  # before it trains
        (["nails"], "two parts"),
        (["nobody/nails"], "hf auth login"),
        (["nobody/nails", "--fold", "all"], "would overwrite one another"),
    ]:
        done = part.run("train.py", *args, *part.small, "--push_to_hub", *wanted, code=2, **nowhere)
        assert said in done.stderr
    assert not any(part.run_dir(work_dir).glob("weights/*"))  # nothing was trained
