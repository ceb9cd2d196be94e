"""torch.compile, the flag --compile: translates the network once; training is then faster, above all on a GPU."""

import argparse
import shutil

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


def compile_network(network: nn.Module, args: argparse.Namespace) -> None:
    """Have the network translated when it is first used; in place, so that checkpoints are the same with and without.

    Python hands a GPU its work piece by piece, and a fast one waits for it. In the mode "reduce-overhead" torch.compile
    records the pieces of a pass, and from then on hands over all of them at once, as a CUDA graph. A graph has the same
    memory each time, also for the gradients: where they are added up, over batches or devices, there is none.

    Args:
        args: the flags accumulate_grad_batches, device and num_nodes.
    """
    adds_up = args.accumulate_grad_batches > 1 or len(args.device) * args.num_nodes > 1
    network.compile(mode="default" if adds_up else "reduce-overhead")
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
