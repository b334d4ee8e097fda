"""Length, precision and memory of training."""

from typing import Literal

from trainer.schema.declare import Group, Section, parameter


class Training(Group):
    batch_size: int = parameter(
        "train_batch_size",
        1,
        "Train batch size",
        Section.LENGTH,
        """Images per step. More is smoother and quicker per image, and takes more memory; raise
        the learning rate with it. Only images of one bucket share a batch.""",
        ge=1,
        le=4096,
    )
    epochs: int = parameter(
        "epoch",
        1,
        "Epoch",
        Section.LENGTH,
        """How many times all images (times their repeats) are gone through. 20 images × 10 repeats
        × 8 epochs = 1600 steps at batch size 1: a good first try.""",
        ge=1,
        le=1_000_000,
    )
    max_epochs: int | None = parameter(
        "max_train_epochs",
        None,
        "Max train epoch",
        Section.LENGTH,
        """Training ends after this many epochs, whatever Epoch says. Empty or 0: no limit.""",
        ge=0,
        le=1_000_000,
        blank="no limit",
    )
    max_steps: int | None = parameter(
        "max_train_steps",
        None,
        "Max train steps",
        Section.LENGTH,
        """Training takes exactly this many steps; it goes before both epoch settings. Empty or 0:
        the epochs decide.""",
        ge=0,
        le=100_000_000,
        blank="the epochs decide",
    )
    precision: Literal["no", "fp16", "bf16"] = parameter(
        "mixed_precision",
        "fp16",
        "Mixed precision",
        Section.MACHINE,
        """The numbers that the model computes with. bf16 where the card knows it (RTX 30 and
        newer, and processors), fp16 on older cards, no for fp32 at twice the memory, whose products newer cards round to
        TF32. The LoRA's own weights stay exact either way.""",
    )
    threads: int = parameter(
        "num_cpu_threads_per_process",
        2,
        "Number of CPU threads per core",
        Section.MACHINE,
        """How many threads the trainer computes with on the processor, in all: kohya_ss's label says
        "per core". Matters little on a GPU; on a CPU set it to the number of cores.""",
        ge=1,
        le=1024,
    )
    processes: int = parameter(
        "num_processes",
        1,
        "Number of processes",
        Section.MACHINE,
        """One for each GPU that is to take part, in all machines. Each holds the whole model and takes Train batch size
        images of every step, so 2 processes at batch size 4 train like one at 8, and an epoch has half the steps: raise
        the learning rate as with a larger batch. On a processor without GPUs it gains nothing.""",
        ge=1,
        le=1024,
    )
    gpus: str = parameter(
        "gpu_ids",
        "",
        "GPU IDs",
        Section.MACHINE,
        """Which GPUs take part, by their numbers from 0: "1" or "0,2". At least as many as there are processes. Empty:
        the first ones.""",
        blank="the first ones",
        placeholder="0,1",
    )
    seed: int | None = parameter(
        "seed",
        None,
        "Seed",
        Section.MACHINE,
        """Start of all randomness. The same number and the same settings on the same device give
        the same LoRA. Empty: a random one, which the log and the file name.""",
        ge=0,
        le=2**63 - 1,
        blank="a random seed",
    )
    accumulation: int = parameter(
        "gradient_accumulation_steps",
        1,
        "Gradient accumulate steps",
        Section.STEP,
        """Batches that are averaged into one step: the effect of a batch N times as large without
        its memory. Steps get fewer and slower.""",
        ge=1,
    )
    checkpointing: bool = parameter(
        "gradient_checkpointing",
        False,
        "Gradient checkpointing",
        Section.STEP,
        """Forget intermediate results and compute them again when needed: far less memory, about a
        third slower, the same result.""",
    )
    goes_on_with_less: bool = parameter(
        "go_on_with_less_memory",
        False,
        "Go on with less memory",
        Section.STEP,
        """When memory ends: take the step again with Gradient checkpointing; if that is not enough, with each batch in
        parts that add up to it; then without the text encoders, where nothing of theirs changes. Slower, and the same
        LoRA but for rounding and dropout. Each change is a warning in the log. Off: training ends there, with its state
        saved.""",
    )
    full_fp16: bool = parameter(
        "full_fp16",
        False,
        "Full fp16 training (experimental)",
        Section.STEP,
        """The LoRA's own weights, gradients and the optimizer's input in fp16 too: a little less memory, and small
        changes are rounded away. Rarely worth it. Needs Mixed precision fp16, and a GPU.""",
    )
    full_bf16: bool = parameter(
        "full_bf16",
        False,
        "Full bf16 training (experimental)",
        Section.STEP,
        """The same in bf16, which rounds more coarsely and never overflows. Needs Mixed precision bf16.""",
    )
    fp8_base: bool = parameter(
        "fp8_base",
        False,
        "fp8 base",
        Section.STEP,
        """Keep the frozen base model, U-Net and text encoders, in 8 bits a weight and widen each layer only while it
        computes: half the memory of fp16, steps a little slower, the result nearly the same. Needs Mixed precision
        fp16 or bf16.""",
    )
    fp8_base_unet: bool = parameter(
        "fp8_base_unet",
        False,
        "fp8 base unet",
        Section.STEP,
        """The same for the U-Net alone; the text encoders keep what Mixed precision says.""",
    )
    base_bits: Literal["16", "int8", "nf4"] = parameter(
        "base_weights",
        "16",
        "Base weights",
        Section.STEP,
        """How the frozen U-Net is kept, by bitsandbytes: 16 as Mixed precision says; int8 halves it and is closer to
        the original than fp8; nf4 takes a quarter, and details suffer a little. For cards of 8 GB and under.""",
    )
    memory_efficient_attention: bool = parameter(
        "mem_eff_attn",
        False,
        "Memory efficient attention",
        Section.STEP,
        """Never hold the whole table of attention in memory, whatever CrossAttention below says. That is what sdpa
        and xformers do by themselves, so it matters with none.""",
    )
    attention: Literal["none", "sdpa", "xformers"] = parameter(
        "xformers",
        "xformers",
        "CrossAttention",
        Section.STEP,
        """The attention kernel. xformers where it is installed and knows this machine; otherwise
        PyTorch's own (sdpa), which is as good, and the log says so. none: the plain formula, slow
        and hungry, for comparing.""",
    )
    compiler: Literal["auto", "no", "inductor"] = parameter(
        "dynamo_backend",
        "auto",
        "Dynamo backend",
        Section.STEP,
        """Compile the U-Net's transformer blocks for this machine (torch.compile): steps get shorter, and the first one
        takes about a minute longer, once for a machine and a model. auto: on a GPU, for a full-size model, from 1,000
        steps on; how much it gains there was not measured yet. inductor: always; on a processor it gains a few percent.
        no: never. Where it cannot be done, a warning says so and training goes on without. The results are the same but
        for rounding.""",
    )
    prior_loss_weight: float = parameter(
        "prior_loss_weight",
        1.0,
        "Prior loss weight",
        Section.LOSS,
        """How much regularisation images count against training images. Without a regularisation
        folder it does nothing.""",
        ge=0,
    )
    additional: str = parameter(
        "additional_parameters",
        "",
        "Additional parameters",
        Section.STEP,
        """--name value, as often as needed: sets any parameter by its preset key and goes before the form. A
        name that is none is refused. Handy for presets of others and for trying things out.""",
        kind="text",
        placeholder="--max_train_steps 500 --seed 7",
    )

    @property
    def batch_of_all(self) -> int:
        """Images per batch over all processes."""
        return self.batch_size * self.processes
