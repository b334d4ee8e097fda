"""Token ids and weights beside those of sd-scripts, which read the same vocabulary with ftfy's cleaning."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests import reference
from trainer.models.clip_tokens import BEGIN, END, Piece, clean, pieces, tokenize, tokenizer

CAPTIONS = reference.read("captions")
MOJIBAKE = "caf\u00c3\u00a9 mojibake"
LENGTHS = (75, 150, 225)


@pytest.mark.proves("max_token_length")
@pytest.mark.parametrize("case", CAPTIONS["token_ids"]["cases"], ids=lambda case: case["caption"][:30])
def test_ids_are_those_of_sd_scripts_for_every_length(case):
    if case["caption"] == MOJIBAKE:
        pytest.skip("text that was decoded wrongly is not put right")
    for length in LENGTHS:
        found = tokenize([case["caption"]], length)
        assert found.ids[0].tolist() == [reference.expanded(row) for row in case[str(length)]]
        assert found.weights is None


@pytest.mark.proves("weighted_captions")
@pytest.mark.parametrize(
    "case", CAPTIONS["weighted_tokens"]["cases"], ids=lambda c: f"{c['prompt'][:20]} {c['max_token_length']}"
)
def test_weighted_ids_and_weights_are_those_of_sd_scripts_across_chunks(case):
    found = tokenize([case["prompt"]], case["max_token_length"], weighted=True)
    assert found.ids[0].tolist() == [reference.expanded(row) for row in case["ids"]]
    torch.testing.assert_close(found.weights[0], torch.tensor([reference.expanded(row) for row in case["weights"]]))


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("it\u2019s \u201cso\u201d", 'it\'s "so"'),
        ("\ufb01ne \uff21\u3000b", "fine A b"),
        ("a &amp; b", "a & b"),
        ("<a> &amp; b", "<a> &amp; b"),
        ("e\u0301", "\u00e9"),
        ("x\ufeff\x00y", "xy"),
    ],
)
def test_text_is_cleaned_as_clips_own_tokenizer_did(text, cleaned):
    assert clean(text) == cleaned


@pytest.mark.proves("no_token_padding")
def test_without_padding_a_batch_is_as_long_as_its_longest_caption():
    texts = ["a photo of a cat", "a", ""]
    found = tokenize(texts, 75, padded=False)
    assert found.ids.shape == (3, 1, 5 + 2)
    assert found.ids[0, 0].tolist() == [BEGIN, 320, 1125, 539, 320, 2368, END]
    assert found.ids[1, 0].tolist() == [BEGIN, 320, END, END, END, END, END]
    assert tokenize([""], 75, padded=False).ids.tolist() == [[[BEGIN, END]]]


@pytest.mark.parametrize(("words", "chunks"), [(74, 1), (75, 1), (76, 2), (150, 2), (151, 3), (400, 3)])
def test_without_padding_long_captions_take_no_more_chunks_than_they_fill(words, chunks):
    found = tokenize(["cat " * words, "cat"], 225, padded=False)
    assert found.ids.shape == (2, chunks, 77 if chunks > 1 else min(words, 75) + 2)
    assert (found.ids[..., -1] == END).all()
    assert int((found.ids[0] == 2368).sum()) == min(words, 225)


@settings(deadline=None, max_examples=200)
@given(st.text(st.sampled_from("()[]:,.019 ab's\t\n<|>\u2019\u65e5\u00bd\U0001f600I\u0130")) | st.text())
@example("a <|endoftext|> b<|startoftext|>")
@example("x<|ENDOFTEXT|>y we'll don't")
def test_pieces_are_the_tokens_of_transformers_and_make_up_the_text(text):
    found = pieces(text)
    assert [piece.token for piece in found] == tokenizer()(clean(text), add_special_tokens=False)["input_ids"]
    assert "".join(piece.text for piece in found) == clean(text).rstrip()


def test_the_pieces_of_a_weighted_text_have_its_weights_and_not_its_brackets():
    found = pieces("a (red:1.5) [cat]", weighted=True)
    assert found == [Piece(320, "a", 1.0), Piece(736, "red", 1.5), Piece(2368, "cat", 1 / 1.1)]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.text(st.sampled_from("()[]\\:,.019 ab&;#<\n\u2019\u65e5")) | st.text(), min_size=1, max_size=4),
    st.booleans(),
    st.booleans(),
)
def test_any_text_has_tokens(texts, weighted, padded):
    found = tokenize(texts, 150, weighted=weighted, padded=padded)
    assert found.ids.shape[0] == len(texts)
    assert found.ids.shape[2] <= 77
    assert ((found.ids >= 0) & (found.ids <= END)).all()
    if weighted:
        assert found.weights.shape == found.ids.shape
        assert (found.weights[..., 0] == 1).all() and (found.weights[..., -1] == 1).all()
