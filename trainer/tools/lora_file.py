"""LoRA files as the tools take and give them: layers by kohya's name, and what a new file says about itself."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save

from trainer.checkpoint import DTYPES, hashes
from trainer.errors import ConfigError, ModelError, Problem
from trainer.lora.reading import LoraFile, read
from trainer.lora.recognise import CONVOLUTION
from trainer.models.facts import FAMILIES, Family
from trainer.models.families import header_of
from trainer.models.weights import DTYPES as FILE_DTYPES
from trainer.paths import resolve
from trainer.tensorfile import TensorInfo
from trainer.tools.stream import cast, finish

UP, DOWN, MID, ALPHA = "lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha"
# Tensors of types whose ΔW is made of the base model's weight, so that it is not known without one.
RELATIVE = ("on_input", "oft_blocks", "a1.weight", "dora_scale")

Roles = Mapping[str, torch.Tensor]


def written(text: str, inputs: Iterable[Path], suffix: str = ".safetensors") -> Path:
    """Where a tool's output goes. Raises ConfigError for what it cannot be."""
    path = resolve(text)
    folder = bool(suffix) and (path.is_dir() or text.rstrip().endswith(("/", "\\")))
    if suffix and not path.suffix and not folder:
        path = path.with_name(path.name + suffix)
    problem = ""
    if folder or (suffix and path.is_dir()):
        problem = f'"{text}" is a folder; name a file in it'
    elif suffix and path.suffix != suffix:
        problem = f'"{text}" must end with {suffix}'
    elif any(path.resolve() == one.resolve() for one in inputs):
        problem = f'"{text}" is one of the inputs; choose another name'
    elif not suffix and path.suffix == ".safetensors":
        problem = f'"{text}" would be a folder, as the checkpoint is one; choose a name without .safetensors'
    elif not suffix and any(
        {path.resolve(), one.resolve()} & {*path.resolve().parents, *one.resolve().parents} for one in inputs
    ):
        problem = f'"{text}" holds an input, or lies in one; name a new folder'
    elif not suffix and path.exists() and not (path / "model_index.json").is_file():
        problem = f'"{text}" is there already, and is no diffusers model; name a new folder in it or beside it'
    if problem:
        raise ConfigError([Problem("output", "Output", problem)])
    return path


def whole(path: Path) -> LoraFile:
    """A LoRA file, read. Raises ModelError where a value in it is not a number."""
    file = read(path)
    for name, tensor in file.tensors.items():
        if not torch.isfinite(tensor.float()).all():
            raise ModelError(f'"{path}" has values that are not numbers in {name}.', "Choose a file from before that.")
    return file


def without_hashes(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata without what was worked out from tensors that are others now."""
    stale = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
    return {key: text for key, text in metadata.items() if key not in stale}


def read_arguments(metadata: Mapping[str, str]) -> dict[str, str]:
    """What `ss_network_args` says; nothing where it cannot be read."""
    try:
        found = json.loads(metadata.get("ss_network_args", "{}"))
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def plain(roles: Roles) -> bool:
    """Whether a layer is up · down alone."""
    return set(roles) <= {UP, DOWN, ALPHA}


def require_absolute(name: str, roles: Roles, path: Path) -> None:
    """Raises ModelError for a layer whose update depends on the base model."""
    mark = next((role for role in RELATIVE if role in roles), "")
    if mark:
        raise ModelError(
            f'"{path}" is of a type whose update depends on the base model (its {name} has {mark}).',
            "Merge it into its checkpoint, and extract a LoRA from the difference.",
        )


def factors(roles: Roles) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A plain layer's up [out, r] and down [r, in·k·k], float32, and alpha / r."""
    up, down = roles[UP].float().flatten(1), roles[DOWN].float().flatten(1)
    return up, down, float(roles[ALPHA]) / len(down) if ALPHA in roles else 1.0


def has_matrix(roles: Roles) -> bool:
    """Whether a layer changes a weight that is a matrix or convolution, which up and down can hold."""
    return not {"w_norm", "b_norm"} & set(roles) and set(roles) - {"diff_b", ALPHA} != set()


def biases_of(name: str, roles: Roles) -> str:
    """The name of what a layer changes and up and down cannot hold: a bias or norm; empty where there is none."""
    return "" if has_matrix(roles) and "diff_b" not in roles else name


def biases_left_out(names: Sequence[str]) -> list[str]:
    """The note about layers of which up and down matrices can hold nothing."""
    return (
        [f"{len(names)} biases and norms were left out, the first is {names[0]}: a rank has no room for them."]
        if names
        else []
    )


def weight_shape(name: str, roles: Roles, family: Family | None) -> torch.Size:
    """The shape of the weight that a layer is an update of, by its tensors and, where they are flat, its name."""
    if DOWN in roles:
        kernel = roles[MID].shape[2:] if MID in roles else roles[DOWN].shape[2:]
        return torch.Size((len(roles[UP]), roles[DOWN].shape[1], *kernel))
    if "diff" in roles:
        return roles["diff"].shape
    if "hada_w1_a" in roles:
        rows, columns = _size(roles, "hada_w1", "hada_t1")
    else:
        first, second = _size(roles, "lokr_w1", ""), _size(roles, "lokr_w2", "lokr_t2")
        rows, columns = first[0] * second[0], first[1] * second[1]
    kernel = _kernel(name, family)
    return torch.Size((rows, columns // kernel.numel(), *kernel))


def _size(roles: Roles, name: str, core: str) -> tuple[int, int]:
    """Rows and columns of a whole matrix `name`, or of the product of `name`_a, a core where there is one, and `name`_b."""
    if name in roles:
        return len(roles[name]), roles[name][0].numel()
    a, b = roles[f"{name}_a"], roles[f"{name}_b"]
    if core in roles:
        return a.shape[1], b.shape[1] * roles[core].shape[2:].numel()
    return len(a), b.shape[1]


def _kernel(name: str, family: Family | None) -> torch.Size:
    """The kernel of the layer of this name: 3×3, 1×1 or that of a linear layer, which has none."""
    if CONVOLUTION.search(name) or name.endswith("_op"):
        return torch.Size((3, 3))
    linear = family is not None and family.configs["unet"].get("use_linear_projection", False)
    one = name.endswith("_conv_shortcut") or (name.endswith(("_proj_in", "_proj_out")) and not linear)
    return torch.Size((1, 1) if one else ())


def precision_of(name: str, tensors: Iterable[TensorInfo]) -> torch.dtype:
    """The dtype that an option names; "same" is that of the largest tensor given."""
    if name != "same":
        return DTYPES[name]
    return FILE_DTYPES[max(tensors, key=lambda info: info.size).dtype]


def save_layers(path: Path, layers: Mapping[str, Roles], dtype: torch.dtype, metadata: Mapping[str, str]) -> str:
    """Write a LoRA file, its hashes included. Returns the sentence that says so. Raises TrainingError for a value that is not a number."""
    tensors = {
        f"{name}.{role}": cast(tensor, dtype, f"{name}.{role}") if tensor.is_floating_point() else tensor
        for name, roles in layers.items()
        for role, tensor in roles.items()
    }
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    data = save(tensors, {**metadata, **hashes(tensors, metadata)})
    return finish(path, lambda temporary: temporary.write_bytes(data))[1]


def ranks_told(layers: Mapping[str, Roles]) -> dict[str, str]:
    """Rank and alpha as sd-scripts tells them: the number, or Dynamic where layers differ; convolutions apart."""
    large = {name for name, roles in layers.items() if roles[DOWN].shape[2:] not in ((), (1, 1))}
    told = {}
    for group, keys in (
        (set(layers) - large, ("ss_network_dim", "ss_network_alpha")),
        (large, ("conv_dim", "conv_alpha")),
    ):
        ranks = {len(layers[name][DOWN]) for name in group}
        alphas = {float(layers[name][ALPHA]) for name in group}
        for key, numbers in zip(keys, (ranks, alphas), strict=True):
            if numbers:
                told[key] = f"{numbers.pop():g}" if len(numbers) == 1 else "Dynamic"
    arguments = {key: told.pop(key) for key in ("conv_dim", "conv_alpha") if key in told}
    return {**told, **({"ss_network_args": json.dumps(arguments)} if arguments else {})}


def family_of(files: Sequence[LoraFile]) -> tuple[Family | None, str]:
    """The family that the files are for, and what their base model predicted. Raises ModelError where two differ."""
    names = {file.about.family: file.about.path for file in files if file.about.family}
    if len(names) > 1:
        (one, path), (other, second) = list(names.items())[:2]
        raise ModelError(
            f'"{path}" is for {FAMILIES[one].title}, "{second}" for {FAMILIES[other].title}.',
            "Only LoRAs of one family can become one.",
        )
    said = [file.metadata.get("modelspec.prediction_type", "") for file in files]
    return FAMILIES.get(next(iter(names), "")), "v_prediction" if any(s.startswith("v") for s in said) else "epsilon"


def spec(
    family: Family | None, prediction: str, title: str, sources: Sequence[Path], *, is_lora: bool
) -> dict[str, str]:
    """The modelspec.* entries (https://github.com/Stability-AI/ModelSpec) of a file that a tool wrote."""
    entries = {"sai_model_spec": "1.0.1", "title": title}
    if family is not None:
        entries |= {
            "architecture": family.architectures[prediction] + ("/lora" if is_lora else ""),
            "implementation": family.implementation,
            "resolution": f"{family.resolution}x{family.resolution}",
        }
    now = datetime.fromtimestamp(time.time(), UTC).replace(microsecond=0, tzinfo=None)
    entries |= {
        "date": now.isoformat(),
        "prediction_type": "v" if prediction == "v_prediction" else "epsilon",
        "implementation_version": f"lorawright/{version('lorawright')}",
    }
    if sources:
        entries["merged_from"] = ", ".join(map(_title, sources))
    return {f"modelspec.{key}": value for key, value in entries.items()}


def _title(path: Path) -> str:
    said = header_of(path).metadata.get("modelspec.title") if path.is_file() else None
    return said or path.stem
