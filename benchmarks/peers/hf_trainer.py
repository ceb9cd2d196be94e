"""What part 6 is compared with: SegFormer with the Trainer of Hugging Face.

Follows the guide "Image segmentation" of transformers (huggingface.co/docs/transformers/tasks/semantic_segmentation):
PIL reads, torchvision augments the photograph in its full size, SegformerImageProcessor resizes and normalises,
compute_metrics enlarges the logits of the whole validation set, and Trainer does the rest with its defaults (AdamW, a
learning rate that falls linearly). From scratch: the network of nvidia/mit-b0 with weights as transformers draws them.

Trainer needs the package accelerate, which no part needs: it is in benchmarks/requirements.txt.

    .venv-pt/bin/python benchmarks/peers/hf_trainer.py --data_root DATA --work_dir DIR --epochs 5 --image_size 192 \
        --batch_size 8 --learning_rate 1.5e-3 --workers 2
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from transformers import (
    EvalPrediction,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)


def parse_args() -> argparse.Namespace:
    """The flags that all peers share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    types = {"data_root": Path, "work_dir": Path, "epochs": int, "image_size": int, "batch_size": int}
    for name, kind in (types | {"learning_rate": float, "workers": int}).items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    return parser.parse_args()


def train_transform() -> v2.Compose:
    """Flips, affine, colour, and sometimes blur, of a photograph and its mask."""
    affine = v2.RandomAffine(30, translate=(0.1, 0.1), scale=(0.8, 1.2), interpolation=InterpolationMode.BILINEAR)
    jitter = v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05)
    flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
    blur = v2.GaussianBlur(5, sigma=(0.3, 1.0))
    sometimes = [v2.RandomApply([step], p) for step, p in [(affine, 0.5), (jitter, 0.5), (blur, 0.1)]]
    return v2.Compose([*flips, *sometimes])


class NailDataset(Dataset):
    """What SegFormer is called with: pixel_values, float32 (3, S, S), and labels, int64 (S, S)."""

    def __init__(self, data_root: Path, csv_file: str, image_size: int, transform: v2.Compose | None = None) -> None:
        self.data_root, self.transform = data_root, transform
        self.paths = pd.read_csv(data_root / "csv_file" / csv_file)
        self.processor = SegformerImageProcessor(size={"height": image_size, "width": image_size})

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.paths.iloc[index]
        image = Image.open(self.data_root / row["images"]).convert("RGB")
        mask = tv_tensors.Mask(np.array(Image.open(self.data_root / row["masks"])) // 255)
        if self.transform:
            image, mask = self.transform(image, mask)
        inputs = self.processor(image, mask)
        return {name: values[0] for name, values in inputs.items()}


@torch.no_grad()
def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The IoU of the nails, over all pixels of the set."""
    labels = prediction.label_ids == 1
    logits = torch.from_numpy(prediction.predictions)
    logits = nn.functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    preds = logits.argmax(dim=1).numpy() == 1
    union = np.count_nonzero(labels | preds)
    return {"iou": np.count_nonzero(labels & preds) / union if union else 1.0}


class PeerLog(TrainerCallback):
    """Writes the IoU in validation to peer.csv, after each epoch."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.write_text("epoch,val_iou\n")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        with self.file.open("a") as file:
            file.write(f"{state.epoch:.0f},{metrics['eval_iou']}\n")


class NailTrainer(Trainer):
    """A Trainer that validates on all photographs: dataloader_drop_last would leave the last ones out there, too."""

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        workers, collate = self.args.dataloader_num_workers, self.data_collator
        return DataLoader(self.eval_dataset, self.args.eval_batch_size, num_workers=workers, collate_fn=collate)


def main() -> None:
    """Data, model, Trainer."""
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    train_dataset = NailDataset(args.data_root, "train.csv", args.image_size, train_transform())
    valid_dataset = NailDataset(args.data_root, "valid.csv", args.image_size)
    set_seed(42)  # as train.py, and as the default of TrainingArguments
    model = SegformerForSemanticSegmentation(SegformerConfig(num_labels=2))  # else its defaults, which are mit_b0

    training_args = TrainingArguments(
        output_dir=str(args.work_dir),
        learning_rate=args.learning_rate,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        dataloader_num_workers=args.workers,
        dataloader_drop_last=True,
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="epoch",
        # Only the best epoch is saved. load_best_model_at_end would save all, and then not find SegFormer's weights,
        # whose names are changed in the file (huggingface/transformers, pull request 48822); from_pretrained does.
        save_strategy="best",
        save_total_limit=1,
        metric_for_best_model="iou",
        remove_unused_columns=False,
        report_to="none",
    )
    trainer = NailTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=valid_dataset,
        compute_metrics=compute_metrics,
        callbacks=[PeerLog(args.work_dir / "peer.csv")],
    )
    trainer.train()  # leaves the best epoch in work_dir/checkpoint-STEP


if __name__ == "__main__":
    main()
