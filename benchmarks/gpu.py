"""Steps a second and peak memory on a GPU, here and in kohya's sd-scripts, in turn on the same card.

    python benchmarks/gpu.py [--sd-scripts FOLDER --python ENVIRONMENT/bin/python --tokenizers FOLDER] [--work FOLDER]
    python benchmarks/gpu.py --device cpu --small      # tries the script itself out where there is no GPU

SD 1.5 at 512×512 with batches of 1 and 8, SDXL at 1024×1024 with 1 and 4, each with AdamW and AdamW8bit: rank 16 on
U-Net and text encoders, bf16, random weights, eight photographs. Every step is awaited in both programs. Ours compiles
its blocks as it does by itself in a long run; with --compiler no it does not. The share is that of the matrix rate that
the card was measured to have. Writes gpu.json and gpu.md into the work folder.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from full_size import ROOT, make_images, make_model, our_settings, run_alone, their_settings

CASES = (("sd1", 512, 1), ("sd1", 512, 8), ("sdxl", 1024, 1), ("sdxl", 1024, 4))
SMALL = (("sd1", 128, 1),)
OPTIMIZERS = ("AdamW", "AdamW8bit")
SCRIPTS = {"sd1": "train_network.py", "sdxl": "sdxl_train_network.py"}
WARM_UP = 3
MEASURED = "LORAWRIGHT_MEASURED"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("benchmark-work"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="one small case of few steps")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--compiler", choices=("no", "inductor"), default="inductor")
    parser.add_argument("--sd-scripts", type=Path)
    parser.add_argument("--python", type=Path)
    parser.add_argument("--tokenizers", type=Path, help="sd-scripts' --tokenizer_cache_dir")
    chosen = parser.parse_args()
    chosen.steps = chosen.steps or (2 if chosen.small else 40)
    if chosen.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    chosen.work.mkdir(parents=True, exist_ok=True)
    images = make_images(chosen.work / "images")
    rows = []
    for family, side, batch in SMALL if chosen.small else CASES:
        model = make_model(chosen.work / f"{'sd15' if family == 'sd1' else family}-random.safetensors", family)
        for optimizer in OPTIMIZERS[:1] if chosen.small else OPTIMIZERS:
            case = {"family": family, "side": side, "batch": batch, "optimizer": optimizer}
            for number in range(chosen.rounds):
                one = ours(model, images, case, chosen)
                other = theirs(model, images, case, chosen) if chosen.sd_scripts else None
                rows.append({**case, "round": number + 1, "ours": one, "sd_scripts": other})
                (chosen.work / "gpu.json").write_text(json.dumps(rows, indent=1))
                (chosen.work / "gpu.md").write_text(table(rows))
    print(table(rows), end="")


def ours(model: Path, images: Path, case: dict[str, Any], chosen: argparse.Namespace) -> dict[str, Any]:
    """What `python -m trainer bench` measures."""
    settings = our_settings(model, images, case["side"], "bf16") | {
        **{"train_batch_size": case["batch"], "optimizer": case["optimizer"], "sdxl": case["family"] == "sdxl"},
        "dynamo_backend": chosen.compiler,
        **{"network_dim": 16, "network_alpha": 1, "unet_lr": 1e-4, "text_encoder_lr": 5e-5},
    }
    preset = chosen.work / "preset.json"
    preset.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "trainer", "bench", str(preset.resolve()), "--json", "--steps", str(chosen.steps)]
    own = {**os.environ, "PYTHONPATH": str(ROOT)}  # what was set for sd-scripts is not for this
    done = subprocess.run(command, cwd=ROOT, env=own, stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout)
    return {
        "device": found["device"],
        "steps_per_s": 1 / found["median_step"],
        "memory_gb": (found["device_memory"] or found["memory"]) / 2**30,
        "share": found["share"],
        "operations": found["operations_per_step"],
        "machine_rate": found["machine_rate"],
    }


def theirs(model: Path, images: Path, case: dict[str, Any], chosen: argparse.Namespace) -> dict[str, Any]:
    """The same steps of sd-scripts' own program, timed by `measured` in its process."""
    steps, answer = WARM_UP + chosen.steps + 1, (chosen.work / "measured.json").resolve()
    output, tokenizers = (chosen.work / "sd-scripts").resolve(), chosen.tokenizers
    words = [
        *their_settings(model, images, output, case["side"], "bf16", steps, tokenizers),
        *("--network_dim=16", f"--optimizer_type={case['optimizer']}", f"--train_batch_size={case['batch']}"),
        *(["--no_half_vae"] if case["family"] == "sdxl" else []),
    ]
    os.environ[MEASURED] = str(answer)
    command = [str(chosen.python), "-u", str(Path(__file__).resolve()), SCRIPTS[case["family"]], *words]
    try:
        memory = run_alone(command, chosen.sd_scripts, chosen.work / "sd-scripts.log")
    finally:
        del os.environ[MEASURED]
    found = json.loads(answer.read_text())
    took = [b - a for a, b in zip(found["ends"], found["ends"][1:], strict=False)][WARM_UP - 1 : -1]
    device = found["device_memory"]
    return {"steps_per_s": 1 / statistics.median(took), "memory_gb": device / 2**30 if device else memory}


def measured(answer: Path) -> None:
    """Run the program that the command line names, noting the end of each optimizer step and the peak of memory."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    ends: list[float] = []

    def ended(*_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    register_optimizer_step_post_hook(ended)
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path.cwd())
    runpy.run_path(sys.argv[0], run_name="__main__")
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    answer.write_text(json.dumps({"ends": ends, "device_memory": peak}))


def table(rows: list[dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = [
        f"{rows[0]['ours']['device']}, {rows[0]['ours']['machine_rate'] / 1e12:.2f} T operations/s in bf16",
        "",
        "| model | optimizer | steps/s | share | GB | sd-scripts: steps/s | GB | ours ÷ theirs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        one, other = row["ours"], row["sd_scripts"]
        beside = (
            f"{other['steps_per_s']:.3f} | {other['memory_gb']:.2f} | {one['steps_per_s'] / other['steps_per_s']:.2f}"
            if other
            else "– | – | –"
        )
        lines.append(
            f"| {row['family']} {row['side']}², batch {row['batch']} | {row['optimizer']} | {one['steps_per_s']:.3f} "
            f"| {one['share']:.0%} | {one['memory_gb']:.2f} | {beside} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if MEASURED in os.environ:
        measured(Path(os.environ[MEASURED]))
    else:
        main()
