"""What is found in the image folders, and what is found wrong with them."""

import os
import shutil
import time

import pytest
from PIL import Image
from skimage import data

from trainer.data import folders
from trainer.data.folders import natural, problems, scan
from trainer.errors import DataError
from trainer.schema.data import Captions
from trainer.schema.model import Folders

TXT = Captions(extension=".txt")


@pytest.fixture(scope="session")
def jpegs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        Image.fromarray(getattr(data, name)()).save(folder / f"{name}.jpg")
    return folder


@pytest.fixture
def put(tmp_path, jpegs):
    """put("10_cat/a.png", caption="…") puts a photograph there, with a caption file if given."""

    def put(place, caption=None, of="coffee", suffix=".txt"):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(jpegs / f"{of}.jpg", path)
        if caption is not None:
            path.with_suffix(suffix).write_text(caption, encoding="utf-8")
        return path

    return put


def look(folder, regularisation="", captions=TXT):
    return problems(Folders(images=str(folder), regularisation=str(regularisation)), captions)


def errors(found):
    return [str(problem) for problem in found if problem.severity == "error"]


def warnings(found):
    return [str(problem) for problem in found if problem.severity == "warning"]


# What is found


@pytest.mark.proves("train_data_dir")
def test_a_kohya_folder_gives_repeats_and_captions(tmp_path, put):
    put("10_sks cat/b.jpg", "a cat on a roof")
    put("10_sks cat/a.jpg", of="chelsea")
    put("3_dog/c.JPEG", "a dog", of="rocket")
    found = scan(Folders(images=str(tmp_path)), TXT)
    assert [(p.path.name, p.caption, p.repeats, p.size, p.folder) for p in found.pictures] == [
        ("c.JPEG", "a dog", 3, (640, 427), "3_dog"),
        ("a.jpg", "sks cat", 10, (451, 300), "10_sks cat"),
        ("b.jpg", "a cat on a roof", 10, (600, 400), "10_sks cat"),
    ]
    assert [(s.path.name, s.repeats, s.class_tokens, s.images) for s in found.subsets] == [
        ("3_dog", 3, "dog", 1),
        ("10_sks cat", 10, "sks cat", 2),
    ]
    assert found.repeats == 23


@pytest.fixture
def _case_counts(tmp_path):
    (tmp_path / "case").mkdir()
    if (tmp_path / "CASE").exists():
        pytest.skip("this file system knows no case")
    (tmp_path / "case").rmdir()


@pytest.mark.usefixtures("_case_counts")
def test_each_of_two_images_whose_names_differ_in_case_has_its_own_caption(tmp_path, put):
    put("1_x/Cat.jpg", "large")
    put("1_x/cat.jpg", "small")
    assert {p.path.name: p.caption for p in scan(Folders(images=str(tmp_path)), TXT).pictures} == {
        "Cat.jpg": "large",
        "cat.jpg": "small",
    }


@pytest.mark.usefixtures("_case_counts")
def test_a_caption_that_is_another_images_own_is_not_taken_for_its_case_and_one_that_is_nobodys_is(tmp_path, put):
    put("1_x/coffee.jpg", "a cup")
    put("1_x/COFFEE.JPG")
    put("1_x/Tea.jpg").with_name("TEA.txt").write_text("a pot")
    found = {p.path.name: p.caption for p in scan(Folders(images=str(tmp_path)), TXT).pictures}
    assert found == {"coffee.jpg": "a cup", "COFFEE.JPG": "x", "Tea.jpg": "a pot"}
    (warning,) = warnings(look(tmp_path))
    assert '1 of 3 images has no caption file ending in ".txt": COFFEE.JPG' in warning


@pytest.mark.usefixtures("_case_counts")
def test_of_captions_in_several_cases_the_nearest_is_taken_whatever_the_order_on_disk(tmp_path, put):
    image = put("1_x/cat.jpg")
    for name, kept in (("CAT.TXT", "far"), ("cat.TXT", "near"), ("cat.txt", "own")):
        image.with_name(name).write_text(kept)
        assert scan(Folders(images=str(tmp_path)), TXT).pictures[0].caption == kept


def test_unreadable_images_are_counted_by_folder_beside_the_others(tmp_path, put):
    put("2_x/a.jpg", "x")
    put("2_x/b.jpg").write_bytes(b"")
    put("1_y/c.jpg", "y")
    found = folders.survey(Folders(images=str(tmp_path)), TXT, decode=False)
    assert [(s.path.name, s.images, s.unreadable) for s in found.dataset.subsets] == [("1_y", 1, 0), ("2_x", 1, 1)]
    (unreadable,) = found.unreadable
    assert "b.jpg" in unreadable


def test_a_flat_folder_is_seen_once(tmp_path, put):
    put("a.jpg", "one")
    put("b.jpg")
    pictures = scan(Folders(images=str(tmp_path)), TXT).pictures
    assert [(p.caption, p.repeats, p.class_tokens) for p in pictures] == [("one", 1, None), (None, 1, None)]


@pytest.mark.parametrize(
    ("name", "repeats", "words"), [("5_a_b c", 5, "a_b c"), ("07_x", 7, "x"), ("4", 4, ""), ("4_", 4, "")]
)
def test_names_are_read_as_sd_scripts_reads_them(tmp_path, put, name, repeats, words):
    put(f"{name}/a.jpg")
    (picture,) = scan(Folders(images=str(tmp_path)), TXT).pictures
    assert (picture.repeats, picture.caption) == (repeats, words)


@pytest.mark.proves("caption_extension")
@pytest.mark.parametrize(
    ("extension", "suffix"), [("", ".caption"), ("txt", ".txt"), (".txt", ".TXT"), (" .cap ", ".cap")]
)
def test_the_caption_extension_is_read_with_and_without_its_dot(tmp_path, put, extension, suffix):
    put("1_x/a.jpg", "the caption", suffix=suffix)
    (picture,) = scan(Folders(images=str(tmp_path)), Captions(extension=extension)).pictures
    assert picture.caption == "the caption"


@pytest.mark.parametrize(
    "text", ["a cat", "a cat\n", "  a cat \r\nsecond line", "\n\na cat\n", "\ufeffa cat", "a cat\rsecond"]
)
def test_the_caption_is_the_first_line_with_text(tmp_path, put, text):
    put("1_x/a.jpg").with_suffix(".txt").write_bytes(text.encode())
    assert scan(Folders(images=str(tmp_path)), TXT).pictures[0].caption == "a cat"


def test_an_empty_caption_file_means_no_caption_and_is_told(tmp_path, put):
    put("1_x/a.jpg", "\n")
    assert scan(Folders(images=str(tmp_path)), TXT).pictures[0].caption == ""
    assert "1 caption file is empty, so its image trains without a caption: a.jpg" in warnings(look(tmp_path))[0]
    put("1_x/b.jpg", "")
    assert "2 caption files are empty, so their images train" in warnings(look(tmp_path))[0]


def test_the_order_is_natural_and_the_same_everywhere():
    names = ["img10.png", "img2.png", "Img1.png", "é.png", "img2.jpg"]
    assert sorted(names, key=natural) == ["Img1.png", "img2.jpg", "img2.png", "img10.png", "é.png"]


def test_spaces_and_other_scripts_in_every_path(tmp_path, put):
    put("my pictures/2_кошка ☕/été 猫 (1).jpg", "ein Kätzchen")
    put("reg bilder/1_猫/räg.jpg")
    found = look(tmp_path / "my pictures", tmp_path / "reg bilder")
    assert found == []
    pictures = scan(
        Folders(images=str(tmp_path / "my pictures"), regularisation=str(tmp_path / "reg bilder")), TXT
    ).pictures
    assert [p.caption for p in pictures] == ["ein Kätzchen", "猫"]


def test_hidden_files_and_folders_are_passed_over(tmp_path, put):
    put("1_x/a.jpg", "x")
    put("1_x/._a.jpg").write_bytes(b"not an image")
    put(".ipynb_checkpoints/b.jpg")
    assert look(tmp_path) == []
    assert len(scan(Folders(images=str(tmp_path)), TXT).pictures) == 1


# Regularisation


@pytest.mark.proves("reg_data_dir")
def test_as_many_regularisation_images_as_training_images_are_seen(tmp_path, put):
    put("train/10_cat/a.jpg", "a")
    for name in "abc":
        put(f"reg/1_cat/{name}.jpg")
    pictures = scan(Folders(images=str(tmp_path / "train"), regularisation=str(tmp_path / "reg")), TXT).pictures
    assert [(p.regularisation, p.repeats) for p in pictures] == [(False, 10), (True, 4), (True, 3), (True, 3)]
    assert look(tmp_path / "train", tmp_path / "reg") == []


def test_regularisation_images_that_are_not_used_are_told(tmp_path, put):
    put("train/2_cat/a.jpg", "a")
    for name in "abc":
        put(f"reg/1_cat/{name}.jpg")
    (warning,) = warnings(look(tmp_path / "train", tmp_path / "reg"))
    assert "Regularisation folder (reg_data_dir): 1 of 3 images are not used" in warning
    pictures = scan(Folders(images=str(tmp_path / "train"), regularisation=str(tmp_path / "reg")), TXT).pictures
    assert [p.repeats for p in pictures] == [2, 1, 1]


def test_the_same_folder_twice_is_refused(tmp_path, put):
    put("1_x/a.jpg", "x")
    (error,) = errors(look(tmp_path, f"{tmp_path}/"))
    assert "(reg_data_dir): is the same as Image folder (train_data_dir)" in error


def test_a_wrong_regularisation_folder_names_its_own_control(tmp_path, put):
    put("1_x/a.jpg", "x")
    (error,) = errors(look(tmp_path, tmp_path / "nothing"))
    assert error.startswith("Regularisation folder (reg_data_dir): there is no folder")


# What is wrong


def test_no_folder_is_given():
    (error,) = errors(look(""))
    assert error.startswith("Image folder (train_data_dir): is empty.")


def test_a_missing_folder_names_what_exists_of_its_path(tmp_path):
    (error,) = errors(look(tmp_path / "nowhere" / "cat"))
    assert f'"{tmp_path}" exists' in error


@pytest.mark.skipif(os.name == "nt", reason="such paths are right on Windows")
def test_a_windows_path_is_recognised():
    assert "Windows" in errors(look(r"C:\Users\me\cats"))[0]


@pytest.mark.parametrize("text", ["~nobody/x", "x" * 5000, "embedded:../../etc", "//", "con:"])
def test_strange_paths_are_problems_never_crashes(text):
    assert errors(look(text))


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "cats.zip").write_bytes(b"")
    assert "is a file" in errors(look(tmp_path / "cats.zip"))[0]


def test_a_folder_without_images_says_which_kinds_count(tmp_path):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "movie.gif").touch()
    (error,) = errors(look(tmp_path))
    assert "no images (png, jpg, jpeg, webp, bmp" in error


def test_one_level_too_deep_names_the_folder_above(tmp_path, put):
    put("cats/10_cat/a.jpg", "x")
    (error,) = errors(look(tmp_path / "cats" / "10_cat"))
    assert f'Enter "{tmp_path / "cats"}".' in error


def test_one_level_too_high_names_the_folder_below(tmp_path, put):
    put("cats/10_cat/a.jpg", "x")
    (error,) = errors(look(tmp_path))
    assert f'Enter "{tmp_path / "cats"}".' in error


def test_an_inner_folder_without_a_number_is_named_with_both_ways_out(tmp_path, put):
    put("cat/a.jpg", "x")
    (error,) = errors(look(tmp_path))
    assert '"10_cat"' in error
    assert f'enter "{tmp_path / "cat"}"' in error


def test_ignored_folders_and_images_beside_numbered_ones_are_told(tmp_path, put):
    put("10_cat/a.jpg", "x")
    put("more/b.jpg", "x")
    put("c.jpg", "x")
    found = look(tmp_path)
    assert errors(found) == []
    assert any("1 image lies directly" in w for w in warnings(found))
    assert any("1 inner folder holds images but is ignored" in w and "not NN_name: more" in w for w in warnings(found))
    put("d.jpg", "x")
    put("others/b.jpg", "x")
    found = look(tmp_path)
    assert any("2 images lie directly" in w for w in warnings(found))
    assert any("2 inner folders hold images but are ignored" in w for w in warnings(found))


def test_zero_repeats_leave_a_folder_out(tmp_path, put):
    put("10_cat/a.jpg", "x")
    put("0_dog/b.jpg", "x")
    assert '"0_dog" is left out' in warnings(look(tmp_path))[0]
    assert len(scan(Folders(images=str(tmp_path)), TXT).pictures) == 1


@pytest.mark.parametrize(("name", "severity"), [("2023", "warning"), ("1500_x", "warning"), ("20230915_trip", "error")])
def test_a_year_or_date_in_front_is_not_taken_for_repeats_in_silence(tmp_path, put, name, severity):
    put("1_x/a.jpg", "x")
    put(f"{name}/a.jpg", "x")
    (problem,) = look(tmp_path)
    assert problem.severity == severity
    assert f'"{name}" is read as {name.split("_")[0]} repeats' in problem.message


def test_nothing_but_zero_repeats_is_an_error(tmp_path, put):
    put("0_dog/b.jpg", "x")
    assert "no images are left" in errors(look(tmp_path))[0]


def test_damaged_images_are_all_found_at_once_and_five_are_named(tmp_path, put):
    for number in range(7):
        path = put(f"1_x/bad{number}.jpg", "x")
        path.write_bytes(path.read_bytes()[:-20_000] if number else b"")
    put("1_x/good.jpg", "x")
    (error,) = errors(look(tmp_path))
    assert "7 of 8 images cannot be used" in error
    assert all(f"bad{number}.jpg" in error for number in range(5))
    assert "bad5.jpg" not in error
    assert "and 2 more" in error


def test_an_image_that_leads_to_itself_is_reported(tmp_path, put):
    put("1_x/good.jpg", "x")
    (tmp_path / "1_x" / "loop.png").symlink_to(tmp_path / "1_x" / "loop.png")
    (tmp_path / "2_loop").symlink_to(tmp_path / "2_loop")
    assert "loop.png" in errors(look(tmp_path))[0]


def test_captions_under_another_extension_name_the_one_to_set(tmp_path, put):
    for name in "abc":
        put(f"1_x/{name}.jpg", "x", suffix=".txt")
    (warning,) = warnings(look(tmp_path, captions=Captions()))
    assert warning.startswith('Caption extension (caption_extension): no image has a caption file ending in ".caption"')
    assert "3 of 3" in warning
    assert "Enter .txt here" in warning


def test_some_missing_captions_are_counted_and_three_are_named(tmp_path, put):
    put("1_x/captioned.jpg", "x")
    for number in range(4):
        put(f"1_x/{number}.jpg")
    (warning,) = warnings(look(tmp_path))
    assert '4 of 5 images have no caption file ending in ".txt": 0.jpg, 1.jpg, 2.jpg, and 1 more' in warning
    assert "folder's name is the caption instead: x" in warning


def test_no_captions_at_all_say_what_is_used_instead(tmp_path, put):
    put("numbered/1_sks cat/a.jpg")
    put("flat/a.jpg")
    assert "the caption instead: sks cat" in warnings(look(tmp_path / "numbered"))[0]
    assert "train without a caption" in warnings(look(tmp_path / "flat"))[0]


@pytest.mark.parametrize("content", ["grün".encode("latin-1"), "cat".encode("utf-16"), b"cat\0dog"])
def test_captions_that_are_not_utf8_are_named(tmp_path, put, content):
    put("1_x/a.jpg").with_suffix(".txt").write_bytes(content)
    (error,) = errors(look(tmp_path))
    assert error.startswith("Caption extension (caption_extension): ")
    assert "a.txt" in error
    assert "UTF-8" in error


def test_all_that_is_wrong_is_told_at_once(tmp_path, put):
    put("train/1_x/a.jpg").write_bytes(b"")
    put("train/1_x/b.jpg").with_suffix(".txt").write_bytes(b"\xff")
    put("train/2_y/c.jpg", "x")
    found = look(tmp_path / "train", tmp_path / "nothing")
    assert len(errors(found)) == 3
    with pytest.raises(DataError) as caught:
        scan(Folders(images=str(tmp_path / "train"), regularisation=str(tmp_path / "nothing")), TXT)
    assert str(caught.value).count("\n") == 2


def test_a_file_name_that_is_not_utf8_can_be_printed(tmp_path, put):
    put("1_x/a.jpg", "x")
    try:
        (tmp_path / "1_x" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system knows no such names")
    (error,) = errors(look(tmp_path))
    assert "caf\\udce9.png" in error
    error.encode()


def test_when_time_is_up_the_rest_is_only_opened_and_that_is_told(tmp_path, put, monkeypatch):
    put("1_x/a.jpg", "x")
    cut = put("1_x/b.jpg", "x")
    cut.write_bytes(cut.read_bytes()[:-20_000])
    monkeypatch.setattr(folders, "DECODING_S", -1.0)
    found = look(tmp_path)
    assert errors(found) == []
    assert "0 of 2 images were read" in warnings(found)[0]


def test_nothing_is_written_or_changed(tmp_path, put):
    put("1_x/a.jpg", "x")
    put("1_x/b.jpg").write_bytes(b"")
    before = {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in tmp_path.rglob("*")}
    look(tmp_path)
    assert {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in tmp_path.rglob("*")} == before


def test_ten_thousand_images_are_scanned_in_seconds(tmp_path):
    folder = tmp_path / "1_x"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "0.png")
    for number in range(1, 10_000):
        os.link(folder / "0.png", folder / f"{number}.png")
    start = time.monotonic()
    found = scan(Folders(images=str(tmp_path)), TXT)
    assert len(found.pictures) == 10_000
    assert time.monotonic() - start < 15
