"""What a look at the pixels finds, and what it does not mistake for it."""

import numpy as np
import pytest
from PIL import Image

from gui import dataset
from gui.inspection import Look, alike, inspect


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "1_x").mkdir()
    return tmp_path / "1_x"


def picture(seed, size=(96, 64)):
    """Soft blobs: like a photograph in that neighbours are alike."""
    noise = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def messages(folder, **changes):
    found = inspect({"train_data_dir": str(folder.parent), **changes}, patience_s=60)
    assert found["done"] == found["total"]
    return [problem["message"] for problem in found["problems"]]


def test_a_copy_in_another_size_and_format_is_a_near_duplicate_and_other_pictures_are_not(folder):
    for seed in range(8):
        picture(seed).save(folder / f"{seed}.png")
    picture(3).resize((70, 50)).save(folder / "copy.jpg", quality=70)
    for name, colour in (("red", "red"), ("blue", "blue")):
        Image.new("RGB", (64, 64), colour).save(folder / f"{name}.png")
    (message,) = messages(folder)
    assert message.startswith("Nearly the same (2 images in 1 group): ") and "1_x/3.png ~ 1_x/copy.jpg" in message


def test_damage_transparency_and_turned_pictures_are_told_with_their_fix(folder):
    picture(0).save(folder / "whole.png")
    data = (folder / "whole.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    picture(1).convert("RGBA").save(folder / "glass.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(2).save(folder / "lying.jpg", exif=exif)
    damaged, transparent, lying = messages(folder)
    assert "cut.png" in damaged and "Replace or remove" in damaged
    assert "glass.png" in transparent and "masked_loss" in transparent
    assert "lying.jpg" in lying and "EXIF" in lying
    assert len(messages(folder, masked_loss=True)) == 2


def test_images_that_cannot_be_opened_are_counted_and_told_with_the_damaged(folder):
    picture(0).save(folder / "whole.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("words")
    found = inspect({"train_data_dir": str(folder.parent)}, patience_s=60)
    assert (found["done"], found["total"]) == (3, 3)
    (problem,) = found["problems"]
    assert problem["severity"] == "error" and problem["message"].startswith("Damaged (2): ")
    assert "empty.png" in problem["message"] and "text.jpg" in problem["message"]


def test_many_copies_are_one_group_of_which_the_first_are_named(folder):
    for name in "abcde":
        picture(0).save(folder / f"{name}.png")
    for name in "xy":
        picture(1).save(folder / f"{name}.png")
    (message,) = messages(folder)
    assert message.startswith(
        "Nearly the same (7 images in 2 groups): 1_x/a.png ~ 1_x/b.png ~ 1_x/c.png and 2 more, 1_x/x.png ~ 1_x/y.png. "
    )


def test_a_group_holds_what_is_like_its_first_and_not_what_is_only_like_another_of_it():
    looks = {
        f"{level}": Look("", False, False, np.full((8, 9, 3), level, np.uint8)) for level in (0, 10, 20, 200, 205, 210)
    }
    assert alike(looks) == [["0", "10"], ["200", "205", "210"]]


def test_many_images_are_looked_at_in_parts(folder):
    for seed in range(4):
        picture(seed, (40, 40)).save(folder / f"{seed}.png")
    first = inspect({"train_data_dir": str(folder.parent)}, patience_s=0)
    assert (first["done"], first["total"], first["problems"]) == (1, 4, [])


@pytest.mark.parametrize("kept_small", [True, False])
def test_images_much_smaller_than_the_resolution_are_named(folder, kept_small):
    picture(0, (64, 64)).save(folder / "tiny.png")
    picture(1, (256, 256)).save(folder / "large.png")
    form = {"train_data_dir": str(folder.parent), "max_resolution": "256,256", "bucket_no_upscale": kept_small}
    (told,) = [p for p in dataset.dataset(form)["problems"] if "much smaller" in p["message"]]
    assert told["key"] == "max_resolution" and "(tiny.png)" in told["message"]
