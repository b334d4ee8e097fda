"""The LoRA network: its type, size, and where it starts from. Which of these a type uses is said in its row of algorithms.py."""

from typing import TYPE_CHECKING, Literal

from trainer.schema.algorithms import TYPES
from trainer.schema.declare import Group, Section, parameter

if TYPE_CHECKING:
    NetworkType = str
else:
    NetworkType = Literal[tuple(TYPES)]
Reach = Literal["attn-mlp", "attn-only", "full", "full-lin", "unet-transformer-only", "unet-convblock-only"]


class Network(Group):
    type: NetworkType = parameter(
        "LoRA_type",
        "Standard",
        "LoRA type",
        Section.LORA,
        """Standard adds two small matrices to every attention layer: small files, works
        everywhere, the right start. Kohya LoCon adds them to the convolutions as well: two to three
        times the size, better at textures and styles. LyCORIS/LoHa holds more in the same size and wants small
        ranks (4–8) and more steps; LyCORIS/LoKr makes the smallest files but for LyCORIS/iA3, which only scales what is
        there (rates of 5e-3 and more). LyCORIS/LoCon is Kohya LoCon with DoRA and more to choose; LyCORIS/GLoRA adds
        a second pair of matrices. LyCORIS/Diag-OFT and BOFT turn weights instead of adding to them, which keeps more
        of the model. LyCORIS/Native Fine-Tuning trains everything: a file as large as the model, much memory. LoRA-FA is
        Standard with half of it frozen: less memory, slower to learn. DyLoRA trains all ranks up to the one
        given, so that the best is chosen afterwards.""",
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
        le=1_000_000,
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
    conv_rank: int = parameter(
        "conv_dim",
        1,
        "Convolution Rank (Dimension)",
        Section.RANK,
        """The rank of the 3×3 convolutions. They hold textures and need less than attention does: half of Network
        Rank or under, for instance 4. 0: they are left alone.""",
        ge=0,
        le=1_000_000,
        when={"dim_from_weights": False},
    )
    conv_alpha: float = parameter(
        "conv_alpha",
        1.0,
        "Convolution Alpha",
        Section.RANK,
        """The update of the 3×3 convolutions is scaled by this ÷ Convolution Rank. 0: as large as the rank.""",
        ge=0,
        when={"dim_from_weights": False},
    )
    reach: Reach = parameter(
        "LyCORIS_preset",
        "full",
        "LyCORIS Preset",
        Section.LORA,
        """Which layers are trained. full: all; full-lin: without 3×3 convolutions; attn-mlp: the transformers, as
        Standard does; attn-only: their attention alone; unet-…: that part of the U-Net, and no text encoder.""",
    )
    norms: bool = parameter(
        "train_norm",
        False,
        "Train Norm",
        Section.LORA,
        """Train weight and bias of the U-Net's norm layers too, where the preset reaches. They are few and set
        contrast and colours of whole pictures: try it for styles, with a low rate. ComfyUI and the web UIs'
        newer versions use them; other programs may leave them aside.""",
    )
    unit: int = parameter(
        "unit",
        1,
        "DyLoRA Unit / Block size",
        Section.RANK,
        """DyLoRA trains one unit of this many ranks in a step, drawn at random, so that the file can be cut off
        behind any of them later. It must divide the ranks. Small units leave more to choose from and need more
        steps, since each is drawn less often: a quarter of the rank is a start.""",
        ge=1,
        le=64,
    )
    factor: int = parameter(
        "factor",
        -1,
        "LoKr factor",
        Section.RANK,
        """Size of LoKr's smaller matrix. -1: near the square root of the layer's size, the smallest file; 4–16:
        larger files that hold more.""",
        ge=-1,
        le=1024,
    )
    decompose_both: bool = parameter(
        "decompose_both",
        False,
        "LoKr decompose both",
        Section.RANK,
        """Make LoKr's smaller matrix from two of low rank as well: a smaller file still, where the rank is small.""",
    )
    tucker: bool = parameter(
        "use_tucker",
        False,
        "Use Tucker decomposition",
        Section.RANK,
        """Take 3×3 convolutions apart in all their directions (Tucker): fewer weights for the same rank.""",
    )
    cp: bool = parameter(
        "use_cp",
        False,
        "Use CP decomposition",
        Section.RANK,
        """LoKr's name for the same: 3×3 convolutions are taken apart in all their directions.""",
    )
    scalar: bool = parameter(
        "use_scalar",
        False,
        "Use Scalar",
        Section.RANK,
        """Train one more number in front of each layer's update, which starts at 0; the matrices then start at
        random. The file looks the same.""",
    )
    dora: bool = parameter(
        "dora_wd",
        False,
        "DoRA Weight Decompose",
        Section.RANK,
        """Train the length of each row of weights apart from its direction (DoRA). Often closer to full training
        at small ranks; slower, and wants a lower learning rate.""",
    )
    on_input: bool = parameter(
        "train_on_input",
        True,
        "iA3 train on input",
        Section.RANK,
        """iA3 scales what comes into each layer. Off: what goes out of it.""",
    )
    constraint: float = parameter(
        "constrain",
        0.0,
        "Constrain OFT",
        Section.RANK,
        """How far the weights may be turned: the rotations' size is held at this × the layer's outputs. 0.001 is a
        tight bound, 0.01 a loose one; 0: none.""",
        ge=0,
    )
    rescaled: bool = parameter(
        "rescaled",
        False,
        "Rescaled OFT",
        Section.RANK,
        """Train the length of each row of weights as well as its direction.""",
    )
    max_norm: float = parameter(
        "scale_weight_norms",
        0.0,
        "Scale weight norms",
        Section.RANK,
        """After each step, a layer's update whose norm is larger than this is shrunk to it, which holds back
        overtraining and lets several LoRAs be mixed. 1 is a good start; lower is stronger; 0: off.""",
        ge=0,
    )
    dropout: float = parameter(
        "network_dropout",
        0.0,
        "Network dropout",
        Section.RANK,
        """Share of the values between the two matrices that are left out at random in each step, so that no single
        one is relied on. Against overtraining on few images: 0.1–0.3, with more steps. 0: off.""",
        ge=0,
        le=0.99,
    )
    rank_dropout: float = parameter(
        "rank_dropout",
        0.0,
        "Rank dropout",
        Section.RANK,
        """The same for whole ranks: each is left out with this probability for an image, the others are scaled up
        to make up for it. 0.1–0.3; 0: off.""",
        ge=0,
        le=0.99,
    )
    rank_dropout_scale: bool = parameter(
        "rank_dropout_scale",
        False,
        "Rank Dropout Scale",
        Section.RANK,
        """Scale what rank dropout leaves up, so that the update stays as strong on average.""",
    )
    module_dropout: float = parameter(
        "module_dropout",
        0.0,
        "Module dropout",
        Section.RANK,
        """The same for whole layers: each layer's update is left out with this probability in a step. 0.1–0.3;
        0: off.""",
        ge=0,
        le=0.99,
    )
