"""Captions that are longer than what is read of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import get_args

from trainer.data.folders import Picture
from trainer.errors import Problem
from trainer.models.clip_tokens import pieces
from trainer.paths import shown
from trainer.prompts import Prompt
from trainer.schema import problem_with
from trainer.schema.data import Captions

LENGTHS: tuple[int, ...] = get_args(Captions.model_fields["max_tokens"].annotation)
MOST_NAMED = 3
LONGEST_SHOWN = 60


@lru_cache(20_000)
def measured(caption: str, max_tokens: int, weighted: bool) -> tuple[int, str]:
    """How many tokens a caption has, and the part of it that is cut off; "" where all is read."""
    found = pieces(caption, weighted=weighted)
    return len(found), "".join(piece.text for piece in found[max_tokens:]).strip()


def problems(pictures: Sequence[Picture], settings: Captions) -> Iterator[Problem]:
    """A warning where captions are cut, with what is lost and the length that would hold all."""
    limit = settings.max_tokens
    counts = [(p, *measured(p.caption or "", limit, settings.weighted)) for p in pictures]
    long = [(picture, count, cut) for picture, count, cut in counts if count > limit]
    if not long:
        return
    named = "; ".join(
        f'"{shown(picture.folder)}/{shown(picture.path.name)}" has {count} (cut: "{_start(cut)}")'
        for picture, count, cut in long[:MOST_NAMED]
    )
    more = f"; and {len(long) - MOST_NAMED} more" if len(long) > MOST_NAMED else ""
    longest = max(count for _, count, _ in long)
    enough = next((length for length in LENGTHS if length >= longest), None)
    fix = f"Set it to {enough}, or shorten them." if enough else f"Shorten them: {LENGTHS[-1]} tokens are the most."
    shuffled = " Since captions are shuffled, each read loses another part." if settings.shuffle else ""
    noun = "caption is" if len(long) == 1 else "captions are"
    message = f"{len(long)} {noun} longer than the {limit} tokens that are read: {named}{more}.{shuffled} {fix}"
    yield problem_with("max_token_length", message, "warning")


def prompt_problems(prompts: Iterable[Prompt]) -> Iterator[Problem]:
    """A warning for each sample prompt that is cut, with what is lost."""
    limit = LENGTHS[-1]
    for prompt in prompts:
        for what, text in (("prompt", prompt.prompt), ("negative prompt", prompt.negative)):
            count, cut = measured(text, limit, weighted=False)
            if cut and text in prompt.texts:
                message = f'line {prompt.line}: its {what} has {count} tokens (cut: "{_start(cut)}"). Shorten it: {limit} are the most.'
                yield problem_with("sample_prompts", message, "warning")


def _start(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN].rstrip() + " …"
