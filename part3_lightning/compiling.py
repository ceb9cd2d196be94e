"""Giving a GPU the work of a step at once: recorded passes and, with the flag --compile, torch.compile."""

import argparse
import contextlib
import shutil
import warnings
from collections.abc import Iterator

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_only
from torch import nn


def check_compiler(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Leave with a message if --compile is given, and what torch.compile writes could not be compiled."""
    if not args.compile:
        return
    if not shutil.which("g++"):
        parser.error("argument --compile: torch.compile needs g++ (on Debian and Ubuntu: apt install g++)")
    if " " in torch.__file__ and not torch.cuda.is_available():  # it does not quote the path that it links to
        parser.error(f"argument --compile: on a CPU, torch must be in a path without a space, not in {torch.__file__}")


def adds_up(args: argparse.Namespace) -> bool:
    """Whether these flags add gradients up, over batches or devices. A CUDA graph's backward pass writes to the same
    memory each time, so a sum that is kept there would be lost.
    """
    return args.accumulate_grad_batches > 1 or len(args.device) * args.num_nodes > 1


@contextlib.contextmanager
def as_in_validation(network: nn.Module) -> Iterator[None]:
    """Meanwhile the network is as in validation: without gradients, and BatchNorm uses its averages."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def waits_for_results(network: nn.Module, images: torch.Tensor) -> bool:
    """Whether Python looks at what the GPU has worked out during a pass, or brings numbers there itself.

    Such a pass cannot be recorded. It is tried once, in training and in validation, while torch raises an error there.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
    try:
        network(images).float().mean().backward()
        with as_in_validation(network):
            network(images)
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
        network.zero_grad()
    return False


class RecordPasses(Callback):
    """Records what the network does on a GPU once, in training and in validation, and from then on plays it back.

    Python hands a GPU its work piece by piece, some thousand pieces a step, and a fast one waits for it. A record,
    which is a CUDA graph, is handed over in one go. It is for batches of one size; others, such as validation's last
    one, are passed as without it.

    What you change in the network after the start is not in the record, such as layers that are trained later on; nor
    may it be called twice before backward. Then leave this callback out of train.py.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        """`args`: the flags accumulate_grad_batches, batch_size, device, image_size, num_nodes and profiler."""
        has_hooks = args.profiler == "pytorch"  # it tells the time of each layer, and a record has none
        self.is_possible = args.device[0] != "cpu" and not adds_up(args) and not has_hooks
        self.shape = (args.batch_size, 3, args.image_size, args.image_size)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """While no loader is at work yet, whose threads would disturb the recording: see configure_optimizers."""
        if not self.is_possible:
            return
        network, plain = pl_module.network, pl_module.network.forward
        images = torch.zeros(self.shape, device=pl_module.device).to(memory_format=torch.channels_last)
        buffers = [buffer.clone() for buffer in network.buffers()]
        with trainer.precision_plugin.forward_context():
            if waits_for_results(network, images):
                trainer.print("this network cannot be recorded as a CUDA graph: the GPU gets its work piece by piece")
            else:
                self.record(network, images)
                recorded = network.forward
                # Cloned, because the next pass writes its results to the same memory.
                network.forward = lambda batch: recorded(batch).clone() if batch.shape == self.shape else plain(batch)
        for buffer, before in zip(network.buffers(), buffers, strict=True):
            buffer.copy_(before)  # such as BatchNorm's averages: these passes were only a trial

    def record(self, network: nn.Module, images: torch.Tensor) -> None:
        """Replace the network's forward by one that plays back, in training and in validation."""
        # They are recorded on another stream. In backward, torch lets the main one wait for it, and would warn of that.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        torch.cuda.make_graphed_callables(network, (images,), allow_unused_input=True)
        with as_in_validation(network):
            torch.cuda.make_graphed_callables(network, (images,))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget the record: it reads the weights where they lay in training."""
        vars(pl_module.network).pop("forward", None)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The same, because Lightning then tears nothing down."""
        self.teardown(trainer, pl_module, "fit")


def compile_network(network: nn.Module, args: argparse.Namespace) -> None:
    """Have the network translated when it is first used; in place, so that checkpoints are the same with and without.

    In the mode "reduce-overhead" torch.compile then records it, too.

    Args:
        args: the flags accumulate_grad_batches, device and num_nodes.
    """
    network.compile(mode="default" if adds_up(args) else "reduce-overhead")
    if rank_zero_only.rank == 0:
        print("--compile: the first step may take minutes, in which torch translates the network", flush=True)


class ValidateUncompiled(Callback):
    """Validation uses the network as it is: to translate that as well, and again for a last batch that is smaller,
    would take more minutes than it gains.
    """

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.compiler.set_stance("force_eager")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.compiler.set_stance("default")
