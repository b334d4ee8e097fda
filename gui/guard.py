"""What the page answers, and to whom: known hosts, no orders from other pages, no routes that it does not use."""

from __future__ import annotations

import errno
import ipaddress
import os
import secrets
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
LOOPBACK = ("localhost", "127.0.0.1", "::1")


ANSWERED = (
    "/",
    "/login",
    "/config",
    "/theme.css",
    "/favicon.ico",
    "/manifest.json",
    "/gradio_api/app_id",
    "/gradio_api/component_server",
    "/gradio_api/info",
    "/gradio_api/queue/status",
    "/gradio_api/startup-events",
)
ANSWERED_UNDER = (
    "/assets/",
    "/static/",
    "/lorawright-",
    "/view/",
    "/gradio_api/file=/",
    "/gradio_api/heartbeat/",
)
"""What the page uses of Gradio's routes. The others would fetch from elsewhere, take uploads, run events by name."""

FOR_GOOD = "max-age=31536000, immutable"
"""How long a browser may keep a file whose address changes with its content."""


def password_for(listen: str, share: bool, given: str | None) -> str | None:
    """The password to ask for: the given one; where others could reach the page and none is given, a new one."""
    return given or (secrets.token_urlsafe(12) if share or not is_loopback(listen) else None)


def cannot_listen(host: str, port: int) -> str | None:
    """Why nothing can be served at this address or name and port (0: any), and what to do; known without Gradio,
    which asks for the port at 127.0.0.1 as well.
    """
    if not 0 <= port <= 65535:
        return f"--server_port {port} is no port. Give one from 1 to 65535, or none for the first free one from 7860."
    for where in dict.fromkeys((host, "127.0.0.1")):
        try:
            for family, _, _, _, place in socket.getaddrinfo(where, port, type=socket.SOCK_STREAM):
                socket.create_server(place, family=family).close()
        except UnicodeError:
            return _no_address(host, "no name is written so")
        except socket.gaierror as error:
            return _no_address(host, str(error.strerror))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return (
                    f"--server_port {port} is taken: something is served at {where} there already, perhaps this page. "
                    "Give another port, or none for the first free one from 7860."
                )
            if error.errno == errno.EACCES:
                return f"--server_port {port} is not allowed to this user. Give one from 1024 on."
            return _no_address(host, os.strerror(error.errno or 0))
    return None


def _no_address(host: str, reason: str) -> str:
    return f'--listen "{host}" is no address of this machine ({reason}). Give 127.0.0.1, 0.0.0.0 or its own.'


def path_of(scope: Scope) -> str:
    """The path that is asked for, without what a proxy or Gradio puts in front of it."""
    path, root = str(scope["path"]), str(scope.get("root_path") or "").rstrip("/")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach what listens there. Names other than localhost count as outside."""
    if address in ("", *LOOPBACK):
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def host_of(netloc: str) -> str:
    """ "example.com:7860" → "example.com", "[::1]:7860" → "::1"; "" when it cannot be one."""
    try:
        return (urlsplit(f"//{netloc}").hostname or "").rstrip(".")
    except ValueError:
        return ""


class Hosts:
    """The names under which the page may be asked for.

    Without a password only this machine's own names and addresses are: a web page elsewhere can point
    a name of its own at 127.0.0.1 and would then be talking to us (DNS rebinding). An address cannot
    be pointed elsewhere. With a password such a page meets the login, since cookies go by name.
    """

    def __init__(self, names: Iterable[str], password: bool) -> None:
        self.trusted = {host_of(name) for name in names if host_of(name)}
        self.own = {*LOOPBACK, socket.gethostname().lower()}
        self.password = password

    def trust(self, name: str) -> None:
        self.trusted.add(host_of(name))

    def known(self, netloc: str) -> bool:
        host = host_of(netloc)
        if not host:
            return False
        if host in self.own or host in self.trusted or self.password:
            return True
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True


def answered(path: str) -> bool:
    """Whether the page has any use for a path."""
    return (path.rstrip("/") or "/") in ANSWERED or path.startswith(ANSWERED_UNDER)


def _kept_for_good(send: Send) -> Send:
    """Let the browser keep Gradio's scripts and styles, for which it would ask again at each visit."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 200:
            MutableHeaders(scope=message)["Cache-Control"] = FOR_GOOD
        await send(message)

    return sending


class Guard:
    """Refuses unknown hosts, unused paths, and orders (anything but reading) that come from another site's page."""

    def __init__(self, app: ASGIApp, hosts: Hosts) -> None:
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            refusal = self.refusal(scope.get("method", "GET"), headers, scope["type"])
            used = scope["type"] == "http" and answered(path_of(scope))
            if refusal or not used:
                if scope["type"] == "websocket":
                    await send({"type": "websocket.close", "code": 1008})
                else:
                    await PlainTextResponse(refusal or "There is nothing here.", 403 if refusal else 404)(
                        scope, receive, send
                    )
                return
            if path_of(scope).startswith("/assets/"):
                send = _kept_for_good(send)
        await self.app(scope, receive, send)

    def refusal(self, method: str, headers: dict[str, str], kind: str = "http") -> str:
        """Why a request is refused; "" when it is welcome. Header names are in lower case."""
        host = headers.get("host", "")
        if not self.hosts.known(host):
            return f'"{host}" is not a name of this page. If it should be, start with --trusted_host {host_of(host)}.'
        if method in SAFE_METHODS and kind == "http":
            return ""
        origin = headers.get("origin")
        if origin is None:
            return ""
        theirs = urlsplit(origin).netloc.lower()
        if theirs and (theirs == host.lower() or theirs == headers.get("x-forwarded-host", "").lower()):
            return ""
        if host_of(theirs) in self.hosts.trusted:
            return ""
        return f'A page at "{origin}" may not give orders to this one.'
