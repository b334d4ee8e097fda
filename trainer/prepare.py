"""From settings to everything that the loop needs: data, model, network, optimizer."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LRScheduler

from trainer import checkpoint, metadata, models, networks, optim
from trainer.data import cache, folders
from trainer.data.buckets import Buckets
from trainer.data.feed import Feed
from trainer.events import Event, Phase, Warned
from trainer.length import Length
from trainer.networks import Network
from trainer.paths import resolve
from trainer.prompts import Prompt, parse
from trainer.randomness import set_torch_to
from trainer.run import Run
from trainer.schema import Config
from trainer.schema.rules import text_encoder_rate, unet_rate

log = logging.getLogger(__name__)
COMPUTE = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Emit = Callable[[Event], None]


@dataclass
class Session:
    """One training, ready to run. Modules are on the device; the network is not attached yet."""

    config: Config
    run: Run
    emit: Emit
    seed: int
    precision: str
    accelerator: Accelerator
    model: Any
    network: Network
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    feed: Feed
    length: Length
    description: metadata.Description
    prompts: list[Prompt]
    output: Path
    check: Callable[[], None]


def prepare(config: Config, run: Run, emit: Emit, check: Callable[[], None] = lambda: None) -> Session:
    """Load and build all parts of a training.

    `check` is called between pieces of work and may raise to end it. Raises a LorawrightError
    naming what does not work.
    """
    training = config.training
    torch.set_num_threads(training.threads)
    accelerator, precision = _accelerator(config, emit)
    dtype = COMPUTE[precision]
    seed = training.seed if training.seed is not None else secrets.randbelow(2**32)
    log.info("seed: %d", seed)

    emit(Phase("reading the image folders"))
    dataset = folders.scan(config.folders, config.captions)
    buckets = Buckets(config.data)
    placements = [buckets.place(picture.size) for picture in dataset.pictures]

    emit(Phase("loading the base model"))
    model = models.load(
        config.model.path,
        config.model.vae,
        dtype,
        accelerator.device,
        config.captions.clip_skip,
        config.captions.max_tokens,
    )
    _choose_attention(model, training.attention, accelerator.device, emit)
    if training.checkpointing:
        model.unet.enable_gradient_checkpointing()
        model.text_encoder.activation_checkpointing_enable()
        model.text_encoder.train()

    def progress(done: int, total: int) -> None:
        emit(Phase("caching latents", done, total))
        check()

    latents = None
    if config.data.cache_latents:
        latents = cache.encode_all(
            dataset.pictures,
            placements,
            model,
            flip=config.data.flip,
            batch_size=config.data.vae_batch_size or training.batch_size,
            dtype=torch.float32 if precision == "no" else torch.float16,
            to_disk=config.data.cache_to_disk,
            progress=progress,
        )
        if accelerator.device.type != "cpu":
            model.vae.to("cpu")
            torch.cuda.empty_cache()

    emit(Phase("building the network"))
    feed = Feed(dataset.pictures, placements, config, seed, latents)
    length = Length.of(len(feed), training)
    network = _network(config, model, seed)
    optimizer = optim.make_optimizer(_groups(config, network), config.optim)
    scheduler = optim.make_scheduler(optimizer, config.optim, length.total_steps)
    repeats = [picture.repeats for picture in dataset.pictures]
    return Session(
        config=config,
        run=run,
        emit=emit,
        seed=seed,
        precision=precision,
        accelerator=accelerator,
        model=model,
        network=network,
        optimizer=accelerator.prepare(optimizer),
        scheduler=scheduler,
        feed=feed,
        length=length,
        description=metadata.describe(
            config,
            family=model.family,
            seed=seed,
            length=length,
            dataset=dataset,
            placements=placements,
            repeats=repeats,
        ),
        prompts=parse(config.samples.prompts),
        output=resolve(config.folders.output) if config.folders.output else run.output,
        check=check,
    )


def _accelerator(config: Config, emit: Emit) -> tuple[Accelerator, str]:
    """The device and the precision that it can compute in."""
    precision: str = config.training.precision
    if precision == "fp16" and not torch.cuda.is_available():
        precision = "bf16"
        emit(Warned("Mixed precision fp16 needs a GPU; bf16 is used instead.", "Set Mixed precision to bf16 or no."))
    logging_dir = resolve(config.folders.logging) if config.folders.logging else None
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with="tensorboard" if logging_dir else None,
        project_dir=logging_dir,
        step_scheduler_with_optimizer=False,
    )
    if logging_dir:
        logging_dir.mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers(config.saving.name)
    return accelerator, precision


def _choose_attention(model: Any, wanted: str, device: torch.device, emit: Emit) -> None:
    if wanted == "none":
        from diffusers.models.attention_processor import AttnProcessor

        model.unet.set_attn_processor(AttnProcessor())
        return
    if wanted == "xformers":
        try:
            if device.type != "cuda":
                raise RuntimeError("it has kernels for NVIDIA GPUs only")
            model.unet.enable_xformers_memory_efficient_attention()
            return
        except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            log.info("xformers is not used (%s); PyTorch's scaled-dot-product attention is", reason)


def _network(config: Config, model: Any, seed: int) -> Network:
    """The network with its first weights: random ones that follow from the seed, or a file's."""
    parts = {
        part for part, rate in (("unet", unet_rate(config)), ("text_encoder", text_encoder_rate(config))) if rate > 0
    }
    settings = config.network
    weights = checkpoint.read_lora(resolve(settings.weights)) if settings.weights else None
    set_torch_to(seed, "network")
    sizes = weights if settings.dim_from_weights else None
    network = networks.build(settings.type, model.targets(), parts, settings.rank, settings.alpha, sizes)
    if weights is not None:
        with torch.no_grad():
            network.read(weights)
    counts = {part: sum(p == part for p in network.part_of.values()) for part in ("text_encoder", "unet")}
    log.info(
        "network: %d modules (%d text encoder, %d U-Net), %.1f million weights",
        sum(counts.values()),
        counts["text_encoder"],
        counts["unet"],
        sum(p.numel() for p in network.parameters()) / 1e6,
    )
    return network


def _groups(config: Config, network: Network) -> list[dict[str, Any]]:
    rates = {"text_encoder": text_encoder_rate(config), "unet": unet_rate(config)}
    groups = [{"name": part, "params": network.parameters_of(part), "lr": rate} for part, rate in rates.items()]
    return [group for group in groups if group["params"]]


def memory_bytes(device: torch.device) -> int:
    """The most memory used so far: of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)
