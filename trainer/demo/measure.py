"""Measures the embedded base model and prints a table; draws the contact sheet.

    python -m trainer.demo.measure --work /folder/of/make_base --sheet docs/images/base.png
    python -m trainer.demo.measure --work /folder/of/make_base --style linocut.safetensors
    python -m trainer.demo.measure --work /folder/of/make_base --subject zwx_bear.safetensors

A drawn picture counts as right when, among the rendered pictures of all concepts in the asked style (also those that
the model was not taught), one of the five nearest is of the asked concept. `features` is the space in which they are
near.

`--style` and `--subject` measure instead what the LoRA of a demo learned: the style on concepts that its pictures lack,
the subject beside other pictures of its class.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn import functional

from trainer.demo import pictures
from trainer.demo.make_base import Collection, as_bytes, as_floats, reconstruction_psnr
from trainer.demo.make_images import CLASS, DEMO, HELD_OUT, SUBJECT, demo_concepts
from trainer.lora.reading import read
from trainer.models import load
from trainer.networks import Network, build
from trainer.networks.blocks import from_file
from trainer.sampling import make_sampler
from trainer.schema.network import Network as Settings

STYLES = list(pictures.STYLES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="the work folder of make_base: the rendered pictures")
    parser.add_argument("--base", default="", help="a base model's file; the embedded one unless given")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--style", type=Path, help="measure this LoRA of the preset first-steps, not the base model")
    parser.add_argument("--subject", type=Path, help="measure this LoRA of the preset first-subject")
    parser.add_argument("--features", type=Path, help="only write the features of the known pictures: for the tests")
    parser.add_argument("--sheet", type=Path, help="write what was drawn first to this PNG")
    args = parser.parse_args()

    collection = Collection.prepare(args.work)
    model = load(args.base, "", torch.float32, torch.device("cpu"), clip_skip=1, max_tokens=75)
    linocuts = pictures.IconSet(args.work / "packages", pictures.UNSEEN_STYLE[1])
    unseen = torch.stack([as_bytes(linocuts.picture(concept.icon)) for concept in pictures.CONCEPTS])
    if args.features:
        write_features(args.features, collection.known, unseen)
        return
    if args.style:
        rows, sheet = measure_style(model, args.style, features_by_style(collection.known, unseen), unseen)
    elif args.subject:
        rows, sheet = measure_subject(model, args.subject)
    else:
        rows, sheet = measure_base(model, args.prompts, collection)
    for name, value, wanted in rows:
        print(f"{name:58} {value:>8} {wanted}")
    if args.sheet:
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        sheet.quantize(256, dither=Image.Dither.NONE).save(args.sheet, optimize=True)


Row = tuple[str, str, str]


def measure_base(model, count: int, collection: Collection) -> tuple[list[Row], Image.Image]:
    """The table of the base model's figures, and a contact sheet of the first 40 prompts."""
    chosen = prompts(count)
    captions = [pictures.caption(STYLES[style], pictures.CONCEPTS[i].name) for style, i in chosen]
    drawn = draw(model, captions)
    # Every concept's pictures, those that only the autoencoder saw among them.
    references = features(collection.images).unflatten(0, (-1, len(STYLES)))
    right = nearest_are_right(drawn, chosen, references)
    rows = [
        (
            "autoencoder, pictures of the concepts (dB)",
            f"{reconstruction_psnr(model.vae, collection.known):.2f}",
            "≥ 26",
        ),
        (f"right concept in the first 5 of {len(collection.images) // len(STYLES)} (%)", percent(right), "≥ 60"),
    ]
    for style, word in enumerate(STYLES):
        rows.append((f"  {word}", percent([ok for ok, (s, _) in zip(right, chosen, strict=True) if s == style]), ""))
    return rows, contact_sheet(drawn[:40], captions[:40])


def measure_style(model, lora: Path, references: torch.Tensor, unseen: torch.Tensor) -> tuple[list[Row], Image.Image]:
    """The table of the style demo's figures, and a contact sheet: without the LoRA, with it, in turn.

    `references`: `features_by_style`. A concept is as near as the nearest of its pictures in any style, linocut among
    them, so that the same rule holds with and without the LoRA. `unseen` are the linocuts: black and white, which come
    out of the autoencoder with a slight tint.
    """
    network = network_of(lora, model)
    concepts = demo_concepts(HELD_OUT)
    captions = [pictures.caption(pictures.UNSEEN_STYLE[0], concept.name) for concept in concepts]
    without = draw(model, captions)
    network.attach()
    drawn = draw(model, captions)
    with network.strength(0):
        at_zero = draw(model, captions)
    network.detach()

    numbers = [pictures.CONCEPTS.index(concept) for concept in concepts]
    right_without, right = (nearest_in_any_style(images, numbers, references) for images in (without, drawn))
    tint = saturation(through_autoencoder(model, unseen[numbers]))
    kept = sum(right) / max(1, sum(right_without))
    rows = [
        ("saturation without the LoRA", f"{saturation(without):.4f}", ""),
        ("saturation with it", f"{saturation(drawn):.4f}", ""),
        ("  ratio", f"{saturation(drawn) / saturation(without):.3f}", "< 0.1"),
        ("saturation of black and white from the autoencoder", f"{tint:.4f}", ""),
        ("right concept in the first 5, without (%)", percent(right_without), ""),
        ("right concept in the first 5, with (%)", percent(right), ""),
        ("  ratio", f"{kept:.3f}", "≥ 0.667"),
        ("strength 0 gives the base model's pictures, bit for bit", str(torch.equal(at_zero, without)), "True"),
    ]
    pairs = torch.stack([without, drawn], dim=1).flatten(0, 1)
    return rows, contact_sheet(pairs, [label for caption in captions for label in (caption, "with the LoRA")], 10)


def measure_subject(model, lora: Path, each: int = 8) -> tuple[list[Row], Image.Image]:
    """The table of the subject demo's figures, and a contact sheet: subject, class, both without and with the LoRA.

    A picture shows the subject when the nearest of the demo's pictures, the regularisation images among them, is one of
    the subject.
    """
    network = network_of(lora, model)
    folders = {name: sorted((DEMO / name).rglob("*.png")) for name in ("concept", "concept_reg")}
    shown = features(
        torch.stack([as_bytes(Image.open(path).convert("RGB")) for part in folders.values() for path in part])
    )
    of_subject = len(folders["concept"])
    styles = sorted({path.stem.split("_")[0] for path in folders["concept"]})

    def subjects(images: torch.Tensor) -> list[bool]:
        nearest = torch.cdist(features(images), shown).argmin(dim=1)
        return (nearest < of_subject).tolist()

    rows, sheets = [], []
    for name, wanted in ((SUBJECT, "≥ 75"), (CLASS, "≤ 25")):
        captions = [pictures.caption(style, name) for style in styles for _ in range(each)]
        without = draw(model, captions)
        network.attach()
        drawn = draw(model, captions)
        network.detach()
        rows.append((f'"{name}" shows the subject, without the LoRA (%)', percent(subjects(without)), ""))
        rows.append((f'"{name}" shows the subject, with it (%)', percent(subjects(drawn)), wanted))
        sheets += [(images[::3], captions[::3]) for images in (without, drawn)]
    images, labels = zip(*sheets, strict=True)
    return rows, contact_sheet(torch.cat(images), [label for part in labels for label in part])


def network_of(lora: Path, model) -> Network:
    """The LoRA file's network on the model, not attached yet."""
    tensors = read(lora).tensors
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    parts = {part for part, prefix in prefixes.items() if any(name.startswith(prefix) for name in tensors)}
    network = build(Settings(), model.targets(), parts, from_file(tensors))
    with torch.no_grad():
        network.read(tensors)
    return network


def prompts(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """`count` pairs of (style, concept), styles in turn, concepts drawn without repeating one in a style."""
    rng = random.Random(seed)  # noqa: S311  not for secrets
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


def nearest_are_right(drawn: torch.Tensor, chosen: list[tuple[int, int]], references: torch.Tensor) -> list[bool]:
    """For each drawn picture of a chosen (style, concept): is the concept among the five nearest of that style?

    `references`: (concepts, styles, 1280), the features of every concept's pictures.
    """
    return [
        _among_five(feature, references[:, [style]], concept)
        for feature, (style, concept) in zip(features(drawn), chosen, strict=True)
    ]


def nearest_in_any_style(drawn: torch.Tensor, concepts: list[int], references: torch.Tensor) -> list[bool]:
    """For each drawn picture: is its concept among the five nearest, each as near as its nearest style?"""
    return [
        _among_five(feature, references, concept) for feature, concept in zip(features(drawn), concepts, strict=True)
    ]


def _among_five(feature: torch.Tensor, references: torch.Tensor, concept: int) -> bool:
    distances = (references - feature).norm(dim=2).amin(dim=1)
    return concept in distances.topk(5, largest=False).indices.tolist()


def features_by_style(known: torch.Tensor, unseen: torch.Tensor) -> torch.Tensor:
    """(concepts, styles + 1, 1280): of the known pictures, and last of the linocut of every concept."""
    by_style = features(known).view(len(pictures.CONCEPTS), len(STYLES), -1)
    return torch.cat([by_style, features(unseen)[:, None]], dim=1)


FEATURE_STEPS = 50
"""A written feature is a whole number of fiftieths: no coarser than the pictures' own noise, and a small file."""


def write_features(path: Path, known: torch.Tensor, unseen: torch.Tensor) -> None:
    """So that tests can judge drawings without the packages."""
    numbers = (features_by_style(known, unseen) * FEATURE_STEPS).round().clamp(-128, 127).char()
    np.savez_compressed(path, features=numbers.numpy())


def read_features(path: Path) -> torch.Tensor:
    """`features_by_style` of the file, to a fiftieth."""
    return torch.from_numpy(np.load(path)["features"]).float() / FEATURE_STEPS


def saturation(images: torch.Tensor) -> float:
    """Mean over pixels of (largest − smallest channel) / 255."""
    return (images.amax(1).float() - images.amin(1).float()).mean().item() / 255


@torch.no_grad()
def through_autoencoder(model, images: torch.Tensor) -> torch.Tensor:
    """The uint8 pictures as the model's autoencoder gives them back."""
    latents = model.vae.encode(as_floats(images)).latent_dist.mean * model.vae.config.scaling_factor
    return ((model.decode(latents) + 1) * 127.5).round().byte()


def percent(flags: list[bool]) -> str:
    return f"{100 * sum(flags) / len(flags):.1f}"


def contact_sheet(drawn: torch.Tensor, labels: list[str], columns: int = 8) -> Image.Image:
    size, label_height = pictures.SIZE, 16
    rows = -(-len(drawn) // columns)
    sheet = Image.new("RGB", (columns * size, rows * (size + label_height)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (image, label) in enumerate(zip(drawn, labels, strict=True)):
        x, y = number % columns * size, number // columns * (size + label_height)
        sheet.paste(Image.fromarray(image.permute(1, 2, 0).numpy()), (x, y))
        pen.text((x + 4, y + size + 2), label, fill="black")
    return sheet


if __name__ == "__main__":
    main()
