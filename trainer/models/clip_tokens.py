"""CLIP's tokenizer, from the vocabulary that ships with the package (no network).

The file holds OpenAI's byte-pair merges, one pair a line, as published with CLIP under MIT. The
vocabulary follows from it: 256 byte symbols, the same at the end of a word, one symbol a merge,
and the begin and end marks.
"""

from __future__ import annotations

import gzip
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MERGES = Path(__file__).parent.parent / "assets" / "clip" / "bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SIZE = 49408
BEGIN, END = VOCABULARY_SIZE - 2, VOCABULARY_SIZE - 1


def byte_symbols() -> list[str]:
    """The printable characters that stand for the 256 bytes, in the vocabulary's order.

    Bytes that print stand for themselves; the others are moved behind character 255 (GPT-2's rule).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


@lru_cache
def tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer with the 49,408 entries that every SD 1.x and SDXL model uses."""
    from transformers import CLIPTokenizer

    with gzip.open(MERGES, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    pairs = [tuple(line.split()) for line in lines[1 : VOCABULARY_SIZE - 512 - 2 + 1]]
    symbols = byte_symbols()
    entries = [
        *symbols,
        *(symbol + "</w>" for symbol in symbols),
        *("".join(pair) for pair in pairs),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    assert len(entries) == VOCABULARY_SIZE
    return CLIPTokenizer(vocab={entry: i for i, entry in enumerate(entries)}, merges=pairs, model_max_length=77)


def chunks(texts: list[str], max_tokens: int) -> list[list[list[int]]]:
    """Token ids of each text as chunks of 77: begin mark, 75 tokens, end mark.

    `max_tokens` is 75, 150 or 225; longer texts are cut, shorter ones filled with end marks.
    Returns a list [texts][max_tokens / 75][77].
    """
    assert max_tokens % 75 == 0
    result = []
    for ids in tokenizer()(texts, add_special_tokens=False)["input_ids"] if texts else []:
        filled = [*ids[:max_tokens], *[END] * (max_tokens - len(ids))]
        result.append([[BEGIN, *filled[i : i + 75], END] for i in range(0, max_tokens, 75)])
    return result
