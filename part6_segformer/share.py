"""A trained network as transformers wants it: a folder for `from_pretrained` and `pipeline`, or a place on the hub."""

import shlex
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers import SegformerImageProcessor
from transformers.utils import logging

from model import load_model, name_labels
from utils import stop

CARD = """---
library_name: transformers
pipeline_tag: image-segmentation
tags: [segformer, semantic-segmentation]
---

# SegFormer ({encoder}), trained to find: {labels}

Validation IoU: {iou:.4f} (the pixels of the photographs for validation counted together, at {size} x {size} pixels).

```python
from transformers import pipeline

segments = pipeline("image-segmentation", model="{name}")("photograph.jpg")
```

Photographs are resized to {size} x {size} pixels, the size of training, whatever their shape. Trained with the loss
`{loss}` on {photographs} photographs; the weights are those of the best of {epochs} epochs, number {best_epoch}.
"""


def save_for_transformers(run_dir: Path, rows: list[dict[str, float]], photographs: int, name: str | None) -> Path:
    """Write <run_dir>/transformers/, of the best epoch, and return it.

    Args:
        rows: of metrics.csv.
        photographs: that the network was trained on.
        name: on the hub, such as user/nails, for the card; or None.
    """
    folder = run_dir / "transformers"
    if folder.exists() and not folder.is_dir():
        stop(f"{folder} is a file, where the network for transformers belongs: move it, and call again with --resume")
    model = load_model(run_dir / "weights" / "best.ckpt")
    about, size = model.hparams, model.hparams["image_size"]
    logging.disable_progress_bar()
    model.network.model.save_pretrained(folder)
    mean, std = list(about["mean"]), list(about["std"])
    SegformerImageProcessor(size={"height": size, "width": size}, image_mean=mean, image_std=std).save_pretrained(
        folder
    )
    best = max(rows, key=lambda row: row["val_iou"])  # the first, if there are several, as for best.ckpt
    card = CARD.format(
        encoder=Path(about["encoder"]).name,  # of a folder not the whole path, which says too much of this machine
        labels=", ".join(list(name_labels(about["classes"]).values())[1:]),
        iou=best["val_iou"],
        best_epoch=int(best["epoch"]),
        size=size,
        name=name or "path/to/this/folder",
        loss=about["loss"],
        epochs=len(rows),
        photographs=photographs,
    )
    (folder / "README.md").write_text(card)
    print(f"\nfor transformers: {folder}")
    return folder


def check_login(name: str | None, fold: str | None) -> None:
    """Leave with a message, before anything is trained, if it is to be uploaded and that cannot be.

    Args:
        name: of --push_to_hub; it may be none, or the hub may not know the user.
        fold: of --fold.
    """
    if name is None:
        return
    if fold == "all":
        stop("--push_to_hub: not with --fold all, whose folds would overwrite one another")
    if "/" not in name:
        stop(f"--push_to_hub {name}: such names have two parts, as user/model")
    try:
        validate_repo_id(name)
        HfApi().whoami()
    except HFValidationError as error:
        stop(f"--push_to_hub {name}: {first_line(error)}")
    except LocalTokenNotFoundError:
        stop(f"--push_to_hub {name}: you are not logged in; first hf auth login")
    except HfHubHTTPError as error:
        stop(f"--push_to_hub {name}: the hub does not know you ({first_line(error)}); first hf auth login")
    except Exception as error:  # of what the hub's client uses
        stop(f"--push_to_hub {name}: the hub cannot be reached ({first_line(error)})")


def share(run_dir: Path, rows: list[dict[str, float]], photographs: int, name: str | None) -> None:
    """Write <run_dir>/transformers/ and, if it has a name there, upload it to the hub; see the two functions."""
    folder = save_for_transformers(run_dir, rows, photographs, name)
    if name:
        push_to_hub(folder, name)


def push_to_hub(folder: Path, name: str) -> None:
    """Upload that folder to https://huggingface.co/<name>, as private if it is new; leaves with a message if not."""
    try:
        api = HfApi()
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except (Exception, KeyboardInterrupt) as error:
        later = shlex.join(["hf", "upload", "--private", name, str(folder)])
        stop(f"--push_to_hub {name}: not uploaded ({first_line(error)}). Later:\n    {later}", code=1)
    print(f"uploaded to https://huggingface.co/{name}")


def first_line(error: BaseException) -> str:
    """What an exception says, or is, in a few words."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
