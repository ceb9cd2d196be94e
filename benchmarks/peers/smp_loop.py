"""What part 3 is compared with: a training loop in plain PyTorch, around a network of segmentation_models_pytorch.

Follows the loop of its examples (github.com/qubvel-org/segmentation_models.pytorch, examples/
binary_segmentation_buildings.py): Dice loss, CosineAnnealingLR stepped once an epoch, IoU from counts that are summed
over the set. Images are read and augmented as torchvision's "Getting started with transforms v2" shows.

    .venv-pt/bin/python benchmarks/peers/smp_loop.py --data_root DATA --work_dir DIR --epochs 5 --image_size 128 \
        --batch_size 8 --learning_rate 2e-3 --workers 2 --encoder resnet18
"""

import argparse
from pathlib import Path

import pandas as pd
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode, v2


def parse_args() -> argparse.Namespace:
    """The flags that all peers share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    types = {"data_root": Path, "work_dir": Path, "epochs": int, "image_size": int, "batch_size": int}
    for name, kind in (types | {"learning_rate": float, "workers": int}).items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--encoder", default="resnet18")
    return parser.parse_args()


def create_transform(image_size: int, train: bool) -> v2.Compose:
    """Resize, in training augment, then normalise; masks keep their type and their values."""
    affine = v2.RandomAffine(30, translate=(0.1, 0.1), scale=(0.8, 1.2), interpolation=InterpolationMode.BILINEAR)
    jitter = v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05)
    blur, noise = v2.GaussianBlur(5, sigma=(0.3, 1.0)), v2.GaussianNoise(sigma=0.03)
    flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
    sometimes = [v2.RandomApply([step], p) for step, p in [(affine, 0.5), (jitter, 0.5), (blur, 0.1), (noise, 0.1)]]
    augment = [*flips, *sometimes] if train else []
    to_float = v2.ToDtype(torch.float32, scale=True)  # images only, from 255 to 1
    normalize = v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    return v2.Compose([v2.Resize((image_size, image_size)), *augment, to_float, normalize])


class NailDataset(Dataset):
    """Images, float32 (3, S, S), and masks, uint8 (1, S, S) of 0 and 1."""

    def __init__(self, data_root: Path, csv_file: str, transform: v2.Compose) -> None:
        self.data_root, self.transform = data_root, transform
        self.paths = pd.read_csv(data_root / "csv_file" / csv_file)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = self.paths.iloc[index]
        image = tv_tensors.Image(decode_image(str(self.data_root / row["images"]), mode=ImageReadMode.RGB))
        mask = tv_tensors.Mask(decode_image(str(self.data_root / row["masks"]), mode=ImageReadMode.GRAY) // 255)
        return self.transform(image, mask)


def train_epoch(
    model: nn.Module, loader: DataLoader, loss_fn: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> float:
    """Train on each batch once; the mean loss."""
    model.train()
    total = 0.0
    for images, masks in loader:
        images, masks = images.to(device), masks.to(device)
        optimizer.zero_grad()
        loss = loss_fn(model(images), masks)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(loader)


@torch.no_grad()
def validate(model: nn.Module, loader: DataLoader, device: torch.device) -> float:
    """The IoU of the foreground, over all pixels of the set."""
    model.eval()
    stats = []
    for images, masks in loader:
        images, masks = images.to(device), masks.to(device)
        preds = (model(images).sigmoid() > 0.5).long()
        stats.append(smp.metrics.get_stats(preds, masks.long(), mode="binary"))
    tp, fp, fn, tn = (torch.cat(counts) for counts in zip(*stats, strict=True))
    return smp.metrics.iou_score(tp, fp, fn, tn, reduction="micro").item()


def main() -> None:
    """Data, model, loop."""
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(42)  # as train.py

    train_dataset = NailDataset(args.data_root, "train.csv", create_transform(args.image_size, train=True))
    valid_dataset = NailDataset(args.data_root, "valid.csv", create_transform(args.image_size, train=False))
    train_loader = DataLoader(train_dataset, args.batch_size, shuffle=True, num_workers=args.workers, drop_last=True)
    valid_loader = DataLoader(valid_dataset, args.batch_size, shuffle=False, num_workers=args.workers)

    model = smp.Unet(args.encoder, encoder_weights=None, in_channels=3, classes=1).to(device)
    loss_fn = smp.losses.DiceLoss(smp.losses.BINARY_MODE, from_logits=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs, eta_min=1e-5)

    best = -1.0
    log = args.work_dir / "peer.csv"
    log.write_text("epoch,val_iou\n")
    for epoch in range(args.epochs):
        loss = train_epoch(model, train_loader, loss_fn, optimizer, device)
        scheduler.step()
        iou = validate(model, valid_loader, device)
        print(f"epoch {epoch + 1}/{args.epochs}: loss {loss:.4f}, IoU in validation {iou:.4f}", flush=True)
        if iou > best:
            best = iou
            torch.save(model.state_dict(), args.work_dir / "best.pth")
        with log.open("a") as file:
            file.write(f"{epoch + 1},{iou}\n")


if __name__ == "__main__":
    main()
