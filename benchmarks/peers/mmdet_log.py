"""A hook for MMEngine that writes the segm mAP to peer.csv, after each epoch; mmdet_plain.py names it in its config."""

from pathlib import Path

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class PeerLog(Hook):
    """Writes epoch and segm_mAP, 0 where nothing is found: then MMDetection computes none."""

    def before_train(self, runner: Runner) -> None:
        self.file = Path(runner.work_dir) / "peer.csv"
        self.file.write_text("epoch,segm_mAP\n")

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        with self.file.open("a") as file:
            file.write(f"{runner.epoch},{metrics.get('coco/segm_mAP', 0.0)}\n")
