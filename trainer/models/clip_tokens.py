"""CLIP's tokenizer, from the vocabulary that ships with the package (no network).

The file holds OpenAI's byte-pair merges, one pair a line, as published with CLIP under MIT. The
vocabulary follows from it: 256 byte symbols, the same at the end of a word, one symbol a merge,
and the begin and end marks.
"""

from __future__ import annotations

import gzip
import html
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.data.captions import weigh

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import CLIPTokenizer

MERGES = Path(__file__).parent.parent / "assets" / "clip" / "bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SIZE = 49408
BEGIN, END = VOCABULARY_SIZE - 2, VOCABULARY_SIZE - 1

_MARKS = ("<|startoftext|>", "<|endoftext|>")
_WORD_END = "</w>"
_WORDS = "|".join(
    (*map(re.escape, _MARKS), "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", r"[\p{L}]+", r"[\p{N}]", r"[^\s\p{L}\p{N}]+")
)
"""What CLIP takes for one word before it is split further (Radford et al. 2021, its published tokenizer)."""


def byte_symbols() -> list[str]:
    """The printable characters that stand for the 256 bytes, in the vocabulary's order.

    Bytes that print stand for themselves; the others are moved behind character 255 (GPT-2's rule).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The 49,408 entries that every Stable Diffusion model uses, with their ids, and the merges."""
    with gzip.open(MERGES, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    pairs = [(left, right) for line in lines[1 : VOCABULARY_SIZE - 512 - 2 + 1] for left, right in [line.split()]]
    symbols = byte_symbols()
    entries = [
        *symbols,
        *(symbol + _WORD_END for symbol in symbols),
        *("".join(pair) for pair in pairs),
        *_MARKS,
    ]
    assert len(entries) == VOCABULARY_SIZE
    return {entry: i for i, entry in enumerate(entries)}, pairs


@lru_cache
def tokenizer() -> CLIPTokenizer:
    """The vocabulary as transformers' CLIPTokenizer, for pipelines of diffusers."""
    from transformers import CLIPTokenizer

    vocabulary, pairs = _vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=77)


@lru_cache
def _splitter() -> Tokenizer:
    """The same as `tokenizer` makes, without transformers, which takes seconds to import."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    vocabulary, pairs = _vocabulary()
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, end_of_word_suffix=_WORD_END, unk_token=_MARKS[1]))
    made.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    made.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in _MARKS])
    return made


@dataclass(frozen=True)
class Piece:
    """One token of a text, the part of the text that it stands for (with the blanks before it), and how much it counts."""

    token: int
    text: str
    weight: float = 1.0


def pieces(text: str, *, weighted: bool = False) -> list[Piece]:
    """All tokens of a text, without begin and end marks; of a `weighted` one the brackets are read."""
    if not weighted:
        return _pieces(text, 1.0)
    return [piece for run, weight in weigh(text) for piece in _pieces(run, weight)]


def _pieces(text: str, weight: float) -> list[Piece]:
    text = clean(text)
    found, end = [], 0
    encoding = _splitter().encode(text, add_special_tokens=False)
    for token, (_, behind) in zip(encoding.ids, encoding.offsets, strict=True):
        found.append(Piece(token, text[end:behind], weight))
        end = max(end, behind)
    return found


@dataclass(frozen=True)
class Tokens:
    """Texts as ids [B, chunks, length], each chunk with its begin and end mark.

    `weights`, of the same shape, say how much each counts; None: all the same.
    """

    ids: torch.Tensor
    weights: torch.Tensor | None = None

    def only(self, places: Sequence[int]) -> Tokens:
        """The texts at these places, as long as they are among all."""
        some = list(places)
        return Tokens(self.ids[some], None if self.weights is None else self.weights[some])

    @property
    def rows(self) -> torch.Tensor:
        """The chunks of all texts as one batch [B·chunks, length]."""
        return self.ids.flatten(0, 1)

    def joined(self, states: torch.Tensor) -> torch.Tensor:
        """The texts' states [B, 75·chunks + 2, C] from those of the chunks [B·chunks, length, C].

        Multiplied by the weights; of several chunks the inner begin and end marks are left out.
        """
        import torch

        states = states.unflatten(0, self.ids.shape[:2])
        if self.weights is not None:
            states = states * self.weights.to(states.dtype)[..., None]
        return torch.cat([states[:, 0, :1], states[:, :, 1:-1].flatten(1, 2), states[:, -1, -1:]], 1)

    def to(self, device: torch.device) -> Tokens:
        from trainer.transfer import send

        return Tokens(send(self.ids, device), None if self.weights is None else send(self.weights, device))


# CLIP was trained on text that ftfy had put right. This is the part of it that captions meet:
# ligatures and letters of full or half width, and curly quotes.
_PLAIN = {
    **{code: unicodedata.normalize("NFKC", chr(code)) for code in (0x3000, *range(0xFB00, 0xFB07))},
    **{code: unicodedata.normalize("NFKC", chr(code)) for code in range(0xFF01, 0xFFF0)},
    **dict.fromkeys((0x02BC, *range(0x2018, 0x201C)), "'"),
    **dict.fromkeys(range(0x201C, 0x2020), '"'),
}
_CONTROLS = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ufeff\u206a-\u206f\ufff9-\ufffc]")


def clean(text: str) -> str:
    """The text as CLIP's own tokenizer reads it: plain quotes and letters, no HTML entities, NFC.

    Left out is ftfy's guess at text that was decoded wrongly (cafÃ© for café).
    """
    if "<" not in text:
        text = html.unescape(text)
    return unicodedata.normalize("NFC", _CONTROLS.sub("", text.translate(_PLAIN)))


def tokenize(
    texts: list[str], max_tokens: int, *, weighted: bool = False, padded: bool = True, padding: int | None = None
) -> Tokens:
    """Token ids of each text in chunks of 77: begin mark, 75 tokens, end mark.

    `max_tokens` is 75, 150 or 225; longer texts are cut, shorter ones filled: up to `max_tokens`, or where
    not `padded` only up to the longest text, which makes a single chunk shorter and several fewer.
    `weighted` texts have their brackets read. Filled with end marks, or, after one end mark, with the
    token `padding`: then a chunk that begins beyond the text has its end mark first.
    """
    import torch

    assert max_tokens % 75 == 0
    lines = [[(piece.token, piece.weight) for piece in pieces(text, weighted=weighted)] for text in texts]
    longest = max((len(line) for line in lines), default=0)
    length = max_tokens
    if not padded:
        length = min(max_tokens, longest if longest <= 75 else -(-longest // 75) * 75)
    places = range(0, max(1, length), 75)
    rows = [[_chunk(line[:length][i : i + 75], min(75, length), padding) for i in places] for line in lines]
    ids = torch.tensor([[[token for token, _ in chunk] for chunk in row] for row in rows], dtype=torch.int64)
    weights = torch.tensor([[[weight for _, weight in chunk] for chunk in row] for row in rows])
    return Tokens(ids, weights if weighted else None)


def _chunk(piece: list[tuple[int, float]], length: int, padding: int | None) -> list[tuple[int, float]]:
    fill = END if padding is None else padding
    return [(BEGIN, 1.0), *piece, (END, 1.0), *[(fill, 1.0)] * (length - len(piece))]
