"""The page behind nginx, under a path, with the very snippet of the README."""

import http.client
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass

import pytest

from tests.browser.conftest import FAKE, ROOT, eventually, serving, set_text, wait_ready, wait_state
from tests.browser.test_live import loss_is_drawn

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
CONFIGURATION = """
daemon off; pid nginx.pid; error_log stderr error; worker_processes 1;
{user}
events {{}}
http {{
    access_log off; client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    server {{ listen 127.0.0.1:{port}; {snippet} }}
}}
"""


@dataclass
class Proxied:
    url: str
    port: int


@pytest.fixture
def proxied(tmp_path):
    """A page with a password behind nginx, as the README says."""
    if NGINX is None:
        pytest.skip("there is no nginx on this machine")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    flags = re.search(r"python app\.py (--root_path .*?) +#", readme)[1].split()
    with serving(tmp_path / "runs", FAKE, *flags, "--password", "let me in") as server:
        snippet = re.search(r"```nginx\n(.*?)```", readme, re.DOTALL)[1].replace("7860", str(server.port))
        folder = tmp_path / "nginx"
        folder.mkdir()
        user = f"user {tmp_path.owner()};" if tmp_path.owner() == "root" else ""
        (folder / "nginx.conf").write_text(CONFIGURATION.format(port=port, snippet=snippet, user=user))
        nginx = subprocess.Popen([NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf")])
        try:
            eventually(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
            link = "".join(server.process.stdout.readline() for _ in range(2)).split("/view/")[1].strip()
            yield Proxied(f"http://127.0.0.1:{port}/lora/", port), link
        finally:
            nginx.terminate()
            nginx.wait(10)


def test_the_page_is_whole_under_a_path_behind_nginx(proxied, visit):
    server, link = proxied
    page = visit(server, ready=False)
    page.get_by_label("User name").fill("me")
    page.get_by_label("Password").fill("let me in")
    page.get_by_role("button", name="Log in").click()
    wait_ready(page)
    assert page.url == server.url
    set_text(page, "training_comment", "steps=40")
    page.get_by_role("button", name="Start training").click()
    wait_state(page, "running", "done")
    page.wait_for_selector("#lw-samples img >> nth=1")
    eventually(lambda: page.evaluate("[...document.querySelectorAll('#lw-samples img')].every(i => i.naturalWidth)"))
    wait_state(page, "done")
    assert loss_is_drawn(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="last.safetensors").click()
    assert download.value.path().read_bytes().startswith(b"not really weights")

    onlooker = visit(server, f"view/{link}", ready=False, alone=True)
    eventually(
        lambda: (
            onlooker.evaluate("[...document.querySelectorAll('#lw-samples img')].filter(i => i.naturalWidth).length")
            > 1
        )
    )

    def order(origin, cookies):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        cookie = "; ".join(f"{c['name']}={c['value']}" for c in cookies)
        connection.request("POST", "/lora/gradio_api/component_server/", "{}", {"Origin": origin, "Cookie": cookie})
        return connection.getresponse().status

    assert order("http://evil.example", page.context.cookies()) == 403
    assert order(f"http://127.0.0.1:{server.port}", []) == 401
    assert order(f"http://127.0.0.1:{server.port}", page.context.cookies()) not in (401, 403, 404)
