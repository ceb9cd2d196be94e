"""The barest training loop that is right, for the network of each part, on batches that lie in memory; and the barest
loading: of one photograph, and of an epoch's.

What steps.py compares train.py with, what choices.py changes one thing at a time of, and the limits of loaders.py.
"""

import argparse
import itertools
import logging
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from results import CORES, ON_GPU, ROOT, TF_PARTS

KEPT_BATCHES = 4  # batches, which are used in turn
Step = Callable[[Any], object]  # trains on the batch that it is given


def parse_flags(part: str, flags: list[Any], keep_freed_memory: bool = True) -> argparse.Namespace:
    """What train.py of a part makes of its flags. From now on, `import train` and `sys.argv` mean this part and these.

    Without --device it is the first GPU, or the CPU; without --mixed_precision it is float32.

    Args:
        keep_freed_memory: as train.py does in parts 1 to 6.
    """
    sys.path.insert(0, str(ROOT / part))
    sys.argv[1:] = [str(flag) for flag in flags]
    import train

    if keep_freed_memory and hasattr(train, "keep_freed_memory"):
        train.keep_freed_memory()
    args = train.parse_args()
    args.part = part
    if part in TF_PARTS:
        train.create_strategy(args)  # while it still can be set that TensorFlow does not take all memory of a GPU
    args.device = args.device or ["gpu:0" if ON_GPU else "cpu"]
    args.mixed_precision = {"False": "fp32", None: "fp32"}.get(args.mixed_precision, args.mixed_precision)
    return args


def create_step(args: argparse.Namespace, choice: str = "as it is") -> Callable[[], object]:
    """A function that trains on the next of a few batches, which lie in memory.

    Args:
        args: what `parse_flags` returns.
        choice: one of those of the part in choices.py.
    """
    if args.part in TF_PARTS:
        set_precision(half="bf16" in (choice, args.mixed_precision))
        batches = iter(tensorflow_loader(args, KEPT_BATCHES, range(1)).cache().repeat())
        # train_on_batch calls the same function, but first makes a tf.data pipeline of its one batch.
        train_step = tensorflow_model(args).make_train_function()
        return lambda: float(train_step(batches)["loss"])
    if args.part == "part7_mmdetection":
        from mmengine.runner import Runner

        config = mmdet_config(args)
        loader = Runner.build_dataloader(config.train_dataloader, seed=args.seed)
        step = mmdet_step(args, config, choice)
    else:
        data = torch_data(args)
        device = data.trainer.strategy.root_device
        loader = (data.transfer_batch_to_device(batch, device, 0) for batch in data.train_dataloader())
        normalized_step = torch_step(args, data, choice)

        def step(batch: Any) -> None:
            normalized_step(data.on_after_batch_transfer(batch, 0))  # bytes become normalised floats

    batches = itertools.cycle(list(itertools.islice(loader, KEPT_BATCHES)))
    return lambda: step(next(batches))


def set_precision(half: bool) -> None:
    """Of the networks that TensorFlow builds from now on."""
    from keras2 import tf

    tf.keras.mixed_precision.set_global_policy("mixed_bfloat16" if half else "float32")


def tensorflow_model(args: argparse.Namespace) -> Any:
    """The network of parts 1 and 2, with its loss and optimizer."""
    import train

    model = train.create_network(args)
    model.compile(train.create_optimizer(args.optimizer, args.learning_rate), train.create_loss())
    train.build_optimizer(model)
    return model


def tensorflow_loader(args: argparse.Namespace, steps: int, epochs: range) -> Any:
    """The loader of train.py of parts 1 and 2."""
    import train

    from keras2 import tf

    context = tf.distribute.InputContext()
    if args.part == "part1_tensorflow":
        paths = train.load_data_path(args.data_root, "train.csv")
        return train.create_loader(args, None, paths, context, steps, epochs)
    paths, plan = balanced_paths(args)
    paths = paths.assign(number=paths["source"].map(list(plan.index).index))
    return train.create_loader(args, None, paths, context, steps, epochs, plan).take(steps * len(epochs))


def balanced_paths(args: argparse.Namespace) -> tuple[Any, Any]:
    """The photographs of part 2, and its plan of how often they are drawn."""
    import train

    paths = train.load_source_paths(args.data_root)
    return paths, train.plan_balance(args.balance, args.strong_augmentation, paths["source"].value_counts().to_dict())


def torch_data(args: argparse.Namespace) -> Any:
    """The data module of train.py of parts 3 to 6."""
    import train

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    form = [args.data_format] if "data_format" in args else []
    paths = train.load_data_path(args.data_root, "train.csv", *form)
    data = train.NailDataModule(args, paths, paths)
    data.trainer = train.create_trainer(args, Path(), [])
    data.trainer.training = True
    return data


def torch_step(args: argparse.Namespace, data: Any, choice: str = "as it is") -> Step:
    """Parts 3 to 6: forward, loss, backward, AdamW; on batches that are normalised."""
    import torch
    import train

    device = data.trainer.strategy.root_device
    args.compile = choice == "compile"
    torch.manual_seed(args.seed)
    nothing_to_resume = [Path("no checkpoint")] if args.part == "part6_segformer" else []
    model = train.create_model(args, *nothing_to_resume).to(device).train()
    if choice in ("contiguous", "channels last"):
        model.to(memory_format=torch.contiguous_format if choice == "contiguous" else torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, fused=choice != "not fused")
    half = "bf16" in (choice, args.mixed_precision)

    def step(batch: Any) -> None:
        images, masks = batch
        if choice == "contiguous":
            images = images.contiguous()
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits = model(images)
        loss = model.loss_fn(logits.float(), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if ON_GPU:
            torch.cuda.synchronize()

    return step


def mmdet_config(args: argparse.Namespace) -> Any:
    """The config of train.py of part 7."""
    import cv2
    import train
    from mmdet.utils import register_all_modules

    cv2.setNumThreads(0)  # as MMEngine's runner does
    register_all_modules()
    return train.create_config(args, Path(), [], processes=1)


def mmdet_step(args: argparse.Namespace, config: Any, choice: str = "as it is") -> Step:
    """Part 7: the model's own loss, backward, gradients clipped and the rate scaled as the config says, AdamW."""
    import torch
    from mmdet.registry import MODELS

    torch.manual_seed(args.seed)
    model = MODELS.build(config.model)
    model.init_weights()
    model.to("cuda" if ON_GPU else "cpu").train()
    if choice == "channels last":
        model.to(memory_format=torch.channels_last)
    learning_rate = args.learning_rate * args.batch_size / config.auto_scale_lr.base_batch_size
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, fused=choice != "not fused")

    def step(batch: Any) -> None:
        loss, _ = model.parse_losses(model(**model.data_preprocessor(batch, True), mode="loss"))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim_wrapper.clip_grad.max_norm)
        optimizer.step()
        if ON_GPU:
            torch.cuda.synchronize()

    return step


def bare_load(args: argparse.Namespace, used: int) -> Callable[[int, int], object]:
    """A function that reads, resizes and augments photograph `index` of the `used` ones of an epoch.

    In another epoch that photograph looks otherwise, in part 2 it is another one; in part 7 it stays as it is.
    """
    if args.part == "part2_balanced_data":
        return balanced_load(args, used)
    if args.part == "part7_mmdetection":
        from mmdet.registry import DATASETS

        dataset = DATASETS.build(mmdet_config(args).train_dataloader.dataset)
        return lambda epoch, index: dataset[index]
    dataset = torch_data(args).train_dataset
    return lambda epoch, index: dataset[epoch, index]


DRAWN_EPOCHS = 100  # of part 2's limit; then it begins with the first one again


def balanced_load(args: argparse.Namespace, used: int) -> Callable[[int, int], object]:
    """The same for part 2: photographs drawn as its plan says, with the augmentation of their sources."""
    import cv2

    from transform import seed_transform, strong_transform, train_transform, valid_transform

    paths, plan = balanced_paths(args)
    # In each epoch others: the few of one may be quicker to read than those that the loader draws.
    weights = paths["source"].map(plan["repeats"])
    drawn = paths.sample(used * DRAWN_EPOCHS, replace=True, weights=weights, random_state=args.seed)
    images, masks = drawn["images"].tolist(), drawn["masks"].tolist()
    resize, augmentations = valid_transform(args.image_size), {False: train_transform(), True: strong_transform()}
    augment = drawn["source"].map(plan["strong"]).map(augmentations).tolist()

    def load(epoch: int, index: int) -> object:
        draw = epoch % DRAWN_EPOCHS * used + index
        image, mask = cv2.imread(images[draw], cv2.IMREAD_COLOR_RGB), cv2.imread(masks[draw], cv2.IMREAD_GRAYSCALE)
        resized = resize(image=image, mask=mask // 255)
        seed_transform(augment[draw], args.seed, draw)
        return augment[draw](**resized)

    return load


def bare_pass(load: Callable[[int, int], object], epoch: int, used: int) -> float:
    """Load and augment the `used` photographs of an epoch in as many processes as there are cores, drop them.

    Returns:
        Images per second, from when the last process has begun until the first one has no more to do.
    """
    each = used // CORES
    ready = multiprocessing.Barrier(CORES, timeout=60)
    times = np.frombuffer(multiprocessing.RawArray("d", CORES * (each + 1))).reshape(CORES, -1)  # all see the same

    def work(process: int) -> None:
        load(epoch, process)
        ready.wait()
        times[process, 0] = time.perf_counter()
        for number in range(each):
            load(epoch, process + number * CORES)
            times[process, number + 1] = time.perf_counter()

    processes = [multiprocessing.Process(target=work, args=(process,)) for process in range(CORES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a process of the limit has failed")
    began, ended = times[:, 0].max(), times[:, -1].min()
    return np.count_nonzero((times > began) & (times <= ended)) / (ended - began)
