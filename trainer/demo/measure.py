"""Measures the embedded base model and prints a table; draws the contact sheet.

    python -m trainer.demo.measure --work /folder/of/make_base --sheet docs/images/base.png

A drawn picture counts as right when, among the rendered pictures of all concepts in the asked style, one of the
five nearest is of the asked concept. `features` is the space in which they are near.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from torch.nn import functional
from PIL import Image, ImageDraw

from trainer.demo import pictures
from trainer.demo.make_base import Collection, reconstruction_psnr
from trainer.models import load
from trainer.sampling import make_sampler

STYLES = list(pictures.STYLES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="the work folder of make_base: the rendered pictures")
    parser.add_argument("--base", default="", help="a base model's file; the embedded one unless given")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of 40 prompts to this PNG")
    args = parser.parse_args()

    collection = Collection.prepare(args.work)
    model = load(args.base, "", torch.float32, torch.device("cpu"), clip_skip=1, max_tokens=75)
    chosen = prompts(args.prompts)
    drawn = draw(model, [pictures.caption(STYLES[style], pictures.CONCEPTS[i].name) for style, i in chosen])
    right = nearest_are_right(drawn, chosen, collection.known)

    rows = [("autoencoder, trained pictures (dB)", f"{reconstruction_psnr(model.vae, collection.known):.2f}", "≥ 26")]
    rows += [(f"right concept in the first 5 of {len(pictures.CONCEPTS)} (%)", percent(right), "≥ 60")]
    for style, word in enumerate(STYLES):
        rows.append((f"  {word}", percent([ok for ok, (s, _) in zip(right, chosen, strict=True) if s == style]), ""))
    for name, value, wanted in rows:
        print(f"{name:44} {value:>7} {wanted}")
    if args.sheet:
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(drawn[:40], chosen[:40]).save(args.sheet, optimize=True)


def prompts(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """`count` pairs of (style, concept), styles in turn, concepts drawn without repeating one in a style."""
    rng = random.Random(seed)
    orders = [rng.sample(range(len(pictures.CONCEPTS)), len(pictures.CONCEPTS)) for _ in STYLES]
    return [(i % len(STYLES), orders[i % len(STYLES)][i // len(STYLES)]) for i in range(count)]


@torch.no_grad()
def draw(model, captions: list[str], steps: int = 25, guidance: float = 3.0, batch: int = 20) -> torch.Tensor:
    """(captions, 3, size, size) uint8, by DDIM; picture i starts from the noise of seed i."""
    side = pictures.SIZE // model.pixels_per_latent
    drawn = []
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        seeds = range(start, start + len(part))
        latents = torch.stack([torch.randn(4, side, side, generator=torch.Generator().manual_seed(i)) for i in seeds])
        states = model.text_states(model.tokens([""] * len(part) + part))
        sampler = make_sampler("ddim", model.schedule)
        sampler.set_timesteps(steps)
        for time in sampler.timesteps:
            plain, prompted = model.predict(torch.cat([latents, latents]), time, states).chunk(2)
            latents = sampler.step(plain + guidance * (prompted - plain), time, latents).prev_sample
        drawn.append(((model.decode(latents) + 1) * 127.5).round().byte())
    return torch.cat(drawn)


def features(images: torch.Tensor) -> torch.Tensor:
    """(pictures, 1280): colour and outline, coarsely. Two pictures are near when their Euclidean distance is small.

    On a grid of 16×16 cells: the mean lightness, red − green and yellow − blue (each in 0 … 1 or −1 … 1), and the
    mean absolute step of the lightness from pixel to pixel, across and down, times 4 so that an outline through a
    cell counts about as much as the cell's colour.
    """
    rgb = images.float() / 255
    red, green, blue = rgb.unbind(1)
    lightness = 0.299 * red + 0.587 * green + 0.114 * blue
    colour = torch.stack([lightness, red - green, (red + green) / 2 - blue], dim=1)
    across = functional.pad(lightness.diff(dim=2).abs(), (0, 1))
    down = functional.pad(lightness.diff(dim=1).abs(), (0, 0, 0, 1))
    return functional.adaptive_avg_pool2d(
        torch.cat([colour, 4 * across[:, None], 4 * down[:, None]], dim=1), 16
    ).flatten(1)


def nearest_are_right(drawn: torch.Tensor, chosen: list[tuple[int, int]], known: torch.Tensor) -> list[bool]:
    """For each drawn picture of a chosen (style, concept): is the concept among the five nearest of that style?"""
    references = features(known).view(len(pictures.CONCEPTS), len(STYLES), -1)
    found = []
    for feature, (style, concept) in zip(features(drawn), chosen, strict=True):
        distances = (references[:, style] - feature).norm(dim=1)
        found.append(concept in distances.topk(5, largest=False).indices.tolist())
    return found


def saturation(images: torch.Tensor) -> float:
    """Mean over pixels of (largest − smallest channel) / 255."""
    return (images.amax(1).float() - images.amin(1).float()).mean().item() / 255


def percent(flags: list[bool]) -> str:
    return f"{100 * sum(flags) / len(flags):.1f}"


def contact_sheet(drawn: torch.Tensor, chosen: list[tuple[int, int]], columns: int = 8) -> Image.Image:
    size, label = pictures.SIZE, 16
    rows = -(-len(drawn) // columns)
    sheet = Image.new("RGB", (columns * size, rows * (size + label)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (image, (style, concept)) in enumerate(zip(drawn, chosen, strict=True)):
        x, y = number % columns * size, number // columns * (size + label)
        sheet.paste(Image.fromarray(image.permute(1, 2, 0).numpy()), (x, y))
        pen.text((x + 4, y + size + 2), pictures.caption(STYLES[style], pictures.CONCEPTS[concept].name), fill="black")
    return sheet


if __name__ == "__main__":
    main()
