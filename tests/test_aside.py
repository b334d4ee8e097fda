"""Files that give way to a later one of their name, and how each is found again."""

import os

from trainer.aside import found_again, set_aside, written_at


def written(path, text, at_s):
    path.write_text(text)
    os.utime(path, ns=(at_s * 10**9, at_s * 10**9))
    return path, written_at(path)


def test_each_of_three_files_of_one_name_is_found_again_and_none_for_another(tmp_path):
    path = tmp_path / "cat [v2].safetensors"
    stamps = []
    for text, at_s in (("first", 1_700_000_000), ("second", 1_700_000_000 + 1), ("third", 1_700_000_000 + 2)):
        set_aside(path)
        stamps.append(written(path, text, at_s)[1])
    assert [found_again(path, stamp).read_text() for stamp in stamps] == ["first", "second", "third"]
    found_again(path, stamps[0]).unlink()
    assert found_again(path, stamps[0]) is None


def test_where_it_is_not_known_when_it_was_written_whatever_has_the_name_is_it(tmp_path):
    path = tmp_path / "cat.safetensors"
    assert found_again(path, 0) is None
    path.write_text("x")
    assert found_again(path, 0) == path and found_again(path, 1) is None


def test_nothing_is_in_the_way_of_a_new_name(tmp_path):
    assert set_aside(tmp_path / "cat.safetensors") is None


def test_two_files_of_one_second_get_two_names(tmp_path):
    path = tmp_path / "cat.safetensors"
    for text in ("first", "second"):
        written(path, text, 1_700_000_000)
        set_aside(path)
    assert sorted(other.read_text() for other in tmp_path.iterdir()) == ["first", "second"]
