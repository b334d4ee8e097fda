"""What a batch holds at each read: flips, crops, hues, captions; and who reads it."""

from __future__ import annotations

import os
import pickle
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from trainer import schema
from trainer.data import feed as feed_module
from trainer.data.buckets import Placement
from trainer.data.cache import Latents
from trainer.data.feed import Feed
from trainer.data.folders import Picture
from trainer.data.images import with_hue


@pytest.fixture
def picture(tmp_path):
    """A 96×80 picture whose red is the column and whose green is the row."""
    y, x = np.mgrid[:80, :96].astype(np.uint8)
    Image.fromarray(np.stack([x, y, np.full_like(x, 7)], -1)).save(tmp_path / "a.png")
    return Picture(tmp_path / "a.png", "a, b, c, d", 40, (96, 80), "40_x", False, "x")


PLACEMENT = Placement((64, 64), (96, 80), (16, 8))


def feed(picture, latents=None, seed=1, **settings):
    config = schema.parse({"cache_latents": latents is not None, "bucket_reso_steps": 64} | settings)
    return Feed([picture], [PLACEMENT], config, seed, latents)


def corners(made):
    """The column and row of each read's first pixel."""
    reads = [made[number].pixels[0] for number in range(len(made))]
    return [tuple(((read[:2, 0, 0] + 1) * 127.5).round().int().tolist()) for read in reads]


def test_the_centre_is_cut_out_at_every_read(picture):
    assert set(corners(feed(picture))) == {(16, 8)}


@pytest.mark.proves("random_crop")
def test_a_random_crop_is_another_place_of_the_image_at_each_read(picture):
    found = corners(feed(picture, random_crop=True))
    assert len(set(found)) > 30
    assert {0 <= left <= 32 and 0 <= top <= 16 for left, top in found} == {True}
    assert min(left for left, _ in found) < 8 and max(left for left, _ in found) > 24
    assert found == corners(feed(picture, random_crop=True))
    assert found != corners(feed(picture, random_crop=True, seed=2))


def test_a_random_crop_shows_the_very_pixels_of_the_image(picture):
    made = feed(picture, random_crop=True)
    (left, top), read = corners(made)[0], made[0].pixels[0]
    image = torch.from_numpy(np.array(Image.open(picture.path))).permute(2, 0, 1)
    assert torch.equal(((read + 1) * 127.5).round(), image[:, top : top + 64, left : left + 64].float())


def test_each_read_tells_its_images_own_size_crop_and_bucket(picture):
    """SDXL's conditioning: 96×80 in a square bucket leaves (64 − 64·80/96) // 2 = 5 pixels above."""
    made = feed(picture, flip_aug=True)
    found = {tuple(made[number].sizes[0].tolist()) for number in range(40)}
    assert found == {(80, 96, 5, 0, 64, 64)}
    tall = Feed([replace(picture, size=(80, 97))], [PLACEMENT], made.config, 1)
    margins = {tuple(tall[number].sizes[0, 2:4].tolist()) for number in range(40)}
    assert margins == {(0, 5), (0, 6)}  # (64 − 64·80/97) // 2 = 5 on the left, 6.2 on the right


@pytest.mark.proves("color_aug")
def test_colour_augmentation_moves_the_hue_a_little_anew_at_each_read(picture):
    image = np.zeros((80, 96, 3), np.uint8)
    image[:, :48] = (200, 40, 40)
    image[:, 48:] = 90
    Image.fromarray(image).save(picture.path)
    made = feed(picture, color_aug=True)
    reads = [((made[n].pixels[0] + 1) * 127.5).round().int() for n in range(len(made))]
    reds = {tuple(read[:, 0, 0].tolist()) for read in reads}
    assert len(reds) > 10
    assert {red for red, _, _ in reds} == {200}  # the brightest channel stays
    assert all(max(green, blue) <= 40 + 160 * 16 / 60 + 3 for _, green, blue in reds)  # at most 16° of 60
    assert any(green > 50 for _, green, _ in reds) and any(blue > 50 for _, _, blue in reds)
    assert all((read[:, 0, -1] == 90).all() for read in reads)  # greys stay
    assert {tuple(feed(picture)[n].pixels[0, :, 0, 0].tolist()) for n in range(5)} == {
        tuple((np.array([200, 40, 40]) / np.float32(127.5) - 1).astype(np.float32).tolist())
    }


def test_a_third_of_the_circle_makes_red_green():
    red = np.full((2, 2, 3), (255, 0, 0), np.uint8)
    found = with_hue(red, 1 / 3)[0, 0].astype(int)
    assert np.abs(found - (0, 255, 0)).max() < 8
    assert np.array_equal(with_hue(red, 1.0), red)


@pytest.mark.proves("flip_aug")
def test_flipping_mirrors_about_half_of_the_reads_of_an_image(picture):
    first = [left for left, _ in corners(feed(picture, flip_aug=True))]
    assert set(first) == {16, 79}
    assert 10 < first.count(79) < 30


@pytest.mark.proves("flip_aug")
def test_flipping_takes_the_mirrored_version_of_cached_latents(picture):
    latents = [Latents(torch.zeros(4, 8, 8), torch.ones(4, 8, 8))]
    made = feed(picture, latents, flip_aug=True)
    reads = [float(made[n].latents.mean()) for n in range(len(made))]
    assert set(reads) == {0.0, 1.0}
    assert 10 < sum(reads) < 30
    plain = feed(picture, latents)
    assert {float(plain[n].latents.mean()) for n in range(40)} == {0.0}


@pytest.mark.proves("shuffle_caption")
def test_captions_are_shuffled_anew_at_each_read(picture):
    made = feed(picture, shuffle_caption=True, keep_tokens=1)
    texts = [made[n].captions[0] for n in range(len(made))]
    assert len(set(texts)) > 4
    assert all(text.startswith("a, ") for text in texts)


@pytest.fixture
def reader(monkeypatch):
    """Batches whose pixels are the number of the process that read them."""
    monkeypatch.setattr(feed_module, "to_tensor", lambda images: torch.tensor(os.getpid()))

    def go(made, numbers):
        return [int(batch.pixels) for batch in made.batches(numbers)]

    return go


def test_workers_read_in_processes_of_their_own(picture, reader):
    made = feed(picture, max_data_loader_n_workers=2)
    found = reader(made, range(8))
    assert len(set(found)) == 2
    assert os.getpid() not in found
    assert set(reader(feed(picture), range(8))) == {os.getpid()}


@pytest.mark.proves("persistent_data_loader_workers")
def test_persistent_workers_live_on_in_the_next_epoch_and_others_do_not(picture, reader):
    settings = {"max_data_loader_n_workers": 1, "train_batch_size": 20}  # 2 batches an epoch
    once = reader(feed(picture, **settings), range(1, 6))
    assert once[0] != once[1] == once[2] != once[3] == once[4]
    kept = reader(feed(picture, persistent_data_loader_workers=True, **settings), range(1, 6))
    assert len(set(kept)) == 1


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("numbers", [range(0), range(1), range(3, 11), range(4, 8)])
def test_with_any_workers_every_batch_comes_once_and_in_order(picture, numbers, persistent):
    settings = {"train_batch_size": 10, "random_crop": True}  # 4 batches an epoch
    alone = [batch.pixels for batch in feed(picture, **settings).batches(numbers)]
    made = feed(picture, max_data_loader_n_workers=2, persistent_data_loader_workers=persistent, **settings)
    helped = [batch.pixels for batch in made.batches(numbers)]
    assert len(alone) == len(helped) == len(numbers)
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))


def test_without_workers_the_next_batch_and_no_more_is_read_while_this_one_is_trained(picture, monkeypatch):
    reading = [threading.Event() for _ in range(3)]
    made, read = feed(picture), Feed.__getitem__

    def told(self, number):
        reading[number].set()
        return read(self, number)

    monkeypatch.setattr(Feed, "__getitem__", told)
    batches = made.batches(range(3))
    next(batches)  # and here would be the step
    assert reading[1].wait(10)
    assert not reading[2].wait(0.2)
    assert len(list(batches)) == 2


@pytest.mark.proves("max_data_loader_n_workers")
def test_there_are_never_more_workers_than_the_machine_has_threads(picture, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert feed(picture, max_data_loader_n_workers=64).workers() == 3
    assert feed(picture, max_data_loader_n_workers=2).workers() == 2
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert feed(picture, max_data_loader_n_workers=64).workers() == 1


def test_cached_latents_need_no_workers(picture):
    latents = [Latents(torch.zeros(4, 8, 8))]
    assert feed(picture, latents, max_data_loader_n_workers=4).workers() == 0


def test_a_feed_can_be_sent_to_a_fresh_process(picture):
    """Where processes do not fork (Windows, macOS), the loader pickles it."""
    made = feed(picture, random_crop=True)
    assert torch.equal(pickle.loads(pickle.dumps(made))[3].pixels, made[3].pixels)


def test_every_nth_epoch_is_read_without_captions(picture):
    made = feed(picture, caption_dropout_every_n_epochs=2, train_batch_size=10)  # 4 batches an epoch
    without = [number for number in range(16) if made[number].captions == [""] * 10]
    assert without == [4, 5, 6, 7, 12, 13, 14, 15]
    assert all(made[number].captions == [picture.caption] * 10 for number in range(16) if number not in without)


def test_a_share_of_the_reads_is_without_caption(picture):
    made = feed(picture, caption_dropout_rate=0.25)
    dropped = sum(made[number].captions == [""] for number in range(400))
    assert 70 < dropped < 130
