"""Where each weight is in an original Stable Diffusion file, and where diffusers keeps it.

`unet_names`, `vae_names`, `clip_names` and `open_clip_names` compute the table from a diffusers (transformers)
config, for any number of levels, channels, layers and attentions: original name → diffusers name. `tables` has
those of all parts of a family; `from_original` and `to_original` apply them. The tables need no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trainer.errors import ModelError
from trainer.models.facts import Encoder, Family

Config = Mapping[str, Any]
# Several names: the original holds those tensors as one, in this order along its first side.
Names = dict[str, str | tuple[str, ...]]
Weights = dict[str, Any]

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."


def tables(family: Family, configs: Mapping[str, Config], present: Iterable[str] = ()) -> dict[str, Names]:
    """Each part's table of names: "unet", "vae", and the text encoders' parts.

    `present`: the names in the file, where it may be one of the earliest, which leave "text_model." out.
    """
    encoders = {}
    for encoder in family.encoders:
        names = encoder_names(encoder, configs[encoder.part])
        old = encoder.prefix.removesuffix("text_model.")
        if f"{old}embeddings.token_embedding.weight" in present:
            names = {old + name.removeprefix(encoder.prefix): ours for name, ours in names.items()}
        encoders[encoder.part] = names
    return {"unet": unet_names(configs["unet"]), "vae": vae_names(configs["vae"]), **encoders}


def from_original(weights: Mapping[str, Any], configs: Mapping[str, Config], family: Family) -> dict[str, Weights]:
    """Each part's state dict, as diffusers and transformers name it.

    `configs` has the parts' configs. Weights that no table names are left out. Raises ModelError when a named weight
    is missing.
    """
    states = {}
    for part, names in tables(family, configs, weights).items():
        missing = [original for original in names if original not in weights]
        if missing:
            shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
            raise ModelError(
                f"The file lacks {len(missing)} of the {len(names)} weights of its {family.parts[part]}: {shown}.",
                "Choose a complete checkpoint of the chosen model family; a LoRA, a VAE or a U-Net alone is not "
                "enough.",
            )
        states[part] = {
            name: tensor
            for original, ours in names.items()
            for name, tensor in taken(original, weights[original], ours)
        }
    for name in _vae_attention_weights(states["vae"]):
        # 1×1 convolutions in the original, Linear in diffusers.
        states["vae"][name] = states["vae"][name].reshape(states["vae"][name].shape[:2])
    return states


def to_original(states: Mapping[str, Mapping[str, Any]], configs: Mapping[str, Config], family: Family) -> Weights:
    """One state dict with original names, from each part's: the inverse of `from_original`."""
    vae = dict(states["vae"])
    for name in _vae_attention_weights(vae):
        vae[name] = vae[name].reshape(*vae[name].shape, 1, 1)
    return {
        original: given(original, {**states, "vae": vae}[part], ours)
        for part, names in tables(family, configs).items()
        for original, ours in names.items()
    }


def taken(original: str, tensor: Any, ours: str | tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """What becomes of a tensor of the original: (our name, tensor), one or several."""
    if isinstance(ours, tuple):
        yield from zip(ours, tensor.chunk(len(ours)), strict=True)
    else:
        yield ours, tensor.T if _is_transposed(original) else tensor


def given(original: str, weights: Mapping[str, Any], ours: str | tuple[str, ...]) -> Any:
    """The original's tensor, from ours."""
    if isinstance(ours, tuple):
        import torch

        return torch.cat([weights[name] for name in ours])
    return weights[ours].T.contiguous() if _is_transposed(original) else weights[ours]


def _is_transposed(original: str) -> bool:
    """OpenCLIP multiplies by its projection from the right."""
    return original.endswith(".text_projection")


def unet_names(config: Config) -> Names:
    """Original name → diffusers name of every weight of a UNet2DConditionModel."""
    return _prefixed(UNET_PREFIX, _unet_layers(config))


def vae_names(config: Config) -> Names:
    """Original name → diffusers name of every weight of an AutoencoderKL."""
    return _prefixed(VAE_PREFIX, _vae_layers(config))


def encoder_names(encoder: Encoder, config: Config) -> Names:
    """Original name → transformers name of every weight of a text encoder."""
    make = open_clip_names if encoder.naming == "open_clip" else clip_names
    names = make(encoder.prefix, config)
    if not encoder.projected:
        return names
    inner = "text_model."
    projection: Names = {f"{encoder.prefix}text_projection": "text_projection.weight"}
    return projection | {
        original: tuple(inner + one for one in ours) if isinstance(ours, tuple) else inner + ours
        for original, ours in names.items()
    }


def clip_names(prefix: str, config: Config) -> Names:
    """The table of a CLIPTextModel that the original file holds in transformers' own naming."""
    names = ["embeddings.token_embedding.weight", "embeddings.position_embedding.weight"]
    for i in range(config["num_hidden_layers"]):
        parts = (
            *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
            *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
        )
        names += [f"encoder.layers.{i}.{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    names += ["final_layer_norm.weight", "final_layer_norm.bias"]
    return {prefix + name: name for name in names}


def open_clip_names(prefix: str, config: Config) -> Names:
    """The table of a CLIPTextModel that the original file holds in OpenCLIP's naming: q, k and v in one tensor.

    OpenCLIP's last layer is left out where the config has one less: SD 2.x attends to the one before.
    """
    names: Names = {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
    }
    parts = {
        "attn.out_proj": "self_attn.out_proj",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for i in range(config["num_hidden_layers"]):
        theirs, ours = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        for kind in ("weight", "bias"):
            names[f"{theirs}.attn.in_proj_{kind}"] = tuple(f"{ours}.self_attn.{p}_proj.{kind}" for p in ("q", "k", "v"))
            names |= {f"{theirs}.{part}.{kind}": f"{ours}.{name}.{kind}" for part, name in parts.items()}
    names |= {f"ln_final.{kind}": f"final_layer_norm.{kind}" for kind in ("weight", "bias")}
    return {prefix + original: ours for original, ours in names.items()}


# A layer is (original name, diffusers name, whether it has a bias).
Layer = tuple[str, str, bool]


def _prefixed(prefix: str, layers: Iterator[Layer]) -> Names:
    return {
        f"{prefix}{original}.{kind}": f"{name}.{kind}"
        for original, name, has_bias in layers
        for kind in (("weight", "bias") if has_bias else ("weight",))
    }


# U-Net


def _unet_layers(config: Config) -> Iterator[Layer]:
    channels = list(config["block_out_channels"])
    levels = len(channels)
    depths = _per_level(config.get("layers_per_block", 2), levels)
    transformers = _per_level(config.get("transformer_layers_per_block", 1), levels)
    down_attends = ["CrossAttn" in kind for kind in config["down_block_types"]]
    up_attends = ["CrossAttn" in kind for kind in config["up_block_types"]]

    yield from _renamed({"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"})
    if config.get("addition_embed_type") == "text_time":
        yield from _renamed({"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"})
    yield "input_blocks.0.0", "conv_in", True

    number = 1
    for level in range(levels):
        block = f"down_blocks.{level}"
        for i in range(depths[level]):
            entering = channels[level] if i > 0 else channels[max(0, level - 1)]
            original = f"input_blocks.{number}"
            yield from _unet_resnet(f"{original}.0", f"{block}.resnets.{i}", entering != channels[level])
            if down_attends[level]:
                yield from _unet_attention(f"{original}.1", f"{block}.attentions.{i}", transformers[level])
            number += 1
        if level < levels - 1:
            yield f"input_blocks.{number}.0.op", f"{block}.downsamplers.0.conv", True
            number += 1

    yield from _unet_resnet("middle_block.0", "mid_block.resnets.0", False)
    yield from _unet_attention("middle_block.1", "mid_block.attentions.0", transformers[-1])
    yield from _unet_resnet("middle_block.2", "mid_block.resnets.1", False)

    number = 0
    for step, level in enumerate(reversed(range(levels))):
        block = f"up_blocks.{step}"
        below = channels[min(level + 1, levels - 1)]
        for i in range(depths[level] + 1):
            # A resnet here sees what comes from below beside what its level's way down kept.
            skipped = channels[max(0, level - 1)] if i == depths[level] else channels[level]
            entering = (below if i == 0 else channels[level]) + skipped
            original = f"output_blocks.{number}"
            yield from _unet_resnet(f"{original}.0", f"{block}.resnets.{i}", entering != channels[level])
            if up_attends[step]:
                yield from _unet_attention(f"{original}.1", f"{block}.attentions.{i}", transformers[level])
            if level > 0 and i == depths[level]:
                yield f"{original}.{2 if up_attends[step] else 1}.conv", f"{block}.upsamplers.0.conv", True
            number += 1

    yield from _renamed({"out.0": "conv_norm_out", "out.2": "conv_out"})


def _unet_resnet(original: str, name: str, has_shortcut: bool) -> Iterator[Layer]:
    parts = {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
    }
    if has_shortcut:
        parts["skip_connection"] = "conv_shortcut"
    yield from _renamed(parts, original, name)


def _unet_attention(original: str, name: str, transformers: int) -> Iterator[Layer]:
    yield from _renamed({"norm": "norm", "proj_in": "proj_in"}, original, name)
    for i in range(transformers):
        block = f"transformer_blocks.{i}"
        for part in ("attn1", "attn2"):
            for projection in ("to_q", "to_k", "to_v"):
                path = f"{block}.{part}.{projection}"
                yield f"{original}.{path}", f"{name}.{path}", False
        same = ("attn1.to_out.0", "attn2.to_out.0", "norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2")
        yield from _renamed({f"{block}.{part}": f"{block}.{part}" for part in same}, original, name)
    yield f"{original}.proj_out", f"{name}.proj_out", True


# VAE


def _vae_layers(config: Config) -> Iterator[Layer]:
    channels = list(config["block_out_channels"])
    levels, depth = len(channels), config.get("layers_per_block", 1)

    yield "encoder.conv_in", "encoder.conv_in", True
    for level in range(levels):
        for i in range(depth):
            entering = channels[level] if i > 0 else channels[max(0, level - 1)]
            yield from _vae_resnet(
                f"encoder.down.{level}.block.{i}",
                f"encoder.down_blocks.{level}.resnets.{i}",
                entering != channels[level],
            )
        if level < levels - 1:
            yield f"encoder.down.{level}.downsample.conv", f"encoder.down_blocks.{level}.downsamplers.0.conv", True
    yield from _vae_middle("encoder", config)
    yield from _renamed({"norm_out": "conv_norm_out", "conv_out": "conv_out"}, "encoder", "encoder")

    yield "decoder.conv_in", "decoder.conv_in", True
    yield from _vae_middle("decoder", config)
    for step, level in enumerate(reversed(range(levels))):
        for i in range(depth + 1):
            entering = channels[level] if i > 0 else channels[min(level + 1, levels - 1)]
            yield from _vae_resnet(
                f"decoder.up.{level}.block.{i}", f"decoder.up_blocks.{step}.resnets.{i}", entering != channels[level]
            )
        if level > 0:
            yield f"decoder.up.{level}.upsample.conv", f"decoder.up_blocks.{step}.upsamplers.0.conv", True
    yield from _renamed({"norm_out": "conv_norm_out", "conv_out": "conv_out"}, "decoder", "decoder")

    if config.get("use_quant_conv", True):
        yield "quant_conv", "quant_conv", True
    if config.get("use_post_quant_conv", True):
        yield "post_quant_conv", "post_quant_conv", True


def _vae_middle(half: str, config: Config) -> Iterator[Layer]:
    yield from _vae_resnet(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", False)
    if config.get("mid_block_add_attention", True):
        parts = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
        yield from _renamed(parts, f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0")
    yield from _vae_resnet(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", False)


def _vae_resnet(original: str, name: str, has_shortcut: bool) -> Iterator[Layer]:
    parts = {part: part for part in ("norm1", "conv1", "norm2", "conv2")}
    if has_shortcut:
        parts["nin_shortcut"] = "conv_shortcut"
    yield from _renamed(parts, original, name)


def _vae_attention_weights(vae: Mapping[str, Any]) -> list[str]:
    return [name for name in vae if ".attentions.0.to_" in name and name.endswith(".weight")]


def _renamed(parts: Mapping[str, str], original: str = "", name: str = "") -> Iterator[Layer]:
    """Layers with a bias, below a module of either layout."""
    for original_part, part in parts.items():
        yield ".".join(filter(None, (original, original_part))), ".".join(filter(None, (name, part))), True


def _per_level(value: int | list[int] | tuple[int, ...], levels: int) -> list[int]:
    return [value] * levels if isinstance(value, int) else list(value)
