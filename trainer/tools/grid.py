"""Pictures to choose a checkpoint by: LoRA files × strengths × prompts, each prompt from one seed throughout.

    grid.json     what the pictures show (contact.py)
    *.png         named after all that a picture follows from, so that none is drawn twice
    sheet.png     all of them on one page

A picture is drawn as the training's own samples are, so that those of the same file and settings are
equal bit for bit. The base model is loaded once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from trainer import kohya, networks, sampling
from trainer.aside import set_aside
from trainer.data import texts
from trainer.errors import ConfigError, ModelError, Problem
from trainer.events import Event, Phase, Warned
from trainer.lora.inspecting import Inspected, inspect
from trainer.lora.reading import read
from trainer.models import families
from trainer.models.facts import FAMILIES, Family
from trainer.networks import Network, blocks
from trainer.paths import resolve
from trainer.pictures import parameters, seed_and_size
from trainer.prepare import accelerator_of, base_model, make_compact, place_unet
from trainer.prompts import Prompt, parse
from trainer.schema import Config
from trainer.schema import read as config_of
from trainer.tools import Report, Tell, contact
from trainer.tools.commands import Grid

SHEET = "sheet.png"
MOST = 1000
THUMB = 256
EDGE, LINE = 8, 18


@dataclass(frozen=True)
class Shot:
    """One prompt as it is drawn everywhere: with this seed and (width, height)."""

    prompt: Prompt
    seed: int
    size: tuple[int, int]


def run(options: Grid, tell: Tell) -> Report:
    """Draw the grid. Raises ConfigError, or ModelError where a file is no LoRA or does not fit the base model."""
    tell("reading the LoRAs", 0, 0)
    files = [inspect(path) for path in options.paths]
    strengths = options.strengths
    config, prompts = _settings(options, files[0])
    shots = [
        Shot(prompt, *seed_and_size(config, _seed(options, files[0], config), index, prompt))
        for index, prompt in enumerate(prompts)
    ]
    total = len(files) * len(strengths) * len(shots)
    if total > MOST:
        message = f"these would be {total} pictures, and {MOST} is the most. Choose fewer files, strengths or prompts"
        raise ConfigError([Problem("at", "Strengths", message)])
    folder = _folder(options.output)
    names = [[[_name(config, file, at, shot) for shot in shots] for at in strengths] for file in files]
    index = {
        "rows": [str(file.about.path) for file in files],
        "at": strengths,
        "prompts": [{"prompt": shot.prompt.prompt, "seed": shot.seed, "size": shot.size} for shot in shots],
        "lines": options.prompts if options.prompts.strip() else config.samples.prompts,
        "pictures": names,
    }
    contact.write(folder, index)

    warnings: list[str] = []

    def emit(event: Event) -> None:
        if isinstance(event, Phase):
            tell(event.name, event.done, event.total)
        elif isinstance(event, Warned):
            warnings.append(f"{event.message} {event.hint}".strip())

    torch.set_num_threads(config.training.threads)
    accelerator, precision = accelerator_of(config, emit)
    model = base_model(config, precision, accelerator.device, emit, lambda: None)
    for file in files:
        _require_fit(file, model.family, config)
    for part in (model.vae, *model.text_encoders.values()):
        part.to(accelerator.device)
    prompt_texts = None
    if config.captions.cache_states and not any("text_encoder" in file.about.parts for file in files):
        prompt_texts = texts.of_prompts(model, prompts)
    make_compact(model, config.training, with_text_encoders=not config.captions.cache_states)
    place_unet(model, accelerator.device, [file.preset["LoRA_type"] for file in files])

    done = fresh = 0
    for file, row in zip(files, names, strict=True):
        network = network_of(file, model)
        network.attach()
        for at, cell in zip(strengths, row, strict=True):
            for shot, name in zip(shots, cell, strict=True):
                tell("drawing", done, total)
                done += 1
                if (folder / name).exists():
                    continue
                try:
                    with network.strength(at), network.without_dropout():
                        image = sampling.draw(
                            model, shot.prompt, config.samples.sampler, shot.size, shot.seed, texts=prompt_texts
                        )
                except ValueError as error:
                    warnings.append(f"{file.about.path.name} at strength {at:g}: {error}")
                    continue
                about = parameters(shot.prompt, config.samples.sampler, shot.size, shot.seed)
                sampling.save_png(image, folder / name, f"{about}, Lora: {file.about.path.stem}:{at:g}")
                fresh += 1
        network.detach()
    tell("drawing", total, total)
    sheet = _sheet(folder, files, strengths, shots, names)
    sampling.save_png(sheet, folder / SHEET, "")
    return Report(
        [f"{fresh} pictures were drawn; {total - fresh} of {total} were there already.", f"Written: {folder / SHEET}"],
        path=str(folder / SHEET),
        warnings=warnings,
    )


def _require_fit(file: Inspected, family: Family, config: Config) -> None:
    found = file.about.family
    if found and found != family.name:
        raise ModelError(
            f'"{file.about.path}" is a LoRA for {FAMILIES[found].title}; "{config.model.path}" is {family.what}.',
            "Choose a Checkpoint of the LoRA's family.",
        )


def network_of(file: Inspected, model: Any) -> Network:
    """A LoRA file's network on the model, not attached yet. Raises ModelError where they do not fit."""
    tensors = read(file.about.path).tensors
    plain = Config().network.model_copy(update={"type": file.preset["LoRA_type"]})
    settings = blocks.settings_of_file(plain, tensors)
    network = networks.build(
        settings, model.targets(norms=settings.norms), set(file.about.parts), blocks.from_file(tensors)
    )
    with torch.no_grad():
        network.read(tensors)
    return network


def _settings(options: Grid, first: Inspected) -> tuple[Config, list[Prompt]]:
    """Model, precision, size and sampler: of the run or preset given, else as the first file says of itself."""
    if options.settings.strip():
        path = resolve(options.settings)
        try:
            preset = kohya.load(path / "config.json" if path.is_dir() else path)
        except ConfigError as error:
            raise ConfigError([Problem("settings", "Settings", p.message) for p in error.problems]) from error
        config, wrong = config_of(preset.values)
        if wrong:
            raise ConfigError([Problem("settings", "Settings", "; ".join(str(problem) for problem in wrong))])
    else:
        config, _ = config_of(first.preset)
    if options.model.strip():
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": options.model})})
    elif not options.settings.strip():
        message = "is empty. Choose the base model that the LoRA is for, or the settings of the run that made it"
        raise ConfigError([Problem("model", "Checkpoint", message)])
    try:
        prompts = parse(options.prompts if options.prompts.strip() else config.samples.prompts)
    except ConfigError as error:
        raise ConfigError([Problem("prompts", "Prompts", problem.message) for problem in error.problems]) from error
    if not prompts:
        raise ConfigError([Problem("prompts", "Prompts", "is empty. Enter one prompt a line")])
    return config, prompts


def _seed(options: Grid, first: Inspected, config: Config) -> int:
    """From which those of the prompts without one follow: the training's, so that its samples are met again."""
    if options.seed is not None:
        return options.seed
    said = first.about.metadata.get("ss_seed", "")
    return int(said) if said.isdigit() else config.training.seed or 0


def _folder(text: str) -> Path:
    folder = resolve(text)
    if folder.exists() and not folder.is_dir():
        raise ConfigError([Problem("output", "Output", f'"{text}" is a file; name a folder')])
    folder.mkdir(parents=True, exist_ok=True)
    if contact.read(folder) is None:  # whatever has these names is not of a grid
        for name in (contact.INDEX, SHEET):
            set_aside(folder / name)
    return folder


def _name(config: Config, file: Inspected, at: float, shot: Shot) -> str:
    """A picture's file name, which follows from all that is in the picture; at strength 0 the LoRA is not."""
    parts = (config.model, config.captions, config.objective, config.training, config.samples.sampler)
    origin = [_stamp(families.locate(config.model.path)), *([_stamp(file.about.path), at] if at else [])]
    text = repr((parts, origin, shot))
    return f"{hashlib.blake2b(text.encode(), digest_size=10).hexdigest()}.png"


def _stamp(path: Path) -> tuple[str, int, int]:
    found = path.stat()
    return str(path.resolve()), found.st_size, found.st_mtime_ns


def _sheet(
    folder: Path,
    files: Sequence[Inspected],
    strengths: Sequence[float],
    shots: Sequence[Shot],
    names: Sequence[Sequence[Sequence[str]]],
) -> Image.Image:
    """One block a prompt: a row a file, a column a strength."""
    font: Any = ImageFont.load_default(size=13)
    cells = [_fitted(shot.size) for shot in shots]
    width = EDGE + len(strengths) * (max(w for w, _ in cells) + EDGE)
    height = sum(2 * LINE + len(files) * (h + LINE + EDGE) + EDGE for _, h in cells)
    sheet = Image.new("RGB", (width, height), "white")
    write = partial(ImageDraw.Draw(sheet).text, fill="black", font=font)
    top = EDGE
    for i, (shot, (w, h)) in enumerate(zip(shots, cells, strict=True)):
        write((EDGE, top), f"{shot.prompt.prompt}  (seed {shot.seed})")
        for column, at in enumerate(strengths):
            write((EDGE + column * (w + EDGE), top + LINE), f"strength {at:g}")
        top += 2 * LINE
        for row, file in enumerate(files):
            write((EDGE, top), file.about.path.name)
            for column in range(len(strengths)):
                path = folder / names[row][column][i]
                if path.exists():
                    with Image.open(path) as picture:
                        sheet.paste(picture.resize((w, h)), (EDGE + column * (w + EDGE), top + LINE))
            top += h + LINE + EDGE
    return sheet


def _fitted(size: tuple[int, int]) -> tuple[int, int]:
    share = min(1.0, THUMB / max(size))
    return max(1, round(size[0] * share)), max(1, round(size[1] * share))
