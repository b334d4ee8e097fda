"""What a LoRA file was trained on and with, and the settings to train so again.

The sources are its tensors, the entry that this program keeps all settings in, and the `ss_*` entries of its header, which
sd-scripts writes, and so do kohya_ss, this program and others. Values are text there; "None" is what was not set.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from trainer.lora import settings
from trainer.lora.recognise import Lora, recognise
from trainer.models.facts import FAMILIES
from trainer.schema import PARAMETERS
from trainer.schema.algorithms import TYPES, types_using

# Entries that are a setting as it stands: entry → preset key, and the value that "None" means there.
AS_IT_STANDS: Mapping[str, tuple[str, Any]] = {
    "ss_output_name": ("output_name", ""),
    "ss_learning_rate": ("learning_rate", None),
    "ss_unet_lr": ("unet_lr", ""),
    "ss_text_encoder_lr": ("text_encoder_lr", ""),
    "ss_gradient_checkpointing": ("gradient_checkpointing", False),
    "ss_gradient_accumulation_steps": ("gradient_accumulation_steps", 1),
    "ss_lr_scheduler": ("lr_scheduler", "constant"),
    "ss_lr_warmup_steps": ("lr_warmup_steps", 0),
    "ss_network_dim": ("network_dim", 4),
    "ss_network_alpha": ("network_alpha", 1),
    "ss_network_dropout": ("network_dropout", 0),
    "ss_scale_weight_norms": ("scale_weight_norms", 0),
    "ss_mixed_precision": ("mixed_precision", "no"),
    "ss_full_fp16": ("full_fp16", False),
    "ss_v2": ("v2", False),
    "ss_clip_skip": ("clip_skip", 1),
    "ss_max_token_length": ("max_token_length", 75),
    "ss_cache_latents": ("cache_latents", False),
    "ss_seed": ("seed", None),
    "ss_zero_terminal_snr": ("zero_terminal_snr", False),
    "ss_training_comment": ("training_comment", ""),
    "ss_max_grad_norm": ("max_grad_norm", 1.0),
    "ss_caption_dropout_rate": ("caption_dropout_rate", 0),
    "ss_caption_dropout_every_n_epochs": ("caption_dropout_every_n_epochs", 0),
    "ss_prior_loss_weight": ("prior_loss_weight", 1.0),
    "ss_min_snr_gamma": ("min_snr_gamma", 0),
    "ss_noise_offset": ("noise_offset", 0),
    "ss_noise_offset_random_strength": ("noise_offset_random_strength", False),
    "ss_adaptive_noise_scale": ("adaptive_noise_scale", 0),
    "ss_multires_noise_iterations": ("multires_noise_iterations", 0),
    "ss_multires_noise_discount": ("multires_noise_discount", 0),
    "ss_ip_noise_gamma": ("ip_noise_gamma", 0),
    "ss_ip_noise_gamma_random_strength": ("ip_noise_gamma_random_strength", False),
    "ss_debiased_estimation": ("debiased_estimation_loss", False),
    "ss_loss_type": ("loss_type", "l2"),
    "ss_huber_schedule": ("huber_schedule", "snr"),
    "ss_huber_c": ("huber_c", 0.1),
    "ss_huber_scale": ("huber_scale", 1.0),
    "ss_fp8_base": ("fp8_base", False),
    "ss_fp8_base_unet": ("fp8_base_unet", False),
    "ss_batch_size_per_device": ("train_batch_size", 1),
    "ss_color_aug": ("color_aug", False),
    "ss_flip_aug": ("flip_aug", False),
    "ss_random_crop": ("random_crop", False),
    "ss_shuffle_caption": ("shuffle_caption", False),
    "ss_keep_tokens": ("keep_tokens", 0),
    "ss_enable_bucket": ("enable_bucket", False),
    "ss_bucket_no_upscale": ("bucket_no_upscale", False),
    "ss_min_bucket_reso": ("min_bucket_reso", 256),
    "ss_max_bucket_reso": ("max_bucket_reso", None),
    "modelspec.title": ("metadata_title", ""),
    "modelspec.author": ("metadata_author", ""),
    "modelspec.description": ("metadata_description", ""),
    "modelspec.license": ("metadata_license", ""),
    "modelspec.tags": ("metadata_tags", ""),
}
# The same in the network's arguments (`ss_network_args`), by sd-scripts' and lycoris-lora's names.
NETWORK_ARGUMENTS = {
    name: name
    for name in [
        "conv_dim",
        "conv_alpha",
        "rank_dropout",
        "module_dropout",
        "rank_dropout_scale",
        "factor",
        "decompose_both",
        "use_tucker",
        "use_cp",
        "use_scalar",
        "dora_wd",
        "train_on_input",
        "rescaled",
        "train_norm",
        "unit",
        "down_lr_weight",
        "mid_lr_weight",
        "up_lr_weight",
        "block_lr_zero_threshold",
        "block_dims",
        "block_alphas",
        "conv_block_dims",
        "conv_block_alphas",
        "loraplus_lr_ratio",
        "loraplus_unet_lr_ratio",
        "loraplus_text_encoder_lr_ratio",
    ]
} | {"dropout": "network_dropout", "constraint": "constrain", "preset": "LyCORIS_preset"}
# Of a data set that was described in a file of its own (`ss_datasets`).
OF_DATASETS = {
    "batch_size_per_device": "train_batch_size",
    "enable_bucket": "enable_bucket",
    "min_bucket_reso": "min_bucket_reso",
    "max_bucket_reso": "max_bucket_reso",
    "bucket_no_upscale": "bucket_no_upscale",
}
# What no file says, since it names a place on the trainer's disk or a habit of it.
PLACES = ("pretrained_model_name_or_path", "train_data_dir", "reg_data_dir", "vae", "caption_extension")
# Of these nothing depends for the weights that come out.
OF_NO_EFFECT = [
    "output_dir",
    "logging_dir",
    "model_list",
    "save_model_as",
    "cache_latents_to_disk",
    "vae_batch_size",
    "resume",
    "xformers",
    "mem_eff_attn",
    "num_cpu_threads_per_process",
    "gpu_ids",
    "max_data_loader_n_workers",
    "persistent_data_loader_workers",
    "network_weights",
    "dim_from_weights",
    "additional_parameters",
    "cache_text_encoder_outputs_to_disk",
    "max_train_epochs",
    "sdxl_no_half_vae",
]
_WITHOUT_EFFECT = re.compile(r"save_|sample_|log_|wandb_|metadata_")


@dataclass(frozen=True)
class Inspected:
    """What a LoRA file says of itself.

    `about`: what its tensors say. `facts`: (name, value) in words, in order. `tags`: by image folder,
    each tag with how often it was there. `preset`: kohya_ss's keys with the values it was trained with.
    `unsaid`: what the file does not say, in sentences. `defaults`: the controls that stay as they are
    by default, since the file does not say.
    """

    about: Lora
    facts: tuple[tuple[str, str], ...]
    tags: Mapping[str, Mapping[str, int]]
    preset: Mapping[str, Any]
    unsaid: tuple[str, ...]
    defaults: tuple[str, ...]


def inspect(path: Path | str) -> Inspected:
    """What the file was trained on and with. Raises ModelError when it is no LoRA that can be read."""
    lora = recognise(path)
    said = _Metadata(lora.metadata)
    preset = {key: value for key, value in _preset(lora, said).items() if key in PARAMETERS and value is not None}
    unsaid = list(_unsaid(lora, said))
    silent = [key for key in PARAMETERS if key not in preset and _matters(key, preset, said)]
    defaults = tuple(PARAMETERS[key].label for key in silent)
    return Inspected(lora, tuple(_facts(lora, said)), said.tags(), preset, tuple(unsaid), defaults)


def _matters(key: str, preset: Mapping[str, Any], said: _Metadata) -> bool:
    """Whether it is worth telling that a control stays as it is by default.

    What is not among the network's arguments was off.
    """
    if key in (*PLACES, *OF_NO_EFFECT) or _WITHOUT_EFFECT.match(key):
        return False
    if types := types_using(key):
        is_told = bool(said.text("ss_network_module")) and key in NETWORK_ARGUMENTS.values()
        return preset["LoRA_type"] in types and not is_told
    return True


class _Metadata:
    """The header's entries, with what is JSON in them."""

    def __init__(self, entries: Mapping[str, str]) -> None:
        self.entries = entries

    def text(self, key: str) -> str:
        """The entry's text; "" where it is missing or "None"."""
        value = self.entries.get(key, "")
        return "" if value == "None" else value

    def table(self, key: str) -> Any:
        """The entry's JSON; an empty table where it is missing or damaged."""
        try:
            return json.loads(self.text(key) or "{}") or {}
        except ValueError:
            return {}

    def datasets(self) -> list[dict[str, Any]]:
        found = self.table("ss_datasets")
        return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []

    def tags(self) -> dict[str, dict[str, int]]:
        found = self.table("ss_tag_frequency")
        found = found if isinstance(found, dict) else {}
        for one in self.datasets():
            more = one.get("tag_frequency")
            found = found | (more if isinstance(more, dict) else {})
        return {
            str(folder): dict(Counter({tag: n for tag, n in tags.items() if type(n) is int}).most_common())
            for folder, tags in found.items()
            if isinstance(tags, dict)
        }


def _plain(text: str) -> Any:
    """A value as JSON has it: true, 3, 0.5, or the text."""
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _number(key: str, text: str) -> Any:
    """The same; None where a control wants a number and the file says none, as "Dynamic" of ranks that differ."""
    value = _plain(text)
    return None if isinstance(value, str) and PARAMETERS[key].kind in ("integer", "number") else value


def _preset(lora: Lora, said: _Metadata) -> dict[str, Any]:
    preset: dict[str, Any] = {}
    for entry, (key, off) in AS_IT_STANDS.items():
        if entry in said.entries:
            text = said.entries[entry]
            preset[key] = off if text == "None" else text if PARAMETERS[key].kind == "text" else _number(key, text)
    preset |= _length(said)
    preset |= _data(said)
    if said.text("ss_optimizer"):
        preset |= _optimizer(said.text("ss_optimizer"))
    if "ss_noise_offset" in said.entries:
        preset["noise_offset_type"] = "Multires" if preset.get("multires_noise_iterations") else "Original"
    if "lr_warmup_steps" in preset:
        preset["lr_warmup"] = 0  # it would count where there are no steps
    if preset.get("metadata_title") == preset.get("output_name"):
        preset.pop("metadata_title", None)  # which stands there where no title was set
    if sides := re.findall(r"\d+", said.text("modelspec.timestep_range")):
        preset |= {"min_timestep": int(sides[0]), "max_timestep": int(sides[-1])}
    version, prediction = said.text("ss_base_model_version"), said.text("modelspec.prediction_type")
    scheduler, _, first_rate = str(preset.get("lr_scheduler", "")).partition(":")
    if first_rate:  # as sd-scripts tells the rate that Adafactor begins with
        preset |= {"lr_scheduler": scheduler, "learning_rate": _plain(first_rate)}
    for family in FAMILIES.values():
        if family.switch:
            preset[family.switch] = family.name == lora.family or preset.get(family.switch) is True
    preset["v_parameterization"] = version.endswith("_v") or prediction == "v"
    preset |= _network(lora, said) | settings.read(said.text(settings.ENTRY))
    preset |= _by_tensors(lora, preset) | {"LoRA_type": _type(lora, said)}
    kinds = Counter(tensor.dtype for tensor in lora.tensors.values())
    preset["save_precision"] = {"F16": "fp16", "BF16": "bf16"}.get(kinds.most_common(1)[0][0], "float")
    return preset


def _network(lora: Lora, said: _Metadata) -> dict[str, Any]:
    """What the network's arguments say."""
    arguments = said.table("ss_network_args")
    arguments = arguments if isinstance(arguments, dict) else {}
    return {
        key: value if not isinstance(value, str) or PARAMETERS[key].kind == "text" else _number(key, value)
        for name, key in NETWORK_ARGUMENTS.items()
        if key in PARAMETERS and (value := arguments.get(name)) not in (None, "", "None")
    }


def _type(lora: Lora, said: _Metadata) -> str:
    """The LoRA type: by its tensors where only one writes them, else by what the training program called it."""
    arguments = said.table("ss_network_args")
    arguments = arguments if isinstance(arguments, dict) else {}
    module, algo = said.text("ss_network_module"), str(arguments.get("algo", "")).replace("_", "-").lower()
    kept = settings.read(said.text(settings.ENTRY)).get("LoRA_type")
    if kept in TYPES and TYPES[kept].program == module and lora.type in ("", kept):
        return str(kept)
    by_algo = {row.algo: label for label, row in TYPES.items() if row.algo}
    label = lora.type or by_algo.get({"lora": "locon", "": "locon"}.get(algo, algo) if "lycoris" in module else "", "")
    if not label:
        label = next((name for name, row in TYPES.items() if row.program == module != "networks.lora"), "")
    if not label:
        label = "Kohya LoCon" if lora.conv_ranks else "Standard"
    return label


def _by_tensors(lora: Lora, preset: Mapping[str, Any]) -> dict[str, Any]:
    """What the tensors show and the metadata do not say, or say wrongly: a file may have been made smaller since."""
    found: dict[str, Any] = {}
    for key, ranks in (("network_dim", lora.ranks), ("conv_dim", lora.conv_ranks)):
        if len(ranks) == 1 and (rank := next(iter(ranks))) != preset.get(key):
            found[key] = rank
    if "network_dim" in found and len(alphas := _alphas(lora)) == 1:
        found["network_alpha"] = alphas.pop()
    for part, key in (("unet", "unet_lr"), ("text_encoder", "text_encoder_lr")):
        if part not in lora.parts:
            found[key] = 0
    return found


def _length(said: _Metadata) -> dict[str, Any]:
    """Epochs, or steps where they are not what the epochs make."""
    epochs, steps = _plain(said.text("ss_num_epochs")), _plain(said.text("ss_max_train_steps"))
    batches = _plain(said.text("ss_num_batches_per_epoch"))
    accumulation = _plain(said.text("ss_gradient_accumulation_steps")) or 1
    if not isinstance(epochs, int):
        return {"max_train_steps": steps} if isinstance(steps, int) else {}
    by_epochs = epochs * -(-batches // accumulation) if isinstance(batches, int) else None
    return {"epoch": epochs} | ({"max_train_steps": steps} if isinstance(steps, int) and steps != by_epochs else {})


def _data(said: _Metadata) -> dict[str, Any]:
    """Resolution and buckets; of several data sets, the first's."""
    preset: dict[str, Any] = {}
    first = next(iter(said.datasets()), {})
    preset |= {key: first[name] for name, key in OF_DATASETS.items() if first.get(name) is not None}
    resolution = str(first.get("resolution") or said.text("ss_resolution"))
    sides = re.findall(r"\d+", resolution)
    if sides:
        preset["max_resolution"] = f"{sides[0]},{sides[-1]}"
    return preset


def _optimizer(text: str) -> dict[str, Any]:
    """`bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.01,betas=(0.9, 0.99))` → the optimizer and its arguments."""
    name, _, rest = text.partition("(")
    choices = {choice.rpartition(".")[2].lower(): choice for choice in PARAMETERS["optimizer"].choices}
    known = choices.get(name.rpartition(".")[2].lower())
    arguments = re.split(r",(?![^(\[]*[)\]])", rest.removesuffix(")")) if rest else []
    words = " ".join(re.sub(r"\s", "", one) for one in arguments if one.strip())
    return ({"optimizer": known} if known else {}) | {"optimizer_args": words}


def _unsaid(lora: Lora, said: _Metadata) -> list[str]:
    """What must be filled in by hand, with what the file does say of it."""
    model = said.text("ss_sd_model_name")
    told = [
        f"It was {model}" + (f" ({digest})" if (digest := _digest(said)) else "")
        if model
        else "The file does not name it"
    ]
    lines = [f"Enter {PARAMETERS['pretrained_model_name_or_path'].label}: where the base model lies. {told[0]}."]
    folders = ", ".join(_folders(said, "ss_dataset_dirs")) or "not named in the file"
    lines.append(f"Enter {PARAMETERS['train_data_dir'].label}: where the images lie. Their folders were {folders}.")
    if regularisation := _folders(said, "ss_reg_dataset_dirs"):
        lines.append(f"Enter {PARAMETERS['reg_data_dir'].label}: theirs were {', '.join(regularisation)}.")
    if vae := said.text("ss_vae_name"):
        lines.append(f"Enter {PARAMETERS['vae'].label}: it was {vae}.")
    lines.append(f"Enter {PARAMETERS['caption_extension'].label}: how the captions' files end.")
    if said.text("ss_optimizer") and "optimizer" not in _optimizer(said.text("ss_optimizer")):
        lines.append(f"Enter {PARAMETERS['optimizer'].label}: {said.text('ss_optimizer')} is not known here.")
    if not any(entry.startswith("ss_") for entry in said.entries):
        lines.insert(0, "The file says nothing of its training; what stands here follows from its tensors alone.")
    elif len(said.datasets()) > 1:
        lines.append(
            f"It was trained on {len(said.datasets())} data sets with settings of their own; the first's are here."
        )
    if len(lora.ranks) > 1 and _number("network_dim", said.text("ss_network_dim")) is None:
        lines.append(f"Enter {PARAMETERS['network_dim'].label}: its layers have several, {_counts(lora.ranks)}.")
    return lines


def _digest(said: _Metadata) -> str:
    whole = said.text("ss_new_sd_model_hash")
    return f"SHA-256 {whole[:10]}" if whole else f"hash {short}" if (short := said.text("ss_sd_model_hash")) else ""


def _folders(said: _Metadata, entry: str) -> list[str]:
    """Each image folder with its images and repeats."""
    found = said.table(entry)
    return [
        f"{name} ({info.get('img_count', '?')} images × {info.get('n_repeats', '?')})"
        for name, info in (found.items() if isinstance(found, dict) else ())
        if isinstance(info, dict)
    ]


def _facts(lora: Lora, said: _Metadata) -> list[tuple[str, str]]:
    """What to show, in the order of a reader's questions."""
    family = FAMILIES[lora.family].title if lora.family else f"not told (text states {lora.width} wide)"
    length = f"{said.text('ss_steps')} steps" if said.text("ss_steps") else ""
    if said.text("ss_epoch"):
        length += f", {said.text('ss_epoch')} of {said.text('ss_num_epochs') or '?'} epochs"
    rates = ", ".join(
        f"{noun} {said.text(key)}"
        for noun, key in (("U-Net", "ss_unet_lr"), ("text encoder", "ss_text_encoder_lr"))
        if said.text(key)
    )
    facts = {
        "Names": lora.naming,
        "Made for": family,
        "LoRA type": _type(lora, said),
        "Ranks": _counts(lora.ranks) + (f"; 3×3 convolutions {_counts(lora.conv_ranks)}" if lora.conv_ranks else ""),
        "Alphas": _counts(_alphas(lora)),
        "Parts": " and ".join(sorted({"unet": "U-Net", "text_encoder": "text encoder"}[part] for part in lora.parts)),
        "Layers": str(lora.modules),
        "Base model": " ".join(filter(None, (said.text("ss_sd_model_name"), _digest(said)))),
        "VAE": said.text("ss_vae_name"),
        "Images": ", ".join(_folders(said, "ss_dataset_dirs")),
        "Regularisation images": ", ".join(_folders(said, "ss_reg_dataset_dirs")),
        "Resolution": str(_data(said).get("max_resolution", "")).replace(",", " × "),
        "Trained": length,
        "Batch size": said.text("ss_total_batch_size") or said.text("ss_batch_size_per_device"),
        "Learning rates": rates or said.text("ss_learning_rate"),
        "Scheduler": said.text("ss_lr_scheduler"),
        "Optimizer": said.text("ss_optimizer"),
        "Seed": said.text("ss_seed"),
        "Comment": said.text("ss_training_comment"),
        "Written by": said.text("modelspec.implementation_version") or said.text("ss_sd_scripts_commit_hash"),
        "Notes": " ".join(lora.notes),
    }
    return [(name, value) for name, value in facts.items() if value]


def _alphas(lora: Lora) -> set[float]:
    """Every alpha in the file, or those that it has elsewhere."""
    names = [name for name, ours in lora.names.items() if ours.endswith(".alpha")]
    with safe_open(lora.path, framework="pt") as file:
        return {float(file.get_tensor(name)) for name in names} | set(lora.alphas.values())


def _counts(numbers: Any) -> str:
    return ", ".join(f"{number:g}" for number in sorted(set(numbers)))
