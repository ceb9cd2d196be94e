"""Parts are copied, not imported: shared files are byte-identical, and every package a part needs is its own.

Run as a script, as `make copies` does, it repairs what has drifted.
"""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = sorted(path.name for path in ROOT.glob("part[1-7]_*"))
# In all parts that have them these files are the same to the byte.
SHARED = [
    "utils.py",
    "data_summary.py",
    "image_files.py",
    "pairs.py",
    "prepared.py",
    "quick_imports.py",
    "runs.py",
    "keras2.py",
    "strategy.py",
    "checkpoints.py",
    "export.py",
    "folds.py",
    "inference.py",
    "losses.py",
    "memory.py",
]
# These are the same in the parts with these numbers, whose lesson is about something else.
SHARED_AMONG = {
    "callbacks.py": "3456",
    "compiling.py": "3456",
    "data_preparation.py": "123456",
    "dataloader.py": "36",
    "errors.py": "12",
    "loading.py": "12",
    "model.py": "345",
    "predict.py": "3456",
    "shared_memory.py": "3456",
    "transform.py": "356",
}
# Installed under one name, imported under another.
IMPORTED_AS = {
    "mmcv-lite": "mmcv",
    "nvidia-dali-cuda130": "nvidia",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "tf-keras": "tf_keras",
}
# What is not imported by every part that needs it, but by its framework: loggers, the progress bar, the ONNX exporter.
NOT_IMPORTED = {"tensorboard", "wandb", "rich", "onnxscript"}


def originals() -> list[tuple[Path, list[Path]]]:
    """Each shared file of the earliest part that has it, and its copies in the others."""
    found = [[ROOT / part / name for part in PARTS if (ROOT / part / name).exists()] for name in SHARED]
    found += [[ROOT / part / name for part in PARTS if part[4] in parts] for name, parts in SHARED_AMONG.items()]
    return [(files[0], files[1:]) for files in found if files]


def packages(requirements_in: Path) -> set[str]:
    """The names in a requirements.in, without extras, comments and other files."""
    lines = [line.split("#")[0].strip() for line in requirements_in.read_text().splitlines()]
    return {re.split(r"[\[=<>]", line)[0] for line in lines if line and not line.startswith("-r")}


def locked(requirements_txt: Path) -> set[str]:
    return {line for line in requirements_txt.read_text().splitlines() if "==" in line}


def test_shared_files_are_the_same() -> None:
    for original, copies in originals():
        for copy in copies:
            assert copy.read_bytes() == original.read_bytes(), f"{copy} differs from {original}: run make copies"


@pytest.mark.parametrize("part", PARTS)
def test_a_part_imports_what_it_requires_and_nothing_else(part: str) -> None:
    files = list((ROOT / part).glob("*.py"))
    imported = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    own = {file.stem for file in files}
    foreign = imported - own - set(sys.stdlib_module_names)
    required = packages(ROOT / part / "requirements.in")
    importable = {IMPORTED_AS.get(name, name.replace("-", "_")) for name in required}
    assert foreign <= importable
    assert importable - foreign <= NOT_IMPORTED


@pytest.mark.parametrize("folder", [*PARTS, "tests"])
def test_one_lock(folder: str) -> None:
    assert locked(ROOT / folder / "requirements.txt") <= locked(ROOT / "requirements.txt")
    assert f"-r {folder}/requirements.in" in (ROOT / "requirements.in").read_text().splitlines()


def test_one_opencv_and_no_agpl() -> None:
    names = {line.split("==")[0].strip() for line in locked(ROOT / "requirements.txt")}
    assert {name for name in names if "opencv" in name} == {"opencv-python-headless"}
    assert "albumentationsx" not in names


@pytest.mark.parametrize(("venv", "module"), [(".venv-tf", "torch"), (".venv-pt", "tensorflow")])
def test_tensorflow_and_torch_do_not_meet(venv: str, module: str) -> None:
    python = ROOT / venv / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no part needs {venv} yet")
    find = f"import importlib.util; print(importlib.util.find_spec({module!r}))"
    found = subprocess.run([python, "-c", find], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "None"


@pytest.mark.parametrize("part", PARTS)
def test_files_are_read_in_one_sitting(part: str) -> None:
    for file in (ROOT / part).glob("*.py"):
        lines = len(file.read_text().splitlines())
        assert lines <= (200 if file.name == "train.py" else 300), f"{file} has {lines} lines"


@pytest.mark.parametrize("part", PARTS)
def test_garbage_is_looked_for_again_after_the_imports(part: str) -> None:
    for file in (ROOT / part).glob("*.py"):
        _, *body = ast.parse(file.read_text()).body  # without the docstring
        lines = [ast.unparse(node) for node in body]
        if "import quick_imports" in lines:
            is_import = [isinstance(node, ast.Import | ast.ImportFrom) for node in body]
            after_imports = is_import.index(False)
            assert lines[0] == "import quick_imports" and lines[after_imports] == "quick_imports.end()", file
            assert not any(is_import[after_imports:]), file
        else:
            assert file.name not in ("train.py", "predict.py", "export.py")


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("part1_tensorflow", "part2_balanced_data"),
        ("part1_tensorflow", "part3_lightning"),
        ("part3_lightning", "part4_kornia"),
        ("part3_lightning", "part5_dali"),
        ("part3_lightning", "part6_segformer"),
        ("part3_lightning", "part7_mmdetection"),
    ],
)
def test_a_readme_tells_the_length_of_the_diff(earlier: str, later: str) -> None:
    diff = ["diff", "-r", "-x", "README.md", "-x", "imgs", "-x", "work_dir", "-x", "*cache*", earlier, later]
    lines = subprocess.run(diff, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    text = (ROOT / later / "README.md").read_text()
    assert f"../{earlier} .   # {len(lines)} lines" in text


if __name__ == "__main__":
    for original, copies in originals():
        for copy in copies:
            if not copy.exists() or copy.read_bytes() != original.read_bytes():
                shutil.copyfile(original, copy)
                print(f"copied {original.relative_to(ROOT)} to {copy.relative_to(ROOT)}")
