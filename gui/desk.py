"""What the page may ask of the server: one function for each question, gathered by Desk.functions."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from gui import choosing, form, history, live, sweep
from gui.asking import asked
from gui.files import Roots
from gui.presets import Presets
from gui.runs import ALIVE, BusyError, Runs, kill
from gui.tools import Tools
from gui.waiting import Queue
from trainer import jsontext, kohya, state
from trainer.errors import ConfigError, DataError, Problem
from trainer.paths import resolve
from trainer.run import REQUESTS, Run
from trainer.schema import PARAMETERS

MOST_RUNS = 100
MOST_COMPARED = 24
FIRST = "shipped/first-steps"
GONE_S = 90
"""A page that has not asked for so long is gone; a browser lets a hidden one ask once a minute."""

Answer = dict[str, Any]
Ask = Mapping[str, Any]
Values = Mapping[str, Any]


@dataclass
class Desk:
    """Everything that the page works on. `allow` lets a file or folder be fetched by the browser."""

    runs: Runs
    presets: Presets
    roots: Roots
    allow: Callable[[Path], None]
    pages: dict[str, float] = field(default_factory=dict)
    """The pages that show the form, and when each asked last for what is new; −∞: it was closed."""

    @property
    def draft(self) -> Path:
        return self.runs.folder / "draft.json"

    def hello(self, ask: Ask) -> Answer:
        """What the page needs to begin: the parameters, the shelf, and the form as it was left.

        Who comes for the first time finds the preset of first steps, ready to start.
        """
        try:
            preset = kohya.load(self.draft) if self.draft.exists() else self._first()
        except ConfigError:
            # A draft that cannot be read (the disk was full) is no reason to show no page.
            preset = kohya.Preset({})
        return {
            "table": form.table(),
            **self._shelf(),
            "models": self.roots.models(),
            "draft": _as_form(preset),
        }

    def _shelf(self) -> Answer:
        return {"presets": self.presets.ids(), "misnamed": self.presets.misnamed()}

    def _first(self) -> kohya.Preset:
        return self.presets.load(FIRST) if FIRST in self.presets.ids() else kohya.Preset({})

    def draft_saved(self, ask: Ask) -> Answer:
        """Keep the form as it stands; tells what the schema finds wrong with it."""
        values = form.read(ask["entries"])
        kohya.save(self.draft, values, ask["kept"])
        return {"problems": [asdict(problem) for problem in form.problems(values)]}

    def load(self, ask: Ask) -> Answer:
        """A preset as the form shows it. `stays`: what it does not name and the user has entered, which is kept.

        `source`: the preset that the form with these `entries` was filled with.
        """
        try:
            preset = self.presets.load(str(ask["id"]))
        except ConfigError as error:
            return {"problems": [asdict(problem) for problem in error.problems]}
        source = str(ask.get("source", ""))
        filled = self.presets.load(source).values if source in self.presets.ids() else {}
        own = form.entered(ask.get("entries", {}), filled)
        stays = {key: entry for key, entry in own.items() if key not in preset.values}
        answer = _as_form(preset)
        return {**answer, "entries": {**answer["entries"], **stays}, "stays": list(stays)}

    def parse(self, ask: Ask) -> Answer:
        """A preset given as JSON text. What is no JSON is told with its line."""
        try:
            flat = jsontext.read(ask["text"])
        except json.JSONDecodeError as error:
            message = f"Line {error.lineno}: {error.msg}."
            return {"problems": [asdict(Problem("", "JSON", message))], "line": error.lineno}
        if not isinstance(flat, dict):
            return {"problems": [asdict(Problem("", "JSON", 'It must be an object: {"key": value, …}.'))], "line": 1}
        return _as_form(kohya.read(flat))

    def flat(self, ask: Ask) -> Answer:
        """The form as the JSON of a preset."""
        flat = {**ask["kept"], **form.read(ask["entries"])}
        flat = {key: value for key, value in flat.items() if key not in kohya.SECRET}
        return {"text": json.dumps(flat, indent=2, ensure_ascii=False)}

    def save(self, ask: Ask) -> Answer:
        try:
            name = str(ask["name"]).strip().removesuffix(".json")
            if not ask.get("replace") and self.presets.taken(name):
                return {"exists": True}
            saved = self.presets.save(name, form.read(ask["entries"]), ask["kept"])
        except ConfigError as error:
            return {"problems": [asdict(problem) for problem in error.problems]}
        return {"id": saved, "path": str(self.presets.path(saved)), **self._shelf()}

    def preset_delete(self, ask: Ask) -> Answer:
        """Delete one of the user's own presets; the shelf as it is then."""
        try:
            self.presets.delete(str(ask["id"]))
        except ConfigError as error:
            return {"problems": [asdict(problem) for problem in error.problems]}
        return self._shelf()

    def check(self, ask: Ask) -> Answer:
        found = self.runs.check(form.read(ask["entries"]), ask["kept"])
        return {**found, "outline": outline(found.get("summary") or {})}

    def trial(self, ask: Ask) -> Answer:
        """What three steps and a picture take, in "trial" where nothing stands in the way."""
        try:
            return self.runs.trial(form.read(ask["entries"]), ask["kept"])
        except BusyError as busy:
            return {"problems": [asdict(Problem("", "Trial", str(busy)))], "notes": []}

    def trial_stop(self, ask: Ask) -> Answer:
        self.runs.end_trials()
        return {}

    def outlook(self, ask: Ask) -> Answer:
        """What would be trained. Problems are only counted: the check tells them."""
        from gui.outlook import outlook  # late: what reads images takes a while to import

        return outlook(form.read(ask["entries"]), self.runs)

    def dataset(self, ask: Ask) -> Answer:
        """The image folders that the form names: how often what is seen, and where each image is cut."""
        from gui.dataset import dataset

        values = form.read(ask["entries"])
        found = dataset(values, ask.get("find", ""), ask.get("tag", ""))
        return {**found, "undo": self.captioning.undoable(), "locked": self.captioning.locked(values)}

    def inspect(self, ask: Ask) -> Answer:
        """What a look at the images' pixels tells; asked again until all are done."""
        from gui.inspection import inspect

        return inspect(form.read(ask["entries"]))

    @cached_property
    def captioning(self) -> Any:
        from gui.captions import Captions

        return Captions(self.roots, self.runs.folder / "captions")

    def captions(self, ask: Ask) -> Answer:
        """Edit captions, or with "undo" take the last edit back; `refused` says why nothing was changed."""
        from gui.captions import RefusedError

        try:
            if ask["how"] == "undo":
                return dict(self.captioning.undo())
            return dict(self.captioning.edit(form.read(ask.get("entries") or {}), ask))
        except RefusedError as error:
            return {"refused": str(error)}
        except OSError as error:
            return {"refused": f'"{error.filename}" cannot be written: {error.strerror}.'}

    def draws(self, ask: Ask) -> Answer:
        """What steps of a training with this form would see, from the trainer itself."""
        return self.runs.told("draws", form.read(ask["entries"]), {}, "--batch", str(int(ask["batch"])))

    @cached_property
    def uploads(self) -> Any:
        from gui.upload import Uploads

        return Uploads(self.roots, self.runs.folder / "uploads")

    def upload(self, ask: Ask) -> Answer:
        """Take a zip with images, step by step; `refused` says why it is not taken."""
        asked = {"name": "", "id": "", "target": "", "size": 0, "offset": 0, "data": "", **ask}
        steps: dict[str, Callable[[], Answer]] = {
            "place": lambda: self.uploads.place(asked["name"]),
            "begin": lambda: self.uploads.begin(asked["size"], asked["target"]),
            "add": lambda: self.uploads.add(asked["id"], asked["offset"], asked["data"]),
            "unpack": lambda: self.uploads.unpack(asked["id"], asked["target"]),
            "drop": lambda: self.uploads.drop(asked["id"]),
        }
        try:
            return steps[ask["step"]]() if ask["step"] in steps else {"refused": "There is no such step."}
        except DataError as error:
            return {"refused": str(error)}
        except OSError as error:
            return {"refused": f'"{error.filename}" cannot be written: {error.strerror}.'}

    def thumbnails(self, ask: Ask) -> Answer:
        """Small pictures of images in the folders that the form names, by path."""
        from gui.dataset import thumbnails

        return thumbnails(form.read(ask["entries"]), [str(path) for path in ask["paths"]])

    def start(self, ask: Ask) -> Answer:
        """Check, and start when nothing stands in the way: `run` is then in the answer."""
        try:
            self.runs.only_idle()  # before the check, which takes seconds
        except BusyError as busy:
            return _busy(str(busy))
        answer = self.check(ask)
        if any(problem["severity"] == "error" for problem in answer["problems"]):
            return answer
        return self._made(self.runs.start, ask, answer)

    def _made(self, make: Callable[[Values, Values], Run], ask: Ask, answer: Answer) -> Answer:
        """The answer of a check, with the run that `make` makes of the settings, or why it cannot."""
        try:
            run = make(form.read(ask["entries"]), ask["kept"])
        except BusyError as error:
            return _busy(str(error))
        except OSError as error:
            return {**answer, "problems": [self._unwritable(error)]}
        return {**answer, "run": run.folder.name}

    def _unwritable(self, error: OSError) -> Answer:
        place = error.filename or self.runs.folder
        message = f'"{place}" cannot be written: {error.strerror}. Start the page with --runs FOLDER elsewhere.'
        return asdict(Problem("", "Runs folder", message))

    @cached_property
    def queue(self) -> Queue:
        return Queue(self.runs)

    def enqueue(self, ask: Ask) -> Answer:
        """Check, and let the settings wait for their turn when nothing stands in the way.

        `at_once`: nothing runs or waits before them.
        """
        answer = self.check(ask)
        if any(problem["severity"] == "error" for problem in answer["problems"]):
            return answer
        at_once = self.runs.active() is None and not self.queue.waiting()
        return {**self._made(self.queue.add, ask, answer), "at_once": at_once}

    def sweep(self, ask: Ask) -> Answer:
        """Check every combination of the swept values, and queue them all when nothing stands in the way of any.

        The first is looked at as closely as before a start, the images decoded; the others as the form is.
        """
        values = form.read(ask["entries"])
        combinations, problems = sweep.plan(values, ask["fields"])
        problems += sweep.check(combinations)
        if any(problem.severity == "error" for problem in problems):
            return _refused(*problems)
        answer = self.runs.check(combinations[0].values, ask["kept"])
        if any(problem["severity"] == "error" for problem in answer["problems"]):
            return answer
        try:
            sweep.enqueue(self.queue, combinations, ask["kept"])
        except OSError as error:
            return {**answer, "problems": [self._unwritable(error)]}
        return {**answer, "problems": [*map(asdict, problems), *answer["problems"]], "runs": len(combinations)}

    def turn(self, ask: Ask) -> Answer:
        """Let a waiting run start earlier, or take it out of the queue."""
        run, orders = self._run(ask), {"earlier": self.queue.earlier, "remove": self.queue.remove}
        return {"done": run is not None and ask["word"] in orders and orders[ask["word"]](run)}

    def poll(self, ask: Ask) -> Answer:
        """What is new of a run. `others`: whether another page shows the form, too."""
        answer = live.poll(self.runs, ask)
        now, page = time.monotonic(), ask.get("page", "")
        if self.pages.get(page) != -math.inf:  # a closed page's last question may come behind its leave
            self.pages[page] = now
        answer["others"] = any(other != page and now - at < GONE_S for other, at in self.pages.copy().items())
        for folder in {Path(sample["path"]).parent for sample in answer.get("samples", ())}:
            self.allow(folder)
        if answer.get("state") in ALIVE:
            answer["waiting"] = [run.folder.name for run in self.queue.waiting()]
        return answer

    def left(self, ask: Ask) -> Answer:
        """A page was closed."""
        self.pages[ask["page"]] = -math.inf
        return {}

    def control(self, ask: Ask) -> Answer:
        """Hand a request to a run's trainer; `kill` ends it."""
        run = self._run(ask)
        if run is None:
            return {"done": False}
        if ask["word"] == "kill":
            kill(run)
        elif ask["word"] in REQUESTS:
            run.request(ask["word"])
        return {"done": True}

    def list_runs(self, ask: Ask) -> Answer:
        with self.runs.alone():  # the queue gives a run that begins another name
            ids = self.runs.ids()
            return {
                "runs": [self.runs.summary(run_id) for run_id in ids[:MOST_RUNS]],
                "more": max(0, len(ids) - MOST_RUNS),
                "queue": [run.folder.name for run in self.queue.waiting()],
                "trouble": self.queue.trouble,
            }

    def resume(self, ask: Ask) -> Answer:
        """A run's settings with its newest sound state, ready to be started; `form`: as the form shows them then.

        What goes on from the state takes it away at its end, so that the form does not name it.
        """
        answer, run = self.settings(ask), self._run(ask)
        folder = history.newest_state(run) if run else None
        if folder is None:
            return {"problems": [asdict(Problem("", "Resume", "No state of this run can be read any more."))]}
        if "entries" in answer:
            own = answer["entries"]
            answer["form"] = {**own, "resume": own["resume"] if own["resume"] == state.AUTO else ""}
            answer["entries"] = {**own, "resume": str(folder)}
        return answer

    def files(self, ask: Ask) -> Answer:
        """What of a run can be downloaded, with its size."""
        run = self._run(ask)
        found = self._downloads(run)
        return {"files": [[name, path.stat().st_size] for name, path in found.items()]}

    def delete(self, ask: Ask) -> Answer:
        """What would go and what would stay of a run's folder, and what it wrote elsewhere, which stays as well; deleted
        when `sure`. `refused` says why not.
        """
        run = self._run(ask)
        if run is None:
            return {"refused": "There is no such run."}
        try:
            found = self.runs.delete(run) if ask.get("sure") is True else history.rest(run)
        except BusyError as error:
            return {"refused": str(error)}
        except OSError as error:
            return {"refused": f'"{error.filename or run.folder}" cannot be deleted: {error.strerror}.'}
        names = [[path.relative_to(run.folder).as_posix() for path in part] for part in (found.goes, found.stays)]
        elsewhere = [one.path for one in history.saved(run) if not one.path.is_relative_to(run.folder)]
        return {"goes": names[0], "stays": names[1], "elsewhere": [str(path) for path in elsewhere if path.exists()]}

    def compare(self, ask: Ask) -> Answer:
        """Settings, curve, outcome and samples of at most 24 runs, as many as a sweep has."""
        answers = []
        for run_id in dict.fromkeys(map(str, ask["runs"][:MOST_COMPARED])):
            run = self.runs.find(run_id) if run_id else None
            if run is None:
                continue
            self.allow(run.samples)
            settings = self.settings({"run": run_id})
            told = {"curve": history.curve(run), "outcome": history.outcome(run), "samples": history.samples(run)}
            answers.append({**settings, **told})
        return {"runs": answers}

    def settings(self, ask: Ask) -> Answer:
        """A run's settings as the form shows them; the newest run's for ""."""
        run = self.runs.find(str(ask["run"]))
        if run is None:
            return {"run": None}
        try:
            answer = _as_form(kohya.load(run.config))
            if _is_gone(answer["entries"]["resume"]):
                answer["entries"]["resume"] = ""
            return {**answer, "description": "", "run": run.folder.name}  # it tells of a preset, not of this run
        except ConfigError as error:
            return {"run": run.folder.name, "problems": [asdict(problem) for problem in error.problems]}

    def download(self, ask: Ask) -> Answer:
        """Let the browser fetch one file of a run; its path is in the answer."""
        run = self._run(ask)
        path = self._downloads(run).get(str(ask["name"]))
        if path is None:
            return {"path": None}
        self.allow(path)
        return {"path": str(path)}

    def checkpoints(self, ask: Ask) -> Answer:
        """What of a run can be drawn to choose by, and the grid that was drawn last."""
        run = self._run(ask)
        return {**choosing.offer(run), **self.grid(ask)} if run else {"files": []}

    def grid_start(self, ask: Ask) -> Answer:
        run = self._run(ask)
        if run is None:
            return {"problems": [asdict(Problem("", "Run", "There is no such run."))]}
        problems = choosing.start(self.tools, run, [str(name) for name in ask["names"]], ask)
        return {"problems": [asdict(problem) for problem in problems]}

    def grid(self, ask: Ask) -> Answer:
        """How far the grid of a run is drawn."""
        run = self._run(ask)
        if run is None:
            return {"state": "none", "grid": None}
        self.allow(run.grid)
        return choosing.poll(self.tools, run)

    def listing(self, ask: Ask) -> Answer:
        return self.roots.listing(str(ask["path"]), bool(ask["files"]))

    @cached_property
    def tools(self) -> Tools:
        return Tools(self.runs, self.roots)

    def offer_tools(self, ask: Ask) -> Answer:
        return self.tools.offer()

    def start_tool(self, ask: Ask) -> Answer:
        return {"problems": [asdict(problem) for problem in self.tools.start(str(ask["tool"]), ask["entries"])]}

    def stop_tool(self, ask: Ask) -> Answer:
        self.tools.stop()
        return {"done": True}

    def poll_tool(self, ask: Ask) -> Answer:
        answer = self.tools.poll(int(ask["offset"]))
        if answer.get("picture"):
            self.allow(Path(answer["picture"]))
        return answer

    def captioner(self, ask: Ask) -> Answer:
        """What kind of captioning model a folder holds."""
        return dict(self.tools.captioning(ask["path"]))

    def _downloads(self, run: Run | None) -> dict[str, Path]:
        return live.downloads(run, self.runs.root, self.roots.folders) if run else {}

    def _run(self, ask: Ask) -> Run | None:
        return self.runs.find(str(ask["run"])) if ask.get("run") else None

    def functions(self) -> list[Callable[[Any], Answer]]:
        """What the script may call, under the names it calls them by; how it must ask is in gui/asking.py."""
        offered = {
            "hello": self.hello,
            "draft": self.draft_saved,
            "load": self.load,
            "parse": self.parse,
            "flat": self.flat,
            "save": self.save,
            "preset_delete": self.preset_delete,
            "check": self.check,
            "trial": self.trial,
            "trial_stop": self.trial_stop,
            "outlook": self.outlook,
            "dataset": self.dataset,
            "thumbnails": self.thumbnails,
            "captions": self.captions,
            "draws": self.draws,
            "upload": self.upload,
            "inspect": self.inspect,
            "start": self.start,
            "enqueue": self.enqueue,
            "sweep": self.sweep,
            "turn": self.turn,
            "resume": self.resume,
            "files": self.files,
            "delete": self.delete,
            "compare": self.compare,
            "poll": self.poll,
            "left": self.left,
            "control": self.control,
            "runs": self.list_runs,
            "settings": self.settings,
            "download": self.download,
            "checkpoints": self.checkpoints,
            "grid_start": self.grid_start,
            "grid": self.grid,
            "listing": self.listing,
            "tools": self.offer_tools,
            "tool_start": self.start_tool,
            "tool_stop": self.stop_tool,
            "tool_poll": self.poll_tool,
            "captioner": self.captioner,
        }
        return [asked(name, function) for name, function in offered.items()]


def _is_gone(resume: str) -> bool:
    """Whether a state to resume is not there any more: what went on from it takes it away at its end."""
    return resume not in ("", state.AUTO) and not resolve(resume).is_dir()


def _busy(message: str) -> Answer:
    return {**_refused(Problem("", "Not now", message)), "busy": True}


def _refused(*problems: Problem) -> Answer:
    return {"problems": [asdict(problem) for problem in problems], "notes": [], "summary": {}, "outline": ""}


def _as_form(preset: kohya.Preset) -> Answer:
    """A preset as the form shows it, with what became of its keys and what the schema finds wrong."""
    problems = form.problems(preset.values)
    switches = {p.key for p in problems if p.key in PARAMETERS and PARAMETERS[p.key].kind == "switch"}
    return {
        "entries": form.fill(preset.values),
        "kept": preset.kept,
        "notes": [asdict(note) for note in preset.notes],
        "problems": [
            {**asdict(p), "message": p.message + (". The default is shown." if p.key in switches else "")}
            for p in problems
        ],
        "description": preset.description,
    }


def outline(summary: Mapping[str, Any]) -> str:
    """What would be trained, in one line."""
    parts = [
        _counted(summary.get("images"), "image"),
        _counted(len(summary.get("buckets") or ()), "bucket"),
        f"{summary['repeats']} seen in an epoch" if summary.get("repeats") else "",
        _counted(summary.get("epochs"), "epoch"),
        _counted(summary.get("total_steps"), "step"),
        str(summary.get("model") or ""),
    ]
    return " · ".join(part for part in parts if part)


def _counted(count: int | None, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}" if count else ""
