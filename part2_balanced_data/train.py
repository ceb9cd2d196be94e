"""Train a U-Net on nails with TensorFlow, balanced by source: flags, devices, data, model, fit.

Article: https://hphuongdhsp.github.io/ml-blog/tensorflow/semanticsegmentation/deeplearning/imbalanceddata/2022/08/03/segmentation-model-part2.html
"""

import quick_imports  # first: it makes the imports below faster

import argparse
import math
import sys
from functools import partial
from pathlib import Path

from balance import plan_balance, show_table
from callbacks import Checkpoints, MetricsLog, PredictionGrid, StopIfNotFinite
from dataloader import create_loader, load_data_path, load_source_paths, sample_batch
from errors import errors_in_words
from keras2 import build_optimizer, sm, tf
from memory import keep_freed_memory
from model import F1, IoU, create_loss, create_model, create_optimizer, create_schedule
from runs import open_run, read_metrics, report, why_over
from strategy import create_strategy, throwaway_run
from utils import choose_precision, stop, train_parser, treat_sigterm_like_ctrl_c

quick_imports.end()

PART = "balanced"  # the name of its folder in work_dir
# With another one of these, --resume would not go on with the same network, learning rate, draws or best epoch.
FIXED = ["encoder", "optimizer", "image_size", "batch_size", "limit_batches", "seed"]
FIXED += ["balance", "strong_augmentation", "monitor"]
POLICIES = {"fp32": "float32", "fp16": "mixed_float16", "bf16": "mixed_bfloat16"}


def parse_args() -> argparse.Namespace:
    """The flags that all parts share, and this part's own."""
    parser = train_parser("Train a segmentation model with TensorFlow.", encoder="efficientnetb4")
    add = parser.add_argument
    add("--optimizer", choices=["radam", "adamw"], default="radam", help="(%(default)s)")
    add("--cache", choices=["none", "memory", "disk"], default="none", help="keep decoded images there (%(default)s)")
    add("--balance", nargs="+", default=["uniform"], help="uniform, sqrt, none, or SOURCE=WEIGHT for each (uniform)")
    add(
        "--strong_augmentation",
        nargs="+",
        metavar="SOURCE",
        help="or 'none' (default: those drawn over 3 times an epoch)",
    )
    add("--monitor", choices=["iou", "macro_iou"], default="iou", help="tells the best epoch (%(default)s)")
    args = parser.parse_args()
    encoders = sm.get_available_backbone_names()
    if args.encoder not in encoders:
        parser.error(f"argument --encoder: {args.encoder!r} is none of {', '.join(encoders)}")
    if args.encoder_weights not in ("imagenet", "none") and not Path(args.encoder_weights).is_file():
        parser.error(f"argument --encoder_weights: {args.encoder_weights!r} is neither imagenet, none nor a file")
    if set("*?[") & set(str(args.work_dir.resolve())):
        parser.error("argument --work_dir: TensorFlow finds no checkpoints in a path with *, ? or [ in it")
    return args


def create_network(args: argparse.Namespace) -> tf.keras.Model:
    """The model of the flags; leaves with a message if its weights cannot be fetched."""
    weights = None if args.encoder_weights == "none" else args.encoder_weights
    try:
        return create_model(args.encoder, args.image_size, weights)
    except Exception as error:  # Keras raises a bare Exception where there is no network
        if "URL fetch failure" in str(error):
            stop(
                f"--encoder_weights imagenet: they cannot be downloaded ({error}). Without network, start from "
                "scratch with --encoder_weights none, or give a file with --encoder_weights FILE"
            )
        if weights not in (None, "imagenet") and isinstance(error, (OSError, ValueError, KeyError)):
            stop(f"--encoder_weights {weights}: these are not weights of {args.encoder} without its top ({error})")
        raise


def count_steps(args: argparse.Namespace, train_number: int, valid_number: int, devices: int) -> tuple[int, int]:
    """The steps of an epoch of training and of validation."""
    if args.batch_size % devices:
        stop(f"--batch_size {args.batch_size} cannot be shared equally by {devices} devices")
    if train_number < args.batch_size:
        stop(f"--batch_size {args.batch_size}: there are only {train_number} photographs to train with")
    if valid_number < devices:
        stop(f"--device: {valid_number} photographs for validation are too few for {devices} devices")
    steps = train_number // args.batch_size  # what does not fill a batch is left to another epoch
    valid_steps = min(math.ceil(valid_number / args.batch_size), valid_number // devices)
    if args.limit_batches:
        steps, valid_steps = min(steps, args.limit_batches), min(valid_steps, args.limit_batches)
    return steps, valid_steps


def main() -> None:
    """Read top to bottom, this is the lesson."""
    args = parse_args()
    treat_sigterm_like_ctrl_c()

    # Data: only the paths so far.
    train_paths = load_source_paths(args.data_root)
    valid_paths = load_data_path(args.data_root, "valid.csv")
    photographs = train_paths["source"].value_counts(sort=False).to_dict()
    plan = plan_balance(args.balance, args.strong_augmentation, photographs)
    train_paths = train_paths[train_paths["source"].isin(plan.index)]
    sources = list(dict.fromkeys([*plan.index, *valid_paths["source"]]))  # for validation there may be others
    train_paths, valid_paths = (
        paths.assign(number=paths["source"].map(sources.index)) for paths in (train_paths, valid_paths)
    )

    # Devices.
    strategy = create_strategy(args)
    steps, valid_steps = count_steps(args, len(train_paths), len(valid_paths), strategy.num_replicas_in_sync)
    args.mixed_precision = choose_precision(args.mixed_precision, on_gpu=args.device[0] != "cpu")
    tf.keras.mixed_precision.set_global_policy(POLICIES[args.mixed_precision])
    tf.keras.utils.set_random_seed(args.seed)

    # Of several machines all have to save, but only the files of the first one are kept.
    is_chief = strategy.extended.should_checkpoint
    run_dir = open_run(args, PART, FIXED) if is_chief else throwaway_run(args, args.work_dir / PART)

    # Model: what is made in the strategy's scope lives on every device.
    schedule = create_schedule(args.learning_rate, args.epochs * steps)
    with strategy.scope():
        model = create_network(args)
        iou, f1 = IoU(len(sources)), F1(len(sources))
        # Under mixed_float16, Keras puts a LossScaleOptimizer around the optimizer by itself.
        model.compile(create_optimizer(args.optimizer, schedule), create_loss(), weighted_metrics=[iou, f1])
        build_optimizer(model)
        network = {"encoder": args.encoder, "image_size": args.image_size}
        checkpoints = Checkpoints(model, run_dir, args.monitor, network)
        done = checkpoints.restore(args.work_dir / PART / "weights")
    rows = read_metrics(args.work_dir / PART, done, args.resume)
    if over := why_over(args, rows, f"val_{args.monitor}"):
        if is_chief:
            print(over)
            report(args, run_dir, rows, f"val_{args.monitor}")
            print("\n" + show_table(plan, max(rows, key=lambda row: row[f"val_{args.monitor}"])))
        return

    with errors_in_words(run_dir / "weights", train_paths, valid_paths):
        # Loaders.
        keep_freed_memory()  # they need as much for each photograph
        epochs = range(done, args.epochs)
        distribute = strategy.distribute_datasets_from_function
        loader = partial(create_loader, args, run_dir)
        train_loader = distribute(lambda context: loader(train_paths, context, steps, epochs, plan))
        valid_loader = distribute(lambda context: loader(valid_paths, context, valid_steps))

        # Fit.
        print(f"{len(train_paths)} photographs for training, {len(valid_paths)} for validation; ", end="")
        print(f"{' '.join(args.device)}, {args.mixed_precision}; {len(epochs)} epochs of {steps} steps")
        shares = ", ".join(f"source {source} {weight:.1%}" for source, weight in plan["weight"].items())
        print(f"to be drawn: {shares}", flush=True)
        log = MetricsLog(run_dir, rows, steps * args.batch_size, schedule, sources, iou, args)
        grid = PredictionGrid(*sample_batch(valid_paths, 8, args.image_size), log)
        # First, so that what is printed later stands below its line; the metrics are no means over the steps.
        progress = tf.keras.callbacks.ProgbarLogger("steps", stateful_metrics=["macro_iou", "worst_iou"])
        bar_or_line = 1 if sys.stdout.isatty() else 2
        model.fit(
            train_loader,
            steps_per_epoch=steps,
            epochs=args.epochs,
            initial_epoch=done,
            validation_data=valid_loader,
            validation_steps=valid_steps,
            # The log comes before the checkpoint: of a run that is killed between them, --resume drops the
            # row without a checkpoint. A checkpoint without its row could not be mended.
            callbacks=[progress, StopIfNotFinite(), log, checkpoints, grid],
            verbose=bar_or_line if is_chief else 0,
        )
    if is_chief:
        report(args, run_dir, rows, f"val_{args.monitor}")
        print("\n" + show_table(plan, max(rows, key=lambda row: row[f"val_{args.monitor}"])))


if __name__ == "__main__":
    main()
