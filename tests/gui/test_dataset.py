"""The image folders as the page shows them."""

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
    assert found["steps"] == {"seen": 23, "batch": 2, "accumulation": 1, "batches": 12, "epochs": 3, "steps": 36}


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


def test_of_very_many_images_some_are_listed_and_all_are_counted(settings, monkeypatch):
    monkeypatch.setattr(dataset, "MOST_IMAGES", 2)
    found = dataset.dataset(settings)
    assert (len(found["images"]), found["more"], found["steps"]["seen"]) == (2, 1, 23)
