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
from trainer.models import layout
from trainer.paths import absent, base_model, resolve, shown
from trainer.tensorfile import Header, TensorInfo, header

SUPPORTED = {"sd1": "Stable Diffusion 1.x"}
CONFIGS = Path(__file__).parent.parent / "assets" / "sd1" / "configs.json"
PARTS = {"unet": "U-Net", "vae": "VAE", "text_encoder": "text encoder"}

UNET = "model.diffusion_model."
CONVOLUTION = re.compile(r"_(conv[12]?|conv_in|conv_out)\.")
FIRST_LAYER = UNET + "input_blocks.0.0.weight"
SD1_WIDTH, SD2_WIDTH = 768, 1024

Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Found:
    """A base model. `width` is that of the text states its U-Net attends to (SD 1.x: 768),
    `vae_channels` the channels of its VAE's innermost level (SD: 512), None where not told."""

    family: str
    prediction: Literal["epsilon", "v_prediction"]
    layout: Literal["diffusers", "single file"]
    what: str
    width: int
    vae_channels: int | None = None


# Parts of tensors' names that tell the LoRA type. DoRA's comes last: other types have it too.
MARKS = {
    ".hada_": "LyCORIS/LoHa",
    ".lokr_": "LyCORIS/LoKr",
    ".on_input": "LyCORIS/iA3",
    ".oft_blocks": "LyCORIS/Diag-OFT",
    ".a1.weight": "LyCORIS/GLoRA",
    ".diff": "LyCORIS/Native Fine-Tuning",
    ".lora_mid.": "LyCORIS/LoCon",
    ".dora_scale": "LyCORIS/LoCon",
}


@dataclass(frozen=True)
class Lora:
    """A LoRA file: its ranks, those of 3×3 convolutions, its parts ("unet", "text_encoder"), and its U-Net's `width`.

    `type`: the LoRA type that it is of, where its names tell; "" for up and down matrices, which several write.
    """

    type: str
    ranks: frozenset[int]
    conv_ranks: frozenset[int]
    parts: frozenset[str]
    width: int | None
    modules: int


def locate(source: str) -> Path:
    """The path of the base model that the settings name; empty means the embedded one.

    Raises ModelError for names of online models, and for what does not exist.
    """
    path = base_model(source)
    if os.path.exists(path):  # noqa: PTH110  answers False where pathlib raises
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source.strip()) and not source.strip().startswith("."):
        raise ModelError(
            f'"{source.strip()}" is the name of a model on huggingface.co; nothing is loaded from the network here.',
            f"Download it (hf download {source.strip()} --local-dir FOLDER) and enter that folder.",
        )
    raise ModelError(_sentence(absent(source.strip() or str(path), "file or folder")))


def detect(path: Path) -> Found:
    """Which base model `path` is. Raises ModelError when it is none, or of an unsupported family."""
    found = _folder(path) if path.is_dir() else _file(path)
    if found.family not in SUPPORTED:
        raise ModelError(
            f'"{shown(path)}" is {found.what}, which is not supported yet.',
            f"Choose a model of the family {' or '.join(SUPPORTED.values())}.",
        )
    return found


def _file(path: Path) -> Found:
    head = header(path)
    tensors = head.tensors
    what = _other_than_a_base_model(tensors)
    if what:
        raise ModelError(
            f'"{shown(path)}" is {what}, not a base model.',
            "Name a complete checkpoint: U-Net, VAE and text encoder in one file.",
        )
    width = _width(tensors)
    configs = _embedded_configs(path, head)
    prediction = _prediction(head, configs)
    family, what = _family(tensors, width, bool(configs))
    missing = _missing_part(tensors)
    if family in SUPPORTED and missing:
        raise ModelError(
            f'"{shown(path)}" lacks its {missing}.', "Name a complete checkpoint: U-Net, VAE and text encoder."
        )
    if not family:
        raise ModelError(
            f'"{shown(path)}" is {what}: its {len(tensors)} tensors are those of no known base model'
            f"{f' (the first is {next(iter(tensors))})' if tensors else ''}.",
            f"Choose a model of the family {' or '.join(SUPPORTED.values())}.",
        )
    if family in SUPPORTED:
        _require_all_tensors(path, tensors, configs)
    return Found(family, prediction, "single file", what, width, _vae_channels(tensors))


def _family(tensors: Tensors, width: int, has_configs: bool) -> tuple[str, str]:
    def any_of(*starts: str) -> bool:
        return any(name.startswith(starts) for name in tensors)

    if any_of("model.diffusion_model.joint_blocks.", "joint_blocks."):
        return "sd3", "Stable Diffusion 3"
    if any_of("model.diffusion_model.double_blocks.", "double_blocks.", "transformer.single_transformer_blocks."):
        return "flux", "a Flux model"
    if FIRST_LAYER not in tensors:
        return "", "not a Stable Diffusion checkpoint"
    channels = tensors[FIRST_LAYER].shape[1] if len(tensors[FIRST_LAYER].shape) == 4 else 0
    if any_of("conditioner.embedders."):
        refiner = not any_of("conditioner.embedders.1.")
        family, what = ("sdxl-refiner", "the SDXL refiner") if refiner else ("sdxl", "an SDXL model")
    elif any_of("cond_stage_model.model.") or width == SD2_WIDTH:
        family, what = "sd2", "a Stable Diffusion 2.x model"
    elif width == SD1_WIDTH or (has_configs and width):
        family, what = "sd1", "a Stable Diffusion 1.x model"
    else:
        return "", f"a U-Net of unknown kind (its text states are {width} wide)"
    if channels == 9:
        return f"{family}-inpainting", f"{what} for inpainting (9 input channels)"
    if channels != 4:
        return f"{family}-{channels}", f"{what} with {channels} input channels instead of 4"
    return family, what


def _width(tensors: Tensors) -> int:
    """The last side of the first cross-attention key's weight; 0 without one."""
    for name, tensor in tensors.items():
        if name.startswith(UNET) and name.endswith(".attn2.to_k.weight") and len(tensor.shape) == 2:
            return tensor.shape[1]
    return 0


def _missing_part(tensors: Tensors) -> str:
    for part, prefix in (("text encoder", "cond_stage_model."), ("VAE", "first_stage_model.")):
        if not any(name.startswith(prefix) for name in tensors):
            return part
    return ""


def _require_all_tensors(path: Path, tensors: Tensors, configs: Mapping[str, Any]) -> None:
    """Raises ModelError when a tensor is missing that the configs ask for."""
    configs = configs or json.loads(CONFIGS.read_text())
    tables = {"unet": layout.unet_names, "vae": layout.vae_names, "text_encoder": layout.text_encoder_names}
    for part, names in tables.items():
        try:
            _require_modest(configs[part])
            wanted = names(configs[part])
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ModelError(
                f'"{shown(path)}" is damaged: the config in its header has no usable {PARTS[part]}.',
                "Fetch the file again.",
            ) from error
        missing = [name for name in wanted if name not in tensors]
        if missing:
            raise ModelError(
                f'"{shown(path)}" lacks {len(missing)} of the {len(wanted)} tensors of its {PARTS[part]}, '
                f"the first is {missing[0]}.",
                "Name a complete checkpoint of Stable Diffusion 1.x.",
            )


def _require_modest(config: Mapping[str, Any]) -> None:
    """Raises ValueError for a config whose table of names would fill the memory."""
    counts = [len(config.get("block_out_channels", "1"))]
    for key in ("layers_per_block", "transformer_layers_per_block", "num_hidden_layers"):
        value = config.get(key, 1)
        counts += value if isinstance(value, list) else [value]
    if not all(0 < count <= 100 for count in counts):
        raise ValueError("a count is not in 1 … 100")


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
    return configs if isinstance(configs, dict) and set(configs) >= set(PARTS) else {}


def _prediction(head: Header, configs: Mapping[str, Any]) -> Literal["epsilon", "v_prediction"]:
    """Only what the file says for itself: its config, its modelspec metadata, or a `v_pred` mark."""
    scheduler = configs.get("scheduler")
    said = scheduler.get("prediction_type") if isinstance(scheduler, dict) else None
    said = said or head.metadata.get("modelspec.prediction_type") or ("v" if "v_pred" in head.tensors else "")
    return "v_prediction" if str(said).startswith("v") else "epsilon"


def _other_than_a_base_model(tensors: Tensors) -> str:
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


_PIPELINES = {
    "StableDiffusionXL": ("sdxl", "an SDXL model"),
    "StableDiffusion3": ("sd3", "Stable Diffusion 3"),
    "Flux": ("flux", "a Flux model"),
}


def _folder(path: Path) -> Found:
    if not (path / "unet").is_dir() and not (path / "model_index.json").is_file():
        raise _no_model_in(path)
    index = _json(path / "model_index.json") if (path / "model_index.json").is_file() else {}
    pipeline = str(index.get("_class_name", ""))
    for start, (family, what) in _PIPELINES.items():
        if pipeline.startswith(start):
            return Found(family, "epsilon", "diffusers", what, 0)
    parts = {part: _json(path / part / "config.json") for part in PARTS}
    for part in parts:
        for file in _weights(path / part):
            header(file)
    unet = parts["unet"]
    width = unet.get("cross_attention_dim")
    scheduler = path / "scheduler" / "scheduler_config.json"
    said = _json(scheduler).get("prediction_type") if scheduler.is_file() else None
    prediction: Literal["epsilon", "v_prediction"] = "v_prediction" if said == "v_prediction" else "epsilon"
    if (path / "text_encoder_2").is_dir() or width == 2048:
        return Found("sdxl", prediction, "diffusers", "an SDXL model", 2048)
    if not isinstance(width, int) or "CrossAttn" not in str(unet.get("down_block_types")):
        raise ModelError(
            f'"{shown(path)}" is a model of the kind {pipeline or unet.get("_class_name")}, '
            "whose U-Net attends to no text as Stable Diffusion's does.",
            f"Choose a model of the family {' or '.join(SUPPORTED.values())}.",
        )
    family, what = "sd1", "a Stable Diffusion 1.x model"
    if width == SD2_WIDTH:
        family, what = "sd2", "a Stable Diffusion 2.x model"
    channels = unet.get("in_channels", 4)
    if channels == 9:
        family, what = f"{family}-inpainting", f"{what} for inpainting (9 input channels)"
    elif channels != 4:
        family, what = f"{family}-{channels}", f"{what} with {channels} input channels instead of 4"
    innermost = parts["vae"].get("block_out_channels")
    channels = innermost[-1] if isinstance(innermost, list) and innermost else None
    return Found(family, prediction, "diffusers", what, width, channels)


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


def _weights(folder: Path) -> list[Path]:
    """The weight files of one part. Raises ModelError when there are none."""
    for stem in ("diffusion_pytorch_model", "model"):
        for variant in ("", ".fp16"):
            single = folder / f"{stem}{variant}.safetensors"
            if single.is_file():
                return [single]
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if index.is_file():
                places = _json(index).get("weight_map")
                return [folder / str(name) for name in sorted(set(places.values()))] if isinstance(places, dict) else []
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
        for file in _weights(folder):
            header(file)
        channels = config["latent_channels"]
    else:
        tensors = header(path).tensors
        first = next(
            (n for n in ("first_stage_model.decoder.conv_in.weight", "decoder.conv_in.weight") if n in tensors), ""
        )
        if not first or len(tensors[first].shape) != 4:
            what = _other_than_a_base_model(tensors)
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


def read_lora(text: str) -> Lora:
    """What a LoRA file holds. Raises ModelError when it is none, or of a type that is not supported."""
    path = resolve(text)
    if not os.path.exists(path):  # noqa: PTH110
        raise ModelError(_sentence(absent(text, "file")))
    tensors = header(path).tensors
    names = " ".join(tensors)
    if not any(name.startswith(("lora_unet_", "lora_te")) for name in tensors):
        diffusers = re.search(r"\.lora_[AB]\b|\.lora\.(down|up)\b|_lora\.(down|up)\b", names)
        what = "a LoRA in diffusers' naming" if diffusers else _other_than_a_base_model(tensors)
        what = what or ("a base model" if any(n.startswith(UNET) for n in tensors) else "not a LoRA")
        raise ModelError(
            f'"{shown(path)}" is {what}; its tensors are not named lora_unet_… or lora_te_….',
            "Name a LoRA made by this program, kohya_ss or sd-scripts.",
        )
    kind = next((label for mark, label in MARKS.items() if mark in names), "")
    if any(name.endswith(".oft_blocks") and len(tensor.shape) == 4 for name, tensor in tensors.items()):
        kind = "LyCORIS/BOFT"
    downs = {
        n: t for n, t in tensors.items() if n.endswith((".lora_down.weight", ".hada_w1_b", ".b2.weight")) and t.shape
    }
    if any(name.startswith(("lora_te1_", "lora_te2_")) for name in tensors):
        raise ModelError(f'"{shown(path)}" is a LoRA for SDXL, which is not supported yet.', "Name one for SD 1.x.")
    convolutions = {n: t for n, t in downs.items() if CONVOLUTION.search(n) or t.shape[2:] == (3, 3)}
    plain = {n: t for n, t in downs.items() if n not in convolutions}
    width = next((t.shape[1] for n, t in downs.items() if "_attn2_to_k." in n and len(t.shape) > 1), None)
    parts = {"unet" if name.startswith("lora_unet_") else "text_encoder" for name in tensors if "." in name}
    ranks, conv_ranks = (frozenset(t.shape[0] for t in group.values()) for group in (plain, convolutions))
    return Lora(kind, ranks, conv_ranks, frozenset(parts), width, len(downs))


def _sentence(message: str) -> str:
    return message[:1].upper() + message[1:]
