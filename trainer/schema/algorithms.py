"""Every LoRA type: the file in trainer/networks that makes its modules, and the controls that it uses. One row each.

Needs no torch, so that the form and the check know what applies before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RANK = "network_dim network_alpha"
CONVOLUTIONS = "conv_dim conv_alpha"
BLOCKS = (
    "down_lr_weight mid_lr_weight up_lr_weight block_lr_zero_threshold "
    "block_dims block_alphas conv_block_dims conv_block_alphas"
)
LORA_PLUS = "loraplus_lr_ratio loraplus_unet_lr_ratio loraplus_text_encoder_lr_ratio"
DROPOUTS = "network_dropout rank_dropout module_dropout"
KOHYA = f"{RANK} {BLOCKS} {DROPOUTS} scale_weight_norms"
LYCORIS = "LyCORIS_preset module_dropout"
ROWS_DROPPED = "rank_dropout rank_dropout_scale"
LOW_RANK = f"{RANK} {CONVOLUTIONS} {LYCORIS} {ROWS_DROPPED} train_norm scale_weight_norms use_scalar"
ROTATION = f"network_dim conv_dim {LYCORIS} {ROWS_DROPPED} train_norm constrain rescaled"

MATRICES = "lora_down.weight"


@dataclass(frozen=True)
class Row:
    """A LoRA type's `module` in trainer/networks and `controls`, the preset keys that matter to it.

    `mark`: a tensor that each layer has in its files, by the start of its name, and in no others'.
    `program`, `algo`: what sd-scripts and lycoris-lora call it in a file's metadata. `reads_weights`: whether its
    modules compute with the frozen layer's weight, and not with the layer's answer alone.
    """

    module: str
    controls: str
    mark: str = MATRICES
    program: str = "networks.lora"
    algo: str = ""
    reads_weights: bool = False


def _lycoris(module: str, controls: str, mark: str, algo: str = "", reads_weights: bool = True) -> Row:
    return Row(module, controls, mark, "lycoris.kohya", algo or module, reads_weights)


TYPES: Mapping[str, Row] = {
    "Standard": Row("standard", f"{KOHYA} {LORA_PLUS}"),
    "Kohya LoCon": Row("standard", f"{KOHYA} {CONVOLUTIONS} {LORA_PLUS}"),
    "Kohya DyLoRA": Row("dylora", f"{KOHYA} {CONVOLUTIONS} {LORA_PLUS} unit", program="networks.dylora"),
    "LoRA-FA": Row("lora_fa", KOHYA, program="networks.lora_fa"),
    "LyCORIS/LoCon": _lycoris("locon", f"{LOW_RANK} {LORA_PLUS} use_tucker dora_wd", MATRICES),
    "LyCORIS/LoHa": _lycoris("loha", f"{LOW_RANK} use_tucker dora_wd", "hada_w1_b"),
    "LyCORIS/LoKr": _lycoris("lokr", f"{LOW_RANK} use_cp dora_wd factor decompose_both", "lokr_w1"),
    "LyCORIS/iA3": _lycoris("ia3", f"{LYCORIS} {ROWS_DROPPED} scale_weight_norms train_on_input", "on_input"),
    "LyCORIS/DyLoRA": _lycoris(
        "dylora",
        f"{RANK} {CONVOLUTIONS} {LYCORIS} {DROPOUTS} {LORA_PLUS} train_norm scale_weight_norms unit",
        MATRICES,
        reads_weights=False,
    ),
    "LyCORIS/GLoRA": _lycoris("glora", LOW_RANK, "a1.weight"),
    "LyCORIS/Diag-OFT": _lycoris("diag_oft", ROTATION, "oft_blocks", "diag-oft"),
    "LyCORIS/BOFT": _lycoris("boft", ROTATION, "oft_blocks"),
    "LyCORIS/Native Fine-Tuning": _lycoris("full", f"{LYCORIS} train_norm scale_weight_norms", "diff"),
}
USES: Mapping[str, frozenset[str]] = {label: frozenset(row.controls.split()) for label, row in TYPES.items()}


def type_of(dimensions: Mapping[str, int]) -> str:
    """The LoRA type with the formula for one layer of a file; "" where there is none.

    `dimensions`: the layer's tensors, by name without the layer's, and how many dimensions each has.
    Layers of up and down matrices are Standard's, whichever type wrote them.
    """
    if dimensions.get("oft_blocks") == 4:
        return "LyCORIS/BOFT"
    return next((t for t, row in TYPES.items() if any(name.startswith(row.mark) for name in dimensions)), "")


def types_using(key: str) -> tuple[str, ...]:
    """The LoRA types that a control matters to; empty when it has nothing to do with the type."""
    using = tuple(label for label, keys in USES.items() if key in keys)
    return () if len(using) == len(USES) else using
