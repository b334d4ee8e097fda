"""The page in another language."""

import json

import pytest

from app import main
from gui import page, words
from gui.desk import Desk
from gui.files import Roots
from gui.presets import Presets
from gui.runs import Runs


@pytest.fixture
def desk(tmp_path):
    return Desk(Runs(tmp_path, tmp_path, ()), Presets(tmp_path, tmp_path), Roots([tmp_path]), allow=print)


@pytest.mark.parametrize(
    ("script", "sentences"),
    [
        ("a = t`Saved at step ${step}.`", ["Saved at step {0}."]),
        ('t`${counted(n, "image")}${m ? t`, ${b({ c: "}" })} of memory` : ""} in all`', ["{0} image", "{0} images"]),
        ("t`${a}${t`, ${b} of memory`} in all`", ["{0}{1} in all", ", {0} of memory"]),
        ('counted(found.length, "batch", "batches")', ["{0} batch", "{0} batches"]),
        ('press(said("Parameters"))', ["Parameters"]),
        ("split`no words of the page`", []),
    ],
)
def test_sentences_are_gathered_as_the_scripts_look_them_up(script, sentences):
    assert set(sentences) <= set(words._of_scripts(script)) and bool(sentences) == bool([*words._of_scripts(script)])


def test_labels_and_markup_are_shown_in_the_language(desk):
    shown = page.build(desk, {"LoRA type": "LoRA-Art", "Loss": "Verlust", "Stop": "<b>Halt</b>"})
    config = shown.get_config_file()
    assert "LoRA-Art" in [component["props"].get("label") for component in config["components"]]
    markup = "".join(str(c["props"].get("value")) for c in config["components"] if c["type"] == "html")
    assert "<h3>Verlust</h3>" in markup and 'aria-label="Verlust"' in markup
    assert "&lt;b&gt;Halt&lt;/b&gt;" in markup and "<b>Halt" not in markup
    assert "Sample now" in markup  # what the language leaves out stays


def test_the_scripts_bring_the_language_and_have_an_address_of_their_own():
    german = page.script({"Undo": "Zurück"})
    assert 'const WORDS = {"Undo": "Zurück"};' in german
    assert page.script_route({}).path != page.script_route({"Undo": "Zurück"}).path


def test_a_language_that_is_not_there_is_refused_with_those_that_are(tmp_path, capsys):
    assert main(["--language", "klingon", "--runs", str(tmp_path)]) == 2
    assert "klingon" in (told := capsys.readouterr().err) and "english" in told


def test_states_severities_and_phases_are_among_the_words():
    listed = set(words.english())
    assert {"running", "crashed", "queued", "error", "not supported", "less memory", "drawing samples"} <= listed
    assert not [sentence for sentence in listed if "{{" in sentence or "color:" in sentence]


def test_the_list_of_all_words_is_up_to_date():
    listed = json.loads(words.ENGLISH.read_text(encoding="utf-8"))
    assert list(listed) == words.english(), "python -m gui.words makes it anew"
