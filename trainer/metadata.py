"""What a LoRA file says about itself: the `ss_*` and `modelspec.*` entries of its header.

Names and formats are those that sd-scripts writes and that the web UIs, model managers and
metadata editors read: every value is text; lists and tables are JSON; what is unset is "None".
Paths are never stored, only their last part. One entry is this program's own: all settings (trainer/lora/settings.py).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any

from trainer.data.buckets import Placement
from trainer.data.captions import tag_frequency
from trainer.data.folders import Dataset
from trainer.length import Length
from trainer.lora import settings
from trainer.lora.recognise import by_layer, convolutions
from trainer.models.facts import Family
from trainer.networks import Network
from trainer.networks.blocks import RANKED, settings_of_file
from trainer.paths import base_model, resolve
from trainer.schema import Config
from trainer.schema.algorithms import TYPES, USES
from trainer.schema.model import Saving
from trainer.schema.rules import text_encoder_rate, unet_rate

# What sd-scripts writes for features that are off.
UNUSED = {
    "ss_caption_tag_dropout_rate": "0.0",
    "ss_face_crop_aug_range": "None",
    "ss_lowram": "False",
}


@dataclass(frozen=True)
class Description:
    """The part of the metadata that is the same in every file of a run."""

    fixed: Mapping[str, str]
    started: float = field(default_factory=time.time)

    def at(self, step: int, epoch: int, title: str) -> dict[str, str]:
        """The metadata of a file written after `step`, without the hashes of its content."""
        now = time.time()
        return {
            **self.fixed,
            "ss_training_started_at": str(self.started),
            "ss_training_finished_at": str(now),
            "ss_steps": str(step),
            "ss_epoch": str(epoch),
            "modelspec.title": self.fixed.get("modelspec.title", title),
            "modelspec.date": datetime.fromtimestamp(now, UTC).replace(microsecond=0, tzinfo=None).isoformat(),
        }


def model_files(config: Config) -> Callable[[], dict[str, str]]:
    """Begin to work out the names and hashes of base model and VAE; the answer waits for them.

    Reading all of a model takes seconds, and from here on goes on beside other work, which finds the file in memory.
    """
    found: Future[dict[str, str]] = Future()

    def work() -> None:
        try:
            vae = _file("vae", resolve(config.model.vae)) if config.model.vae else {}
            found.set_result(_file("sd_model", base_model(config.model.path)) | vae)
        except OSError as error:
            found.set_exception(error)

    Thread(target=work, name="hashes of the model files", daemon=True).start()  # a stop does not wait for it
    return found.result


def describe(
    config: Config,
    *,
    family: Family,
    seed: int,
    length: Length,
    network: Network,
    precision: str,
    dataset: Dataset,
    placements: Sequence[Placement],
    repeats: Sequence[int],
    files: Mapping[str, str],
) -> Description:
    """Everything about a run that its files should tell.

    `precision`: the one that it computes in; `repeats`: reads an epoch of each picture; `files`: `model_files`.
    """
    config = _as_trained(config, network, precision)
    training, optim, data, captions = config.training, config.optim, config.data, config.captions
    noise = config.objective
    prediction = "v_prediction" if config.model.v_parameterization else "epsilon"
    multires = noise.noise_type == "Multires" and noise.multires_iterations > 0
    original = noise.noise_type == "Original" and noise.noise_offset > 0
    timesteps = noise.min_timestep, noise.max_timestep or 1000
    arguments = ",".join(f"{k}={v}" for k, v in optim.arguments.items())
    seen = {
        reg: sum(r for p, r in zip(dataset.pictures, repeats, strict=True) if p.regularisation == reg)
        for reg in (False, True)
    }
    sizes = _sizes(network) if config.network.dim_from_weights else {}
    arguments_of_network = _network_arguments(config, sizes)
    chooses_rates = optim.relative_step
    values: dict[str, Any] = {
        "ss_session_id": str(int.from_bytes(hashlib.blake2b(str(time.time_ns()).encode()).digest()[:4], "big")),
        "ss_output_name": config.saving.name,
        "ss_learning_rate": None if chooses_rates else optim.learning_rate,
        "ss_unet_lr": None if chooses_rates else unet_rate(config),
        "ss_text_encoder_lr": None if chooses_rates else text_encoder_rate(config),
        "ss_num_train_images": seen[False],
        "ss_num_reg_images": seen[True],
        "ss_num_batches_per_epoch": length.batches_per_epoch,
        "ss_num_epochs": length.epochs,
        "ss_max_train_steps": length.total_steps,
        "ss_gradient_checkpointing": training.checkpointing,
        "ss_gradient_accumulation_steps": training.accumulation,
        "ss_lr_warmup_steps": optim.warmup_of(length.total_steps),
        "ss_lr_scheduler": "adafactor" if chooses_rates else optim.scheduler,
        "ss_network_module": TYPES[config.network.type].program,
        "ss_network_dim": sizes.get("network_dim", config.network.rank),
        "ss_network_alpha": sizes.get("network_alpha", config.network.alpha),
        "ss_network_dropout": config.network.dropout or None,
        **({"ss_network_args": json.dumps(arguments_of_network)} if arguments_of_network else {}),
        "ss_scale_weight_norms": config.network.max_norm or None,
        "ss_mixed_precision": training.precision,
        "ss_full_fp16": training.full_fp16,
        **family.entries(prediction),
        "ss_fp8_base": training.fp8_base,
        "ss_fp8_base_unet": training.fp8_base_unet,
        "ss_zero_terminal_snr": noise.zero_terminal_snr,
        "ss_clip_skip": captions.clip_skip,
        "ss_max_token_length": captions.max_tokens if captions.max_tokens > 75 else None,
        "ss_cache_latents": data.cache_latents,
        "ss_seed": seed,
        "ss_noise_offset": noise.noise_offset if original else None,
        "ss_adaptive_noise_scale": noise.adaptive_noise_scale if original else None,
        "ss_noise_offset_random_strength": original and noise.noise_offset_random,
        "ss_ip_noise_gamma": noise.ip_noise_gamma or None,
        "ss_ip_noise_gamma_random_strength": noise.ip_noise_gamma_random,
        "ss_loss_type": noise.loss_type,
        "ss_huber_schedule": noise.huber_schedule,
        "ss_huber_c": noise.huber_c,
        "ss_huber_scale": noise.huber_scale,
        "ss_debiased_estimation": noise.debiased,
        "ss_multires_noise_iterations": noise.multires_iterations if multires else None,
        "ss_multires_noise_discount": (noise.multires_discount or 0.3) if multires else None,
        "ss_training_comment": config.saving.comment or None,
        "ss_optimizer": optim.optimizer + (f"({arguments})" if arguments else ""),
        "ss_max_grad_norm": optim.max_grad_norm,
        "ss_caption_dropout_rate": captions.dropout_rate,
        "ss_caption_dropout_every_n_epochs": captions.dropout_every_n_epochs,
        "ss_prior_loss_weight": training.prior_loss_weight,
        "ss_min_snr_gamma": noise.min_snr_gamma or None,
        "ss_batch_size_per_device": training.batch_size,
        "ss_total_batch_size": training.batch_of_all * training.accumulation,
        "ss_resolution": data.resolution,
        "ss_color_aug": data.color,
        "ss_flip_aug": data.flip,
        "ss_random_crop": data.random_crop,
        "ss_shuffle_caption": captions.shuffle,
        "ss_keep_tokens": captions.keep_tokens,
        "ss_enable_bucket": data.buckets,
        "ss_bucket_no_upscale": data.no_upscale,
        "ss_min_bucket_reso": data.min_bucket_side,
        "ss_max_bucket_reso": data.max_bucket_side,
        "ss_tag_frequency": json.dumps(tag_frequency(dataset)),
        settings.ENTRY: settings.written(config),
        "ss_bucket_info": json.dumps(_bucket_info(placements, repeats, enabled=data.buckets)),
        "ss_dataset_dirs": json.dumps(_folders(dataset, regularisation=False)),
        "ss_reg_dataset_dirs": json.dumps(_folders(dataset, regularisation=True)),
        **files,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family.architectures[prediction]}/lora",
        "modelspec.implementation": family.implementation,
        "modelspec.implementation_version": f"lorawright/{version('lorawright')}",
        "modelspec.resolution": f"{data.resolution[0]}x{data.resolution[1]}",
        "modelspec.prediction_type": "v" if config.model.v_parameterization else "epsilon",
        **{f"modelspec.{name}": text for name, text in _words(config.saving).items() if text},
        **({"modelspec.encoder_layer": captions.clip_skip} if captions.clip_skip > 1 else {}),
        **({"modelspec.timestep_range": "{},{}".format(*timesteps)} if timesteps != (0, 1000) else {}),
        **UNUSED,
    }
    return Description({key: str(value) for key, value in values.items()})


def _words(saving: Saving) -> dict[str, str]:
    """What the user says about the LoRA, by modelspec's names."""
    return {
        "title": saving.title,
        "author": saving.author,
        "description": saving.description,
        "license": saving.license,
        "tags": saving.tags,
    }


def _as_trained(config: Config, network: Network, precision: str) -> Config:
    """The settings with what the machine, or the file that ranks were taken from, made of them."""
    made: dict[str, Any] = {"training": config.training.model_copy(update={"precision": precision})}
    if config.network.dim_from_weights:
        made["network"] = settings_of_file(config.network, network.tensors())
        sizes = ("ranks", "alphas", "conv_ranks", "conv_alphas")
        made["blocks"] = config.blocks.model_copy(update=dict.fromkeys(sizes))
    return config.model_copy(update=made)


def _sizes(network: Network) -> dict[str, str]:
    """Rank and alpha of what is trained, by preset key: the number, or "Dynamic" where layers differ, as sd-scripts has it."""
    layers = by_layer(network.tensors())
    large = convolutions(layers)
    told = {}
    for names, rank, alpha in (
        (layers.keys() - large, "network_dim", "network_alpha"),
        (large, "conv_dim", "conv_alpha"),
    ):
        some = [layers[name] for name in names]
        ranks = {roles[role].shape[at] for roles in some for role, at in RANKED.items() if role in roles}
        alphas = {float(roles["alpha"]) for roles in some if "alpha" in roles}
        for key, numbers in ((rank, ranks), (alpha, alphas)):
            if numbers:
                told[key] = f"{numbers.pop():g}" if len(numbers) == 1 else "Dynamic"
    return told


def _network_arguments(config: Config, sizes: Mapping[str, str]) -> dict[str, str | float]:
    """What was set of the network beyond rank and alpha, by the names and in the form of sd-scripts.

    `sizes`: those of a file that they were taken from.
    """
    settings, blocks, optim = config.network, config.blocks, config.optim
    convolutions = "conv_dim" in USES[settings.type]
    algo = TYPES[settings.type].algo
    given = {
        **({"algo": algo, "preset": settings.reach} if algo else {}),
        "factor": settings.factor if settings.factor > 0 else None,
        "decompose_both": settings.decompose_both,
        "use_tucker": settings.tucker or settings.cp,
        "use_scalar": settings.scalar,
        "dora_wd": settings.dora,
        "train_on_input": settings.on_input if "train_on_input" in USES[settings.type] else None,
        "constraint": settings.constraint,
        "rescaled": settings.rescaled,
        "rank_dropout_scale": settings.rank_dropout_scale,
        "train_norm": settings.norms,
        "unit" if not algo else "block_size": settings.unit if "unit" in USES[settings.type] else None,
        "conv_dim": sizes.get("conv_dim") if sizes else str(settings.conv_rank) if convolutions else None,
        "conv_alpha": sizes.get("conv_alpha") if sizes else f"{settings.conv_alpha:g}" if convolutions else None,
        "rank_dropout": settings.rank_dropout,
        "module_dropout": settings.module_dropout,
        "down_lr_weight": blocks.down_weights,
        "mid_lr_weight": blocks.mid_weights,
        "up_lr_weight": blocks.up_weights,
        "block_lr_zero_threshold": blocks.zero_threshold,
        "block_dims": _listed(blocks.ranks),
        "block_alphas": _listed(blocks.alphas),
        "conv_block_dims": _listed(blocks.conv_ranks),
        "conv_block_alphas": _listed(blocks.conv_alphas),
        "loraplus_lr_ratio": optim.up_ratio,
        "loraplus_unet_lr_ratio": optim.unet_up_ratio,
        "loraplus_text_encoder_lr_ratio": optim.text_encoder_up_ratio,
    }
    numbers = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in given.items() if value}
    return numbers | ({"dropout": settings.dropout} if settings.dropout else {})


def _listed(numbers: Sequence[float] | None) -> str:
    return ",".join(f"{number:g}" for number in numbers or ())


def _bucket_info(placements: Sequence[Placement], repeats: Sequence[int], *, enabled: bool) -> dict[str, Any] | None:
    if not enabled:
        return None
    counts: Counter[tuple[int, int]] = Counter()
    errors = []
    for placement, count in zip(placements, repeats, strict=True):
        counts[placement.bucket] += count
        wide, bucket = (side[0] / side[1] for side in (placement.resized, placement.bucket))
        errors.append(abs(wide - bucket))
    buckets = {str(i): {"resolution": size, "count": n} for i, (size, n) in enumerate(sorted(counts.items()))}
    return {"buckets": buckets, "mean_img_ar_error": sum(errors) / max(1, len(errors))}


def _folders(dataset: Dataset, *, regularisation: bool) -> dict[str, dict[str, int]]:
    """Each folder's repeats, as its name says them, and images."""
    return {
        subset.path.name: {"n_repeats": subset.repeats, "img_count": subset.images}
        for subset in dataset.subsets
        if subset.regularisation == regularisation
    }


def _file(which: str, path: Path) -> dict[str, str]:
    """Name and hashes of a model file; a folder has a name only."""
    name = {f"ss_{which}_name": path.name}
    if not path.is_file():
        return name
    with path.open("rb") as file:
        whole = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0x100000)
        short = hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
    new = "ss_new_sd_model_hash" if which == "sd_model" else "ss_new_vae_hash"
    return {**name, f"ss_{which}_hash": short, new: whole}
