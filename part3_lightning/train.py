"""Train a segmentation model on nails with PyTorch Lightning: flags, data, model, trainer.

Article:
https://hphuongdhsp.github.io/ml-blog/pytorchlightning/semanticsegmentation/deeplearning/2022/08/04/segmentation-model-part3.html
"""

import quick_imports  # first: it makes the imports below faster

import argparse
import difflib
import logging
import pickle
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EMAWeightAveraging
from pytorch_lightning.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.tuner import Tuner
from pytorch_lightning.utilities import rank_zero_only

from callbacks import MetricsLog, PredictionGrid, ProgressBar, StopIfNotFinite, create_logger
from checkpoints import Checkpoints, StopOnSignal, epochs_done, errors_in_words
from compiling import RecordPasses, ValidateUncompiled, check_compiler, compile_network
from dataloader import NailDataModule, load_data_path
from folds import find_folds, fold_or_all, split_by_fold, train_all_folds
from losses import LOSSES
from memory import keep_freed_memory
from model import ARCHS, ENCODERS, MODELS, SegmentationModel, is_encoder
from runs import open_run, read_metrics, report, why_over
from utils import (
    choose_devices,
    choose_precision,
    fraction,
    positive_number,
    stop,
    train_parser,
    treat_sigterm_like_ctrl_c,
    whole_number,
)

quick_imports.end()

PART = "lightning"  # the name of its folder in work_dir
# What --resume cannot change: the network, and what its learning rate and its batches follow from.
FIXED = ["arch", "encoder", "classes", "loss", "image_size", "batch_size", "accumulate_grad_batches", "ema"]
FIXED += ["learning_rate", "auto_lr_find", "gradient_clip", "limit_batches", "seed"]
PRECISIONS = {"fp32": "32-true", "fp16": "16-mixed", "bf16": "bf16-mixed"}


def parse_args() -> argparse.Namespace:
    """The flags that all parts share, and this part's own."""
    parser = train_parser("Train a segmentation model with PyTorch Lightning.", encoder="efficientnet-b4")
    add = parser.add_argument
    add("--arch", choices=ARCHS, default="Unet", metavar="ARCH", help=f"{', '.join(ARCHS)} (%(default)s)")
    add("--model", choices=MODELS, metavar="NAME", help=f"instead of --arch and --encoder: {', '.join(MODELS)}")
    add("--loss", choices=LOSSES, default="lovasz", metavar="LOSS", help=f"{', '.join(LOSSES)} (%(default)s)")
    add("--classes", type=whole_number(), default=1, help="1: nail or not; else the number of labels in the masks (1)")
    add("--fold", type=fold_or_all, metavar="K", help="validate on fold K, train on the others; 'all': in turn")
    add("--cache", choices=["none", "memory"], default="none", help="keep decoded images there (%(default)s)")
    add("--accumulate_grad_batches", type=whole_number(), default=1, metavar="N", help="batches a step (1)")
    add("--gradient_clip", type=positive_number, metavar="NORM", help="longer gradients are shortened to this norm")
    add("--ema", type=fraction, metavar="DECAY", help="validate and save moving averages of the weights (0.99, 0.999)")
    add("--auto_lr_find", action="store_true", help="look for a learning rate first, in 100 steps")
    add("--compile", action="store_true", help="torch.compile: minutes to translate the network, then perhaps faster")
    add("--profiler", choices=["simple", "advanced", "pytorch"], help="where the time goes, written to logs/")
    add("--num_nodes", type=whole_number(), default=1, metavar="N", help="machines (1)")
    args = parser.parse_args()
    if args.model:
        if {word.split("=")[0] for word in sys.argv} & {"--arch", "--encoder"}:
            parser.error("argument --model: it stands for --arch and --encoder; leave these away")
        args.arch, args.encoder = MODELS[args.model]["arch"], MODELS[args.model]["encoder"]
    if not is_encoder(args.encoder):
        similar = ", ".join(difflib.get_close_matches(args.encoder, ENCODERS, n=5, cutoff=0))
        parser.error(f"argument --encoder: {args.encoder!r} is none of smp (similar: {similar}) nor tu-<one of timm>")
    if args.encoder_weights not in ("imagenet", "none") and not Path(args.encoder_weights).is_file():
        parser.error(f"argument --encoder_weights: {args.encoder_weights!r} is neither imagenet, none nor a file")
    check_compiler(parser, args)
    return args


def create_model(args: argparse.Namespace) -> SegmentationModel:
    """The model of the flags; leaves with a message if it cannot be built or its weights cannot be had."""
    weights = None if args.encoder_weights == "none" else args.encoder_weights
    names = ["arch", "encoder", "classes", "image_size", "loss", "learning_rate", "seed"]
    try:
        model = SegmentationModel(**{name: getattr(args, name) for name in names}, encoder_weights=weights)
    except (KeyError, NotImplementedError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        if weights == "imagenet" and isinstance(error, OSError):
            ways_out = "Without network: --encoder_weights none, to start from scratch, or --encoder_weights FILE"
            stop(f"--encoder_weights imagenet: they cannot be downloaded ({error}) {ways_out}")
        stop(f"--arch {args.arch}, --encoder {args.encoder}, --encoder_weights {weights} do not go together: {error}")
    if args.compile:
        compile_network(model.network, args)
    return model


def create_trainer(args: argparse.Namespace, run_dir: Path, callbacks: list[Callback]) -> pl.Trainer:
    """The Trainer of the flags. In Lightning 1, accelerator and devices were gpus=, and precision was amp_level=."""
    on_gpu = args.device[0] != "cpu"
    # Some encoders have layers that a U-Net does not use; without find_unused_parameters, DDP waits for them.
    ddp = DDPStrategy(process_group_backend="nccl" if on_gpu else "gloo", find_unused_parameters=True)
    profilers = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
    return pl.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=[int(name.removeprefix("gpu:")) for name in args.device] if on_gpu else len(args.device),
        num_nodes=args.num_nodes,
        strategy=ddp if len(args.device) * args.num_nodes > 1 else "auto",
        use_distributed_sampler=False,  # the data module deals the photographs, each to one process
        precision=PRECISIONS[args.mixed_precision],
        max_epochs=args.epochs,
        accumulate_grad_batches=args.accumulate_grad_batches,
        gradient_clip_val=args.gradient_clip,
        profiler=profilers[args.profiler](run_dir / "logs", "profile") if args.profiler else None,
        logger=create_logger(args, run_dir),
        callbacks=callbacks,
        enable_progress_bar=sys.stdout.isatty(),
        enable_model_summary=False,
        default_root_dir=run_dir,
    )


def find_learning_rate(trainer: pl.Trainer, model: SegmentationModel, data: NailDataModule) -> None:
    """Raise the learning rate from step to step, and take that at which the loss falls fastest."""
    found = Tuner(trainer).lr_find(model, datamodule=data)
    if found is None or found.suggestion() is None:
        stop("--auto_lr_find: no learning rate was found; give one with --learning_rate")
    trainer.print(f"--auto_lr_find: the loss falls fastest at {found.suggestion():.2e}")


def main() -> None:
    """Read top to bottom, this is the lesson."""
    args = parse_args()
    treat_sigterm_like_ctrl_c()
    # Lightning's hints for developers: that there is no GPU, that more workers might help.
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")

    # Devices.
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    args.device = choose_devices(args.device, gpus)
    args.mixed_precision = choose_precision(args.mixed_precision, on_gpu=args.device[0] != "cpu")

    # Data: only the paths so far.
    train_paths = load_data_path(args.data_root, "train.csv")
    valid_paths = load_data_path(args.data_root, "valid.csv")
    if args.fold == "all":
        return train_all_folds(args, args.work_dir / PART, find_folds(train_paths, valid_paths))
    if args.fold:
        train_paths, valid_paths = split_by_fold(train_paths, valid_paths, args.fold)
    data = NailDataModule(args, train_paths, valid_paths)

    # With several devices this script runs once for each, and the first one writes.
    is_first = rank_zero_only.rank == 0
    part = f"{PART}/fold{args.fold}" if args.fold else PART
    run_dir = open_run(args, part, FIXED) if is_first else args.work_dir / part
    last = run_dir / "weights" / "last.ckpt"
    done = epochs_done(last) if args.resume else 0
    rows = read_metrics(run_dir, done, args.resume)
    if over := why_over(args, rows):
        if is_first:
            print(over)
            report(args, run_dir, rows)
        return

    # Model.
    keep_freed_memory()
    pl.seed_everything(args.seed, verbose=False)
    model = create_model(args)

    with errors_in_words(last):
        # Trainer.
        callbacks = [
            StopIfNotFinite(),
            MetricsLog(run_dir, rows, args.early_stopping),
            PredictionGrid(run_dir, *data.sample_batch(8)),
            *([EMAWeightAveraging(decay=args.ema)] if args.ema else []),
            ValidateUncompiled() if args.compile else RecordPasses(args),
            *([ProgressBar()] if sys.stdout.isatty() else []),
            StopOnSignal(last),
            Checkpoints(last, rows),
        ]
        trainer = create_trainer(args, run_dir, callbacks)
        if args.auto_lr_find and not last.exists():
            find_learning_rate(trainer, model, data)
        numbers = f"{len(train_paths)} photographs for training, {len(valid_paths)} for validation"
        steps = f"{args.epochs - done} epochs of {data.steps} steps"
        trainer.print(f"{numbers}; {' '.join(args.device)}, {args.mixed_precision}; {steps}")
        trainer.fit(model, data, ckpt_path=last if last.exists() else None, weights_only=True)
    if is_first:
        report(args, run_dir, rows)


if __name__ == "__main__":
    main()
