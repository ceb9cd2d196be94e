"""Which devices train together: one, several of one machine, or several machines.

Article, section 5:
https://hphuongdhsp.github.io/ml-blog/tensorflow/semanticsegmentation/deeplearning/2022/08/02/segmentation-model-part1.html
"""

import argparse
import atexit
import os
import shutil
import tempfile
from pathlib import Path

from keras2 import tf
from utils import choose_devices, stop


def create_strategy(args: argparse.Namespace) -> tf.distribute.Strategy:
    """One device, several of one machine, or several machines where TF_CONFIG names them.

    Sets args.device to the names of this machine's devices.
    """
    gpus = tf.config.list_physical_devices("GPU")
    args.device = choose_devices(args.device, [gpu.name for gpu in gpus])
    chosen = [gpus[int(name.removeprefix("gpu:"))] for name in args.device if name != "cpu"]
    tf.config.set_visible_devices(chosen, "GPU")
    for gpu in chosen:
        tf.config.experimental.set_memory_growth(gpu, True)  # else it takes all memory at once
    if "TF_CONFIG" in os.environ:
        return tf.distribute.MultiWorkerMirroredStrategy()
    if len(args.device) == 1:
        return tf.distribute.get_strategy()
    if chosen:
        return tf.distribute.MirroredStrategy()  # over all GPUs that are visible now
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * len(args.device))
    return tf.distribute.MirroredStrategy([f"cpu:{i}" for i in range(len(args.device))])


def throwaway_run(args: argparse.Namespace, run_dir: Path) -> Path:
    """A folder for a machine that is not the first one: it is gone when the run ends, and logs nowhere.

    `run_dir` is that of the first machine, which all have to see if they go on with its run.
    """
    if args.resume and not (run_dir / "config.json").exists():
        stop(f"--work_dir {args.work_dir}: --resume needs one that all machines see")
    args.log = "none"
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in ["weights", "logs"]:
        (folder / name).mkdir()
    return folder
