"""The page in another language: `python app.py --language de` shows the words of gui/words/de.json.

English stands in the code where it is shown. `python -m gui.words` gathers all of it in gui/words/english.json; a
copy of that under the language's name, with other words after the colons, is a translation. What it
leaves out stays English, and so do the log and the trainer's messages.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

from trainer import jsontext

FOLDER = Path(__file__).parent / "words"
ENGLISH = FOLDER / "english.json"
PROPERTIES = ("label", "placeholder")
"""Of a component of Gradio's: those that hold words."""

Words = Mapping[str, str]

_MARKED = re.compile(r'(?<=>)[^<>]+(?=<)|(?<=aria-label=")[^"]+|(?<=title=")[^"]+|(?<=placeholder=")[^"]+')
_LITERAL = re.compile(r'\b(?:said\(|severity: )"([^"]+)"')
_PHASE = re.compile(r'\b(?:Phase|tell)\("([^"]+)"')
_COUNTED = re.compile(r'\bcounted\([^"`]*"([^"]+)"(?:, "([^"]+)")?\)')


def languages() -> list[str]:
    """The names by which a language can be asked for, English first."""
    return [ENGLISH.stem, *sorted(path.stem for path in FOLDER.glob("*.json") if path != ENGLISH)]


def load(language: str) -> Words:
    """The words by the English ones, of a language or of a .json file. Raises OSError or ValueError for what is none."""
    if language == ENGLISH.stem:
        return {}
    path = Path(language) if language.endswith(".json") else FOLDER / f"{language}.json"
    words = jsontext.read(path.read_text(encoding="utf-8"))
    if not isinstance(words, dict):
        raise ValueError('it is no object: {"English": "translation", …}')
    return {str(english): str(other) for english, other in words.items()}


def translate(components: Iterable[Any], words: Words) -> None:
    """Give Gradio's components, and the markup that some hold, the words of a language."""
    for component in components:
        for name in PROPERTIES:
            text = getattr(component, name, None)
            if isinstance(text, str):
                setattr(component, name, words.get(text, text))
        if component.get_block_name() == "html":
            component.value = in_markup(component.value, words)


def in_markup(markup: str, words: Words) -> str:
    """HTML with the words of a language between its tags and in the attributes that are read out."""
    return _MARKED.sub(lambda found: _in_markup(found[0], words), markup)


def english() -> list[str]:
    """All that the page says: its components, the markup in them, its scripts, and the help of parameters and tools."""
    from gui import form, login, page, tools, view
    from gui.desk import Desk
    from gui.files import Roots
    from gui.presets import Presets
    from gui.runs import Runs, State
    from trainer.errors import Problem
    from trainer.kohya import Note

    nowhere = Runs(FOLDER, FOLDER, ())
    desk = Desk(nowhere, Presets(FOLDER, FOLDER), Roots([]), allow=lambda path: None)
    found = [*_of_scripts(page.script({}) + view.script({})), *login.SAID, *_phases()]
    found += [*get_args(State), *get_args(get_type_hints(Problem)["severity"]), *get_args(get_type_hints(Note)["what"])]
    form_to_log_in = re.sub(r"<style>.*?</style>|{{\w+}}", "", login.markup(), flags=re.DOTALL)
    found += [html.unescape(text.strip()) for text in _MARKED.findall(form_to_log_in)]
    for component in page.build(desk).blocks.values():
        found += [getattr(component, name, None) or "" for name in PROPERTIES]
        if component.get_block_name() == "html":
            found += [html.unescape(text.strip()) for text in _MARKED.findall(component.value)]
    offered = tools.Tools(nowhere, desk.roots).offer()["tools"]
    rows = [*form.table(), *offered, *(field for tool in offered for field in tool["fields"])]
    found += [
        row[name]
        for row in rows
        for name in ("label", "help", "allowed", "summary", "tab", "section", "group")
        if name in row
    ]
    return sorted({sentence for sentence in found if re.search(r"[^\W\d_]{2}", sentence)})


def _phases() -> Iterator[str]:
    """What the trainer and the tools say that they are at, out of their sources."""
    for path in (FOLDER.parents[1] / "trainer").rglob("*.py"):
        yield from _PHASE.findall(path.read_text(encoding="utf-8"))


def _in_markup(text: str, words: Words) -> str:
    sentence = html.unescape(text.strip())
    return text.replace(text.strip(), html.escape(words[sentence])) if sentence in words else text


def _of_scripts(scripts: str) -> Iterator[str]:
    yield from _LITERAL.findall(scripts)
    for noun, several in _COUNTED.findall(scripts):
        yield from (f"{{0}} {noun}", f"{{0}} {several or noun + 's'}")
    for found in re.finditer(r"\bt`", scripts):
        yield _template(scripts, found.end())[0]


def _template(text: str, at: int) -> tuple[str, int]:
    """A template literal from behind its opening quote: what it says with {0}, {1}, … for its values, and its end."""
    sentence, count = "", 0
    while text[at] != "`":
        if text.startswith("${", at):
            sentence, count, at = f"{sentence}{{{count}}}", count + 1, _expression(text, at + 2)
        else:
            at += text[at] == "\\"
            sentence, at = sentence + text[at], at + 1
    return sentence, at + 1


def _expression(text: str, at: int) -> int:
    """The place behind the bracket that closes an expression of JavaScript's."""
    while text[at] != "}":
        if text[at] == "`":
            at = _template(text, at + 1)[1]
        elif text[at] == '"':
            at = text.index('"', at + 1) + 1
        elif text[at] == "{":
            at = _expression(text, at + 1)
        else:
            at += 1
    return at + 1


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    text = json.dumps({sentence: sentence for sentence in english()}, indent=0, ensure_ascii=False)
    ENGLISH.write_text(text + "\n", encoding="utf-8")
