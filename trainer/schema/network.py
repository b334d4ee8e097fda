"""The LoRA network: its type, size, and where it starts from."""

from typing import Literal

from trainer.schema.declare import Group, Section, parameter

NetworkType = Literal["Standard"]


class Network(Group):
    type: NetworkType = parameter(
        "LoRA_type",
        "Standard",
        "LoRA type",
        Section.LORA,
        """Standard adds two small matrices to every attention layer: small files, works
        everywhere, the right start.""",
    )
    weights: str = parameter(
        "network_weights",
        "",
        "LoRA network weights",
        Section.LORA,
        """Training goes on from this LoRA file instead of from nothing. The file itself is only
        read.""",
        kind="file",
        placeholder="optional, a .safetensors LoRA",
    )
    dim_from_weights: bool = parameter(
        "dim_from_weights",
        False,
        "DIM from weights",
        Section.LORA,
        """Take rank and alpha of every layer from the file above and ignore Network Rank.""",
    )
    rank: int = parameter(
        "network_dim",
        8,
        "Network Rank (Dimension)",
        Section.RANK,
        """How much the LoRA can hold, and how large its file is (rank 8 of SD 1.5: 9 MB). 4–16 for
        a character or object, 16–64 for a style with many motifs. Too high learns backgrounds and
        flaws as well.""",
        ge=1,
        le=4096,
        when={"dim_from_weights": False},
    )
    alpha: float = parameter(
        "network_alpha",
        1.0,
        "Network Alpha",
        Section.RANK,
        """The update is scaled by alpha ÷ rank. alpha = rank: full strength; alpha = 1 at rank 8:
        an eighth, so it wants a higher learning rate. Keep it at or below the rank.""",
        gt=0,
        when={"dim_from_weights": False},
    )
