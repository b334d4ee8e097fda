"""The login: one password, a session for whoever knows it, and patience with those who guess.

Where a password is set, nothing of the page is answered without a session but the login itself. Gradio's own
login is not used: it leaves some of its routes open, and lets anyone guess as fast as they can.
"""

from __future__ import annotations

import hmac
import html
import ipaddress
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from http.cookies import SimpleCookie
from pathlib import Path
from urllib.parse import parse_qs

from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from gui.guard import path_of
from gui.words import Words, in_markup

FREE_TRIES = 5
LONGEST_WAIT_S = 60.0
FORGOTTEN_AFTER_S = 3600.0
MOST_ADDRESSES = 10_000
MOST_SESSIONS = 1000
MOST_BYTES = 4096
OPEN = ("/gradio_api/startup-events",)
"""Gradio asks itself for this while it starts; the answer says nothing."""

WRONG = "The user name or the password is wrong."
WAIT = "Too many wrong tries. Seconds until the next one counts: {0}."
SAID = (WRONG, WAIT)


class Patience:
    """How long an address must wait before its next guess: 1, 2, 4 … 60 s after the fifth wrong one.

    A guess during the wait is not looked at and does not lengthen it, and after an hour without one all is
    forgotten: nobody is shut out for good. Behind a tunnel the address is the one that a proxy on this machine
    forwards (uvicorn takes it from X-Forwarded-For); who comes through `ssh -L` counts by himself.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._wrong: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def wait_s(self, address: str) -> float:
        count, last = self._of(address)
        if count < FREE_TRIES:
            return 0.0
        return max(0.0, last + min(LONGEST_WAIT_S, 2.0 ** min(count - FREE_TRIES, 60)) - self._clock())

    def failed(self, address: str) -> None:
        key = _neighbourhood(address)
        self._wrong[key] = (self._of(address)[0] + 1, self._clock())
        self._wrong.move_to_end(key)
        while len(self._wrong) > MOST_ADDRESSES:
            self._wrong.popitem(last=False)

    def succeeded(self, address: str) -> None:
        self._wrong.pop(_neighbourhood(address), None)

    def _of(self, address: str) -> tuple[int, float]:
        count, last = self._wrong.get(_neighbourhood(address), (0, 0.0))
        return (0, 0.0) if self._clock() - last > FORGOTTEN_AFTER_S else (count, last)


def _neighbourhood(address: str) -> str:
    """An IPv4 address; of an IPv6 address the half that a single customer cannot change."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(ipaddress.ip_network((found, 64), strict=False)) if found.version == 6 else address


class Login:
    """Lets nobody pass without a session, except to `beside`: paths that ask for a secret of their own."""

    def __init__(
        self,
        app: ASGIApp,
        username: str,
        password: str,
        beside: str = "",
        words: Words | None = None,
        patience: Patience | None = None,
    ) -> None:
        self.app = app
        self.words = words or {}
        self.username = username
        self.password = password
        self.beside = beside
        self.patience = patience or Patience()
        self.sessions: OrderedDict[str, None] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        path, method = path_of(scope), scope.get("method", "")
        known = self._knows(scope)
        if method == "POST" and path == "/login":
            answer: Response = await self._log_in(scope, receive)
        elif known and path == "/login":
            answer = RedirectResponse("./", 303)
        elif known or (self.beside and path.startswith(self.beside)) or (method == "GET" and path in OPEN):
            await self.app(scope, receive, send)
            return
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        elif path in ("", "/", "/login"):
            answer = self._page("", 401)
        else:
            answer = PlainTextResponse("Log in first.", 401)
        await answer(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        cookies = SimpleCookie()
        for name, value in scope["headers"]:
            if name == b"cookie":
                cookies.load(value.decode("latin-1"))
        cookie = cookies.get(_cookie(scope))
        return cookie is not None and cookie.value in self.sessions

    async def _log_in(self, scope: Scope, receive: Receive) -> Response:
        address = scope["client"][0] if scope.get("client") else ""
        wait_s = self.patience.wait_s(address)
        if wait_s > 0:
            seconds = math.ceil(wait_s)
            answer = self._page(self.words.get(WAIT, WAIT).replace("{0}", str(seconds)), 429)
            answer.headers["Retry-After"] = str(seconds)
            return answer
        given = parse_qs((await _body(receive)).decode("utf-8", "replace"))
        username = given.get("username", [""])[0]
        if not self._right(username, given.get("password", [""])[0]):
            self.patience.failed(address)
            return self._page(self.words.get(WRONG, WRONG), 401, username)
        self.patience.succeeded(address)
        session = secrets.token_urlsafe(32)
        self.sessions[session] = None
        while len(self.sessions) > MOST_SESSIONS:
            self.sessions.popitem(last=False)
        # Relative to /login, so that it also leads to the page behind a proxy.
        answer = RedirectResponse("./", 303)
        secure = scope.get("scheme") == "https"
        answer.set_cookie(_cookie(scope), session, httponly=True, samesite="lax", secure=secure)
        return answer

    def _page(self, message: str, status: int, username: str = "") -> HTMLResponse:
        """The form, with the name that was given; the cursor is in the first field that is empty."""
        filled = {"message": message, "first": "" if username else "autofocus", "then": "autofocus" if username else ""}
        text = in_markup(markup(), self.words)
        for place, words in (*filled.items(), ("username", username)):
            text = text.replace(f"{{{{{place}}}}}", html.escape(words))
        policy = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'"
        return HTMLResponse(text, status, {"Cache-Control": "no-store", "Content-Security-Policy": policy})

    def _right(self, username: str, password: str) -> bool:
        # Both are compared, so that the time taken does not tell which was wrong.
        name = hmac.compare_digest(username.strip().encode(), self.username.encode())
        return hmac.compare_digest(password.encode(), self.password.encode()) and name


def _cookie(scope: Scope) -> str:
    # A browser sends cookies to every port of a machine, on which another page may be served.
    return f"lorawright-{(scope.get('server') or ('', 0))[1]}"


async def _body(receive: Receive) -> bytes:
    body = b""
    while len(body) <= MOST_BYTES:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    return body[:MOST_BYTES]


def markup() -> str:
    """The form, with {{message}} and the like where something is put in."""
    return (Path(__file__).parent / "static" / "login.html").read_text(encoding="utf-8")
