"""Combinations of settings that cannot work, or that surely were not meant."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from trainer.errors import Problem
from trainer.models.facts import FAMILIES, UNCLAIMED, Family, Layout
from trainer.schema import blocks
from trainer.schema.algorithms import USES
from trainer.schema.optimizers import SCHEDULERS

if TYPE_CHECKING:
    from trainer.schema import Config
    from trainer.schema.optim import Optim


MOST_RANK = 4096
LONGEST_NAME = 200
"""Bytes of an output name: file systems allow 255, of which a step, "state" and a temporary ending take up to 40."""


def conflicts(config: Config) -> Iterator[Problem]:
    """Each bad combination; the message names both controls. Errors refuse the start."""
    network, training = config.network, config.training
    if network.dim_from_weights and not network.weights:
        yield _problem(
            "dim_from_weights",
            "needs a file in LoRA network weights (network_weights), which is empty. Name one or switch it off.",
        )
    for key, rank in (("network_dim", network.rank), ("conv_dim", network.conv_rank)):
        if rank > MOST_RANK and network.type != "LyCORIS/LoKr" and not network.dim_from_weights:
            yield _problem(
                key,
                f"{rank} is more than a layer of LoRA type (LoRA_type) {network.type} can use; it must be "
                f"{MOST_RANK} or less. Only LyCORIS/LoKr takes such a number, for whole matrices.",
            )
    yield from _units(config)
    if not network.dim_from_weights and network.alpha > network.rank:
        yield _problem(
            "network_alpha",
            f"{network.alpha:g} is larger than Network Rank ({network.rank}), so the update is scaled up by "
            f"{network.alpha / network.rank:g}; usually it is at most the rank.",
            "warning",
        )
    yield from _blocks(config)
    if network.reach.startswith("unet-") and unet_rate(config) == 0:
        yield _problem(
            "LyCORIS_preset",
            f'"{network.reach}" trains the U-Net alone, and Unet learning rate (unet_lr) is 0, so nothing would be '
            "trained. Change one of the two.",
        )
    for key, on, precision in (
        ("full_fp16", training.full_fp16, "fp16"),
        ("full_bf16", training.full_bf16, "bf16"),
    ):
        if on and training.precision != precision:
            yield _problem(
                key,
                f'needs Mixed precision (mixed_precision) {precision}, which is "{training.precision}". '
                "Change it, or switch this off.",
            )
    if unet_rate(config) == 0 and text_encoder_rate(config) == 0:
        yield _problem(
            "unet_lr",
            "and Text Encoder learning rate (text_encoder_lr) are both 0, so nothing would be trained. Set one of them.",
        )
    if unet_rate(config) == 0 and text_encoder_rate(config) and _ends_text_encoder(config):
        yield _problem(
            "stop_text_encoder_training",
            "ends the training of the text encoder, and Unet learning rate (unet_lr) is 0, so nothing would be trained "
            "from there on. Set it to 0, or the rate above 0.",
        )
    if config.optim.goes_back and not config.saving.state:
        yield _problem(
            "go_back_on_nan",
            "needs Save training state (save_state), which is off, so there would be no state to go back to. Switch it "
            "on, or this off.",
        )
    yield from _processes(config)
    yield from _optimizer(config)
    yield from _objective(config)
    yield from _family(config)
    yield from cached_states(config)
    yield from _base_weights(config)
    in_range = config.data.buckets and not config.data.no_upscale
    if in_range and config.data.max_bucket_side and config.data.min_bucket_side > config.data.max_bucket_side:
        yield _problem(
            "min_bucket_reso",
            f"{config.data.min_bucket_side} is larger than Maximum bucket resolution ({config.data.max_bucket_side}).",
        )
    if config.data.cache_to_disk and not config.data.cache_latents:
        yield _problem(
            "cache_latents_to_disk",
            "needs Cache latents (cache_latents), which is off. Switch both on or both off.",
        )
    for key, on in (
        ("color_aug", config.data.color),
        ("random_crop", config.data.random_crop),
    ):
        if on and config.data.cache_latents:
            yield _problem(
                key,
                "changes the image at each read, which Cache latents (cache_latents) leaves no room for. "
                "Switch one of the two off.",
            )
    if config.saving.format != "safetensors":
        yield _problem(
            "save_model_as",
            f'"{config.saving.format}" files can hide programs; safetensors is written instead.',
            "warning",
        )
    if not config.saving.name or any(c in '/\\:*?"<>|' or c < " " for c in config.saving.name):
        yield _problem(
            "output_name",
            f'"{config.saving.name}" cannot be a file name; use letters, digits, blanks, dots, - and _.',
        )
    if (size := len(config.saving.name.encode(errors="replace"))) > LONGEST_NAME:
        message = (
            f'"{config.saving.name}" has {size} bytes, of which file systems leave room for {LONGEST_NAME}. Shorten it.'
        )
        yield _problem("output_name", message)
    if not config.objective.noise_offset and config.objective.adaptive_noise_scale:
        yield _problem(
            "adaptive_noise_scale",
            "does nothing while Noise offset (noise_offset) is 0.",
            "warning",
        )
    if training.attention == "none" and training.checkpointing is False and config.data.resolution[0] >= 1024:
        yield _problem(
            "xformers",
            '"none" at 1024 pixels needs very much memory; sdpa gives the same result with far less.',
            "warning",
        )


def idle(config: Config) -> Iterator[tuple[str, str]]:
    """Controls that have no effect with the others' values, and why; beside those whose own declaration says `when`."""
    network, saving, training, optim = config.network, config.saving, config.training, config.optim
    of_text_encoder = "stop_text_encoder_training loraplus_text_encoder_lr_ratio"
    of_blocks = " ".join(field.alias or "" for field in type(config.blocks).model_fields.values())
    rows: tuple[tuple[object, str, str], ...] = (
        (not config.folders.regularisation, "prior_loss_weight", "Regularisation folder (reg_data_dir) is empty"),
        (
            not saving.every_n_steps,
            "save_last_n_steps save_last_n_steps_state",
            "Save every N steps (save_every_n_steps) is 0",
        ),
        (
            not saving.every_n_epochs,
            "save_last_n_epochs save_last_n_epochs_state",
            "Save every N epochs (save_every_n_epochs) is 0",
        ),
        (not unet_rate(config), f"loraplus_unet_lr_ratio {of_blocks}", "Unet learning rate (unet_lr) is 0"),
        (not text_encoder_rate(config), of_text_encoder, "Text Encoder learning rate (text_encoder_lr) is 0"),
        (
            network.reach.startswith("unet-"),
            f"text_encoder_lr {of_text_encoder}",
            f"LyCORIS Preset (LyCORIS_preset) {network.reach} leaves the text encoder alone",
        ),
        (training.max_epochs, "epoch", "Max train epoch (max_train_epochs) goes before it"),
        (training.max_steps, "epoch max_train_epochs", "Max train steps (max_train_steps) goes before it"),
        (optim.warmup_steps, "lr_warmup", "LR warmup steps (lr_warmup_steps) goes before it"),
        (
            rates_of_their_own(config),
            "learning_rate",
            "Unet learning rate (unet_lr) and Text Encoder learning rate (text_encoder_lr) go before it. Set those, or "
            "empty them",
        ),
    )
    for is_so, keys, reason in rows:
        if is_so:
            yield from ((key, reason) for key in keys.split())


def claimed_family(config: Config) -> Family:
    """The family that the model's switches claim. What the file says otherwise is refused before the start."""
    return next(iter(_claimed(config)), UNCLAIMED)


def _claimed(config: Config) -> list[Family]:
    return [family for family in FAMILIES.values() if family.switch and getattr(config.model, family.switch)]


def _family(config: Config) -> Iterator[Problem]:
    """What cannot be meant about the base model's family."""
    from trainer.schema import PARAMETERS  # late, as in _problem

    model, family = config.model, claimed_family(config)
    for one, other in pairwise(_claimed(config)):
        what = f"and {PARAMETERS[other.switch].label} ({other.switch}) are both on, and a model is of one family."
        yield _problem(one.switch, f"{what} Switch one of them off.")
    if not family.clip_skip and config.captions.clip_skip > 1:
        yield _problem(
            "clip_skip",
            f"{config.captions.clip_skip} has no effect on {family.title}, which always takes the last layer but one.",
            "warning",
        )
    if config.objective.zero_terminal_snr and not model.v_parameterization:
        yield _problem(
            "zero_terminal_snr",
            "needs v_parameterization (v_parameterization), which is off: from pure noise, the noise cannot teach "
            "anything. Switch this off, or choose a model with v-prediction.",
        )


def cached_states(config: Config) -> Iterator[Problem]:
    """What keeps the text encoders' answers from being the same at each read."""
    captions, key = config.captions, "sdxl_cache_text_encoder_outputs"
    if captions.cache_states_to_disk and not captions.cache_states:
        yield _problem(
            "cache_text_encoder_outputs_to_disk",
            f"needs Cache text encoder outputs ({key}), which is off. Switch both on or both off.",
        )
    if not captions.cache_states:
        return
    if text_encoder_rate(config) and not config.network.reach.startswith("unet-"):
        yield _problem(
            key,
            "keeps what the text encoder says before training, and Text Encoder learning rate (text_encoder_lr) is "
            f"{text_encoder_rate(config):g}, so that it would be trained. Set that to 0, or switch this off.",
        )
    for other, on in (
        ("shuffle_caption", captions.shuffle),
        ("caption_dropout_rate", captions.dropout_rate),
        ("caption_dropout_every_n_epochs", captions.dropout_every_n_epochs),
        ("no_token_padding", captions.no_padding),
    ):
        if on:
            yield _problem(
                other,
                f"makes captions another at each read, which Cache text encoder outputs ({key}) leaves no room for. "
                "Switch one of the two off.",
            )


def _base_weights(config: Config) -> Iterator[Problem]:
    """What cannot be meant about how the frozen base model is kept."""
    training = config.training
    bits = training.base_bits != "16"
    for key, on in (("fp8_base", training.fp8_base), ("fp8_base_unet", training.fp8_base_unet), ("base_weights", bits)):
        if on and training.precision == "no":
            yield _problem(
                key,
                'needs Mixed precision (mixed_precision) fp16 or bf16, which is "no". Change it, or switch this off.',
            )
    for key, on in (("fp8_base", training.fp8_base), ("fp8_base_unet", training.fp8_base_unet)):
        if on and bits:
            yield _problem(
                key,
                f'and Base weights (base_weights) "{training.base_bits}" both say how the U-Net is kept. Choose one.',
            )


def _units(config: Config) -> Iterator[Problem]:
    """Whether the ranks can be cut into DyLoRA's units. Where they are a file's, the check of the file tells."""
    network, blocks = config.network, config.blocks
    if network.dim_from_weights:
        return
    for key, label, ranks in (
        ("network_dim", "Network Rank", (network.rank,)),
        ("conv_dim", "Convolution Rank", (network.conv_rank,) if "conv_dim" in USES[network.type] else ()),
        ("block_dims", "Block dims", blocks.ranks or ()),
        ("conv_block_dims", "Conv dims", blocks.conv_ranks or ()),
    ):
        for rank in sorted({rank for rank in ranks if rank % network.unit}):
            yield _problem(
                "unit",
                f"{network.unit} does not divide {label} ({key}) {rank}, and whole units of ranks are trained. "
                f"Choose a number that does, for instance {math.gcd(rank, network.unit)}, or change the rank.",
            )


def _blocks(config: Config) -> Iterator[Problem]:
    """What cannot be meant about the U-Net's blocks and the convolutions."""
    network, settings = config.network, config.blocks
    layout = claimed_family(config).blocks
    for key, numbers in (
        ("block_dims", settings.ranks),
        ("block_alphas", settings.alphas),
        ("conv_block_dims", settings.conv_ranks),
        ("conv_block_alphas", settings.conv_alphas),
    ):
        if numbers is not None and len(numbers) != layout.total and not network.dim_from_weights:
            yield _problem(key, f"needs {layout.total} numbers, one a block of the U-Net; {len(numbers)} were given.")
    for key, weights, count in (
        ("down_lr_weight", settings.down_weights, layout.down),
        ("mid_lr_weight", settings.mid_weights, layout.middle),
        ("up_lr_weight", settings.up_weights, layout.up),
    ):
        if weights and not weights.curve and len(weights.numbers) != count:
            rest = "the missing ones count as 1" if len(weights.numbers) < count else "the rest is left aside"
            yield _problem(
                key, f'has {len(weights.numbers)} numbers for {count} blocks ("{weights}"); {rest}.', "warning"
            )
    rates = blocks.rate_weights(settings, layout)
    if settings.zero_threshold and rates is None:
        yield _problem(
            "block_lr_zero_threshold",
            "does nothing without Down, Mid or Up LR weights (down_lr_weight, mid_lr_weight, up_lr_weight).",
            "warning",
        )
    text_encoder_rests = "" if text_encoder_rate(config) else "Text Encoder learning rate (text_encoder_lr) is 0"
    if _ends_text_encoder(config):
        text_encoder_rests = "Stop text encoder training (stop_text_encoder_training) ends that of the text encoder"
    if text_encoder_rests and unet_rate(config) and (key := _leaving_every_block_out(config, layout)):
        yield _problem(
            key,
            f"leaves out every block of the U-Net that has layers to train, and {text_encoder_rests}, so nothing would be trained.",
        )
    convolutions = "conv_dim" in USES[network.type]
    if settings.conv_alphas and not (settings.conv_ranks or convolutions or network.dim_from_weights):
        yield _problem(
            "conv_block_alphas",
            "needs Conv dims (conv_block_dims), or LoRA type (LoRA_type) Kohya LoCon.",
        )
    if convolutions and not network.dim_from_weights and network.conv_alpha > network.conv_rank > 0:
        yield _problem(
            "conv_alpha",
            f"{network.conv_alpha:g} is larger than Convolution Rank ({network.conv_rank}), so the update is scaled up "
            f"by {network.conv_alpha / network.conv_rank:g}; usually it is at most the rank.",
            "warning",
        )


def _ends_text_encoder(config: Config) -> bool:
    """Whether the text encoder is not trained to the end."""
    return 0 < config.optim.stop_text_encoder_percent < 100


def _leaving_every_block_out(config: Config, layout: Layout) -> str:
    """The control by which no block of the U-Net would have a module; empty where one has."""
    settings, network = config.blocks, config.network
    rates = blocks.rate_weights(settings, layout) or [1.0] * layout.total
    conv_rank = network.conv_rank if "conv_dim" in USES[network.type] else 0
    linear = settings.ranks or (network.rank,) * layout.total
    conv = settings.conv_ranks or (conv_rank,) * layout.total
    inner = range(layout.edge + 1, layout.total - layout.edge)  # the first is the layer that the latents enter by
    if network.dim_from_weights or len(linear) != layout.total or len(conv) != layout.total:
        return "" if any(rates[block] for block in inner) else "up_lr_weight"
    # With convolutions come the linear layers of blocks without attention.
    reached = inner if conv_rank or settings.conv_ranks else layout.attention
    sizes = {block: linear[block] if block in reached else 0 for block in inner}
    if not any(sizes[block] or conv[block] for block in inner):
        return "block_dims"
    return "" if any(rates[block] and (sizes[block] or conv[block]) for block in inner) else "up_lr_weight"


def _processes(config: Config) -> Iterator[Problem]:
    """What several processes cannot do yet, and GPUs that are not told right."""
    count, ids = config.training.processes, config.training.gpus.replace(" ", "").split(",")
    if config.training.gpus and not (all(one.isascii() and one.isdigit() for one in ids) and len(set(ids)) == len(ids)):
        yield _problem(
            "gpu_ids", f'"{config.training.gpus}" is not allowed; it must be numbers from 0, each once, like 0,2.'
        )
    elif config.training.gpus and len(ids) < count:
        yield _problem(
            "gpu_ids",
            f"names {len(ids)} GPUs, and Number of processes (num_processes) is {count}. Name more, or lower that.",
        )
    for key, on in (
        ("go_on_with_less_memory", config.training.goes_on_with_less),
        ("go_back_on_nan", config.optim.goes_back),
    ):
        if on and count > 1:
            yield _problem(
                key,
                f"works with one process, and Number of processes (num_processes) is {count}. Switch this off; a state "
                "to go on from is kept all the same.",
            )


def _optimizer(config: Config) -> Iterator[Problem]:
    """What cannot be meant about the optimizer, its arguments, rates and schedule."""
    optim, row = config.optim, config.optim.row
    unknown = [name for name in optim.arguments if name not in row.valid]
    if unknown:
        yield _problem(
            "optimizer_args",
            f"Optimizer (optimizer) {optim.optimizer} has no argument {', '.join(unknown)}; "
            f"it knows {', '.join(row.valid)}.",
        )
    if optim.optimizer == "DAdaptation":
        yield _problem(
            "optimizer",
            "DAdaptAdam is used, which the authors of DAdaptation made of it. For the first draft itself choose "
            "DAdaptAdamPreprint.",
            "warning",
        )
    yield from _rates(config)
    if optim.scheduler == "adafactor" and not optim.relative_step:
        what = "relative_step=False" if optim.optimizer == "Adafactor" else f'"{optim.optimizer}"'
        yield _problem(
            "lr_scheduler",
            f'"adafactor" works only where Optimizer (optimizer) "Adafactor" chooses the rate itself; '
            f"here it is {what}. Change one of the two.",
        )
    if not row.schedule_free:
        yield from _scheduler(optim)


def _rates(config: Config) -> Iterator[Problem]:
    """What is odd about the rates, given an optimizer that has its own way with them."""
    optim, row = config.optim, config.optim.row
    parts = (
        ("text_encoder_lr", text_encoder_rate(config)),
        ("unet_lr", unet_rate(config)),
    )
    trained = [part for part in parts if part[1]]
    if optim.relative_step:
        yield _problem(
            "optimizer",
            "Adafactor chooses the rates itself: the learning rates and LR Scheduler (lr_scheduler) have no effect. "
            "For rates of your own set relative_step=False in Optimizer extra arguments (optimizer_args).",
            "warning",
        )
    if not row.adapts or not trained:
        return
    key, rate = trained[0]
    if rate <= 0.1:
        yield _problem(
            key,
            f"{rate:g} is very low for {optim.optimizer}, which finds the rate itself and multiplies it with this. "
            "Set it to 1.",
            "warning",
        )
    if row.one_rate and trained[-1][1] != rate:
        yield _problem(
            key,
            f"{rate:g} differs from Unet learning rate (unet_lr), {trained[-1][1]:g}; {optim.optimizer} has one "
            f"rate for all, and uses {rate:g}. Make both 1.",
            "warning",
        )
    factors = (
        ("down_lr_weight", config.blocks.down_weights),
        ("mid_lr_weight", config.blocks.mid_weights),
        ("up_lr_weight", config.blocks.up_weights),
        ("loraplus_lr_ratio", optim.up_ratio),
        ("loraplus_unet_lr_ratio", optim.unet_up_ratio),
        ("loraplus_text_encoder_lr_ratio", optim.text_encoder_up_ratio),
    )
    for key, value in factors:
        if row.one_rate and value:
            yield _problem(
                key,
                f"needs several rates, and Optimizer (optimizer) {optim.optimizer} has one for all. "
                "Leave it empty, or choose another optimizer.",
            )


def _scheduler(optim: Optim) -> Iterator[Problem]:
    name, given = optim.scheduler, optim.scheduler_arguments
    key = "lr_scheduler_args"
    valid = SCHEDULERS[name].split()
    unknown = [argument for argument in given if argument not in valid]
    if unknown:
        knows = f"it knows {', '.join(valid)}" if valid else "it takes none"
        yield _problem(key, f"LR Scheduler (lr_scheduler) {name} has no argument {', '.join(unknown)}; {knows}.")
    needed = {
        "piecewise_constant": (("step_rules",), 'step_rules="1:100,0.1"'),
        "warmup_stable_decay": (("num_decay_steps",), "num_decay_steps=100"),
        "cosine_with_min_lr": (("min_lr_rate", "min_lr"), "min_lr_rate=0.1"),
    }
    if name in needed and not any(argument in given for argument in needed[name][0]):
        names, example = needed[name]
        yield _problem(
            "lr_scheduler",
            f'"{name}" needs {" or ".join(names)} in LR scheduler extra arguments (lr_scheduler_args), '
            f"for instance {example}.",
        )


def _objective(config: Config) -> Iterator[Problem]:
    """What cannot be meant about noise and loss."""
    objective, velocity = config.objective, config.model.v_parameterization
    if objective.max_timestep and objective.min_timestep > objective.max_timestep:
        yield _problem(
            "min_timestep",
            f"{objective.min_timestep} is larger than Max Timestep (max_timestep), {objective.max_timestep}.",
        )
    if objective.scale_v_loss and not velocity:
        yield _problem(
            "scale_v_pred_loss_like_noise_pred",
            "is for models that predict velocity; v_parameterization (v_parameterization) is off. Switch this off.",
        )
    if objective.v_like_loss and velocity:
        yield _problem(
            "v_pred_like_loss",
            "is for models that predict noise; v_parameterization (v_parameterization) is on. Set it to 0.",
        )
    if objective.debiased and objective.min_snr_gamma:
        yield _problem(
            "debiased_estimation_loss",
            "and Min SNR gamma (min_snr_gamma) pull in opposite directions. Use one of the two.",
            "warning",
        )
    for key, random, of, strength in (
        (
            "noise_offset_random_strength",
            objective.noise_offset_random and objective.noise_type == "Original",
            "Noise offset (noise_offset)",
            objective.noise_offset,
        ),
        (
            "ip_noise_gamma_random_strength",
            objective.ip_noise_gamma_random,
            "IP noise gamma (ip_noise_gamma)",
            objective.ip_noise_gamma,
        ),
    ):
        if random and not strength:
            yield _problem(key, f"does nothing while {of} is 0.", "warning")


def _problem(key: str, message: str, severity: Literal["error", "warning"] = "error") -> Problem:
    from trainer.schema import problem_with  # late: the schema is made with the help of this module

    return problem_with(key, message, severity)


def unet_rate(config: Config) -> float:
    """The U-Net's learning rate: its own, or the general one where that is empty."""
    own = config.optim.unet_lr
    return config.optim.learning_rate if own is None else own


def rates_of_their_own(config: Config) -> bool:
    """Whether all parts have a learning rate, so that the general one is nobody's."""
    optim = config.optim
    both = optim.unet_lr is not None and optim.text_encoder_lr is not None
    # The lowest rate of that schedule is a share of it.
    return both and not optim.relative_step and optim.scheduler != "cosine_with_min_lr"


def text_encoder_rate(config: Config) -> float:
    """The text encoder's learning rate: its own, or the general one where that is empty."""
    own = config.optim.text_encoder_lr
    return config.optim.learning_rate if own is None else own
