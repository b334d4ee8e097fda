"""`python -m trainer doctor`: whether this machine and this installation can train, and what to do where they cannot.

What can be tried is tried: a kernel of each library, a file in the runs folder, a short training of the embedded model.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar, Literal

import psutil

from trainer import events
from trainer.events import Event, EventLog, Failed
from trainer.run import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, Run
from trainer.tools import Report
from trainer.tools.commands import Reported

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "bitsandbytes", "safetensors", "gradio")
TRAINING = {
    "train_data_dir": "embedded:images",
    "caption_extension": ".txt",
    "output_name": "doctor",
    "max_resolution": "64,64",
    "max_train_steps": 20,
    "optimizer": "AdamW",
    "mixed_precision": "no",
    "network_dim": 4,
    "seed": 1,
}
ENOUGH_DISK_GB, ENOUGH_MEMORY_GB = 10, 8
LONGEST_TRAINING_S = 600


@dataclass(frozen=True)
class Finding(Event):
    type: ClassVar[str] = "finding"
    what: str
    state: Literal["ok", "note", "wrong"]
    """A note is nothing that stops a training."""
    text: str
    advice: str = ""


def report(runs: Path, told: Path | None = None) -> int:
    """Look at everything, and print each finding at once; to the file `told` they go as events.

    Returns the exit code: 0; 1 where something is wrong; 3 where it was stopped.
    """
    stream = EventLog(told) if told else None
    wrong = 0
    try:
        for look in LOOKS:
            for finding in _tried(look, runs):
                wrong += finding.state == "wrong"
                print(f"{finding.state:6}{finding.what:16}{finding.text}", flush=True)
                if finding.advice:
                    print(f"{'':22}→ {finding.advice}", flush=True)
                if stream:
                    stream.emit(finding)
    except KeyboardInterrupt:
        if stream:
            stream.emit(Failed("stopped", "Stopped."))
        return EXIT_STOPPED
    summary = "All is well." if not wrong else f"{wrong} {'thing is' if wrong == 1 else 'things are'} wrong."
    print(summary)
    if stream:
        stream.emit(Reported(asdict(Report([summary]))))
    return EXIT_FAILED if wrong else EXIT_DONE


def _tried(look: Callable[[Path], Iterator[Finding]], runs: Path) -> Iterator[Finding]:
    """A look's findings; a library may raise anything where it is broken, and that is a finding, too."""
    name = look.__name__.strip("_")
    try:
        yield from look(runs)
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        again = f"Install it again: pip install --force-reinstall -c constraints.txt {name}"
        advice = again if name in (*PACKAGES, "xformers") else "Install the program again in a new environment."
        yield Finding(name, "wrong", f"{type(error).__name__}: {line}", advice)


def _versions(_: Path) -> Iterator[Finding]:
    yield Finding("Python", "ok", f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        try:
            yield Finding(package, "ok", metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Finding(package, "wrong", "is not installed", "pip install -c constraints.txt -e .")


def _gpu(_: Path) -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        square = torch.ones(64, 64, device="cuda")
        right = bool(((square @ square) == 64).all())
        text = f"{card.name}, {card.total_memory / 2**30:.0f} GB, CUDA {torch.version.cuda}"
        yield Finding(
            "GPU", "ok" if right else "wrong", text, "" if right else "It computes wrongly: renew its driver."
        )
    elif shutil.which("nvidia-smi"):
        advice = "Install PyTorch's CUDA build, or a driver that is as new as it needs."
        yield Finding(
            "GPU", "wrong", f"NVIDIA's driver is here, but PyTorch {torch.__version__} does not reach it", advice
        )
    else:
        advice = "The embedded model trains in minutes without one; a full-size one takes seconds to minutes a step."
        yield Finding("GPU", "note", "none; the processor trains", advice)


def _bitsandbytes(_: Path) -> Iterator[Finding]:
    import torch
    from bitsandbytes.optim import AdamW8bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.nn.Parameter(torch.ones(128, 128, device=device))
    optimizer = AdamW8bit([weight], lr=0.1)
    weight.square().sum().backward()
    optimizer.step()
    # The first step of Adam is the rate, whatever the gradient; weight decay takes a thousandth more.
    right = bool(((weight - 0.9).abs() < 0.02).all())
    text = f"a step of AdamW8bit on the {device} {'is right' if right else 'is wrong'}"
    advice = "" if right else "Choose an optimizer without 8bit in its name, or install bitsandbytes again."
    yield Finding("bitsandbytes", "ok" if right else "wrong", text, advice)


def _xformers(_: Path) -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding("xformers", "note", "not used without a GPU, where PyTorch's own attention takes its place")
        return
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError:
        yield Finding("xformers", "note", "not installed; PyTorch's own attention is used, which is as fast")
        return
    query = torch.randn(1, 64, 8, 64, device="cuda", dtype=torch.float16)
    known = torch.nn.functional.scaled_dot_product_attention(*[query.transpose(1, 2)] * 3).transpose(1, 2)
    right = torch.allclose(memory_efficient_attention(query, query, query), known, atol=1e-2)
    advice = "" if right else "Set CrossAttention to sdpa."
    yield Finding(
        "xformers", "ok" if right else "wrong", f"its attention {'agrees' if right else 'does not agree'}", advice
    )


def _room(runs: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(next(place for place in (runs, *runs.parents) if place.is_dir())).free / 2**30
    enough = free >= ENOUGH_DISK_GB
    advice = "" if enough else f"Make room: a LoRA is small, but states and caches need {ENOUGH_DISK_GB} GB or more."
    yield Finding("disk", "ok" if enough else "note", f"{free:.0f} GB free in {runs}", advice)
    memory = psutil.virtual_memory()
    enough = memory.available / 2**30 >= ENOUGH_MEMORY_GB
    advice = "" if enough else "SD 1.5 needs about 4 GB to load, SDXL 8. Close other programs."
    text = f"{memory.available / 2**30:.0f} of {memory.total / 2**30:.0f} GB free"
    yield Finding("memory", "ok" if enough else "note", text, advice)


def _writing(runs: Path) -> Iterator[Finding]:
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=runs, prefix=".doctor-") as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        advice = "Start from a folder of your own, or give app.py another one with --runs."
        yield Finding("runs folder", "wrong", f"cannot be written to: {error}", advice)
    else:
        yield Finding("runs folder", "ok", f"{runs} can be written to")


def _training(_: Path) -> Iterator[Finding]:
    with tempfile.TemporaryDirectory() as folder:
        run, preset = Run(Path(folder) / "run"), Path(folder) / "preset.json"
        preset.write_text(json.dumps(TRAINING | {"output_dir": str(Path(folder) / "out")}))
        command = [sys.executable, "-m", "trainer", "train", str(preset), "--run", str(run.folder)]
        try:
            done = subprocess.run(  # noqa: S603
                command,
                cwd=Path(__file__).parent.parent,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=LONGEST_TRAINING_S,
            )
        except subprocess.TimeoutExpired:
            yield Finding("training", "wrong", f"not done after {LONGEST_TRAINING_S} s", "Is the machine busy?")
            return
        told = [event for event, _ in events.read(run.events)] if run.events.exists() else []
        steps = sum(event["type"] == "step" for event in told)
        if done.returncode == EXIT_DONE and steps == TRAINING["max_train_steps"]:
            # So few steps show that training runs; what the loss does in them says nothing.
            yield Finding("training", "ok", f"{steps} steps of the embedded model ran, and the LoRA was saved")
            return
        failed = next((event for event in told if event["type"] == "failed"), {})
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        yield Finding("training", "wrong", str(failed.get("message", said[-1])), str(failed.get("hint", "")))


LOOKS = (_versions, _gpu, _bitsandbytes, _xformers, _room, _writing, _training)
