"""What the text encoders make of each caption, once: in memory, and on disk for the next run.

On disk each picture has one file, in a folder `.texts` beside it. Its header says what it was made
from: the caption, the text encoders, and how they were asked. An entry that does not match is made
anew; one that is damaged or foreign too.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from trainer.data.cache import Shelf, fingerprint
from trainer.data.captions import draw
from trainer.data.folders import Picture
from trainer.data.overflow import LENGTHS
from trainer.models import TextStates
from trainer.models.clip_tokens import pieces
from trainer.prompts import Prompt
from trainer.randomness import generator_at
from trainer.schema.data import Captions
from trainer.transfer import send

log = logging.getLogger(__name__)
FOLDER = ".texts"
AT_ONCE = 8


class Texts:
    """Captions' states, by caption, in the main memory."""

    def __init__(self, states: Mapping[str, TextStates]) -> None:
        self._states = states

    def of(self, captions: Sequence[str], device: torch.device) -> TextStates:
        """The captions' states [B,L,C], and [B,P] of the pooled ones where the family has them."""
        found = [self._states[caption] for caption in captions]
        pooled = [text.pooled for text in found if text.pooled is not None]
        return TextStates(
            send(torch.stack([text.states for text in found]), device),
            send(torch.stack(pooled), device) if pooled else None,
        )


@torch.no_grad()
def encode(
    texts: Iterable[str],
    ask: Callable[[list[str]], TextStates],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, TextStates]:
    """The states of every text, as `ask` answers for several at once; each text once."""
    found: dict[str, TextStates] = {}
    left = list(dict.fromkeys(texts))
    for start in range(0, len(left), AT_ONCE):
        batch = left[start : start + AT_ONCE]
        answer = ask(batch)
        for i, text in enumerate(batch):
            found[text] = answer.each(lambda part, i=i: part[i].cpu().clone())
        progress(len(found))
    return found


def encode_captions(
    pictures: Sequence[Picture],
    model: Any,
    settings: Captions,
    progress: Callable[[int, int], None],
) -> Texts:
    """The states of every picture's caption. Pictures whose disk entry is valid are not encoded.

    `progress(done, total)` counts the captions that are not on disk.
    """
    # With the cache on, nothing about a caption is drawn at random.
    captions = [draw(picture.caption, settings, generator_at(0, "captions"), 1) for picture in pictures]
    shelf = Shelf(FOLDER, "text states")
    known: dict[str, TextStates] = {}
    sources = [""] * len(pictures)
    if settings.cache_states_to_disk:
        common = _source(model, settings)
        sources = [json.dumps({"caption": caption, **common}) for caption in captions]
        for picture, caption, source in zip(pictures, captions, sources, strict=True):
            entry = shelf.read(shelf.file(picture), source)
            if entry and "states" in entry[0]:
                known[caption] = TextStates(entry[0]["states"], entry[0].get("pooled"))
    stored = set(known)
    todo = [caption for caption in captions if caption not in known]
    total = len(set(todo))
    progress(0, total)
    known |= encode(todo, lambda texts: answer(model, texts, settings), lambda done: progress(done, total))
    if settings.cache_states_to_disk:
        log.info("%d of %d captions were read from the disk cache", len(pictures) - len(todo), len(pictures))
        for picture, caption, source in zip(pictures, captions, sources, strict=True):
            if caption not in stored:
                parts = known[caption]._asdict().items()
                tensors = {name: tensor for name, tensor in parts if tensor is not None}
                shelf.write(shelf.file(picture), tensors, {"made_from": source})
    return Texts(known)


def answer(model: Any, captions: list[str], settings: Captions, places: Sequence[int] | None = None) -> TextStates:
    """What the model's text encoders answer to captions that are trained with, or to those at some places of them.

    Their length is that of all.
    """
    tokens = model.tokens(captions, weighted=settings.weighted, padded=not settings.no_padding)
    if places is not None and len(places) < len(captions):
        tokens = tuple(of_encoder.only(places) for of_encoder in tokens)
    return model.text_states(tokens)  # type: ignore[no-any-return]


def _source(model: Any, settings: Captions) -> dict[str, Any]:
    """All but the caption that an entry follows from."""
    return {
        "encoders": {name: fingerprint(encoder) for name, encoder in model.text_encoders.items()},
        "clip_skip": settings.clip_skip if model.family.clip_skip else None,
        "max_tokens": settings.max_tokens,
        "weighted": settings.weighted,
        "version": 1,
    }


def of_prompt(model: Any, prompt: Prompt) -> TextStates:
    """The states [B,L,C] that a sample is drawn by, in as many chunks as its longest text needs, as the web UIs do.

    Its brackets are text, and what is beyond the longest of `LENGTHS` is cut.
    """
    longest = max(len(pieces(text)) for text in prompt.texts)
    length = next((length for length in LENGTHS if length >= longest), LENGTHS[-1])
    return model.text_states(model.tokens(prompt.texts, max_tokens=length))  # type: ignore[no-any-return]


@torch.no_grad()
def of_prompts(model: Any, prompts: Iterable[Prompt]) -> dict[Prompt, TextStates]:
    """The same for each prompt, in the main memory."""
    return {prompt: of_prompt(model, prompt).each(torch.Tensor.cpu) for prompt in prompts}
