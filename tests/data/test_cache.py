"""Latents: encoded once, in batches, kept on disk, and made anew exactly where something changed."""

from __future__ import annotations

import logging
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from trainer.data import cache
from trainer.data.buckets import Placement
from trainer.data.folders import Picture
from trainer.errors import TrainingError


class Model:
    """Its latents are the image's mean colours, made larger by the VAE's weight; it counts what it encodes."""

    def __init__(self, weight=1.0):
        self.vae = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(self.vae.weight, weight)
        self.batches = []

    def encode(self, pixels, generators):
        assert len(generators) == len(pixels)
        self.batches.append(len(pixels))
        cells = torch.nn.functional.avg_pool2d(pixels, 8) * self.vae.weight.detach()
        return torch.cat([cells, cells[:, :1]], 1)


@pytest.fixture
def pictures(tmp_path):
    found = []
    for i in range(5):
        noise = np.random.default_rng(i).integers(0, 255, (80, 64, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
        found.append(Picture(tmp_path / f"{i}.png", "x", 1, (64, 80), "1_x", False, "x"))
    return found


CENTRE = Placement((64, 64), (64, 80), (0, 8))


def encode(pictures, model=None, placements=None, **options):
    model = model or Model()
    settings = {"flip": False, "batch_size": 1, "dtype": torch.float32, "to_disk": True} | options
    progress = []
    found = cache.encode_all(
        pictures, placements or [CENTRE] * len(pictures), model, progress=lambda *at: progress.append(at), **settings
    )
    assert progress[-1] == (len(pictures), len(pictures))
    return found, sum(model.batches)


def entries(tmp_path):
    return sorted((tmp_path / cache.FOLDER).iterdir())


@pytest.mark.proves("vae_batch_size")
@pytest.mark.parametrize(("size", "batches"), [(1, [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (8, [5])])
def test_the_vae_batch_size_is_how_many_images_it_encodes_at_once_and_changes_nothing(pictures, size, batches):
    model = Model()
    found, _ = encode(pictures, model, batch_size=size, to_disk=False)
    assert model.batches == batches
    alone, _ = encode(pictures, to_disk=False)
    assert all(torch.equal(a.plain, b.plain) for a, b in zip(found, alone, strict=True))


def test_only_images_of_one_bucket_are_encoded_together(pictures):
    model = Model()
    wide = Placement((64, 32), (64, 80), (0, 8))
    encode(pictures, model, [CENTRE, wide, CENTRE, wide, CENTRE], batch_size=8, to_disk=False)
    assert model.batches == [3, 2]


@pytest.mark.proves("cache_latents_to_disk")
def test_the_next_run_reads_the_same_latents_and_encodes_nothing(pictures, tmp_path):
    first, count = encode(pictures)
    assert count == 5
    assert len(entries(tmp_path)) == 5
    second, count = encode(pictures)
    assert count == 0
    assert all(torch.equal(a.plain, b.plain) for a, b in zip(first, second, strict=True))


def test_with_flipping_both_versions_are_kept(pictures):
    plain, _ = encode(pictures)
    both, count = encode(pictures, flip=True)
    assert count == 10
    again, count = encode(pictures, flip=True)
    assert count == 0
    for a, b, c in zip(plain, both, again, strict=True):
        assert torch.equal(a.plain, b.plain) and torch.equal(b.plain, c.plain)
        torch.testing.assert_close(b.flipped, b.plain.flip(-1))
        assert torch.equal(b.flipped, c.flipped)
    assert encode(pictures)[1] == 0


def changed_image(pictures, tmp_path):
    Image.new("RGB", (64, 80), "red").save(pictures[2].path)


def same_size_and_time(pictures, tmp_path):
    """Another picture with the old one's size in bytes, and a newer time."""
    data = bytearray(pictures[2].path.read_bytes())
    entry = tmp_path / cache.FOLDER / "2.png_64x64.safetensors"
    before = entry.read_bytes()
    Image.fromarray(np.asarray(Image.open(pictures[2].path)) // 2).save(pictures[2].path)
    new = pictures[2].path.read_bytes()
    pictures[2].path.write_bytes(new.ljust(len(data), b"\0"))
    assert entry.read_bytes() == before


def half_written(pictures, tmp_path):
    entry = entries(tmp_path)[2]
    entry.write_bytes(entry.read_bytes()[:-40])


def empty(pictures, tmp_path):
    entries(tmp_path)[2].write_bytes(b"")


def foreign(pictures, tmp_path):
    entries(tmp_path)[2].write_bytes(b"PK\x03\x04 an archive" * 20)


def foreign_safetensors(pictures, tmp_path):
    save_file({"latents": torch.zeros(4, 8, 8)}, entries(tmp_path)[2])


def of_another_image(pictures, tmp_path):
    entries(tmp_path)[2].write_bytes(entries(tmp_path)[1].read_bytes())


def not_a_number(pictures, tmp_path):
    from safetensors import safe_open

    entry = entries(tmp_path)[2]
    with safe_open(entry, "pt") as file:
        metadata = file.metadata()
    save_file({"plain": torch.full((4, 8, 8), float("nan"))}, entry, metadata)


def of_another_shape(pictures, tmp_path):
    from safetensors import safe_open

    entry = entries(tmp_path)[2]
    with safe_open(entry, "pt") as file:
        metadata = file.metadata()
    save_file({"plain": torch.zeros(4, 8, 9)}, entry, metadata)


def deleted(pictures, tmp_path):
    entries(tmp_path)[2].unlink()


DAMAGES = [
    changed_image,
    same_size_and_time,
    half_written,
    empty,
    foreign,
    foreign_safetensors,
    of_another_image,
    not_a_number,
    of_another_shape,
    deleted,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_changed_image_or_a_bad_entry_is_encoded_anew_and_no_other(pictures, tmp_path, damage):
    before, _ = encode(pictures)
    untouched = {path: path.stat().st_mtime_ns for path in entries(tmp_path)[:2] + entries(tmp_path)[3:]}
    damage(pictures, tmp_path)
    found, count = encode(pictures)
    assert count == 1
    fresh, _ = encode(pictures, to_disk=False)
    assert all(torch.equal(a.plain, b.plain) for a, b in zip(found, fresh, strict=True))
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    assert encode(pictures)[1] == 0
    assert len(before) == 5


def test_an_image_that_was_only_touched_or_copied_keeps_its_entry(pictures):
    encode(pictures)
    os.utime(pictures[1].path, (1, 1))
    assert encode(pictures)[1] == 0


def test_another_vae_makes_all_anew(pictures):
    encode(pictures)
    found, count = encode(pictures, Model(weight=2.0))
    assert count == 5
    fresh, _ = encode(pictures, Model(weight=2.0), to_disk=False)
    assert torch.equal(found[0].plain, fresh[0].plain)


@pytest.mark.parametrize(
    ("stored", "wanted", "encoded"),
    [(torch.float16, torch.float32, 5), (torch.float32, torch.float16, 0), (torch.float16, torch.float16, 0)],
)
def test_the_latents_of_a_run_are_as_exact_as_without_what_another_left_on_disk(pictures, stored, wanted, encoded):
    encode(pictures, dtype=stored, flip=True)
    found, count = encode(pictures, dtype=wanted, flip=True)
    fresh, _ = encode(pictures, dtype=wanted, flip=True, to_disk=False)
    assert count == 2 * encoded
    for a, b in zip(found, fresh, strict=True):
        assert torch.equal(a.plain, b.plain) and torch.equal(a.flipped, b.flipped)


@pytest.mark.parametrize(
    "other",
    [
        Placement((64, 64), (64, 80), (0, 0)),
        Placement((64, 64), (64, 66), (0, 1)),
        Placement((32, 32), (32, 40), (0, 4)),
    ],
    ids=["crop", "scale", "size"],
)
def test_another_size_or_crop_of_one_image_makes_that_one_anew(pictures, other):
    encode(pictures)
    placements = [CENTRE, CENTRE, CENTRE, other, CENTRE]
    found, count = encode(pictures, placements=placements)
    assert count == 1
    fresh, _ = encode(pictures, placements=placements, to_disk=False)
    assert torch.equal(found[3].plain, fresh[3].plain)


def test_two_sizes_of_an_image_stand_beside_each_other(pictures):
    small = [Placement((32, 32), (32, 40), (0, 4))] * 5
    encode(pictures)
    encode(pictures, placements=small)
    assert encode(pictures)[1] == 0
    assert encode(pictures, placements=small)[1] == 0


def test_a_folder_that_cannot_be_written_is_told_once_and_training_goes_on(pictures, monkeypatch, caplog):
    def refuse(path, data):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(cache, "write_whole", refuse)
    with caplog.at_level(logging.WARNING):
        found, count = encode(pictures)
    assert count == len(found) == 5
    (record,) = caplog.records
    assert "are not cached" in record.getMessage()
    assert "Permission denied" in record.getMessage()


def test_a_read_only_folder_is_only_read(pictures, tmp_path, caplog):
    if os.geteuid() == 0:
        (tmp_path / cache.FOLDER).write_text("not a folder")  # nothing is read-only for root
    else:
        tmp_path.chmod(0o555)
    with caplog.at_level(logging.WARNING):
        found, _ = encode(pictures)
    tmp_path.chmod(0o755)
    assert len(found) == 5
    assert len(caplog.records) == 1


def test_entries_hold_tensors_and_what_they_were_made_from(pictures, tmp_path):
    encode(pictures, flip=True)
    assert {name: list(t.shape) for name, t in load_file(entries(tmp_path)[0]).items()} == {
        "plain": [4, 8, 8],
        "flipped": [4, 8, 8],
    }
    assert [path.name for path in entries(tmp_path)] == [f"{i}.png_64x64.safetensors" for i in range(5)]


@pytest.mark.parametrize(
    ("dtype", "hint"), [(torch.float16, "No half VAE (sdxl_no_half_vae)"), (torch.float32, "another VAE (vae)")]
)
def test_latents_that_are_not_numbers_name_the_image_and_what_to_do(pictures, dtype, hint):
    class Overflowing(Model):
        def encode(self, pixels, generators):
            latents = super().encode(pixels, generators)
            latents[1] = float("nan")
            return latents

    model = Overflowing()
    model.vae.dtype = dtype
    with pytest.raises(TrainingError) as caught:
        encode(pictures, model, batch_size=3, to_disk=False)
    assert str(pictures[1].path) in caught.value.message
    assert str(pictures[0].path) not in caught.value.message
    assert hint in caught.value.hint
