"""What the measurements share: their data, their subprocesses, the machine they belong to, and where figures go.

Each benchmark ends with `save`: it writes NAME.json, draws imgs/NAME.png, and puts the table between the marks of NAME
in README.md and in those READMEs of the parts that have such marks. So no figure there is copied by hand.
"""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from turns import InTurns

HERE = Path(__file__).parent
ROOT = HERE.parent
CORES = len(os.sched_getaffinity(0))
ON_GPU = Path("/proc/driver/nvidia").exists()
TF_PARTS = ["part1_tensorflow", "part2_balanced_data"]
SMALL_MASK_RCNN = ROOT / "part7_mmdetection" / "configs" / "nail_mask_rcnn_small.py"


def multiplies_bf16() -> bool:
    """Whether this CPU can multiply bfloat16; others imitate it, which is far slower than float32."""
    return bool({"amx_bf16", "avx512_bf16"} & set(Path("/proc/cpuinfo").read_text().split()))


def describe_machine(*packages: str) -> str:
    """Such as "2 cores of AMD EPYC (avx2), no GPU; Python 3.11.7, tensorflow 2.21.0"."""
    about = Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*:\s*(.*)", about)
    flags = set(about.split())
    fastest = next((flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags), "no AVX")
    cpu = f"{CORES} cores of {name[1] if name else platform.machine()} ({fastest})"
    versions = [f"{name} {version_of(name)}" for name in packages]
    gpu = ask_gpu("name") if ON_GPU else "no GPU"
    return f"{cpu}, {gpu}; Python {platform.python_version()}, {', '.join(versions)}"


def version_of(package: str) -> str:
    """What is installed of a package: in this environment, or in the one that has it."""
    folders = [*sys.path, *map(str, ROOT.glob(".venv-*/lib/python*/site-packages"))]
    return next(found.version for found in importlib.metadata.distributions(name=package, path=folders))


def last_commit() -> str:
    """What was measured, such as "9ce3c57"; with a + if a script was changed since, "unknown" without git."""
    try:
        git = ["git", "-C", str(ROOT)]
        commit = subprocess.run([*git, "log", "-1", "--format=%h"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "status", "--porcelain", "--", "*.py"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + ("+" if changed else "")


def ask_gpu(what: str) -> str:
    """What the driver says of the first GPU, such as its name, or memory.used in MB."""
    asked = ["nvidia-smi", "--id=0", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def spread(values: Sequence[float] | np.ndarray, form: str) -> str:
    """Median and range, such as "4.9 (4.6 to 6.2)"; a single value has no range."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{np.median(values):{form}} ({np.min(values):{form}} to {np.max(values):{form}})"


# --- data and processes --------------------------------------------------------------------------


def python_of(part: str) -> Path:
    """The interpreter of a part's environment."""
    return ROOT / (".venv-tf" if part in TF_PARTS else ".venv-pt") / "bin" / "python"


def draw_data(part: str, images: int = 240) -> Path:
    """A data_root with drawn photographs, prepared for this part; made when it is first asked for."""
    # Parts 1 to 6 prepare alike, but for the arrays that part 5 can read in the place of PNG files.
    preparing, flags = (part, []) if part == "part7_mmdetection" else ("part5_dali", ["--npy"])
    data_root, drawn = (ROOT / "data" / "bench" / f"{name}_{images}" for name in (preparing, "drawn"))
    draw, prepare = ROOT / "sample_data.py", ROOT / preparing / "data_preparation.py"
    for made, command in [
        (drawn / "sample_data.json", [draw, "--data_root", drawn, "--images", images]),
        (data_root / "csv_file", [prepare, "--raw", drawn, "--data_root", data_root, *flags]),
    ]:
        if not made.exists():
            making = InTurns([python_of(preparing), *command], stdout=subprocess.DEVNULL)
            if making.process.wait():
                raise making.ended()
            making.end()
    return data_root


# --- where figures go ----------------------------------------------------------------------------


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(str, cells))} |\n" for cells in lines)


def save(
    name: str,
    machine: str,
    regime: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    bars: dict[str, Any],
    unit: str,
    figures: Any,
) -> None:
    """Write NAME.json and imgs/NAME.png, and put the table into README.md.

    Args:
        machine: what `describe_machine` says.
        regime: size, batch, network, precision: what the figures hold for.
        rows: of the table, as it is printed.
        bars: for the chart: what was measured, and its values.
        unit: of `bars`.
        figures: everything that was measured, for the JSON.
    """
    about = {"date": str(date.today()), "commit": last_commit(), "machine": machine, "regime": regime}
    about |= {"columns": columns, "rows": rows, "unit": unit, "figures": figures}
    (HERE / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")
    draw_bars(HERE / "imgs" / f"{name}.png", bars, unit)
    write_tables(name)


def write_tables(name: str) -> None:
    """Put the table of NAME.json, and what it holds for, between the marks of NAME in all READMEs that have them.

    That of a part gets its own rows, if the first column says which part a row is of; else it gets all.

    Raises:
        SystemExit: benchmarks/README.md has no such marks.
    """
    about = json.loads((HERE / f"{name}.json").read_text())
    columns, rows = about["columns"], about["rows"]
    regime = f"{about['machine']}; {about['date']}. {about['regime']}\n\n"
    picture = f"\n![{about['unit']}](imgs/{name}.png)\n"
    if not replace_between_marks(HERE / "README.md", name, regime + format_table(columns, rows) + picture):
        raise SystemExit(f"benchmarks/README.md has no marks of {name}, between which its table goes")
    for readme in sorted(ROOT.glob("part*/README.md")):
        if columns[0] == "part":
            its = [row[1:] for row in rows if row[0] == readme.parent.name]
            replace_between_marks(readme, name, regime + format_table(columns[1:], its) + "\n")
        else:
            replace_between_marks(readme, name, regime + format_table(columns, rows) + "\n")


def replace_between_marks(file: Path, name: str, text: str) -> bool:
    """Put `text` between "<!-- NAME: … -->" and "<!-- end of NAME -->"; tell whether the file has these marks."""
    begin, end = re.escape(f"<!-- {name}: "), re.escape(f"<!-- end of {name} -->")
    marks = re.compile(rf"({begin}[^\n]*\n).*?({end})", re.DOTALL)
    replaced, number = marks.subn(lambda found: found[1] + text + found[2], file.read_text())
    if number:
        file.write_text(replaced)
    return number > 0


def draw_bars(file: Path, bars: dict[str, Any], unit: str) -> None:
    """Horizontal bars as long as the medians, with lines from the least to the most."""
    file.parent.mkdir(exist_ok=True)
    names = list(bars)[::-1]
    values = [np.atleast_1d(bars[name]) for name in names]
    medians = np.array([np.median(one) for one in values])
    reach = [medians - [one.min() for one in values], [one.max() for one in values] - medians]
    figure, axes = plt.subplots(figsize=(9, 0.6 + 0.32 * len(names)), layout="constrained")
    axes.barh([name.replace("`", "") for name in names], medians, xerr=reach, color="#6aa5c8", ecolor="#444444")
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=100)
    plt.close(figure)
