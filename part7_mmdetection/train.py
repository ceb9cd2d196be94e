"""Train an instance segmentation model on nails with MMDetection: flags, config, Runner.

Article:
https://hphuongdhsp.github.io/ml-blog/pytorchlightning/intancesegmentation/deeplearning/mmdetection/2022/08/07/segmentation-model-part6.html
"""

import quick_imports  # first: it makes the imports below faster

import argparse
import math
import os
import warnings
from pathlib import Path
from typing import Any

import ops  # noqa: F401 - before all else: it gives mmcv the operators that it was not compiled with

# isort: split
import torch
from mmdet.utils import register_all_modules
from mmengine.config import Config, DictAction
from mmengine.dist import get_world_size
from mmengine.runner import Runner

import hooks  # noqa: F401 - they register themselves
from dataloader import data_config
from errors import config_errors_in_words, errors_in_words
from launch import join_processes, launch, use_device
from model import ENCODERS, adapt_model, describe, epochs_done, refuse_other_weights, replace_everywhere
from runs import open_run, read_metrics, report, why_over
from utils import any_path, choose_devices, choose_precision, stop, train_parser, treat_sigterm_like_ctrl_c

quick_imports.end()

HERE = Path(__file__).parent
PART = "mmdetection"  # the name of its folder in work_dir
# What --resume cannot change: the network, and what its learning rate and its batches follow from.
FIXED = [
    "config",
    "cfg_options",
    "encoder",
    "encoder_weights",
    "image_size",
    "batch_size",
    "learning_rate",
    "limit_batches",
    "seed",
]
BASE_BATCH = 16  # --learning_rate is for so many photographs a step, and is scaled to --batch_size


def parse_args() -> argparse.Namespace:
    """The flags that all parts share, and this part's own."""
    parser = train_parser("Train an instance segmentation model with MMDetection.", encoder="resnet50")
    add = parser.add_argument
    config = HERE / "configs" / "nail_mask_rcnn.py"
    add("--config", type=any_path, default=config, help="a config of configs/, or your own (nail_mask_rcnn.py)")
    add("--cfg_options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="change the config, after all flags")
    started_by = "pytorch" if "TORCHELASTIC_RUN_ID" in os.environ else "none"
    add("--launcher", choices=["none", "pytorch", "slurm"], default=started_by, help="who starts the processes")
    parser.epilog = "Here --encoder_weights may be coco as well, and --learning_rate is for 16 images a step."
    try:
        args = parser.parse_args()
    except ValueError as error:  # of DictAction, which checks nothing
        parser.error(f"argument --cfg_options: they have to be KEY=VALUE ({error})")
    if args.encoder not in ENCODERS:
        parser.error(f"argument --encoder: {args.encoder!r} is none of {', '.join(ENCODERS)}")
    if args.encoder_weights not in ("imagenet", "coco", "none") and not Path(args.encoder_weights).is_file():
        parser.error(f"argument --encoder_weights: {args.encoder_weights!r} is neither imagenet, coco, none nor a file")
    if not args.config.is_file():
        parser.error(f"argument --config: {str(args.config)!r} is not a file")
    args.config = os.path.relpath(args.config, HERE)  # for --resume to know it again when the folder has been moved
    return args


def choose_hardware(args: argparse.Namespace) -> None:
    """Replace --device and --mixed_precision by what this machine has; leaves with a message if that is too little."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    if args.launcher == "none":
        args.device = choose_devices(args.device, gpus)
    elif "cpu" in (args.device or []) or not gpus:
        args.device = ["cpu"]
    else:
        args.device = [f"gpu:{number}" for number in range(len(gpus))]  # all that torchrun lets its processes see
    on_gpu = args.device[0] != "cpu"
    if not on_gpu and args.mixed_precision not in (None, "False"):
        print("warning: --mixed_precision: MMEngine has it on GPUs only; training in fp32")
        args.mixed_precision = "False"
    args.mixed_precision = choose_precision(args.mixed_precision, on_gpu)


def schedule(total: int) -> list[dict[str, Any]]:
    """A learning rate that rises in the first tenth of `total` steps, stays, and falls in the second half.

    Its shape is that of RTMDet's (arXiv 2212.07784). With a cosine from the start, the small config found less.
    """
    rising, falling = min(500, total // 10), total // 2
    rise = {"type": "LinearLR", "start_factor": 0.01, "by_epoch": False, "begin": 0, "end": rising}
    fall = {"type": "CosineAnnealingLR", "eta_min_ratio": 0.01, "by_epoch": False, "begin": falling, "end": total}
    return [rise, fall] if rising > 1 else [fall]  # in a single step it would not rise


def create_config(args: argparse.Namespace, run_dir: Path, rows: list[dict[str, float]], processes: int) -> Config:
    """The config file, with what the flags say put in, and --cfg_options over both.

    Args:
        rows: of metrics.csv, from the epochs before --resume.
        processes: of all machines together.
    """
    try:
        config = Config.fromfile(HERE / args.config)
    except Exception as error:  # a config is a program: anything may be wrong with it
        stop(f"--config {HERE / args.config}: {type(error).__name__}: {error}")
    data, categories = data_config(args, processes)
    for name, value in data.items():
        config[name] = value
    adapt_model(config, len(categories), args.encoder, args.encoder_weights, fetch_weights=not args.resume)
    on_gpu = args.device[0] != "cpu"
    if not on_gpu or processes == 1:
        replace_everywhere(config.model, "type", "BN", instead_of="SyncBN")  # that one is for several GPUs
    config.optim_wrapper.optimizer.lr = args.learning_rate
    if args.mixed_precision != "fp32":
        config.optim_wrapper.type = "AmpOptimWrapper"
        config.optim_wrapper.dtype = {"fp16": "float16", "bf16": "bfloat16"}[args.mixed_precision]
    share = math.ceil(config.train_dataloader.dataset.number / processes)  # MMEngine's sampler rounds up
    config.param_scheduler = schedule(args.epochs * (share // config.train_dataloader.batch_size))
    config.auto_scale_lr = {"enable": True, "base_batch_size": BASE_BATCH}
    config.train_cfg = {"type": "EpochBasedTrainLoop", "max_epochs": args.epochs, "val_interval": 1}
    config.default_hooks = {"checkpoint": None, "logger": None}  # ours do their work, and how is told in hooks.py
    backends = {"none": [], "tensorboard": ["TensorboardVisBackend"], "wandb": ["WandbVisBackend"]}[args.log]
    logs = {"save_dir": str(run_dir / "logs" / args.log)}
    config.visualizer.vis_backends = [{"type": backend, **logs} for backend in backends]
    config.randomness = {"seed": args.seed}
    config.launcher = args.launcher
    if not on_gpu:
        unused = config.get("find_unused_parameters", False)
        distributed = {"type": "MMDistributedDataParallel", "device_ids": None, "find_unused_parameters": unused}
        config.model_wrapper_cfg = distributed
    config.log_level = "CRITICAL"  # to MMDetection it is an ERROR that a network has found nothing yet
    config.work_dir = str(run_dir / "logs" / "mmengine")
    if args.resume:
        config.resume, config.load_from = True, str(run_dir / "weights" / "last.pth")
    if args.cfg_options:
        config.merge_from_dict(args.cfg_options)
    network = describe(config, categories, args.image_size)
    config.custom_hooks = [
        *config.get("custom_hooks", []),
        {"type": "SeedSteps", "seed": args.seed},
        {"type": "StopOnSignal"},
        {"type": "PredictionGrid", "run_dir": str(run_dir)},
        {"type": "EpochEnd", "run_dir": str(run_dir), "rows": rows, "patience": args.early_stopping, "about": network},
    ]
    return config


def main() -> None:
    """Read top to bottom, this is the lesson."""
    args = parse_args()
    treat_sigterm_like_ctrl_c()
    warnings.filterwarnings("ignore")
    choose_hardware(args)
    if len(args.device) > 1 and args.launcher == "none":
        launch(args.device)

    run_dir = args.work_dir / PART
    last = run_dir / "weights" / "last.pth"
    is_first = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0
    if is_first:
        open_run(args, PART, FIXED)
    done = epochs_done(last) if args.resume else 0
    rows = read_metrics(run_dir, done, args.resume)
    args.resume = done > 0
    if args.launcher != "none":
        join_processes(args.launcher, on_gpu=args.device[0] != "cpu")
    else:
        use_device(args.device[0])
    if over := why_over(args, rows, "segm_mAP"):
        if is_first:
            print(f"{over}; to train on, see --encoder_weights in the README")
            report(args, run_dir, rows, monitor="segm_mAP")
        return

    register_all_modules()
    with errors_in_words(last):
        with config_errors_in_words(args.config):
            config = create_config(args, run_dir, rows, get_world_size())
            runner = Runner.from_cfg(config)
            runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)  # train() would, but not in words
        if config.load_from and not args.resume:
            refuse_other_weights(runner.model, Path(config.load_from))
        runner.train()
    if is_first:
        report(args, run_dir, read_metrics(run_dir, runner.epoch, resume=True), monitor="segm_mAP")


if __name__ == "__main__":
    main()
