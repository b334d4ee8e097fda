from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # layers this small are computed sooner than a second thread wakes
os.environ["WANDB_BASE_URL"] = "http://127.0.0.1:9"  # nobody answers there


PHOTOGRAPHS = [f"{name}.{end}" for name in ("astronaut", "chelsea", "rocket") for end in ("png", "txt")]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--proofs", type=Path, help="write the table of parameters and the tests that prove them")
    parser.addoption("--draws", default="0:16", help="which settings tests/test_any_settings.py draws, first:end")
    parser.addoption("--write-work", action="store_true", help="write down how much a step computes now")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "proves(*keys): the test shows the effect of these parameters")
    if config.getoption("--proofs"):
        from tests.proofs import Proofs

        config.pluginmanager.register(Proofs(config.getoption("--proofs")), "proofs")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Where every check is to be made (.ci/run), a program that is missing is no excuse."""
    report: Any = yield
    if report.skipped and os.environ.get("LORAWRIGHT_CI") and "there is no " in str(report.longrepr):
        report.outcome = "failed"
    return report


def forget_accelerator() -> None:
    """Outside of tests one process trains once, and accelerate keeps its precision."""
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _a_test_does_not_see_the_accelerator_of_another() -> Iterator[None]:
    yield
    forget_accelerator()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random base model's file."""
    from tests import tiny

    return tiny.write(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture(scope="session")
def tiny_sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the tiny SD 2.x model, which predicts velocity."""
    from tests import tiny

    return tiny.write_sd2(tmp_path_factory.mktemp("model") / "tiny_sd2.safetensors")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SDXL model's file."""
    from tests import tiny

    return tiny.write_sdxl(tmp_path_factory.mktemp("model") / "tiny_sdxl.safetensors")


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three real photographs of different shapes, in kohya's layout, with captions. Read only."""
    from PIL import Image
    from skimage import data

    folder = tmp_path_factory.mktemp("photographs")
    inner = folder / "2_photo"
    inner.mkdir()
    for name, caption in (("astronaut", "a woman, space suit"), ("chelsea", "a cat"), ("rocket", "a rocket, night")):
        picture = Image.fromarray(getattr(data, name)())
        picture.thumbnail((160, 160))
        picture.save(inner / f"{name}.png")
        (inner / f"{name}.txt").write_text(caption)
    return folder


@pytest.fixture
def settings(tiny_model: Path, photographs: Path, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A preset that trains the tiny model on the photographs for six steps."""
    yield {
        "pretrained_model_name_or_path": str(tiny_model),
        "train_data_dir": str(photographs),
        "output_dir": str(tmp_path / "out"),
        "output_name": "photo",
        "caption_extension": ".txt",
        "max_resolution": "64,64",
        "bucket_reso_steps": 32,
        "mixed_precision": "no",
        "save_precision": "float",
        "optimizer": "AdamW",
        "learning_rate": 1e-2,
        "unet_lr": "",
        "text_encoder_lr": "",
        "lr_warmup": 0,
        "network_dim": 4,
        "network_alpha": 4,
        "seed": 7,
        "epoch": 1,
        "num_cpu_threads_per_process": 1,
    }
    assert sorted(path.name for path in (photographs / "2_photo").iterdir()) == PHOTOGRAPHS, "others read them, too"


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Any]:
    """Train with a preset in this process; returns (exit code, the run's events, its folder)."""
    from trainer import events
    from trainer.__main__ import main

    count = 0

    def run(preset: dict[str, Any], *arguments: str) -> tuple[int, list[dict[str, Any]], Path]:
        nonlocal count
        count += 1
        path = tmp_path / f"preset{count}.json"
        path.write_text(json.dumps(preset))
        folder = tmp_path / f"run{count}"
        code = main(["train", str(path), "--run", str(folder), *arguments])
        forget_accelerator()
        stream = [event for event, _ in events.read(folder / "events.jsonl")] if folder.exists() else []
        return code, stream, folder

    return run


@pytest.fixture
def ruin(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make what `batch_loss` gives for some of its calls, counted from 1, not a number."""

    from trainer import loop

    def of(calls: set[int], loss: Callable[[Any], Any] = lambda loss: loss * float("nan")) -> None:
        real, count = loop.batch_loss, [0]

        def batch_loss(s: Any, batch: Any) -> Any:
            count[0] += 1
            return loss(real(s, batch)) if count[0] in calls else real(s, batch)

        monkeypatch.setattr(loop, "batch_loss", batch_loss)

    return of


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB."""
    place = tmp_path / "small disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(place)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)
