"""What the measurements share: the machine and the versions they belong to, and how figures are written."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import numpy as np


def multiplies_bf16() -> bool:
    """Whether this CPU can multiply bfloat16; others imitate it, which is far slower than float32."""
    return bool({"amx_bf16", "avx512_bf16"} & set(Path("/proc/cpuinfo").read_text().split()))


def describe_machine(*packages: str) -> str:
    """Such as "2 cores of an AMD EPYC (AVX2), no GPU; Python 3.11.7, tensorflow 2.21.0"."""
    about = Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*:\s*(.*)", about)
    flags = set(about.split())
    fastest = next((flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags), "no AVX")
    cpu = f"{len(os.sched_getaffinity(0))} cores of {name[1] if name else platform.machine()} ({fastest})"
    gpu = "" if Path("/proc/driver/nvidia").exists() else ", no GPU"
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return f"{cpu}{gpu}; Python {platform.python_version()}, {', '.join(versions)}"


def spread(values: np.ndarray, form: str) -> str:
    """Median and range, such as "4.9 (4.6 to 6.2)"."""
    return f"{np.median(values):{form}} ({np.min(values):{form}} to {np.max(values):{form}})"
