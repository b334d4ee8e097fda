"""The loss of a full-size SDXL U-Net, here and in kohya's sd-scripts, from the same inputs, in fp32 and in bf16.

    python benchmarks/sdxl_loss.py --sd-scripts FOLDER --python ENVIRONMENT/bin/python [--model FILE] [--side 256]

Latents, noise, timesteps, text states, pooled states and sizes are drawn once; each program then takes the
U-Net's weights from the same file (made with random weights where none is named) and adds the noise, predicts
and takes the loss by its own code, in a process of its own. Needs 16 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
TIMESTEPS = (20, 350, 700, 980)
SIZES = (
    (256, 256, 0, 0, 256, 256),
    (1023, 769, 0, 64, 256, 256),
    (512, 512, 8, 0, 256, 256),
    (300, 900, 0, 300, 256, 256),
)
"""The image's height and width, the top and left of its crop, and what is aimed at."""
PRECISIONS = ("float32", "bfloat16")
LIMIT = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("benchmark-work"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0], help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--sd-scripts", type=Path)
    parser.add_argument("--python", type=Path)
    parser.add_argument("--only", choices=("lorawright", "sd-scripts"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.only:
        answer = {"lorawright": ours, "sd-scripts": theirs}[chosen.only]
        print(json.dumps(answer(chosen.model, drawn(chosen.side // 8), getattr(torch, chosen.precision))))
        return
    if chosen.model is None:
        from full_size import make_model

        chosen.work.mkdir(parents=True, exist_ok=True)
        chosen.model = make_model(chosen.work / "sdxl.safetensors", "sdxl")
    programs = {
        "lorawright": (Path(sys.executable), [ROOT], ""),
        "sd-scripts": (chosen.python, [chosen.sd_scripts], os.environ.get("PYTHONPATH", "")),
    }
    show(
        {
            (precision, name): run(name, *program, chosen, precision)
            for precision in PRECISIONS
            for name, program in programs.items()
        }
    )


def run(
    name: str, python: Path, folders: list[Path], more: str, chosen: argparse.Namespace, precision: str
) -> list[float]:
    """The loss of each sample that one of the programs finds."""
    paths = [*map(str, folders), *filter(None, [more])]
    command = [str(python), __file__, "--only", name, "--precision", precision, "--model", str(chosen.model.resolve())]
    command += ["--side", str(chosen.side), "--threads", str(chosen.threads)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(answer.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def drawn(side: int) -> dict[str, torch.Tensor]:
    """What both are given: latents [4,4,side,side], noise, timesteps, text [4,77,2048], pooled [4,1280], sizes [4,6]."""
    generator = torch.Generator().manual_seed(0)
    count = len(TIMESTEPS)
    shapes = {"latents": (4, side, side), "noise": (4, side, side), "text": (77, 2048), "pooled": (1280,)}
    normal = {name: torch.randn(count, *shape, generator=generator) for name, shape in shapes.items()}
    return normal | {"timesteps": torch.tensor(TIMESTEPS), "sizes": torch.tensor(SIZES)}


@torch.no_grad()
def ours(path: Path, given: Mapping[str, torch.Tensor], dtype: torch.dtype) -> list[float]:
    from trainer.models import Schedule, TextStates, facts, layout, sd, sdxl, weights

    family, cpu = facts.FAMILIES["sdxl"], torch.device("cpu")
    unet = sd.empty(family, family.configs)["unet"]
    with weights.opened(path) as file:
        names = layout.tables(family, family.configs, file.header.tensors)["unet"]
        weights.fill(unet, names, file, dtype, cpu, path)
    unet.requires_grad_(False).eval()
    schedule = Schedule.of(family.configs["scheduler"])
    nothing: Any = None
    model = sdxl.StableDiffusionXL(family, unet, nothing, {}, schedule, dtype, cpu, 1, 75)
    noisy = schedule.add_noise(given["latents"], given["noise"], given["timesteps"])
    text = TextStates(given["text"], given["pooled"])
    answer = model.predict(noisy, given["timesteps"], text, given["sizes"])
    return losses(answer, given["noise"])


@torch.no_grad()
def theirs(path: Path, given: Mapping[str, torch.Tensor], dtype: torch.dtype) -> list[float]:
    from accelerate import init_empty_weights
    from diffusers import DDPMScheduler
    from library.sdxl_original_unet import SdxlUNet2DConditionModel
    from library.sdxl_train_util import get_size_embeddings
    from safetensors import safe_open

    with init_empty_weights():
        unet = SdxlUNet2DConditionModel()
    prefix = "model.diffusion_model."
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        state = {name.removeprefix(prefix): file.get_tensor(name).to(dtype) for name in names}
    unet.load_state_dict(state, assign=True)
    unet.requires_grad_(False).eval()
    unet.set_use_sdpa(True)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    noisy = scheduler.add_noise(given["latents"], given["noise"], given["timesteps"]).to(dtype)
    image, crop, target = given["sizes"].split(2, 1)
    embedded = get_size_embeddings(image, crop, target, "cpu")
    vector = torch.cat([given["pooled"], embedded], 1).to(dtype)
    return losses(unet(noisy, given["timesteps"], given["text"].to(dtype), vector), given["noise"])


def losses(answer: torch.Tensor, noise: torch.Tensor) -> list[float]:
    """The mean squared error of each sample."""
    return (answer.float() - noise).square().mean((1, 2, 3)).tolist()  # type: ignore[no-any-return]


def show(found: dict[tuple[str, str], list[float]]) -> None:
    """Losses of each sample and their mean, and how far each is from sd-scripts' in fp32."""
    truth = found["float32", "sd-scripts"]
    print(f"{'timestep':>10}" + "".join(f"{f'{name}, {precision}':>32}" for precision, name in found))
    for i, place in enumerate([*map(str, TIMESTEPS), "mean"]):
        own = {key: statistics.mean(values) if place == "mean" else values[i] for key, values in found.items()}
        right = statistics.mean(truth) if place == "mean" else truth[i]
        print(f"{place:>10}" + "".join(f"{loss:20.6f} ({loss / right - 1:+.1e})" for loss in own.values()))
    here = found["float32", "lorawright"]
    if any(abs(own / other - 1) > LIMIT for own, other in zip(here, truth, strict=True)):
        sys.exit(f"in fp32 a loss differs by more than {LIMIT}")


if __name__ == "__main__":
    main()
