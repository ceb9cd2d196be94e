"""A hook for MMEngine that adds the seconds of each epoch to its JSON log; mmdet_plain.py names it in its config.

MMEngine's own log has the mean time of an iteration, and nothing of how long computing the metrics takes.
"""

import time
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class EpochSeconds(Hook):
    """Logs train_seconds, and epoch_seconds, which is that and validation, without saving in between."""

    def before_train_epoch(self, runner: Runner) -> None:
        self.began = time.perf_counter()

    def after_train_epoch(self, runner: Runner) -> None:
        self.train_seconds = time.perf_counter() - self.began

    def before_val_epoch(self, runner: Runner) -> None:
        self.began = time.perf_counter()

    def after_val_epoch(self, runner: Runner, metrics: Any = None) -> None:
        epoch_seconds = self.train_seconds + time.perf_counter() - self.began
        seconds = {"train_seconds": self.train_seconds, "epoch_seconds": epoch_seconds}
        runner.visualizer.add_scalars(seconds, step=runner.epoch)
