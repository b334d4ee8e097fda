"""Everything that would stop a preset, found before the start and told all at once."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trainer import state
from trainer.data import folders, images, overflow
from trainer.data.batches import batches_per_epoch
from trainer.data.buckets import Buckets, Size
from trainer.data.folders import Picture
from trainer.errors import ConfigError, DataError, LorawrightError, Problem
from trainer.kohya import Note, Preset, unused
from trainer.length import Length
from trainer.lora.recognise import Lora, recognise
from trainer.models import families, hub
from trainer.models.facts import FAMILIES
from trainer.models.families import Found
from trainer.paths import of_windows, resolve, shown
from trainer.prompts import parse as parse_prompts
from trainer.run import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED
from trainer.schema import PARAMETERS, Config, problem_with, read
from trainer.schema.algorithms import MATRICES, TYPES, USES
from trainer.schema.data import Data
from trainer.schema.optim import WARMING, is_number, steps_of
from trainer.schema.rules import conflicts, text_encoder_rate, unet_rate

ARGUMENTS = ("optimizer", "optimizer_args", "lr_scheduler", "lr_scheduler_args")
# The LoRA types whose files hold up and down matrices, so that one can go on from another's.
UP_AND_DOWN = tuple(label for label, row in TYPES.items() if row.mark == MATRICES)


@dataclass(frozen=True)
class Summary:
    """What training would do; None where a problem keeps it from being known.

    `images` to train on, `regularisation` images beside them, `repeats`: pictures seen in an
    epoch, `buckets`: (width, height, pictures seen in an epoch).
    """

    images: int = 0
    regularisation: int = 0
    repeats: int = 0
    batches_per_epoch: int | None = None
    total_steps: int | None = None
    epochs: int | None = None
    buckets: tuple[tuple[int, int, int], ...] = ()
    model: str | None = None


@dataclass(frozen=True)
class Checked:
    """`config` is None when there is an error among the problems; with warnings alone it is set.

    `ended`: the last state of the training, which `auto` finds at its end, so that nothing is left to do.
    """

    config: Config | None
    problems: tuple[Problem, ...]
    notes: tuple[Note, ...]
    summary: Summary
    ended: state.State | None = None

    @property
    def errors(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.severity == "error")


def problems(preset: Preset, *, decode: bool = True, ask: bool = True, runs: Path = Path("runs")) -> Checked:
    """Check settings, model, images, captions, folders and prompts of a preset; writes nothing.

    Without `decode` only the images' headers are read: quicker, but damage further in is not found. Without `ask`
    no network and no optimizer is: nothing is said of a model on huggingface.co that was not fetched yet, nor of what
    only PyTorch knows. `runs`: the folder of all runs, where "auto" looks for a state.
    """
    config, found = settings(preset.values)
    model, model_problems = _model(config, ask)
    survey = folders.survey(config.folders, config.captions, decode)
    places, place_problems = _places(config, survey.dataset.pictures)
    found += [
        *model_problems,
        *_vae(config, model),
        *_network_weights(config, model),
        *survey.problems,
        *place_problems,
        *overflow.problems(survey.dataset.pictures, config.captions),
        *_output(config),
        *_logging(config),
        *_samples(config),
        *_masks(config, survey.dataset.pictures),
    ]
    summary = _summary(config, survey.dataset.pictures, places, model)
    found += _optimizer(config)
    if ask and not any(p.key in ARGUMENTS and p.severity == "error" for p in found):
        found += _refused_values(config, summary.total_steps or 100)
    if summary.total_steps:
        found += _schedule(config, summary.total_steps)
    resume, ended = _resume(config, summary, runs)
    found += resume
    refused = any(problem.severity == "error" for problem in found)
    told = {problem.key for problem in found}
    notes = (*preset.notes, *(note for note in unused(preset.values) if note.key not in told))
    return Checked(None if refused else config, tuple(found), notes, summary, ended)


def report(preset: Preset, as_json: bool, trial: bool = False) -> int:
    """Print what `problems` finds, and what a `trial` measures where nothing is in the way.

    Returns the exit code: 0 ready, 2 when there are errors, 1 when the trial failed or memory did not suffice.
    """
    checked = problems(preset)
    measured, failure = None, None
    if trial and checked.config is not None:
        from trainer.trial import tried

        try:
            measured = tried(preset, checked)
        except LorawrightError as error:
            failure = Problem("", "Trial", str(error))
            checked = replace(checked, config=None, problems=(*checked.problems, failure))
    if as_json:
        answer = {
            "problems": [asdict(problem) for problem in checked.problems],
            "notes": [asdict(note) for note in checked.notes],
            "summary": asdict(checked.summary),
        }
        print(json.dumps(answer | ({"trial": measured.as_json()} if measured else {})))
    else:
        print("\n".join(shown(line) for line in [*_lines(checked), *(measured.lines if measured else [])]))
    if failure or (measured and measured.ended_in):
        return EXIT_FAILED
    return EXIT_CONFIG if checked.errors else EXIT_DONE


def _lines(checked: Checked) -> Iterator[str]:
    for severity in ("error", "warning"):
        yield from (f"{p.severity}: {p}" for p in checked.problems if p.severity == severity)
    yield from (f"note: {note}" for note in checked.notes)
    summary = checked.summary
    if checked.errors:
        yield f"Not ready: {len(checked.errors)} error(s)."
    else:
        beside = f" and {summary.regularisation} for regularisation" if summary.regularisation else ""
        yield (
            f"Ready: {summary.images} images{beside}, {summary.repeats} seen in an epoch, in {len(summary.buckets)} "
            f"bucket(s); {summary.total_steps} steps in {summary.epochs} epoch(s) of {summary.batches_per_epoch} "
            f"batches; {summary.model or 'no base model'}."
        )


def settings(values: Mapping[str, Any]) -> tuple[Config, list[Problem]]:
    """The config, with the default in place of each value that is not allowed, and all problems."""
    config, found = read(values)
    bad = {problem.key for problem in found}
    for problem in conflicts(config):
        if not any(key == problem.key or f"({key})" in problem.message for key in bad):
            found.append(problem)
    return config, found


def _model(config: Config, ask: bool) -> tuple[Found | None, list[Problem]]:
    key, source = "pretrained_model_name_or_path", config.model.path.strip()
    try:
        to_fetch = hub.is_name(source) and not hub.folder(source)
        if to_fetch and not ask:
            return None, []
        found = families.detect(families.locate(source), complete=not to_fetch)
        awaited = sum(hub.files(source).values()) if to_fetch else 0
    except LorawrightError as error:
        return None, [problem_with(key, error)]
    wrong = []
    if awaited:
        what = f'"{source}" is not on this machine yet: {awaited / 1e9:.1f} GB are fetched from huggingface.co at the start.'
        wrong.append(problem_with(key, what, "warning"))
    if not config.model.path.strip() and config.folders.images.strip() and "embedded:" not in config.folders.images:
        wrong.append(
            problem_with(
                key,
                "is empty, so your images would train the small embedded demo model, whose LoRAs fit no other. "
                "Choose your base model.",
                "warning",
            )
        )
    the_model = f"but {PARAMETERS[key].label} ({key}) is {found.what}"
    for family in FAMILIES.values():
        on = bool(family.switch) and getattr(config.model, family.switch)
        if on and found.family != family.name:
            wrong.append(problem_with(family.switch, f"is on, {the_model}. Switch it off, or choose another model."))
        elif family.switch and not on and found.family == family.name:
            wrong.append(problem_with(family.switch, f"is off, {the_model}. Switch it on."))
    skip = config.captions.clip_skip
    if FAMILIES[found.family].clip_skip and skip > found.text_layers:
        layers = f"whose text encoder has {found.text_layers} layers. It must be {found.text_layers} or less."
        wrong.append(problem_with("clip_skip", f"is {skip}, {the_model}, {layers}"))
    predicts_velocity = found.prediction == "v_prediction"
    if config.model.v_parameterization and found.prediction == "epsilon":
        wrong.append(
            problem_with(
                "v_parameterization",
                f"is on, {the_model} that predicts noise. Switch it off, or choose another model.",
            )
        )
    if predicts_velocity and not config.model.v_parameterization:
        wrong.append(
            problem_with(
                "v_parameterization", f"is off, {the_model} that predicts velocity by its own word. Switch it on."
            )
        )
    if found.zero_terminal_snr != config.objective.zero_terminal_snr:
        state, advice = ("off", "Switch it on") if found.zero_terminal_snr else ("on", "Switch it off unless it was")
        word = "says" if found.zero_terminal_snr else "does not say"
        message = f"is {state}, {the_model} that {word} that it was trained with it. {advice}."
        wrong.append(problem_with("zero_terminal_snr", message, "warning"))
    return found, wrong


def _vae(config: Config, model: Found | None) -> Iterator[Problem]:
    if config.model.vae:
        try:
            families.check_vae(config.model.vae, model)
        except LorawrightError as error:
            yield problem_with("vae", error)


def _network_weights(config: Config, model: Found | None) -> Iterator[Problem]:
    network, key = config.network, "network_weights"
    if not network.weights:
        return
    try:
        lora = recognise(network.weights)
    except LorawrightError as error:
        yield problem_with(key, error)
        return
    if model and lora.width and lora.width != model.width:
        yield problem_with(
            key,
            f'"{shown(network.weights)}" was made for a model whose text states are {lora.width} wide; those of '
            f"{PARAMETERS['pretrained_model_name_or_path'].label} (pretrained_model_name_or_path) are {model.width}. "
            "Choose the model that it was trained on, or one of the same family.",
        )
    if lora.type != network.type and (lora.type or network.type not in UP_AND_DOWN):
        yield problem_with(
            key,
            f'"{shown(network.weights)}" is of LoRA type (LoRA_type) {lora.type or " or ".join(UP_AND_DOWN)}, and '
            f"{network.type} is chosen. Choose the file's, or another file.",
        )
        return
    if network.dim_from_weights and (uneven := {r for r in lora.ranks | lora.conv_ranks if r % network.unit}):
        yield problem_with(
            "unit",
            f"{network.unit} does not divide rank {min(uneven)} of LoRA network weights (network_weights), "
            f'"{shown(network.weights)}", and whole units of ranks are trained. Choose a number that does: 1 always does.',
        )
    if not (network.dim_from_weights or lora.type or network.type.startswith("LyCORIS/")):
        yield from _convolutions(config, lora)
    if not network.dim_from_weights and config.blocks.ranks is None and lora.ranks - {network.rank}:
        ranks = ", ".join(str(rank) for rank in sorted(lora.ranks))
        yield problem_with(
            key,
            f'"{shown(network.weights)}" has rank {ranks}, Network Rank (network_dim) is {network.rank}. '
            "Make them equal, or switch on DIM from weights (dim_from_weights).",
        )
    rates = {"unet": ("unet_lr", unet_rate(config)), "text_encoder": ("text_encoder_lr", text_encoder_rate(config))}
    reached = {"unet"} if network.reach.startswith("unet-") else {"unet", "text_encoder"}
    for part, (rate_key, rate) in rates.items():
        noun = "U-Net" if part == "unet" else "text encoder"
        if part in lora.parts and rate == 0:
            yield problem_with(
                key,
                f'"{shown(network.weights)}" holds a {noun} part, but {PARAMETERS[rate_key].label} ({rate_key}) is 0, '
                "so it would be lost. Set a rate above 0.",
            )
        elif part not in lora.parts and rate and not network.dim_from_weights and part in reached:
            yield problem_with(
                key,
                f'"{shown(network.weights)}" has no {noun} part to go on from. Set {PARAMETERS[rate_key].label} '
                f"({rate_key}) to 0.",
            )


def _convolutions(config: Config, lora: Lora) -> Iterator[Problem]:
    """Whether the file and the settings both train 3×3 convolutions, with the same rank."""
    network, key, file = config.network, "network_weights", f'"{shown(config.network.weights)}"'
    by_type = network.conv_rank if "conv_dim" in USES[network.type] else 0
    wanted = set(config.blocks.conv_ranks or (by_type,)) - {0}
    if lora.conv_ranks and not wanted:
        yield problem_with(
            key,
            f"{file} is a LoCon: it changes 3×3 convolutions too. Set LoRA type (LoRA_type) to Kohya LoCon, "
            "or switch on DIM from weights (dim_from_weights).",
        )
    elif wanted and not lora.conv_ranks:
        yield problem_with(
            key,
            f"{file} has no 3×3 convolutions to go on from. Set LoRA type (LoRA_type) to Standard and leave Conv dims "
            "(conv_block_dims) empty.",
        )
    elif lora.conv_ranks - wanted:
        ranks = ", ".join(str(rank) for rank in sorted(lora.conv_ranks))
        yield problem_with(
            key,
            f"{file} has rank {ranks} in 3×3 convolutions, Convolution Rank (conv_dim) is {network.conv_rank}. "
            "Make them equal, or switch on DIM from weights (dim_from_weights).",
        )


def _resume(config: Config, summary: Summary, runs: Path) -> tuple[list[Problem], state.State | None]:
    """What is to say of the state to go on from, and the state where it ends the training."""
    try:
        found = state.resumed(config, runs)
        if found is None:
            return [], None
        resumed, passed_over = found
        if config.saving.resume == state.AUTO and 0 < summary.total_steps <= resumed.step:
            return [problem_with("resume", resumed.over(summary.total_steps), "warning")], resumed
        resumed.leads_into(summary.total_steps or resumed.step + 1)
        resumed.differences(config, summary.batches_per_epoch or resumed.batches_per_epoch)
    except LorawrightError as error:
        return [problem_with("resume", error)], None
    if not passed_over:
        return [], None
    return [problem_with("resume", f'{" ".join(passed_over)} "{shown(resumed.folder)}" is used.', "warning")], None


def _places(config: Config, pictures: tuple[Picture, ...]) -> tuple[list[Size] | None, list[Problem]]:
    """The bucket of each picture, or None and why there is none."""
    data = config.data
    if data.buckets and data.bucket_step % 8:
        return None, [
            problem_with("bucket_reso_steps", f"{data.bucket_step} is not a multiple of 8, as the VAE needs. Use 64.")
        ]
    if not data.buckets and any(side % 8 for side in data.resolution):
        width, height = data.resolution
        wanted = f"both sides must be multiples of 8, as the VAE needs. Use {width - width % 8},{height - height % 8}"
        return None, [problem_with("max_resolution", f'"{width},{height}": {wanted}.')]
    try:
        buckets = Buckets(data)
    except DataError as error:
        key = "min_bucket_reso" if data.min_bucket_side > min(data.resolution) else "max_bucket_reso"
        return None, [problem_with(key, error)]
    places: dict[Size, Size] = {}
    refused: dict[Size, DataError] = {}
    for size in {picture.size for picture in pictures}:
        try:
            places[size] = buckets.place(size).bucket
        except DataError as error:
            refused[size] = error
    small = [picture for picture in pictures if picture.size in refused]
    if not small:
        return [places[picture.size] for picture in pictures], list(_coarse(data, places, pictures))
    names = "; ".join(f'"{shown(p.path)}": {refused[p.size].message.rstrip(".")}' for p in small[:5])
    more = f"; and {len(small) - 5} more" if len(small) > 5 else ""
    hint = refused[small[0].size].hint
    return None, [
        problem_with("bucket_no_upscale", f"{len(small)} image(s) are too small or narrow: {names}{more}. {hint}")
    ]


def _coarse(data: Data, places: Mapping[Size, Size], pictures: Sequence[Picture]) -> Iterator[Problem]:
    """Whether steps that are large beside the resolution leave images with less than half of their pixels."""
    if not data.buckets:
        return
    lost = [picture for picture in pictures if _shrunk(data, picture.size, places[picture.size])]
    if not lost:
        return
    sizes = {picture.size for picture in lost}
    for finer in (step for step in (32, 16, 8) if step <= data.bucket_step):
        buckets = Buckets(data.model_copy(update={"bucket_step": finer}))
        if not any(_shrunk(data, size, buckets.place(size).bucket) for size in sizes):
            break
    else:
        return  # the shapes are beyond the range of buckets, whatever the steps
    (width, height), (wide, high) = lost[0].size, places[lost[0].size]
    yield problem_with(
        "bucket_reso_steps",
        f"{len(lost)} of {len(pictures)} images are trained with less than half of the pixels that Max resolution "
        f"allows, for instance {width}×{height} as {wide}×{high}: the sides of buckets are multiples of "
        f"{data.bucket_step}. Use {finer}.",
        "warning",
    )


def _shrunk(data: Data, size: Size, bucket: Size) -> bool:
    return 2 * math.prod(bucket) < min(math.prod(size), math.prod(data.resolution))


def _output(config: Config) -> Iterator[Problem]:
    text, name = config.folders.output, config.saving.name
    if not text.strip():
        return
    if why := _no_place(text):
        yield problem_with("output_dir", f"{why} Choose another folder, or leave it empty.")
        return
    file = resolve(text) / f"{name}.safetensors"
    if not os.path.lexists(file):
        return
    if config.network.weights and resolve(config.network.weights).resolve() == file.resolve():
        yield problem_with(
            "output_name",
            f'"{shown(file)}" is the file in LoRA network weights (network_weights), which is never written to. '
            "Choose another name or another Output folder (output_dir).",
        )
    else:
        yield problem_with(
            "output_name",
            f'"{shown(file)}" exists already; it will be kept under a name with its date.',
            "warning",
        )


def _logging(config: Config) -> Iterator[Problem]:
    text = config.folders.logging
    if text.strip() and (why := _no_place(text)):
        yield problem_with("logging_dir", f"{why} Choose another folder, or leave it empty.")


def _no_place(text: str) -> str:
    """Why no files can be written into the folder that `text` means; empty if they can."""
    if of_windows(text):
        return f'"{text}" is a path of a Windows machine.'
    try:
        return not_writable(resolve(text))
    except LorawrightError as error:
        return str(error)


def not_writable(folder: Path) -> str:
    """Why no files can be written under `folder`, which need not exist; empty if they can."""
    existing = folder.absolute()
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not os.path.isdir(existing):  # noqa: PTH112  answers False where pathlib raises
        return f'"{shown(existing)}" is not a folder.'
    try:
        with tempfile.TemporaryFile(dir=existing):
            return ""
    except OSError as error:
        return f'"{shown(folder)}" cannot be written to ({error.strerror}).'


def _samples(config: Config) -> Iterator[Problem]:
    samples = config.samples
    try:
        prompts = parse_prompts(samples.prompts)
    except ConfigError as error:
        yield from error.problems
        return
    if not prompts and (samples.every_n_steps or samples.every_n_epochs):
        yield problem_with(
            "sample_prompts", "is empty, so no samples will be drawn. Enter one prompt a line.", "warning"
        )
    yield from overflow.prompt_problems(prompts)


def _optimizer(config: Config) -> Iterator[Problem]:
    row = config.optim.row
    if row.package and importlib.util.find_spec(row.module.partition(".")[0]) is None:
        yield problem_with(
            "optimizer",
            f'"{config.optim.optimizer}" needs the package {row.package}, which is not installed here. '
            f"Install it (pip install {row.package}), or choose another optimizer.",
        )


def _refused_values(config: Config, total_steps: int) -> Iterator[Problem]:
    """What the optimizer and the scheduler say of their arguments' values, tried on a weight of their own."""
    settings = config.optim
    if not (settings.arguments or settings.scheduler_arguments):
        return
    import torch  # late, and only where there is something to try

    from trainer import optim

    key = "optimizer_args"
    try:
        weight = torch.nn.Parameter(torch.ones(2, 2))
        group = {"name": "unet", "params": [weight], "lr": 1e-4}
        scaled = config.training.precision == "fp16" and torch.cuda.is_available()
        optimizer = optim.make_optimizer([group], settings, fused=not scaled)
        key = "lr_scheduler_args"
        scheduler = optim.make_scheduler(optimizer, settings, total_steps)
        weight.grad = torch.ones_like(weight)
        key = "optimizer_args"
        optimizer.step()
        key = "lr_scheduler_args"
        scheduler.step()
    except ConfigError as error:
        yield from error.problems
    except Exception as error:  # whatever these libraries raise for a value that is none of theirs
        yield problem_with(
            key, f"cannot be used: {str(error).splitlines()[0] if str(error) else type(error).__name__}."
        )


def _schedule(config: Config, total_steps: int) -> Iterator[Problem]:
    """What a schedule of so many steps cannot mean."""
    optim = config.optim
    if optim.row.schedule_free or optim.relative_step:
        return
    given = optim.scheduler_arguments
    warmup = optim.warmup_of(total_steps) if optim.scheduler in WARMING else 0
    if warmup >= total_steps:
        key = "lr_warmup_steps" if optim.warmup_steps else "lr_warmup"
        what = f"takes {warmup} steps, and training {total_steps}, so the learning rate is reached at the end or never."
        yield problem_with(key, f"{what} Lower it, or train for longer.", "warning")
    if optim.scheduler == "warmup_stable_decay" and _is_finite(decay := given.get("num_decay_steps")):
        steps = steps_of(decay, total_steps)
        if warmup + steps > total_steps and "num_stable_steps" not in given:
            what = (
                f"num_decay_steps {decay} and a warmup of {warmup} steps are longer than training, {total_steps} steps"
            )
            message = (
                f"{what}, so that the learning rate begins within its decay. Lower it, or write the share of all: 0.2."
            )
            yield problem_with("lr_scheduler_args", message, "warning")
    rate = optim.learning_rate or unet_rate(config)
    for name, highest in (("min_lr", rate), ("min_lr_rate", 1)):
        if optim.scheduler == "cosine_with_min_lr" and _is_finite(least := given.get(name)) and least > highest:
            of = "Learning rate (learning_rate)" if name == "min_lr" else "the whole rate"
            message = f"{name} {least} is above {of}, {highest:g}, so that the rate rises towards the end. Lower it."
            yield problem_with("lr_scheduler_args", message, "warning")


def _is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def _masks(config: Config, pictures: tuple[Picture, ...]) -> Iterator[Problem]:
    if not config.objective.masked or not pictures:
        return
    for picture in pictures:
        try:
            if images.has_transparency(picture.path):
                return
        except DataError:
            continue  # the survey of the folders tells
    yield problem_with(
        "masked_loss",
        f"is on, but none of the {len(pictures)} images in Image folder (train_data_dir) has an alpha channel, "
        "so all count whole. Cut the subjects out, or switch it off.",
        "warning",
    )


def _summary(config: Config, pictures: tuple[Picture, ...], places: list[Size] | None, model: Found | None) -> Summary:
    training = sum(not picture.regularisation for picture in pictures)
    repeats = [picture.repeats for picture in pictures]
    title = model.title if model else None
    if not places:
        return Summary(training, len(pictures) - training, sum(repeats), model=title)
    counts: Counter[Size] = Counter()
    for bucket, count in zip(places, repeats, strict=True):
        counts[bucket] += count
    length = Length.of(batches_per_epoch(places, repeats, config.training.batch_of_all), config.training)
    return Summary(
        training,
        len(pictures) - training,
        sum(repeats),
        length.batches_per_epoch,
        length.total_steps,
        length.epochs,
        tuple((*bucket, count) for bucket, count in sorted(counts.items())),
        title,
    )
