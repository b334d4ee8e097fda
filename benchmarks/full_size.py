"""How long a full-size SD 1.5 takes here, from the start to the first step and in each step.

    python benchmarks/full_size.py [--precision bf16] [--side 256] [--steps 10] [--rounds 1]
        [--sd-scripts FOLDER --python ENVIRONMENT/bin/python --tokenizers FOLDER]

Makes a base model of SD 1.5's full size with random weights and takes eight photographs from
scikit-image (both kept in --work for the next time), then trains rank 8 on U-Net and text encoder
with batch size 1 in processes of their own. With --sd-scripts the same is done by kohya's
train_network.py, in turn with ours, and the ratios are printed. Needs 24 GB of memory.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PHOTOGRAPHS = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "retina",
    "immunohistochemistry",
    "hubble_deep_field",
    "camera",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("benchmark-work"))
    parser.add_argument("--precision", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sd-scripts", type=Path)
    parser.add_argument("--python", type=Path)
    parser.add_argument("--tokenizers", type=Path, help="sd-scripts' --tokenizer_cache_dir")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    model, images = make_model(chosen.work / "sd15-random.safetensors"), make_images(chosen.work / "images")
    found: dict[str, list[dict[str, float]]] = {"lorawright": [], "sd-scripts": []}
    for _ in range(chosen.rounds):
        found["lorawright"].append(ours(model, images, chosen))
        if chosen.sd_scripts:
            found["sd-scripts"].append(theirs(model, images, chosen))
    show(found)


def make_model(path: Path, family: str = "sd1") -> Path:
    """A base model of full size with random weights, fp16, in the original layout."""
    if not path.exists():
        import torch

        from trainer.models import facts, layout, sd
        from trainer.tools.stream import write

        row = facts.FAMILIES[family]
        states = {name: module.state_dict() for name, module in sd.empty(row, row.configs).items()}
        shapes = {name: tuple(t.shape) for name, t in layout.to_original(states, row.configs, row).items()}
        # Its length is a prime, so that no two rows of a weight are alike.
        noise = torch.randn(4_194_301, generator=torch.Generator().manual_seed(0)).half()

        def make(name: str) -> torch.Tensor:
            shape = shapes[name]
            if len(shape) < 2:
                return torch.full(shape, float(name.endswith("weight")), dtype=torch.float16)
            count, spread = math.prod(shape), math.prod(shape[1:]) ** -0.5
            return (noise * spread).repeat(count // len(noise) + 1)[:count].view(shape)

        write(path, {name: (torch.float16, shape) for name, shape in shapes.items()}, make, {})
    return path.resolve()


def make_images(folder: Path) -> Path:
    """Eight photographs, each seen twice an epoch."""
    inner = folder / "2_photo"
    if not inner.exists():
        from PIL import Image
        from skimage import data

        inner.mkdir(parents=True)
        for name in PHOTOGRAPHS:
            Image.fromarray(getattr(data, name)()).convert("RGB").save(inner / f"{name}.png")
            (inner / f"{name}.txt").write_text(f"a photograph, {name.replace('_', ' ')}")
    return folder.resolve()


def ours(model: Path, images: Path, chosen: argparse.Namespace) -> dict[str, float]:
    run = chosen.work / f"run-{time.time_ns()}"
    settings = our_settings(model, images, chosen.side, chosen.precision) | {"max_train_steps": chosen.steps}
    began = time.time()
    memory, ended = train(settings, run)
    whole = time.time() - began
    return summary(began, [float(str(step["time"])) for step in ended if step["type"] == "step"], whole, memory)


def our_settings(model: Path, images: Path, side: int, precision: str) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": str(model),
        "train_data_dir": str(images),
        "caption_extension": ".txt",
        "max_resolution": f"{side},{side}",
        "bucket_no_upscale": False,
        "min_bucket_reso": side // 2,
        "max_bucket_reso": side * 2,
        "mixed_precision": precision,
        "optimizer": "AdamW",
        "lr_scheduler": "constant",
        "seed": 42,
        "num_cpu_threads_per_process": os.cpu_count(),
    }


def train(settings: dict[str, Any], run: Path) -> tuple[float, list[dict[str, Any]]]:
    """Train with our trainer, in a process of its own. Returns its peak memory in GB and the run's events."""
    from trainer import events

    preset = run.parent / "preset.json"
    preset.write_text("{}")
    command = [sys.executable, "-m", "trainer", "train", str(preset), "--run", str(run)]
    command += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    memory = run_alone(command, ROOT)
    return memory, [event for event, _ in events.read(run / "events.jsonl")]


def theirs(model: Path, images: Path, chosen: argparse.Namespace) -> dict[str, float]:
    output = (chosen.work / "sd-scripts").resolve()
    words = their_settings(model, images, output, chosen.side, chosen.precision, chosen.steps, chosen.tokenizers)
    command = [str(chosen.python), "-u", "train_network.py", *words, "--network_dim=8", "--optimizer_type=AdamW"]
    log = chosen.work / "sd-scripts.log"
    began = time.time()
    memory = run_alone(command, chosen.sd_scripts, log)
    whole = time.time() - began
    # Its progress bar tells the elapsed time of each step in whole seconds; the mean is exact enough.
    text = log.read_text(errors="replace")
    paces = re.findall(rf"steps:\s+\d+%\|[^|]*\|\s*(\d+)/{chosen.steps} \[.*?,\s*([\d.]+)(s/it|it/s)", text)
    means = {int(n): float(v) if unit == "s/it" else 1 / float(v) for n, v, unit in paces if int(n) > 0}
    last = max(means)
    training = means[last] * last
    return {"mean_step_s": means[last], "rest_s": whole - training, "whole_s": whole, "memory_gb": memory}


def their_settings(
    model: Path, images: Path, output: Path, side: int, precision: str, steps: int, tokenizers: Path | None
) -> list[str]:
    output.mkdir(exist_ok=True)
    words = [
        *(
            "--network_module=networks.lora",
            f"--pretrained_model_name_or_path={model}",
            f"--train_data_dir={images}",
            "--caption_extension=.txt",
        ),
        *(f"--resolution={side},{side}", "--enable_bucket", f"--min_bucket_reso={side // 2}"),
        *(f"--max_bucket_reso={side * 2}", "--network_alpha=1", "--seed=42", "--cache_latents"),
        *("--learning_rate=1e-4", "--unet_lr=1e-4", "--text_encoder_lr=5e-5", "--sdpa"),
        *("--max_data_loader_n_workers=0", f"--max_train_steps={steps}", f"--output_dir={output}"),
        *(f"--mixed_precision={precision}", "--save_precision=fp16", "--output_name=theirs"),
    ]
    return words + ([f"--tokenizer_cache_dir={tokenizers}"] if tokenizers else [])


def run_alone(command: list[str], folder: Path, log: Path | None = None) -> float:
    """Run a command to its end; its output goes to `log`. Returns the peak memory in GB."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(os.cpu_count())}
    with open(log or os.devnull, "wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)}" + (f"\nsee {log}" if log else ""))
    return usage.ru_maxrss / 2**20


def summary(began: float, ends: list[float], whole: float, memory: float) -> dict[str, float]:
    steps = [b - a for a, b in pairwise(ends)]
    median = statistics.median(steps[1:])
    mean = statistics.mean(steps)
    return {
        "first_step_after_s": ends[0] - began,
        "median_step_s": median,
        "mean_step_s": mean,
        "rest_s": whole - mean * len(ends),
        "whole_s": whole,
        "memory_gb": memory,
    }


def show(found: dict[str, list[dict[str, float]]]) -> None:
    print(f"{'':12}" + "".join(f"{name:>20}" for name in next(iter(found.values()))[0]))
    for name, rounds in found.items():
        for values in rounds:
            print(f"{name:12}" + "".join(f"{values.get(key, float('nan')):20.2f}" for key in found["lorawright"][0]))
    if found["sd-scripts"]:
        ours_, theirs_ = (
            {k: statistics.mean(r[k] for r in rounds) for k in ("mean_step_s", "rest_s", "whole_s", "memory_gb")}
            for rounds in found.values()
        )
        print("ratio       " + "  ".join(f"{key} {ours_[key] / theirs_[key]:.2f}" for key in ours_))


if __name__ == "__main__":
    main()
