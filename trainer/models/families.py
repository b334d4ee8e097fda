"""What a model file or folder is, told from its own tensors and configs. Needs no torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.errors import ModelError
from trainer.models import hub, layout, pickled
from trainer.models.facts import FAMILIES, Family
from trainer.paths import absent, base_model, resolve, shown
from trainer.tensorfile import Header, TensorInfo, header

*_FIRST, _LAST = (family.title for family in FAMILIES.values())
TITLES = f"{', '.join(_FIRST)} or {_LAST}"

UNET = "model.diffusion_model."
FIRST_LAYER = UNET + "input_blocks.0.0.weight"

Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Found:
    """A base model.

    `prediction`: what it says its U-Net answers, "" where it says nothing. `what`: in a sentence. `width`: of the text
    states that its U-Net attends to (SD 1.x: 768). `vae_channels`: of its VAE's innermost level (SD: 512), None where
    not told. `zero_terminal_snr`: whether it says that its last timestep is pure noise. `text_layers`: of its first
    text encoder.
    """

    family: str
    prediction: Literal["", "epsilon", "v_prediction"]
    layout: Literal["diffusers", "single file"]
    what: str
    width: int
    vae_channels: int | None = None
    zero_terminal_snr: bool = False
    text_layers: int = 12

    @property
    def title(self) -> str:
        """In a line: "SDXL, v-prediction, zero terminal SNR". What it does not say of itself is left out."""
        predictions = {"": "", "epsilon": "epsilon prediction", "v_prediction": "v-prediction"}
        snr = "zero terminal SNR" if self.zero_terminal_snr else ""
        return ", ".join(part for part in (FAMILIES[self.family].title, predictions[self.prediction], snr) if part)


def locate(source: str, progress: hub.Progress | None = None) -> Path:
    """The path of the base model that the settings name; empty means the embedded one.

    A model that is named as on huggingface.co is fetched where it is not in its cache: as a whole where `progress` is
    given, otherwise its configs alone. Raises ModelError for what does not exist.
    """
    path = base_model(source)
    if os.path.exists(path):  # noqa: PTH110  answers False where pathlib raises
        return path
    if hub.is_name(source):
        return hub.fetch(source.strip(), progress) if progress else hub.configs(source.strip())
    raise ModelError(_sentence(absent(source.strip() or str(path), "file or folder")))


def detect(path: Path, *, complete: bool = True) -> Found:
    """Which base model `path` is; where not `complete`, a folder may have its configs alone.

    Raises ModelError when it is none, or not one that LoRAs can be trained for here.
    """
    found = _folder(path, complete) if path.is_dir() else _file(path)
    if found.family not in FAMILIES:
        raise ModelError(f'"{shown(path)}" is {found.what}.', f"Choose a base model of {TITLES}.")
    return found


def _file(path: Path) -> Found:
    head = header_of(path)
    tensors = head.tensors
    what = other_than_a_base_model(tensors)
    if what:
        raise ModelError(
            f'"{shown(path)}" is {what}, not a base model.',
            "Name a complete checkpoint: U-Net, VAE and text encoder in one file.",
        )
    name, what = _family(tensors)
    if not name:
        raise ModelError(
            f'"{shown(path)}" is {what}: its {len(tensors)} tensors are those of no known base model'
            f"{f' (the first is {next(iter(tensors))})' if tensors else ''}.",
            f"Choose a base model of {TITLES}.",
        )
    configs = _embedded_configs(path, head)
    prediction, zero_terminal_snr = _said(head, configs)
    if name in FAMILIES:
        _require_all_tensors(path, FAMILIES[name], tensors, configs)
        configs = configs or FAMILIES[name].configs
    return Found(
        name,
        prediction,
        "single file",
        what,
        _width(tensors),
        _vae_channels(tensors),
        zero_terminal_snr,
        _text_layers(configs),
    )


def header_of(path: Path) -> Header:
    """The header of a model's file; only one called .ckpt or .pt is read as PyTorch's checkpoint."""
    return pickled.header(path) if path.suffix.lower() in pickled.ENDINGS else header(path)


def _family(tensors: Tensors) -> tuple[str, str]:
    """The family by its text encoder's names, and what the file is; "" and why where it is of none."""

    def any_of(*starts: str) -> bool:
        return any(name.startswith(starts) for name in tensors)

    if any_of("model.diffusion_model.joint_blocks.", "joint_blocks."):
        return "sd3", "Stable Diffusion 3, which is not supported"
    if any_of("model.diffusion_model.double_blocks.", "double_blocks.", "transformer.single_transformer_blocks."):
        return "flux", "a Flux model, which is not supported"
    if FIRST_LAYER not in tensors:
        return "", "not a Stable Diffusion checkpoint"
    channels = tensors[FIRST_LAYER].shape[1] if len(tensors[FIRST_LAYER].shape) == 4 else 0
    if any_of("conditioner.embedders.0.model."):
        return "sdxl-refiner", REFINER
    width = _width(tensors)
    families = [f for f in FAMILIES.values() if all(any_of(_root(encoder.prefix)) for encoder in f.encoders)]
    if not families:
        families = [family for family in FAMILIES.values() if family.width == width]
    if not families:
        return "", f"a U-Net of unknown kind (its text states are {width} wide)"
    return _with_channels(families[0], channels)


def _root(prefix: str) -> str:
    """ "cond_stage_model.transformer." of "cond_stage_model.transformer.text_model."."""
    return prefix.removesuffix("text_model.")


def _with_channels(family: Family, channels: int) -> tuple[str, str]:
    if channels == 9:
        return f"{family.name}-inpainting", (
            f"{family.what} for inpainting (9 input channels: latents, mask and masked latents; training has the first 4)"
        )
    if channels != 4:
        return f"{family.name}-{channels}", f"{family.what} with {channels} input channels instead of 4"
    return family.name, family.what


def _width(tensors: Tensors) -> int:
    """The last side of the first cross-attention key's weight; 0 without one."""
    for name, tensor in tensors.items():
        if name.startswith(UNET) and name.endswith(".attn2.to_k.weight") and len(tensor.shape) == 2:
            return tensor.shape[1]
    return 0


def _require_all_tensors(path: Path, family: Family, tensors: Tensors, configs: Mapping[str, Any]) -> None:
    """Raises ModelError when a part or a tensor is missing that the configs ask for."""
    roots = {encoder.part: _root(encoder.prefix) for encoder in family.encoders} | {"vae": layout.VAE_PREFIX}
    for part, root in roots.items():
        if not any(name.startswith(root) for name in tensors):
            raise ModelError(
                f'"{shown(path)}" lacks its {family.parts[part]}.',
                "Name a complete checkpoint: U-Net, VAE and text encoder.",
            )
    configs = configs or family.configs
    for part, noun in family.parts.items():
        try:
            _require_modest(configs[part])
            wanted = layout.tables(family, configs, tensors)[part]
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ModelError(
                f'"{shown(path)}" is damaged: the config in its header has no usable {noun}.', "Fetch the file again."
            ) from error
        missing = [name for name in wanted if name not in tensors]
        if missing:
            raise ModelError(
                f'"{shown(path)}" lacks {len(missing)} of the {len(wanted)} tensors of its {noun}, '
                f"the first is {missing[0]}.",
                f"Name a complete checkpoint of {family.title}.",
            )


def _require_modest(config: Mapping[str, Any]) -> None:
    """Raises ValueError for a config whose table of names would fill the memory."""
    counts = [len(config.get("block_out_channels", "1"))]
    for key in ("layers_per_block", "transformer_layers_per_block", "num_hidden_layers"):
        value = config.get(key, 1)
        counts += value if isinstance(value, list) else [value]
    if not all(0 < count <= 100 for count in counts):
        raise ValueError("a count is not in 1 … 100")


def _text_layers(configs: Mapping[str, Any]) -> int:
    count = configs.get("text_encoder", {}).get("num_hidden_layers")
    return count if isinstance(count, int) else 12


def _vae_channels(tensors: Tensors) -> int | None:
    for name in ("first_stage_model.decoder.conv_in.weight", "decoder.conv_in.weight"):
        if name in tensors and len(tensors[name].shape) == 4:
            return tensors[name].shape[0]
    return None


def _embedded_configs(path: Path, head: Header) -> Mapping[str, Any]:
    """The configs that the embedded base model carries in its metadata; elsewhere empty."""
    try:
        configs = json.loads(head.metadata.get("config", "{}"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f'"{shown(path)}" is damaged: its config is not JSON.', "Fetch the file again.") from error
    return configs if isinstance(configs, dict) and "unet" in configs else {}


def _said(head: Header, configs: Mapping[str, Any]) -> tuple[Literal["", "epsilon", "v_prediction"], bool]:
    """What the file says for itself of its prediction, and whether its last timestep is pure noise.

    In its config, in its modelspec metadata, or by empty tensors that are called so, as NoobAI and its children do it.
    """
    scheduler = configs.get("scheduler")
    scheduler = scheduler if isinstance(scheduler, dict) else {}
    said = scheduler.get("prediction_type") or head.metadata.get("modelspec.prediction_type", "")
    if "v_pred" in head.tensors:
        said = "v"
    return _prediction(said), "ztsnr" in head.tensors or scheduler.get("rescale_betas_zero_snr") is True


def _prediction(said: object) -> Literal["", "epsilon", "v_prediction"]:
    if str(said).startswith("v"):
        return "v_prediction"
    return "epsilon" if said == "epsilon" else ""


def other_than_a_base_model(tensors: Tensors) -> str:
    """What a file without a base model's U-Net is, by its tensors' names; empty if not known."""
    if any(name.startswith(UNET) for name in tensors):
        parts = {"cond_stage_model.", "conditioner.", "text_encoders."}
        if FIRST_LAYER in tensors and not any(name.startswith(tuple(parts)) for name in tensors):
            return "a U-Net without text encoder and VAE"
        return ""
    names = " ".join(tensors)
    if re.search(r"\.lora_(down|up|A|B)\b|\.lora\.(down|up)\b|\.hada_w|\.lokr_w|(^| )lora_(unet|te)", names):
        return "a LoRA"
    for start, what in (
        ("control_model.", "a ControlNet"),
        ("controlnet_", "a ControlNet"),
        ("lllite_", "a ControlNet-LLLite"),
        ("image_proj", "an IP-Adapter"),
        ("emb_params", "a textual inversion embedding"),
        ("string_to_param", "a textual inversion embedding"),
    ):
        if any(name.startswith(start) for name in tensors):
            return what
    if "input_blocks.0.0.weight" in tensors or "conv_in.weight" in tensors:
        return "a U-Net without text encoder and VAE"
    if any(re.match(r"(first_stage_model\.)?(encoder|decoder)\.(conv_in|down|up|mid)", name) for name in tensors):
        return "a VAE"
    if any(re.match(r"(text_model|transformer\.text_model|encoder\.block|shared)\b", name) for name in tensors):
        return "a text encoder"
    return ""


REFINER = "the SDXL refiner, which only finishes pictures: LoRAs are trained for the base model"
_PIPELINES = {
    "StableDiffusion3": ("sd3", "Stable Diffusion 3, which is not supported"),
    "Flux": ("flux", "a Flux model, which is not supported"),
}


def _folder(path: Path, complete: bool) -> Found:
    if not (path / "unet").is_dir() and not (path / "model_index.json").is_file():
        raise _no_model_in(path)
    index = _json(path / "model_index.json") if (path / "model_index.json").is_file() else {}
    pipeline = str(index.get("_class_name", ""))
    for start, (family, what) in _PIPELINES.items():
        if pipeline.startswith(start):
            return Found(family, "", "diffusers", what, 0)
    unet = _json(path / "unet" / "config.json")
    width = unet.get("cross_attention_dim")
    if not isinstance(width, int) or "CrossAttn" not in str(unet.get("down_block_types")):
        raise ModelError(
            f'"{shown(path)}" is a model of the kind {pipeline or unet.get("_class_name")}, '
            "whose U-Net attends to no text as Stable Diffusion's does.",
            f"Choose a base model of {TITLES}.",
        )
    if unet.get("addition_embed_type") == "text_time" and not (path / "text_encoder").is_dir():
        return Found("sdxl-refiner", "", "diffusers", REFINER, width)
    family = _most_alike(unet)
    configs = {part: _json(path / part / "config.json") for part in family.parts}
    for part in family.parts if complete else ():
        for file in weight_files(path / part):
            header(file)
    scheduler = path / "scheduler" / "scheduler_config.json"
    said = _json(scheduler) if scheduler.is_file() else {}
    name, what = _with_channels(family, unet.get("in_channels", 4))
    innermost = configs["vae"].get("block_out_channels")
    return Found(
        name,
        _prediction(said.get("prediction_type")),
        "diffusers",
        what,
        width,
        innermost[-1] if isinstance(innermost, list) and innermost else None,
        said.get("rescale_betas_zero_snr") is True,
        _text_layers(configs),
    )


def _most_alike(unet: Mapping[str, Any]) -> Family:
    """The family whose full-size U-Net has most of what tells the families apart."""

    def score(family: Family) -> int:
        return sum(
            family.configs["unet"].get(key) == unet.get(key) or not (family.configs["unet"].get(key) or unet.get(key))
            for key in ("addition_embed_type", "use_linear_projection", "cross_attention_dim")
        )

    return max(FAMILIES.values(), key=score)


def _no_model_in(path: Path) -> ModelError:
    if (path / "config.json").is_file() and (path.parent / "model_index.json").is_file():
        return ModelError(
            f'"{shown(path)}" is one part of a diffusers model.', f'Enter the whole: "{shown(path.parent)}".'
        )
    try:
        names = sorted(p.name for p in path.iterdir())
    except OSError as error:
        return ModelError(f'"{shown(path)}" cannot be read: {error.strerror}.', "Change its permissions.")
    files = [name for name in names if name.lower().endswith(".safetensors")]
    inner = [name for name in names if (path / name / "model_index.json").is_file()]
    hint = "Enter a folder in diffusers' layout, or one .safetensors file."
    if files or inner:
        hint = f'Enter what is in it, for instance "{shown(path / (inner or files)[0])}".'
    return ModelError(
        f'"{shown(path)}" is a folder, but not of a diffusers model (no model_index.json, no unet).', hint
    )


def weight_files(folder: Path) -> list[Path]:
    """The weight files of one part. Raises ModelError when there are none."""
    for stem in ("diffusion_pytorch_model", "model"):
        for variant in ("", ".fp16"):
            single = folder / f"{stem}{variant}.safetensors"
            if single.is_file():
                return [single]
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if index.is_file():
                places = _json(index).get("weight_map")
                # Names alone: a list that leads out of the folder is not followed.
                names = {Path(str(name)).name for name in places.values()} if isinstance(places, dict) else set()
                return [folder / name for name in sorted(names)]
    pickles = [p.name for p in folder.glob("*.bin")]
    also = f' ("{shown(pickles[0])}" is a pickle, which can hide programs)' if pickles else ""
    raise ModelError(
        f'"{shown(folder)}" holds no .safetensors weights{also}.',
        "Download the model's safetensors version, or save it again with diffusers' save_pretrained.",
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f'"{shown(path)}" cannot be read: {error.strerror}.', "The model's folder is incomplete; fetch it again."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f'"{shown(path)}" is not JSON.', "The model's folder is damaged; fetch it again.") from error
    return found if isinstance(found, dict) else {}


def check_vae(text: str, base: Found | None = None) -> None:
    """Raises ModelError when `text` names no VAE of Stable Diffusion's kind (4 latent channels).

    A file has no config and must be built like the VAE of the base model; a folder brings its own.
    """
    path = resolve(text)
    if not os.path.exists(path):  # noqa: PTH110
        raise ModelError(_sentence(absent(text, "file or folder")))
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        config = _json(folder / "config.json")
        if "latent_channels" not in config:
            raise ModelError(f'"{shown(folder)}" is not the folder of a VAE.', "Leave it empty for the base model's.")
        for file in weight_files(folder):
            header(file)
        channels = config["latent_channels"]
    else:
        tensors = header_of(path).tensors
        first = next(
            (n for n in ("first_stage_model.decoder.conv_in.weight", "decoder.conv_in.weight") if n in tensors), ""
        )
        if not first or len(tensors[first].shape) != 4:
            what = other_than_a_base_model(tensors)
            raise ModelError(
                f'"{shown(path)}" is {what or "not a VAE"}{", not a VAE" if what else ""}.',
                "Leave it empty for the base model's own.",
            )
        innermost, channels = tensors[first].shape[:2]
        if base and base.vae_channels and innermost != base.vae_channels:
            raise ModelError(
                f'"{shown(path)}" is a VAE of another size than the base model\'s '
                f"({innermost} channels instead of {base.vae_channels}).",
                "Leave it empty for the base model's own.",
            )
    if channels != 4:
        raise ModelError(
            f'"{shown(path)}" is a VAE with {channels} latent channels; Stable Diffusion needs 4.',
            "Leave it empty for the base model's own.",
        )


def _sentence(message: str) -> str:
    return message[:1].upper() + message[1:]
