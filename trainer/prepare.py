"""From settings to everything that the loop needs: data, model, network, optimizer."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch.optim.lr_scheduler import LRScheduler

from trainer import attention, compiling, memory, metadata, models, networks, optim, state, trackers
from trainer.arranged import arrange
from trainer.compact import compact
from trainer.data import cache, folders, texts
from trainer.data.buckets import Buckets, Placement
from trainer.data.feed import Feed
from trainer.data.folders import Picture
from trainer.errors import ConfigError
from trainer.events import Event, Phase, Warned
from trainer.length import Length
from trainer.lora.reading import read
from trainer.models.facts import Layout
from trainer.networks import Network, blocks
from trainer.paths import resolve
from trainer.processes import ALONE, PATIENCE, Place, Team, here
from trainer.prompts import Prompt, parse
from trainer.randomness import set_torch_to
from trainer.retention import Retention
from trainer.run import Run, sweep
from trainer.schema import Config, problem_with
from trainer.schema.algorithms import TYPES
from trainer.schema.blocks import rate_weights
from trainer.schema.rules import text_encoder_rate, unet_rate
from trainer.schema.training import Training

log = logging.getLogger(__name__)
COMPUTE = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Emit = Callable[[Event], None]
NOTHING = """and Text Encoder learning rate (text_encoder_lr) leave no layer of this model to train, given the blocks' dims and
LR weights (block_dims, down_lr_weight, mid_lr_weight, up_lr_weight), what the LoRA type reaches, LyCORIS Preset (LyCORIS_preset), and the
file in LoRA network weights (network_weights). Change one of them.""".replace("\n", " ")


@dataclass
class Session:
    """One training, ready to run. Modules are on the device; the network is not attached yet.

    `captions`, `prompt_texts`: what the text encoders answered, where that is cached; they have no weights then.
    """

    config: Config
    run: Run
    emit: Emit
    seed: int
    precision: str
    accelerator: Accelerator
    team: Team
    model: Any
    network: Network
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    feed: Feed
    length: Length
    description: metadata.Description
    prompts: list[Prompt]
    captions: texts.Texts | None
    prompt_texts: dict[Prompt, models.TextStates] | None
    output: Path
    check: Callable[[], None]
    pictures: Mapping[str, Any]
    """What is noted of the images, see `state.fingerprint`."""
    retention: Retention
    trackers: trackers.Trackers
    resumed: state.State | None = None
    written: set[Path] = field(default_factory=set)
    newest_state: Path | None = None
    returns: list[int] = field(default_factory=list)
    """The steps that training went back to, which is in the rates and the noise since."""
    average: tuple[float, int] = (0.0, 0)
    """The average loss that was told of last, and of how many steps."""
    parts: int = 1
    """In how many parts each batch is taken."""
    compiled: bool = False
    """Whether the U-Net's blocks are, or will be when they are first called."""
    whole: bool = True
    """Whether weights, optimizer and schedule are those behind a step, and not within one."""

    @property
    def first_step(self) -> int:
        return self.resumed.step + 1 if self.resumed else 1


def prepare(
    config: Config,
    run: Run,
    emit: Emit,
    check: Callable[[], None] = lambda: None,
    choose: Callable[[Sequence[Picture], Sequence[Placement]], Sequence[int]] | None = None,
) -> Session:
    """Load and build all parts of a training.

    `check` is called between pieces of work and may raise to end it. `choose` tells the places of the pictures that
    are taken, where not all are. Raises a LorawrightError naming what does not work.
    """
    training = config.training
    files = metadata.model_files(config)
    place = here()
    accelerator, precision = accelerator_of(config, emit, place)
    torch.set_num_threads(training.threads)
    team = Team(place)
    resumed = _past(config, run, team)
    seed = training.seed
    if seed is None:
        seed = resumed.seed if resumed else secrets.randbelow(2**32)
    seed = team.told(seed)
    log.info("seed: %d", seed)

    emit(Phase("reading the image folders"))
    dataset = folders.scan(config.folders, config.captions)
    # Whole, since events name what is in it, and who reads them may be in another folder.
    output = resolve(config.folders.output).absolute() if config.folders.output else run.output
    beside = {picture.path.parent / cached for picture in dataset.pictures for cached in (cache.FOLDER, texts.FOLDER)}
    if team.leads:
        for folder in (run.folder, run.samples, output, *sorted(beside)):
            sweep(folder)
    buckets = Buckets(config.data)
    placements = [buckets.place(picture.size) for picture in dataset.pictures]
    if choose:
        chosen = choose(dataset.pictures, placements)
        dataset = replace(dataset, pictures=tuple(dataset.pictures[place] for place in chosen))
        placements = [placements[place] for place in chosen]

    # As they are now: what becomes of the files while they are trained on does not matter.
    pictures = state.fingerprint(dataset.pictures)

    device = accelerator.device
    model = base_model(config, precision, device, emit, check)
    if training.checkpointing:
        models.recompute(model)

    def progress(what: str, done: int, total: int) -> None:
        emit(Phase(f"caching {what}", done, total))
        check()

    prompts = parse(config.samples.prompts)
    latents = None
    model.vae.to(device)
    if config.data.cache_latents:
        encoded = cache.encode_all(
            team.mine(dataset.pictures),
            team.mine(placements),
            model,
            flip=config.data.flip,
            batch_size=config.data.vae_batch_size or training.batch_size,
            dtype=torch.float32 if precision == "no" else torch.float16,
            to_disk=config.data.cache_to_disk,
            masked=config.objective.masked,
            progress=partial(progress, "latents"),
        )
        latents = team.gathered(encoded)
        model.vae.to("cpu" if prompts else "meta")
    captions = prompt_texts = None
    for encoder in model.text_encoders.values():
        encoder.to(device)
    if config.captions.cache_states:
        captions = texts.encode_captions(dataset.pictures, model, config.captions, partial(progress, "captions"))
        prompt_texts = texts.of_prompts(model, prompts)
        for encoder in model.text_encoders.values():
            encoder.to("meta")
    make_compact(model, training, with_text_encoders=not config.captions.cache_states)
    place_unet(model, device, [config.network.type])
    if device.type == "cuda":
        torch.cuda.empty_cache()

    emit(Phase("building the network"))
    feed = Feed(dataset.pictures, placements, config, seed, latents, place)
    length = Length.of(len(feed), training)
    network = _network(config, model, seed)
    groups = _groups(config, network, model.family.blocks)
    if not groups:
        raise ConfigError([problem_with("unet_lr", NOTHING)])
    optimizer = optim.make_optimizer(groups, config.optim, fused=accelerator.scaler is None)
    if config.optim.row.paged and accelerator.device.type == "cpu":
        name = config.optim.optimizer
        emit(Warned(f"{name} moves its states out of a GPU's memory; without a GPU it is like the unpaged one."))
    scheduler = optim.make_scheduler(optimizer, config.optim, length.total_steps)
    optimizer = accelerator.prepare(optimizer)
    if resumed:
        _resume(resumed, config, length, emit)
        if others := resumed.other_pictures(pictures):
            hint = (
                f"Training goes on at step {resumed.step + 1} with what is there now. The order in an epoch follows from "
                "all images, so of this one some may come twice and some not at all."
            )
            emit(Warned(f"The images or captions are not those of step {resumed.step}: {'; '.join(others)}.", hint))
        optim.scale_rates(scheduler, 0.5 ** len(resumed.returns))
        resumed.restore(network, optimizer, scheduler, accelerator.scaler)
    repeats = [picture.repeats for picture in dataset.pictures]
    sizes = len({placement.bucket for placement in placements})
    compiled = compiling.begin(model, network, config, steps=length.total_steps, sizes=sizes, device=device)
    if device.type == "cpu":
        memory.keep()
    else:
        memory.give_back()
    return Session(
        config=config,
        run=run,
        emit=emit,
        seed=seed,
        precision=precision,
        accelerator=accelerator,
        team=team,
        model=model,
        network=network,
        optimizer=optimizer,
        scheduler=scheduler,
        feed=feed,
        length=length,
        description=metadata.describe(
            config,
            family=model.family,
            seed=seed,
            length=length,
            network=network,
            precision=precision,
            dataset=dataset,
            placements=placements,
            repeats=repeats,
            files=files(),
        ),
        prompts=prompts,
        captions=captions,
        prompt_texts=prompt_texts,
        output=output,
        check=check,
        pictures=pictures,
        retention=Retention.after(resumed, config.saving, output),
        trackers=trackers.start(config, run, emit) if team.leads else trackers.Trackers(emit),
        resumed=resumed,
        newest_state=resumed.folder if resumed else None,
        returns=list(resumed.returns) if resumed else [],
        average=resumed.average if resumed else (0.0, 0),
        compiled=compiled,
    )


def _past(config: Config, run: Run, team: Team) -> state.State | None:
    """The state to go on from: the one that the first process finds."""
    found = state.resumed(config, run.folder.parent) if team.leads else None
    folder = team.told(found[0].folder if found else None)
    return found[0] if found else folder and state.read(folder)


def _resume(resumed: state.State, config: Config, length: Length, emit: Emit) -> None:
    """Refuse a state that this training cannot go on from, and tell what is otherwise than it was."""
    resumed.leads_into(length.total_steps)
    differences = resumed.differences(config, length.batches_per_epoch)
    if differences:
        emit(Warned(f"Resuming at step {resumed.step + 1} with other settings: {'; '.join(differences)}."))
    log.info("resuming %s at step %d", resumed.folder, resumed.step + 1)


def base_model(config: Config, precision: str, device: torch.device, emit: Emit, check: Callable[[], None]) -> Any:
    """The base model as the settings want it. Its parts are in the main memory.

    Each goes to the device when its turn comes, so that the U-Net is not there beside the VAE's work.
    """

    def fetching(done: int, total: int) -> None:
        emit(Phase("fetching the base model (MB)", done // 10**6, total // 10**6))
        check()

    emit(Phase("loading the base model"))
    model = models.load(
        config.model.path,
        config.model.vae,
        COMPUTE[precision],
        torch.device("cpu"),
        config.captions.clip_skip,
        config.captions.max_tokens,
        prediction="v_prediction" if config.model.v_parameterization else "epsilon",
        vae_dtype=torch.float32 if config.model.full_vae else None,
        progress=fetching,
    )
    if config.objective.zero_terminal_snr:
        model.schedule = model.schedule.with_zero_terminal_snr()
    model.device = device
    model.schedule = model.schedule.to(device)
    attention.choose(model, config.training, device)
    return model


def accelerator_of(config: Config, emit: Emit, place: Place = ALONE) -> tuple[Accelerator, str]:
    """The device and the precision that it can compute in; where there are others, this joins them.

    Raises ConfigError where a process would have no GPU of its own.
    """
    on_gpu = torch.cuda.is_available()
    if place.count > 1 and on_gpu and int(os.environ["LOCAL_WORLD_SIZE"]) > (found := torch.cuda.device_count()):
        message = f"needs a GPU for each process, and this machine shows {found}. Lower it"
        message += f", or name more in GPU IDs (gpu_ids {config.training.gpus})." if config.training.gpus else "."
        raise ConfigError([problem_with("num_processes", message)])
    precision: str = config.training.precision
    if precision == "fp16" and not torch.cuda.is_available():
        precision = "bf16"
        emit(Warned("Mixed precision fp16 needs a GPU; bf16 is used instead.", "Set Mixed precision to bf16 or no."))
    accelerator = Accelerator(
        mixed_precision=precision,
        step_scheduler_with_optimizer=False,
        cpu=place.count > 1 and not on_gpu,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = True  # as for convolutions: fp32 products with the 11 bits of fp16
    if config.training.full_fp16 and accelerator.scaler is not None:
        # torch's scaler refuses gradients in fp16 unless told that they are meant.
        accelerator.scaler._unscale_grads_ = partial(_unscale, accelerator.scaler._unscale_grads_)
    return accelerator, precision


def _unscale(unscale: Callable[..., Any], optimizer: Any, inverse: Any, found: Any, allow_fp16: bool) -> Any:
    return unscale(optimizer, inverse, found, True)


def place_unet(model: Any, device: torch.device, lora_types: Iterable[str]) -> None:
    """Move the U-Net to its device; on a CPU arrange it there, where no LoRA type on it reads its weights."""
    model.unet.to(device)
    if device.type == "cpu" and not any(TYPES[name].reads_weights for name in lora_types):
        arrange(model.unet)


def make_compact(model: Any, training: Training, *, with_text_encoders: bool) -> None:
    """Keep the frozen layers in the bits that the settings say, but for the U-Net's first and last."""
    kinds = {}
    if training.fp8_base or training.fp8_base_unet:
        kinds["unet"] = "fp8"
    if training.base_bits != "16":
        kinds["unet"] = training.base_bits
    if training.fp8_base and with_text_encoders:
        kinds["text_encoder"] = "fp8"
    for part, kind in kinds.items():
        layers = (t.layer for t in model.targets().values() if t.part == part and t.place != "edge")
        compact(layers, kind, model.device)


def _network(config: Config, model: Any, seed: int) -> Network:
    """The network with its first weights: random ones that follow from the seed, or a file's."""
    parts = {
        part for part, rate in (("unet", unet_rate(config)), ("text_encoder", text_encoder_rate(config))) if rate > 0
    }
    settings = config.network
    weights = read(settings.weights).tensors if settings.weights else None
    set_torch_to(seed, "network")
    if settings.dim_from_weights:
        assert weights is not None
        size_of, settings = blocks.from_file(weights), blocks.settings_of_file(settings, weights)
    else:
        size_of = blocks.from_settings(config, rate_weights(config.blocks, model.family.blocks))
    network = networks.build(settings, model.targets(norms=settings.norms), parts, size_of)
    if weights is not None:
        with torch.no_grad():
            network.read(weights)
    if config.training.full_fp16 or config.training.full_bf16:
        network.to(model.dtype)
    counts = {part: sum(p == part for p in network.part_of.values()) for part in ("text_encoder", "unet")}
    log.info(
        "network: %d modules (%d text encoder, %d U-Net), %.1f million weights",
        sum(counts.values()),
        counts["text_encoder"],
        counts["unet"],
        sum(p.numel() for p in network.parameters()) / 1e6,
    )
    return network


def _groups(config: Config, network: Network, layout: Layout) -> list[dict[str, Any]]:
    """The optimizer's parameter groups: one a part of the model, block with its own rate, and LoRA+ ratio.

    `rate_factor` is what the part's rate is multiplied by.
    """
    optim = config.optim
    rates = {"text_encoder": text_encoder_rate(config), "unet": unet_rate(config)}
    up_ratios = {"text_encoder": optim.text_encoder_up_ratio, "unet": optim.unet_up_ratio}
    weights = rate_weights(config.blocks, layout)
    groups: dict[tuple[str, int | None, bool], dict[str, Any]] = {}
    for name, module in network.layers.items():
        part = network.part_of[name]
        block = blocks.block_of(name) if weights and part == "unet" else None
        ratio = up_ratios[part] or optim.up_ratio
        for key, tensor in module.named_parameters():
            if not tensor.requires_grad:
                continue
            up = bool(ratio) and module.is_up(key)
            factor = (weights[block] if weights and block is not None else 1.0) * (ratio if up else 1.0)
            if factor == 0:  # from a file that has modules there
                tensor.requires_grad_(False)
                continue
            group = {"name": part, "block": block, "rate_factor": factor, "lr": rates[part] * factor, "params": []}
            groups.setdefault((part, block, up), group)["params"].append(tensor)
    return list(groups.values())


def memory_bytes(device: torch.device) -> int:
    """Memory of the training: the most so far on a GPU, or what this process has now where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))
