"""Text states: asked for once a caption, kept on disk, and made anew exactly where something changed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from trainer import models
from trainer.data import texts
from trainer.data.folders import Picture
from trainer.models import TextStates
from trainer.prompts import Prompt
from trainer.schema.data import Captions


class Model:
    """Its states are the caption's letters times the encoder's weight; it notes what it is asked."""

    family = SimpleNamespace(clip_skip=True)

    def __init__(self, weight=1.0, pooled=True):
        self.text_encoders = {"te": torch.nn.Linear(1, 1, bias=False)}
        torch.nn.init.constant_(self.text_encoders["te"].weight, weight)
        self.asked = []
        self.pooled = pooled

    def tokens(self, captions, *, weighted=False, padded=True):
        return captions

    def text_states(self, captions):
        self.asked += captions
        letters = torch.tensor([[float(ord(c)) for c in caption.ljust(4)[:4]] for caption in captions])
        states = self.text_encoders["te"](letters[..., None])
        return TextStates(states, states[:, 0] if self.pooled else None)


CAPTIONS = ["cat", "dog", "cat", None, "bird"]


@pytest.fixture
def pictures(tmp_path):
    found = []
    for i, caption in enumerate(CAPTIONS):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
        found.append(Picture(tmp_path / f"{i}.png", caption, 1, (8, 8), "1_x", False, "x"))
    return found


ON_DISK = Captions(cache_states=True, cache_states_to_disk=True)


def encode(pictures, model=None, settings=ON_DISK):
    model = model or Model()
    progress = []
    found = texts.encode_captions(pictures, model, settings, lambda *at: progress.append(at))
    assert progress[-1][0] == progress[-1][1]
    return found, model.asked


def entry(tmp_path, number):
    return tmp_path / texts.FOLDER / f"{number}.png.safetensors"


def assert_like_new(found, pictures):
    captions = [picture.caption or "" for picture in pictures]
    device = torch.device("cpu")
    fresh = Model().text_states(captions)
    for part, expected in zip(found.of(captions, device), fresh, strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize("pooled", [True, False])
def test_each_caption_is_asked_for_once(pictures, pooled):
    found, asked = encode(pictures, Model(pooled=pooled), Captions(cache_states=True))
    assert sorted(asked) == ["", "bird", "cat", "dog"]
    answer = found.of(["dog", "", "dog"], torch.device("cpu"))
    expected = Model(pooled=pooled).text_states(["dog", "", "dog"])
    assert torch.equal(answer.states, expected.states)
    assert (answer.pooled is None) if not pooled else torch.equal(answer.pooled, expected.pooled)
    assert not (pictures[0].path.parent / texts.FOLDER).exists()


def test_no_more_than_a_few_are_asked_for_at_once(pictures):
    sizes = []
    texts.encode(map(str, range(20)), lambda batch: (sizes.append(len(batch)), Model().text_states(batch))[1])
    assert sizes == [8, 8, 4]


@pytest.mark.proves("cache_text_encoder_outputs_to_disk")
def test_the_next_run_reads_them_all(pictures):
    encode(pictures)
    found, asked = encode(pictures)
    assert asked == []
    assert_like_new(found, pictures)


def other_caption(pictures, path):
    pictures[1] = replace(pictures[1], caption="fox")


def half_written(pictures, path):
    path.write_bytes(path.read_bytes()[:-5])


def foreign(pictures, path):
    path.write_bytes(b"PK\x03\x04 an archive" * 20)


def foreign_safetensors(pictures, path):
    save_file({"states": torch.zeros(4, 1)}, path)


def without_states(pictures, path):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({"x": torch.zeros(4, 1)}, path, metadata)


def not_a_number(pictures, path):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({"states": torch.full((4, 1), float("nan"))}, path, metadata)


def of_another_caption(pictures, path):
    path.write_bytes(path.with_name("4.png.safetensors").read_bytes())


@pytest.mark.parametrize(
    "damage",
    [other_caption, half_written, foreign, foreign_safetensors, without_states, not_a_number, of_another_caption],
    ids=lambda f: f.__name__,
)
def test_a_changed_caption_or_a_bad_entry_is_asked_for_anew_and_no_other(pictures, tmp_path, damage):
    encode(pictures)
    damage(pictures, entry(tmp_path, 1))
    found, asked = encode(pictures)
    assert asked == [pictures[1].caption]
    assert_like_new(found, pictures)
    assert encode(pictures)[1] == []


@pytest.mark.parametrize(
    "change", [{"clip_skip": 2}, {"max_tokens": 150}, {"weighted": True}], ids=lambda change: next(iter(change))
)
def test_another_way_of_asking_makes_all_anew(pictures, change):
    encode(pictures)
    assert len(encode(pictures, settings=ON_DISK.model_copy(update=change))[1]) == 4


def test_another_text_encoder_makes_all_anew(pictures):
    encode(pictures)
    found, asked = encode(pictures, Model(weight=2.0))
    assert len(asked) == 4
    assert torch.equal(found.of(["cat"], torch.device("cpu")).states, Model(weight=2.0).text_states(["cat"]).states)


LONG = ", ".join(f"thing {n}" for n in range(30))  # 119 tokens


@pytest.mark.parametrize("max_tokens", [75, 225])
@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [
        (Prompt("a cat"), 1),
        (Prompt(LONG), 2),
        (Prompt("a cat", negative=LONG), 2),
        (Prompt("a cat", negative=LONG, cfg_scale=1.0), 1),
        (Prompt(f"{LONG}, {LONG}"), 3),
        (Prompt(f"{LONG}, {LONG}, {LONG}"), 3),
    ],
)
def test_a_sample_is_drawn_by_all_of_its_prompt_however_long_captions_may_be(tiny_model, prompt, chunks, max_tokens):
    model = models.load(str(tiny_model), "", torch.float32, torch.device("cpu"), 1, max_tokens)
    longer = models.load(str(tiny_model), "", torch.float32, torch.device("cpu"), 1, 75 * chunks)
    with torch.no_grad():
        states = texts.of_prompt(model, prompt).states
        expected = longer.text_states(longer.tokens(prompt.texts)).states
    assert states.shape[:2] == (len(prompt.texts), 75 * chunks + 2)
    assert torch.equal(states, expected)
    kept = texts.of_prompts(model, [prompt, Prompt("other")])
    assert torch.equal(kept[prompt].states, states)
