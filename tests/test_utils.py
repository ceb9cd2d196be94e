"""The flags: every documented value is taken as meant, every other one is refused by name, with exit code 2."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from conftest import PARTS, ROOT


@pytest.fixture(scope="module")
def utils() -> ModuleType:
    file = ROOT / PARTS[0] / "utils.py"  # the same in all parts, see test_copies.py
    spec = importlib.util.spec_from_file_location("utils_of_the_parts", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--batch_size", "0"),
        ("--batch_size", "-4"),
        ("--batch_size", "16.5"),
        ("--epochs", "ten"),
        ("--epochs", ""),
        ("--learning_rate", "0"),
        ("--learning_rate", "nan"),
        ("--learning_rate", "inf"),
        ("--learning_rate", "1e-3x"),
        ("--mixed_precision", "yes"),
        ("--mixed_precision", "fp8"),
        ("--image_size", "100"),
        ("--image_size", "0"),
        ("--workers", "-1"),
        ("--seed", "-1"),
        ("--seed", "²"),
        ("--log", "mlflow"),
        ("--device", "gpu"),
        ("--device", "-1"),
        ("--early_stopping", "0"),
        ("--limit_batches", "0"),
        ("--data_root", "/no/such/folder"),
        ("--batchsize", "4"),
    ],
)
def test_wrong_values_are_refused_by_name(
    utils: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        utils.train_parser("", "resnet18").parse_args(["--data_root", str(tmp_path), flag, value])
    assert stopped.value.code == 2
    assert flag in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "on_gpu", "meant"),
    [
        ("True", True, "fp16"),
        ("True", False, "bf16"),
        ("true", False, "bf16"),
        ("False", True, "fp32"),
        ("False", False, "fp32"),
        ("fp16", True, "fp16"),
        ("fp16", False, "fp16"),
        ("bf16", True, "bf16"),
        (None, True, "fp16"),
        (None, False, "fp32"),
    ],
)
def test_mixed_precision_means_what_it_says(
    utils: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str | None, on_gpu: bool, meant: str
) -> None:
    flags = ["--mixed_precision", value] if value else []
    args = utils.train_parser("", "resnet18").parse_args(["--data_root", str(tmp_path), *flags])
    assert utils.choose_precision(args.mixed_precision, on_gpu) == meant
    slow = not on_gpu and (meant == "fp16" or (meant == "bf16" and not utils.cpu_has_bf16()))
    assert capsys.readouterr().out.startswith("warning: ") == slow


def test_devices(utils: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert utils.choose_devices(None, []) == ["cpu"]
    assert utils.choose_devices(None, ["A100", "A100"]) == ["gpu:0"]
    assert utils.choose_devices(["0", "1"], ["A100", "A100"]) == ["gpu:0", "gpu:1"]
    assert utils.choose_devices(["cpu", "cpu"], []) == ["cpu", "cpu"]
    for wrong, gpus in [(["1"], ["A100"]), (["0"], []), (["0", "0"], ["A100"]), (["cpu", "0"], ["A100"])]:
        with pytest.raises(SystemExit) as stopped:
            utils.choose_devices(wrong, gpus)
        assert stopped.value.code == 2
    assert "0 (A100)" in capsys.readouterr().err  # the GPUs that are there


def test_short_forms_and_defaults(utils: ModuleType, tmp_path: Path) -> None:
    args = utils.train_parser("", "resnet18").parse_args(["--data_root", str(tmp_path), "-b", "4", "-e", "2"])
    assert (args.batch_size, args.epochs) == (4, 2)
    defaults = utils.train_parser("", "resnet18").parse_args(["--data_root", str(tmp_path)])
    expected = {"batch_size": 16, "epochs": 100, "learning_rate": 1e-3, "image_size": 384, "seed": 42, "log": "none"}
    assert {name: getattr(defaults, name) for name in expected} == expected
    assert not defaults.resume and defaults.early_stopping is None and str(defaults.work_dir) == "work_dir"


def test_resume_command_can_be_pasted(utils: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--data_root", "my nails", "--resume"])
    assert utils.resume_command().endswith("train.py --data_root 'my nails' --resume")
