"""What takes less memory: told where memory does not suffice, and tried where the settings allow it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trainer.errors import Problem

if TYPE_CHECKING:
    from trainer.schema import Config


ON_A_CPU = ("allocate memory", "could not create a primitive")


def is_memory(error: BaseException) -> bool:
    """Whether an error says that memory is full: Python's, a GPU's, or one of torch's or oneDNN's on a CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ON_A_CPU)


def full(error: BaseException, config: Config) -> tuple[str, str]:
    """What to say of memory that is full under these settings, and what to do."""
    first = str(error).splitlines()[0] if str(error) else "out of memory"
    return f"The memory is full ({first}).", " ".join(map(str, savings(config)))


def savings(config: Config) -> Iterator[Problem]:
    """What would lower the memory that these settings take, the most harmless first."""
    from trainer.schema import problem_with  # late: the schema is made with the help of rules that use this module

    training, data = config.training, config.data
    if not training.checkpointing:
        yield problem_with("gradient_checkpointing", "switch it on: the same LoRA, a third slower.", "warning")
    if training.precision == "no":
        yield problem_with("mixed_precision", "bf16 halves the base model.", "warning")
    if not data.cache_latents:
        yield problem_with("cache_latents", "switch it on: the VAE leaves before the first step.", "warning")
    if states_can_be_cached(config):
        yield problem_with(
            "sdxl_cache_text_encoder_outputs", "switch it on: the text encoders leave before the first step.", "warning"
        )
    if training.batch_size > 1:
        yield problem_with(
            "train_batch_size",
            f"lower it from {training.batch_size}, and raise Gradient accumulate steps (gradient_accumulation_steps) "
            "by as much.",
            "warning",
        )
    if not config.optim.optimizer.endswith("8bit"):
        yield problem_with("optimizer", "AdamW8bit keeps a quarter of AdamW's states.", "warning")
    if training.precision != "no" and training.base_bits == "16" and not (training.fp8_base or training.fp8_base_unet):
        yield problem_with(
            "fp8_base", "switch it on: the base model in half the room, steps a little slower.", "warning"
        )
    yield problem_with(
        "max_resolution",
        f"lower it from {data.resolution[0]},{data.resolution[1]}; this changes the result.",
        "warning",
    )


def states_can_be_cached(config: Config) -> bool:
    """Whether the text encoders' answers are not kept, and could be, being the same at each read."""
    from trainer.schema.rules import cached_states

    captions = config.captions
    if captions.cache_states:
        return False
    kept = config.model_copy(update={"captions": captions.model_copy(update={"cache_states": True})})
    return not any(problem.severity == "error" for problem in cached_states(kept))
