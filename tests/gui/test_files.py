import pytest

from gui.files import MOST, Roots


@pytest.fixture
def roots(tmp_path):
    inside = tmp_path / "inside"
    for name in ("b_folder", "A_folder", ".hidden", "models/sd15", "models/deep/er/too"):
        (inside / name).mkdir(parents=True)
    (inside / "models" / "sd15" / "model_index.json").write_text("{}")
    for name in ("models/x.safetensors", "lora.safetensors", "cat.PNG", "notes.txt"):
        (inside / name).write_text("")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.safetensors").write_text("")
    (inside / "link").symlink_to(tmp_path / "outside")
    return Roots([inside, tmp_path / "missing"])


def names(listing):
    return [entry["name"] for entry in listing["entries"]]


def test_folders_come_first_and_only_what_can_be_picked_is_listed(roots, tmp_path):
    listing = roots.listing(str(tmp_path / "inside"), files=True)
    assert names(listing) == ["A_folder", "b_folder", "link", "models", "lora.safetensors"]
    assert listing["images"] == 1
    assert names(roots.listing(str(tmp_path / "inside"), files=False)) == ["A_folder", "b_folder", "link", "models"]


def test_a_diffusers_folder_is_a_model_where_a_model_is_wanted(roots, tmp_path):
    folder = str(tmp_path / "inside" / "models")
    assert {e["name"]: e["what"] for e in roots.listing(folder, files=True)["entries"]}["sd15"] == "model"
    assert {e["name"]: e["what"] for e in roots.listing(folder, files=False)["entries"]}["sd15"] == "folder"


@pytest.mark.parametrize(
    "path", ["{}/outside", "{}", "/", "{}/inside/../outside", "{}/inside/link", "/etc/passwd", "~root"]
)
def test_nothing_outside_the_roots_is_listed(roots, tmp_path, path):
    listing = roots.listing(path.format(tmp_path), files=True)
    assert names(listing) == [str(tmp_path / "inside")]
    assert listing["refused"]


def test_blank_lists_the_roots_without_complaint(roots, tmp_path):
    listing = roots.listing(" ", files=False)
    assert names(listing) == [str(tmp_path / "inside")] and not listing["refused"]


def test_a_file_or_a_half_typed_name_lists_the_folder_above(roots, tmp_path):
    assert roots.listing(str(tmp_path / "inside" / "lora.safetensors"), True)["path"] == str(tmp_path / "inside")
    assert roots.listing(str(tmp_path / "inside" / "A_fol"), True)["path"] == str(tmp_path / "inside")


def test_the_way_up_ends_at_the_root(roots, tmp_path):
    assert roots.listing(str(tmp_path / "inside" / "models"), True)["parent"] == str(tmp_path / "inside")
    assert roots.listing(str(tmp_path / "inside"), True)["parent"] == ""


def test_long_folders_are_cut_and_say_so(tmp_path):
    for n in range(MOST + 3):
        (tmp_path / f"{n:04}").mkdir()
    listing = Roots([tmp_path]).listing(str(tmp_path), False)
    assert len(listing["entries"]) == MOST and listing["more"] == 3


def test_models_are_found_two_levels_deep_and_inside_the_roots(roots, tmp_path):
    (tmp_path / "inside" / "models" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "inside" / "models" / "deep" / "y.safetensors").write_text("")
    (tmp_path / "inside" / "models" / "deep" / "er" / "z.safetensors").write_text("")
    folder = tmp_path / "inside" / "models"
    assert roots.models() == [
        str(folder / "deep" / "y.safetensors"),
        str(folder / "sd15"),
        str(folder / "x.safetensors"),
    ]
