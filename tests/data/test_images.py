"""Pictures from files of every kind, as they are looked at."""

import os

import numpy as np
import pytest
from PIL import Image
from skimage import data

from trainer.data.buckets import Placement
from trainer.data.images import has_transparency, opacity, pixels, size
from trainer.errors import DataError

COFFEE = data.coffee()  # 600×400


def whole(picture):
    return Placement(picture.size, picture.size, (0, 0))


def saved(folder, picture, name="picture.png", **options):
    path = folder / name
    picture.save(path, **options)
    return path


def difference(a, b):
    return np.abs(a.astype(int) - b.astype(int)).mean()


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.webp", "a.jpg", "A.JPEG", "a.avif"])
def test_every_format_gives_the_picture(tmp_path, name):
    lossless = {"lossless": True} if name.endswith("webp") else {}
    path = saved(tmp_path, Image.fromarray(COFFEE), name, **({"quality": 95} | lossless))
    found = pixels(path, whole(Image.fromarray(COFFEE)))
    assert found.shape == (400, 600, 3)
    assert found.dtype == np.uint8
    assert difference(found, COFFEE) < (3 if name.lower().endswith(("jpg", "jpeg", "avif")) else 0.001)


def test_the_centre_is_cut_out(tmp_path):
    path = saved(tmp_path, Image.fromarray(COFFEE))
    found = pixels(path, Placement((512, 320), (600, 400), (44, 40)))
    assert np.array_equal(found, COFFEE[40:360, 44:556])


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_shrunk_picture_is_close_to_the_mean_of_the_pixels_it_replaces(tmp_path, name):
    path = saved(tmp_path, Image.fromarray(COFFEE), name, **({"quality": 95} if name.endswith("jpg") else {}))
    found = pixels(path, Placement((150, 100), (150, 100), (0, 0)))
    mean = COFFEE.reshape(100, 4, 150, 4, 3).mean((1, 3))
    assert difference(found, mean) < 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.avif"])
def test_exif_orientation_is_applied(tmp_path, orientation, name):
    upright = Image.fromarray(data.chelsea())  # 451×300
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, stored, name, exif=exif, quality=95)
    assert size(path) == (451, 300)
    assert difference(pixels(path, whole(upright)), np.asarray(upright)) < 4
    small = pixels(path, Placement((96, 64), (96, 64), (0, 0)))
    assert difference(small, np.asarray(upright.resize((96, 64), Image.Resampling.LANCZOS))) < 4


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_lie_on_white(tmp_path, mode):
    picture = Image.new("RGBA", (32, 16), (10, 20, 30, 0))
    picture.paste((0, 0, 0, 255), (16, 0, 32, 16))
    path = saved(tmp_path, picture.convert(mode))
    found = pixels(path, whole(picture))
    assert np.all(found[:, :16] == 255)
    assert np.all(found[:, 16:] == 0)


def test_half_transparent_parts_mix_with_white(tmp_path):
    path = saved(tmp_path, Image.new("RGBA", (8, 8), (0, 0, 0, 128)))
    assert np.all(pixels(path, Placement((8, 8), (8, 8), (0, 0))) == 127)


def test_16_bit_greys_keep_their_range(tmp_path):
    grey = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    path = saved(tmp_path, Image.fromarray(grey))
    found = pixels(path, Placement((64, 64), (64, 64), (0, 0)))
    assert np.abs(found[..., 0] - grey / 257).max() <= 0.5
    assert np.array_equal(found[..., 0], found[..., 2])


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_other_colour_models_become_rgb(tmp_path, mode):
    picture = Image.fromarray(data.astronaut()).convert(mode)
    path = saved(tmp_path, picture, "a.jpg" if mode == "CMYK" else "a.png")
    found = pixels(path, whole(picture))
    assert difference(found, np.asarray(picture.convert("RGB"))) < 3


def test_a_format_is_told_from_the_content_whatever_the_name(tmp_path):
    path = saved(tmp_path, Image.fromarray(COFFEE), format="JPEG")
    assert path.suffix == ".png"
    assert size(path, decode=True) == (600, 400)


def cut_off(path, share=0.6):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp"])
def test_a_cut_off_image_is_found_by_decoding(tmp_path, name):
    path = cut_off(saved(tmp_path, Image.fromarray(COFFEE), name))
    with pytest.raises(DataError, match=name):
        size(path, decode=True)
    with pytest.raises(DataError, match=name):
        pixels(path, Placement((600, 400), (600, 400), (0, 0)))


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"", "it is none"), (b"<html>not found</html>", "it is none"), (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, ".")],
)
def test_what_is_no_image_is_refused(tmp_path, content, why):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=why):
        size(path)


def test_an_image_too_large_to_open_is_refused(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.fromarray(COFFEE))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600 * 400 // 2 - 1)
    with pytest.raises(DataError, match="more than 178 million pixels"):
        size(path)


def test_links_pipes_and_folders_are_refused_without_waiting(tmp_path):
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("loop", "gone", "folder", "pipe"):
        with pytest.raises(DataError, match=name):
            size(tmp_path / f"{name}.png", decode=True)


def test_files_are_left_as_they_were(tmp_path):
    path = saved(tmp_path, Image.fromarray(COFFEE), "a.jpg")
    path.chmod(0o444)
    before = path.read_bytes(), path.stat().st_mtime_ns
    size(path, decode=True)
    pixels(path, Placement((64, 64), (96, 64), (16, 0)))
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.jpg"]


@pytest.mark.proves("masked_loss")
def test_opacity_is_the_alpha_channels_mean_over_each_latent(tmp_path):
    alpha = np.zeros((64, 96), np.uint8)
    alpha[:, :36] = 255  # four cells and a half
    alpha[60:, :] = 255  # the lower half of the last row
    picture = Image.fromarray(COFFEE[:64, :96]).convert("RGBA")
    picture.putalpha(Image.fromarray(alpha))
    path = saved(tmp_path, picture)
    found = opacity(path, whole(picture))
    expected = np.zeros((8, 12), np.float32)
    expected[:, :4], expected[:, 4] = 1, 0.5
    expected[7, 4:] = [0.75] + 7 * [0.5]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert has_transparency(path)
    cut = Placement((48, 64), (96, 64), (24, 0))
    np.testing.assert_allclose(opacity(path, cut), expected[:, 3:9], atol=1e-3)


def test_an_image_without_alpha_is_opaque_everywhere(tmp_path):
    picture = Image.fromarray(COFFEE[:64, :96])
    path = saved(tmp_path, picture)
    assert opacity(path, whole(picture)).tolist() == np.ones((8, 12)).tolist()
    assert not has_transparency(path)


def test_colours_beneath_a_mask_stay_where_transparency_is_no_shape(tmp_path):
    picture = Image.fromarray(COFFEE[:64, :96]).convert("RGBA")
    picture.putalpha(0)
    path = saved(tmp_path, picture)
    assert (pixels(path, whole(picture)) == 255).all()
    assert np.array_equal(pixels(path, whole(picture), matted=False), COFFEE[:64, :96])
