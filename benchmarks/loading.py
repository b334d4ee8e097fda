"""How much memory it takes to load a base model, as a multiple of its weights, and how long.

    python benchmarks/loading.py MODEL [MODEL ...] [--precision bf16]

A model is a file or a diffusers folder; each is loaded in a process of its own. The peak is the most that the
process ever held, less what it held before (Python and PyTorch).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "float": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.here:
        print(json.dumps(measured(chosen.models[0], PRECISIONS[chosen.precision])))
        return
    print(f"{'model':40}{'weights, GB':>12}{'peak, GB':>10}{'ratio':>8}{'seconds':>9}")
    for model in chosen.models:
        command = [sys.executable, __file__, "--here", "--precision", chosen.precision, str(model.resolve())]
        answer = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True)
        weights, peak, seconds = json.loads(answer.stdout.splitlines()[-1])
        print(f"{model.name:40}{weights:12.2f}{peak:10.2f}{peak / weights:8.2f}{seconds:9.1f}", flush=True)


def measured(model: Path, dtype: torch.dtype) -> tuple[float, float, float]:
    """GB of the weights, GB of the peak above what was held before, seconds."""
    sys.path.insert(0, str(ROOT))
    from trainer import models
    from trainer.models import sd, sdxl  # noqa: F401  imported before the clock starts

    before, began = held("VmRSS"), time.perf_counter()
    loaded = models.load(str(model), "", dtype, torch.device("cpu"), 1, 75)
    seconds = time.perf_counter() - began
    modules = (loaded.unet, loaded.vae, *loaded.text_encoders.values())
    weights = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    return weights / 2**30, held("VmHWM") - before, seconds


def held(key: str) -> float:
    """A line of Linux' account of this process, in GB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 2**20


if __name__ == "__main__":
    main()
