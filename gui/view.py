"""A link to look on: state, loss and samples of the newest run, and nothing that could be pressed.

Who has the link has no session, so that every function of the page refuses him (gui/login.py). What stands
here is all that he gets: a page of its own, what SHOWN names of a run's events, and the pictures of its
samples. No paths, settings or log, which name folders and may hold keys.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from gui import live, runs
from gui.files import inside
from gui.words import Words, in_markup

STATIC = Path(__file__).parent / "static"
PREFIX = "/view/"
SCRIPTS = ("words", "dom", "chart", "samples", "live", "view")
STYLES = ("page", "view")
SHOWN: dict[str, tuple[str, ...]] = {
    "": ("run", "now", "from", "more", "events", "points", "state", "last_event", "stop_asked"),
    "started": ("images", "family", "device", "precision", "seed", "total_steps"),
    "phase": ("name", "done", "total", "time"),
    "step": ("step", "total", "epoch", "epochs", "steps_per_s", "seconds_left", "memory_bytes", "time"),
    "ended": ("step", "seconds", "by"),
    "cause": ("title",),
    "samples": ("step", "index", "prompt", "seed", "strength"),
}
"""What is told, by the part of the answer of gui/live.py; all else is left out."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src 'self' data:; script-src 'self'; style-src 'self'",
    "Referrer-Policy": "no-referrer",
    "X-Robots-Tag": "noindex",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
_OWNERS = re.compile(r"<!-- owner -->.*?<!-- /owner -->", re.DOTALL)


class View:
    """The secret of one start of the page, and the routes that it opens."""

    def __init__(self, found: runs.Runs, words: Words | None = None) -> None:
        self.runs = found
        self.words = words or {}
        self.key = secrets.token_urlsafe(18)

    @property
    def path(self) -> str:
        """The link, without a leading slash: relative to the page's address."""
        return f"{PREFIX[1:]}{self.key}/"

    def route(self) -> Route:
        return Route(PREFIX + "{rest:path}", self.answer, methods=["GET"])

    def answer(self, request: Request) -> Response:
        """What stands behind the link; 404 for a wrong one, whatever is asked for."""
        key, slash, what = str(request.path_params["rest"]).partition("/")
        if not hmac.compare_digest(key.encode(), self.key.encode()):
            return PlainTextResponse("There is nothing here.", 404)
        if not slash:
            return RedirectResponse(f"{key}/")
        return self._found(what, request.query_params) or PlainTextResponse("There is nothing here.", 404, HEADERS)

    def _found(self, what: str, ask: Mapping[str, str]) -> Response | None:
        if what == "":
            return Response(in_markup(_page(), self.words), media_type="text/html", headers=HEADERS)
        if what == "view.js":
            return Response(script(self.words), media_type="text/javascript", headers=HEADERS)
        if what == "view.css":
            return Response(_joined(STYLES, "css"), media_type="text/css", headers=HEADERS)
        if what == "poll":
            return JSONResponse(self.poll(ask.get("run", ""), ask.get("events", "")), headers=HEADERS)
        picture = self._picture(what)
        return FileResponse(picture, headers=HEADERS) if picture else None

    def poll(self, run: str, events: str) -> dict[str, Any]:
        """What is new of the newest run: see gui/live.py, of which only what SHOWN names is told."""
        newest = self.runs.find("")
        same = newest is not None and run == _moment(newest.folder.name)
        offset = int(events) if same and events.isdecimal() and len(events) < 16 else 0
        whole = live.poll(self.runs, {"run": newest.folder.name if same and newest else "", "events": offset})
        answer = _pick(whole, "")
        for part in SHOWN:
            if isinstance(whole.get(part), Mapping):
                answer[part] = _pick(whole[part], part)
        if whole["run"] is None:
            return answer
        answer["run"] = moment = _moment(whole["run"])
        answer["points"] = [point[:3] for point in whole["points"]]  # without the rates
        answer["samples"] = [
            {**_pick(sample, "samples"), "address": f"samples/{moment}/{Path(sample['path']).name}"}
            for sample in whole["samples"]
            if newest and inside(Path(sample["path"]), [newest.samples])  # not those of the run that it goes on from
        ]
        if str(answer.get("phase", {}).get("name", "")).startswith("saving "):
            answer["phase"]["name"] = "saving"  # not the file's name
        return answer

    def _picture(self, what: str) -> Path | None:
        match what.split("/"):
            case ["samples", moment, name] if name.endswith(".png"):
                newest = self.runs.find("")
                if newest is None or _moment(newest.folder.name) != moment:
                    return None
                path = newest.samples / name
                return path if inside(path, [newest.samples]) and path.is_file() else None
        return None


def _moment(run_id: str) -> str:
    """What is told of a run's id: when it was started, not how its files are called."""
    return run_id[:15]


def _pick(found: Mapping[str, Any], part: str) -> dict[str, Any]:
    return {key: found[key] for key in SHOWN[part] if key in found}


def _page() -> str:
    panel = _OWNERS.sub("", (STATIC / "live.html").read_text(encoding="utf-8"))
    return (STATIC / "view.html").read_text(encoding="utf-8").replace("{{live}}", panel)


def script(words: Words) -> str:
    return f"const WORDS = {json.dumps(words, ensure_ascii=False)};\n{_joined(SCRIPTS, 'js')}"


def _joined(names: tuple[str, ...], ending: str) -> str:
    return "\n".join((STATIC / f"{name}.{ending}").read_text(encoding="utf-8") for name in names)
