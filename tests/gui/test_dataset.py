"""The image folders as the page shows them."""

import base64
import io

import pytest
from PIL import Image

from gui import dataset


def put(folder, name, size, caption=None):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "grey").save(folder / name)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption)


@pytest.fixture
def settings(tmp_path):
    put(tmp_path / "10_cat", "a.png", (64, 64), "cat, grey fur")
    put(tmp_path / "10_cat", "b.png", (128, 64), "cat, window")
    put(tmp_path / "3_dog", "c.png", (64, 64))
    return {
        "train_data_dir": str(tmp_path),
        "caption_extension": ".txt",
        "max_resolution": "64,64",
        "enable_bucket": False,
        "train_batch_size": 2,
        "epoch": 3,
    }


def test_count_times_repeats_times_epochs_gives_the_steps(settings):
    found = dataset.dataset(settings)
    assert [(f["name"], f["images"], f["repeats"]) for f in found["folders"]] == [("3_dog", 1, 3), ("10_cat", 2, 10)]
    assert found["steps"] == {
        "seen": 23,
        "batch": 2,
        "accumulation": 1,
        "batches": 12,
        "epochs": 3,
        "steps": 36,
        "limited": False,
    }


def test_images_that_cannot_be_read_are_no_part_of_the_sum_and_are_counted(settings, tmp_path):
    (tmp_path / "10_cat" / "empty.png").write_bytes(b"")
    (tmp_path / "10_cat" / "words.jpg").write_text("words")
    found = dataset.dataset(settings)
    assert [(f["name"], f["images"], f["unreadable"]) for f in found["folders"]] == [("3_dog", 1, 0), ("10_cat", 2, 2)]
    assert sum(f["images"] * f["repeats"] for f in found["folders"]) == found["steps"]["seen"]


def test_the_sum_holds_with_regularisation_images_which_are_seen_as_often_as_the_others(settings, tmp_path):
    for name in "xy":
        put(tmp_path / "reg" / "1_animal", f"{name}.png", (64, 64))
    found = dataset.dataset(settings | {"reg_data_dir": str(tmp_path / "reg")})
    assert [(f["name"], f["images"], f["seen"]) for f in found["folders"]] == [
        ("3_dog", 1, 3),
        ("10_cat", 2, 20),
        ("1_animal", 2, 23),
    ]
    assert found["steps"]["seen"] == 46


def test_the_crop_is_what_the_trainer_keeps_as_shares_of_the_image(settings):
    crops = {image["name"]: image["crop"] for image in dataset.dataset(settings)["images"]}
    assert crops["a.png"] == [0, 0, 1, 1]
    assert crops["b.png"] == [0.25, 0, 0.5, 1]  # twice as wide as high, into a square, from the middle


def test_captions_stand_beside_the_images_and_a_folders_name_where_there_is_none(settings):
    found = dataset.dataset(settings)
    captions = {image["name"]: (image["caption"], image["captioned"]) for image in found["images"]}
    assert captions == {"a.png": ("cat, grey fur", True), "b.png": ("cat, window", True), "c.png": ("dog", False)}
    assert dict(found["tags"]) == {"cat": 2, "dog": 1, "grey fur": 1, "window": 1} and found["tags"][0][0] == "cat"
    assert any("caption" in problem["message"] for problem in found["problems"])


def test_a_bucket_that_fills_no_batch_is_named_with_the_control(settings, tmp_path):
    put(tmp_path / "10_cat", "wide.png", (256, 64), "cat")
    changes = {"enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 128, "bucket_reso_steps": 32}
    found = dataset.dataset(settings | changes | {"train_batch_size": 16})
    (lone,) = [p for p in found["problems"] if p["key"] == "train_batch_size"]
    assert lone["severity"] == "warning" and "16 is more than some buckets hold" in lone["message"]
    assert sum(seen for *_, seen in found["buckets"]) == 33


def of(found, key):
    return [p["message"] for p in found["problems"] if p["key"] == key]


def test_one_image_that_fills_whole_batches_alone_is_named(settings, tmp_path):
    put(tmp_path / "10_cat", "wide.png", (256, 64), "cat")
    settings |= {"enable_bucket": True, "bucket_reso_steps": 32}
    (message,) = of(dataset.dataset(settings), "train_data_dir")
    assert message.startswith("2 bucket(s) of a single image (64×32, 128×32): a batch of 2") and "add images" in message
    assert of(dataset.dataset(settings | {"train_batch_size": 1}), "train_data_dir") == []


def test_fewer_images_than_one_batch_are_told_where_there_is_one_bucket(settings):
    assert of(dataset.dataset(settings), "train_batch_size") == []
    (message,) = of(dataset.dataset(settings | {"train_batch_size": 30}), "train_batch_size")
    assert "(23)" in message and "Raise the repeats" in message


def test_captions_that_are_cut_are_named_with_what_is_lost_and_the_length_that_holds_them(settings, tmp_path):
    put(tmp_path / "10_cat", "long.png", (64, 64), "cat, " * 40 + "red wall")  # 2 tokens each
    found = dataset.dataset(settings)
    (message,) = of(found, "max_token_length")
    assert '"10_cat/long.png" has 82 (cut: ", cat, cat, red wall")' in message and "Set it to 150" in message
    (image,) = [image for image in found["images"] if image["cut"]]
    assert (image["name"], image["tokens"]) == ("long.png", 82)
    assert of(dataset.dataset(settings | {"max_token_length": 150}), "max_token_length") == []


def test_brackets_that_are_read_as_weights_are_no_tokens(settings, tmp_path):
    put(tmp_path / "10_cat", "long.png", (64, 64), "(cat), " * 30)  # 3 tokens each, 2 without the brackets
    assert of(dataset.dataset(settings), "max_token_length")
    assert of(dataset.dataset(settings | {"weighted_captions": True}), "max_token_length") == []


def test_a_caption_longer_than_any_length_is_to_be_shortened_and_shuffling_is_told(settings, tmp_path):
    put(tmp_path / "10_cat", "long.png", (64, 64), "cat, " * 200)
    (message,) = of(dataset.dataset(settings | {"max_token_length": 225, "shuffle_caption": True}), "max_token_length")
    assert "Shorten them: 225" in message and "each read loses another part" in message


def test_an_empty_form_and_a_bad_value_make_no_failure(settings):
    assert dataset.dataset({})["images"] == []
    assert len(dataset.dataset(settings | {"max_resolution": "nonsense", "epoch": "many"})["images"]) == 3


def test_small_pictures_are_given_of_images_in_the_forms_folders_only(settings, tmp_path, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "x.png"
    Image.new("RGB", (8, 8)).save(outside)
    (tmp_path / "10_cat" / "link.png").symlink_to(outside)
    inside = tmp_path / "10_cat" / "b.png"
    asked = [
        str(inside),
        str(outside),
        str(tmp_path / "10_cat" / "link.png"),
        str(inside.with_suffix(".txt")),
        "/etc/passwd",
    ]
    found = dataset.thumbnails(settings, asked)["pictures"]
    assert found.pop(str(inside)).startswith("data:image/jpeg;base64,")
    assert set(found.values()) == {None}


def test_a_small_picture_lays_transparent_parts_on_white_as_the_trainer_does(settings, tmp_path):
    clear = tmp_path / "10_cat" / "clear.png"
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(clear)
    _, data = dataset.thumbnails(settings, [str(clear)])["pictures"][str(clear)].split(",")
    with Image.open(io.BytesIO(base64.b64decode(data))) as small:
        assert small.getpixel((16, 16)) == (255, 255, 255)


def test_of_very_many_images_some_are_listed_and_all_are_counted(settings, monkeypatch):
    monkeypatch.setattr(dataset, "MOST_IMAGES", 2)
    found = dataset.dataset(settings)
    assert (len(found["images"]), found["total"], found["more"], found["steps"]["seen"]) == (2, 3, 1, 23)


@pytest.mark.parametrize(
    ("sought", "names", "more"),
    [
        ({"find": " WINDOW "}, ["b.png"], 0),
        ({"find": "c.png"}, ["c.png"], 0),
        ({"tag": "cat"}, ["a.png"], 1),
        ({"tag": "cat", "find": "fur"}, ["a.png"], 0),
        ({"tag": "fur"}, [], 0),
    ],
)
def test_of_very_many_images_those_that_are_looked_for_are_listed(settings, monkeypatch, sought, names, more):
    monkeypatch.setattr(dataset, "MOST_IMAGES", 1)
    found = dataset.dataset(settings, **sought)
    assert ([image["name"] for image in found["images"]], found["more"], found["total"]) == (names, more, 3)
    assert found["steps"]["seen"] == 23
