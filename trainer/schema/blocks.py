"""The U-Net's blocks, from the input (IN) over the middle (MID) to the output (OUT): rates and sizes of each.

SD 1.x and 2.x have 12 · 1 · 12. SDXL has 9 · 3 · 9 between an entry for its embeddings and one
for its last layers, which have no modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator

from trainer.models.facts import Layout
from trainer.schema.declare import Group, Section, parameter

CURVES: dict[str, Callable[[float], float]] = {
    "cosine": lambda x: math.sin(math.pi / 2 * (1 - x)),
    "sine": lambda x: math.sin(math.pi / 2 * x),
    "linear": lambda x: x,
    "reverse_linear": lambda x: 1 - x,
    "zeros": lambda x: 0.0,
}


@dataclass(frozen=True)
class Weights:
    """Multipliers of the U-Net's rate: numbers, or a curve over the blocks with `base` added."""

    numbers: tuple[float, ...] = ()
    curve: str = ""
    base: float = 0.0

    def spread(self, count: int) -> list[float]:
        """One a block. A list that is too short goes on with 1, and what is too long is left off."""
        if self.curve:
            return [CURVES[self.curve](i / (count - 1)) + self.base for i in range(count)]
        return [*self.numbers, *[1.0] * count][:count]

    def __str__(self) -> str:
        if self.curve:
            return self.curve + (f"+{self.base:g}" if self.base else "")
        return ",".join(f"{number:g}" for number in self.numbers)


def parse_weights(value: Any) -> Any:
    """`0,0.5,1` (nothing between two commas is 0), or `sine`, `sine+.25`. Raises ValueError saying which is wrong."""
    if value == "" or value is None or isinstance(value, Weights):
        return value or None
    if isinstance(value, str) and value.split("+")[0].strip() in CURVES:
        curve, plus, base = value.partition("+")
        return Weights(curve=curve.strip(), base=_number(base, value) if plus else 0.0)
    names = ", ".join(CURVES)
    return Weights(tuple(_number(piece, value, f", nor one of {names}") for piece in _pieces(value)))


def parse_list(value: Any) -> Any:
    """Weights that are numbers, with no curve over them."""
    weights = parse_weights(value)
    if weights and weights.curve:
        raise ValueError(f'"{value}" is a curve over many blocks; there is one in the middle, so it must be a number')
    return weights


def parse_whole_numbers(value: Any) -> Any:
    """ "2,4,4" as whole numbers, None when empty. Raises ValueError naming the piece that is none."""
    numbers = parse_numbers(value)
    if numbers and any(number != int(number) for number in numbers):
        raise ValueError(f'"{value}" must be whole numbers separated by commas')
    return tuple(int(number) for number in numbers) if numbers else None


def parse_numbers(value: Any) -> Any:
    """ "2,1.5,4" as numbers, none of them below 0; None when empty. Raises ValueError naming a wrong piece."""
    if value == "" or value is None:
        return None
    numbers = tuple(_number(piece, value, blank=None) for piece in _pieces(value))
    if min(numbers) < 0:
        raise ValueError(f'"{value}" has a number below 0')
    return numbers


def _pieces(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return list(value)
    return value.split(",") if isinstance(value, str) else [value]


def _number(piece: Any, whole: Any, or_else: str = "", blank: float | None = 0.0) -> float:
    text = str(piece).strip()
    if not text and blank is not None:
        return blank
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        where = f' (in "{whole}")' if str(whole) != text else ""
        raise ValueError(f'"{text}" is not a number{or_else}{where}')
    return number


MidWeights = Annotated[Weights | None, BeforeValidator(parse_list)]
RateWeights = Annotated[Weights | None, BeforeValidator(parse_weights)]
Ranks = Annotated[tuple[int, ...] | None, BeforeValidator(parse_whole_numbers)]
Alphas = Annotated[tuple[float, ...] | None, BeforeValidator(parse_numbers)]
WITHOUT_FILE = {"dim_from_weights": False}


class Blocks(Group):
    down_weights: RateWeights = parameter(
        "down_lr_weight",
        "",
        "Down LR weights",
        Section.BLOCKS,
        """Multiplies the U-Net's learning rate in each of the 12 blocks that take the picture apart
        (IN0–IN11; SDXL has 9): numbers separated by commas, those that are missing count as 1; or a curve:
        cosine (falls from 1 to 0), sine (rises), linear, reverse_linear, zeros, each with +0.25 or
        the like to lift it. A block with 0 gets no modules. Early blocks see composition, the
        middle ones content.""",
        kind="text",
        placeholder="0,0,0,0,0,0,1,1,1,1,1,1 or sine+.25",
    )
    mid_weights: MidWeights = parameter(
        "mid_lr_weight",
        "",
        "Mid LR weights",
        Section.BLOCKS,
        """The same for the block in the middle of the U-Net: one number, for SDXL three. Empty: 1.""",
        kind="text",
        placeholder="0.5",
    )
    up_weights: RateWeights = parameter(
        "up_lr_weight",
        "",
        "Up LR weights",
        Section.BLOCKS,
        """The same for the 12 blocks that draw the picture (OUT0–OUT11; SDXL has 9), from coarse to fine. The
        last ones are about colour and surface: raise them for a style.""",
        kind="text",
        placeholder="1,1,1,1,1,1,0,0,0,0,0,0 or cosine",
    )
    zero_threshold: float = parameter(
        "block_lr_zero_threshold",
        0.0,
        "Blocks LR zero threshold",
        Section.BLOCKS,
        """Blocks whose weight above is not larger than this get no modules at all: a smaller file
        and quicker steps. Useful with a curve. It needs one of the three weights.""",
        ge=0,
        blank="0",
    )
    ranks: Ranks = parameter(
        "block_dims",
        "",
        "Block dims",
        Section.BLOCKS,
        """The rank of each of the 25 blocks IN0–IN11, MID, OUT0–OUT11, instead of one Network Rank
        for all; blocks without attention pay no heed, 0 leaves a block out. SDXL takes 23: one for its
        embeddings, 9, 3, 9, and one for its last layers. The text encoder keeps Network Rank.""",
        kind="text",
        placeholder="25 numbers: 2,2,2,2,4,4,4,4,6,6,6,6,8,6,6,6,6,4,4,4,4,2,2,2,2",
        when=WITHOUT_FILE,
    )
    alphas: Alphas = parameter(
        "block_alphas",
        "",
        "Block alphas",
        Section.BLOCKS,
        """The alpha of each of the 25 blocks (SDXL: 23). Empty: Network Alpha for all; 0: as large as the
        rank.""",
        kind="text",
        placeholder="25 numbers",
        when=WITHOUT_FILE,
    )
    conv_ranks: Ranks = parameter(
        "conv_block_dims",
        "",
        "Conv dims",
        Section.BLOCKS,
        """The rank of the 3×3 convolutions in each of the 25 blocks (SDXL: 23); all of them have some. It
        turns a Standard LoRA into a LoCon, with a file two to three times as large.""",
        kind="text",
        placeholder="25 numbers",
        when=WITHOUT_FILE,
    )
    conv_alphas: Alphas = parameter(
        "conv_block_alphas",
        "",
        "Conv alphas",
        Section.BLOCKS,
        """The alpha of the 3×3 convolutions in each of the 25 blocks (SDXL: 23). Empty: Convolution Alpha where the type has
        it, else 1. It needs Conv dims, or a type with a Convolution Rank.""",
        kind="text",
        placeholder="25 numbers",
        when=WITHOUT_FILE,
    )


def rate_weights(blocks: Blocks, layout: Layout) -> list[float] | None:
    """The multiplier of each block, 0 for those not above the threshold; None when nothing is set."""
    given = (blocks.down_weights, layout.down), (blocks.mid_weights, layout.middle), (blocks.up_weights, layout.up)
    if all(weights is None for weights, _ in given):
        return None
    found = [1.0] * layout.edge
    for weights, count in given:
        spread = weights.spread(count) if weights else [1.0] * count
        found += [w if w > blocks.zero_threshold or weights is None else 0.0 for w in spread]
    return found + [1.0] * layout.edge
