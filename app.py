"""Serve the page: python app.py. Flags as in kohya_ss; by default only this machine can reach it."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
TRAINER = (sys.executable, "-m", "trainer")


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python app.py", description="Lorawright: train LoRAs in the browser.")
    parser.add_argument(
        "--listen", metavar="ADDRESS", default="127.0.0.1", help="address to serve at (default: %(default)s)"
    )
    parser.add_argument(
        "--server_port", type=int, default=0, metavar="PORT", help="default: the first free one from 7860"
    )
    parser.add_argument("--share", action="store_true", help="make a public link; always with a password")
    parser.add_argument("--username", default="me", help="for the login (default: %(default)s)")
    parser.add_argument("--password", help="ask for this password; beyond this machine one is made where none is given")
    parser.add_argument("--inbrowser", action="store_true", help="open the page in a browser")
    parser.add_argument("--headless", action="store_true", help="no browser on this machine; goes before --inbrowser")
    parser.add_argument(
        "--root_path", metavar="PATH", help="where a reverse proxy serves the page: /lora or a whole address"
    )
    parser.add_argument(
        "--trusted_host", metavar="NAME", action="append", default=[], help="another name of this page, behind a proxy"
    )
    parser.add_argument(
        "--language",
        default="english",
        help="the page's words: a file of gui/words (english), or a .json of your own",
    )
    parser.add_argument(
        "--runs", type=Path, default=HERE / "runs", metavar="FOLDER", help="where runs are kept (default: runs/)"
    )
    parser.add_argument(
        "--root",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="a folder that the page may list and whose captions it may edit; give it once for each, in place of home and "
        "this one",
    )
    parser.add_argument(
        "--continue",
        dest="go_on",
        action="store_true",
        help="for rented machines: start the newest run again if the machine was taken away under it, and when this "
        "program gets SIGTERM, let the training save and end first",
    )
    return parser.parse_args(words)


def main(words: list[str] | None = None, trainer: Sequence[str] = TRAINER) -> int:
    """Serve until Ctrl+C. Returns the exit code. `trainer` is the command that checks and trains."""
    given = arguments(words)
    from gui import guard

    given.listen = given.listen.strip("[]") or "127.0.0.1"
    if wrong := guard.cannot_listen(given.listen, given.server_port):
        print(f"The page cannot be served: {wrong}", file=sys.stderr)
        return 1
    password = guard.password_for(given.listen, given.share, given.password)
    from gui import words as vocabulary

    try:
        words = vocabulary.load(given.language)
    except (OSError, ValueError) as error:
        known = ", ".join(vocabulary.languages())
        print(f'--language "{given.language}" cannot be read ({error}). There is: {known}.', file=sys.stderr)
        return 2
    try:
        given.runs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f'"{given.runs}" cannot be made: {error.strerror}. Name another folder with --runs.', file=sys.stderr)
        return 2

    from starlette.middleware import Middleware

    from gui import page
    from gui.desk import Desk
    from gui.files import Roots
    from gui.login import Login
    from gui.presets import Presets
    from gui.runs import Runs
    from gui.view import PREFIX, View

    runs = given.runs.resolve()
    allowed: list[str] = []

    def allow(path: Path) -> None:
        if str(path) not in allowed:
            allowed.append(str(path))

    desk = Desk(
        runs=Runs(runs, HERE, trainer),
        presets=Presets(HERE / "presets", runs / "presets"),
        roots=Roots([*(given.root or [Path.home(), HERE, Path.cwd()]), runs]),
        allow=allow,
    )
    if given.share:
        print("Asking for a share link …", flush=True)
    root_host = given.root_path.split("//", 1)[1].split("/")[0] if given.root_path and "//" in given.root_path else ""
    hosts = guard.Hosts([*given.trusted_host, root_host], password=bool(password))
    middleware = [Middleware(guard.Guard, hosts=hosts)]
    routes = [page.script_route(words)]
    view = View(desk.runs, words) if password else None
    if password and view:
        middleware.append(Middleware(Login, username=given.username, password=password, beside=PREFIX, words=words))
        routes.append(view.route())
    blocks = page.build(desk, words)
    try:
        _, local, shared = blocks.launch(
            server_name=f"[{given.listen}]" if ":" in given.listen else given.listen,
            server_port=given.server_port or None,
            share=given.share,
            inbrowser=given.inbrowser and not given.headless,
            root_path=given.root_path,
            theme=page.theme(),
            head=page.style(),
            favicon_path=page.STATIC / "icon.svg",
            allowed_paths=allowed,
            app_kwargs={"middleware": middleware, "routes": routes},
            max_file_size="1mb",
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError:  # the one that is named may be taken since it was asked for
        none = "no port from 7860 on is free. Name one with --server_port."
        wrong = guard.cannot_listen(given.listen, given.server_port)
        print(f"The page cannot be served: {wrong or none}", file=sys.stderr)
        return 1
    # launch() replaces an empty list by one of its own.
    blocks.allowed_paths = allowed
    if given.go_on and (run := desk.runs.go_on()):
        print(f"{run.folder.name} goes on with what the machine was taken away from.", flush=True)
    desk.queue.serve()
    print(f"Lorawright is at {local}", flush=True)
    if given.share:
        _tell_share(shared, hosts, blocks.server_port)
    if password and view:
        made = f' with the password "{password}", made for this start' if not given.password else ""
        address = shared or (given.root_path if root_host else local)
        print(f'Log in as "{given.username}"{made}.', flush=True)
        print(f"To look on only, without a password: {str(address).rstrip('/')}/{view.path}", flush=True)
        if not given.share and not guard.is_loopback(given.listen):
            print("From other machines, both with this machine's name or address in place of localhost.", flush=True)
    taken_away = threading.Event()
    if given.go_on:
        signal.signal(signal.SIGTERM, lambda number, frame: taken_away.set())
    try:
        taken_away.wait()
        desk.runs.save_before_the_end()
    except KeyboardInterrupt:
        active = desk.runs.active()
        print("\nThe page is closed." + (f" {active.folder.name} goes on training." if active else ""))
    blocks.close(verbose=False)
    return 0


def _tell_share(shared: str | None, hosts: object, port: int) -> None:
    if shared:
        hosts.trust(shared.split("//")[1])  # type: ignore[attr-defined]
        print(f"Shared at {shared} (for a week at most; needs the password)", flush=True)
        return
    print(
        "No share link could be had (no way out to its server). From the other machine, this works instead:\n"
        f"  ssh -L {port}:127.0.0.1:{port} USER@THIS_MACHINE\nthen open http://127.0.0.1:{port} there.",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
