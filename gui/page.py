"""The page: its layout, styles and scripts. What they ask of the server is in desk.py."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gui import form
from gui.desk import Desk
from gui.gradio_import import gr
from gui.guard import FOR_GOOD
from gui.words import Words, translate
from trainer.schema import PARAMETERS, Section

STATIC = Path(__file__).parent / "static"
SCRIPTS = (
    "words",
    "dom",
    "banner",
    "form",
    "find",
    "files",
    "chart",
    "log",
    "samples",
    "live",
    "bar",
    "compare",
    "choose",
    "sweep",
    "lists",
    "outlook",
    "dataset",
    "draws",
    "upload",
    "tools",
    "begin",
)
LATER_STYLES = ("tools", "runs")
"""Of tabs that are opened later: they come with the scripts, since Gradio wants the index small."""

PARAMETER_TABS = ("Basic", "Advanced")
ENGLISH: Words = {}


def theme() -> gr.themes.Base:
    """Gradio's base theme, denser, with the system's own fonts: nothing is fetched from elsewhere."""
    return gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        text_size="sm",
        spacing_size="sm",
        radius_size="md",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


def style() -> str:
    """The style sheet, for the page's head: Gradio rewrites what is given as css."""
    return f"<style>{_dense('page')}</style>"


def _dense(name: str) -> str:
    whole = re.sub(r"/\*.*?\*/", "", _text(f"{name}.css"), flags=re.DOTALL)
    # Blanks before a colon or a bracket mean something in a selector; these mean nothing.
    return re.sub(r" ?([{};]) ?|(?<=[:,]) ", r"\1", whole)


def _text(name: str) -> str:
    """A static file without its indentation: it stands in the page's index."""
    lines = (line.strip() for line in (STATIC / name).read_text(encoding="utf-8").splitlines())
    return "\n".join(line for line in lines if line)


def _markup(name: str) -> str:
    return _text(f"{name}.html")


def script(words: Words) -> str:
    """The page's scripts as one module, whose function puts the page together."""
    parts = [f"const WORDS = {json.dumps(words, ensure_ascii=False)};"]
    parts += [f"const LATER_STYLES = {json.dumps(''.join(map(_dense, LATER_STYLES)))};"]
    parts += [(STATIC / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    return "\n".join(["export default async function (server) {", *parts, "await begin(reliable(server));", "}\n"])


def script_route(words: Words) -> Route:
    """Where the browser fetches the scripts. The address changes with them, so that it may keep them for good."""
    text = script(words)

    def answer(_: Request) -> Response:
        return Response(text, media_type="text/javascript", headers={"Cache-Control": FOR_GOOD})

    return Route(_address(text), answer)


def _address(text: str) -> str:
    return f"/lorawright-{hashlib.sha256(text.encode()).hexdigest()[:12]}.js"


def _load_script(words: Words) -> str:
    """What the page's index holds of the scripts: few bytes, since Gradio wants the index small."""
    return f"""
        import(`${{window.gradio_config?.root || ""}}{_address(script(words))}`)
            .then((module) => module.default(server))
            .catch((error) => {{
                document.getElementById("lw-banner").textContent = `The page could not be put together: ${{error.message}}`;
                throw error;
            }});
    """


def build(desk: Desk, words: Words = ENGLISH) -> gr.Blocks:
    """The page's components. The widgets are Gradio's; what happens between them is in static/*.js."""
    widgets: dict[str, gr.components.Component] = {}
    with gr.Blocks(title="Lorawright", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(
            _markup("bar"),
            apply_default_css=False,
            elem_id="bar",
            js_on_load=_load_script(words),
            server_functions=desk.functions(),
        )
        with gr.Row(elem_id="main"):
            with gr.Column(elem_id="form", scale=3):
                gr.HTML(_markup("outlook"), apply_default_css=False)
                _tabs(widgets)
            with gr.Column(elem_id="side", scale=2):
                gr.HTML(_markup("live"), apply_default_css=False)
        ordered = [widgets[key] for key in PARAMETERS]
        _connect(ordered)
    translate(page.blocks.values(), words)
    page._queue.sleep_when_free = 1  # nothing ever waits in Gradio's queue, which looks a thousand times a second
    return page


def _tabs(widgets: dict[str, gr.components.Component]) -> None:
    """The form's tabs, and those beside it; what they hold of the form goes into `widgets`."""
    with gr.Tabs(overflow_behavior="wrap"):
        for tab in dict.fromkeys(section.tab for section in Section):
            if tab == PARAMETER_TABS[0]:
                with gr.Tab("Parameters", elem_id="tab-parameters"), gr.Tabs(overflow_behavior="wrap"):
                    for inner in PARAMETER_TABS:
                        with gr.Tab(inner, elem_id=form.tab_id(inner)):
                            widgets.update(form.widgets(inner))
            elif tab not in PARAMETER_TABS:
                with gr.Tab(tab, elem_id=form.tab_id(tab)):
                    widgets.update(form.widgets(tab))
        with gr.Tab("Dataset", elem_id="tab-dataset"):
            gr.HTML(_markup("dataset"), apply_default_css=False)
        with gr.Tab("Config (JSON)", elem_id="tab-json"):
            gr.HTML(_markup("json"), apply_default_css=False)
        with gr.Tab("Runs", elem_id="tab-runs"):
            gr.HTML(_markup("runs"), apply_default_css=False)
        with gr.Tab("Tools", elem_id="tab-tools"):
            gr.HTML(_markup("tools"), apply_default_css=False)


def _connect(widgets: list[gr.components.Component]) -> None:
    """Two hidden buttons through which the script reads and fills all widgets at once, without the server."""
    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    reader = gr.Button("read", elem_id="lw-read", visible="hidden")
    filler = gr.Button("fill", elem_id="lw-fill", visible="hidden")
    reader.click(None, inputs=widgets, js="(...values) => lorawright.read(values)", **quiet)
    filler.click(None, outputs=widgets, js="() => lorawright.filling()", **quiet).then(
        None, inputs=widgets, js="(...values) => lorawright.filled(values)", **quiet
    )
