"""Models by their name on huggingface.co, from a server of this test's own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests import tiny
from trainer.models.hub import is_name

NAME, COMMIT = "someone/tiny-xl", "c" * 40
FETCH = """
import json, sys
from trainer.models import families, hub
told = []
path = families.locate(sys.argv[1], lambda done, total: told.append((done, total)))
found = families.detect(path)
print(json.dumps({"path": str(path), "told": told, "family": found.family, "torch": "torch" in sys.modules}))
"""


@pytest.mark.parametrize(
    "text", ["a/..", "a/b..c", "a--b/c", "a/b-", "a/.b", "a/b.git", "a/b/c", "/a/b", "models", "ä/b", "a/" + "b" * 97]
)
def test_what_cannot_be_a_name_there_is_a_path(text):
    assert not is_name(text)
    assert is_name("stabilityai/stable-diffusion-xl-base-1.0") and is_name(" a/b ")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A repository: the tiny SDXL model in diffusers' layout, in two precisions, and what nobody needs."""
    root = tmp_path_factory.mktemp("repository")
    parts = tiny.sdxl_modules()
    for part, module in parts.items():
        module.save_pretrained(root / part)
        module.half().save_pretrained(root / part, variant="fp16")
    content = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    index = {part: ["diffusers", type(module).__name__] for part, module in parts.items()}
    content["model_index.json"] = json.dumps({"_class_name": "StableDiffusionXLPipeline", **index}).encode()
    content["scheduler/scheduler_config.json"] = json.dumps(tiny.CONFIGS["scheduler"]).encode()
    return content | {"README.md": b"hello", "whole.safetensors": b"x" * 100, "vae_1_0/model.safetensors": b"x"}


@pytest.fixture
def hub(files, tmp_path):
    """The server; returns a function that runs a program against it."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, with_body):
            asked.append(self.path)
            head, _, name = self.path.partition(f"/{NAME}/resolve/main/")
            if self.path.startswith(f"/api/models/{NAME}"):
                siblings = [{"rfilename": name, "size": len(body)} for name, body in files.items()]
                body = json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode()
                self.reply(200, body, with_body, {"Content-Type": "application/json"})
            elif not head and name in files:
                etag = hashlib.sha1(files[name], usedforsecurity=False).hexdigest()
                self.reply(200, files[name], with_body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
            else:
                self.reply(404, b"{}", with_body, {"X-Error-Code": "RepoNotFound"})

        def reply(self, status, body, with_body, headers):
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def run(*arguments, port=server.server_port):
        environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "hf")}
        environment |= {"HF_HUB_OFFLINE": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return subprocess.run(
            [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
        )

    run.asked = asked
    yield run
    server.shutdown()


@pytest.mark.proves("pretrained_model_name_or_path")
def test_a_model_is_fetched_once_in_16_bits_with_its_progress(hub, files):
    done = hub("-c", FETCH, NAME)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    folder = Path(answer["path"])
    fetched = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    weights = {f"{part}/{'model' if 'text' in part else 'diffusion_pytorch_model'}.fp16.safetensors" for part in parts}
    configs = {"model_index.json", "scheduler/scheduler_config.json", *(f"{part}/config.json" for part in parts)}
    assert fetched == weights | configs
    total = sum(len(files[name]) for name in fetched)
    assert answer["told"][0] == [0, total]
    assert answer["told"][-1] == [total, total]
    assert (answer["family"], answer["torch"]) == ("sdxl", False)

    hub.asked.clear()
    assert json.loads(hub("-c", FETCH, NAME).stdout)["path"] == answer["path"]
    assert hub.asked == []


def test_the_check_reads_the_configs_alone_and_tells_what_will_be_fetched(hub, files, settings, tmp_path):
    preset = tmp_path / "preset.json"
    preset.write_text(json.dumps(settings | {"pretrained_model_name_or_path": NAME, "v2": True}))
    problems = json.loads(hub("-m", "trainer", "check", preset, "--json").stdout)["problems"]
    assert any("GB are fetched from huggingface.co at the start" in problem["message"] for problem in problems)
    assert any(problem["key"] == "v2" and "is an SDXL model" in problem["message"] for problem in problems)
    assert not any(path.endswith(".safetensors") for path in hub.asked)


def test_an_unknown_name_and_an_unreachable_hub_are_told_at_once(hub):
    assert 'neither a path "no/such" on this machine' in hub("-c", FETCH, "no/such").stderr
    began = time.monotonic()
    assert "cannot be reached from here" in hub("-c", FETCH, NAME, port=9).stderr
    assert time.monotonic() - began < 30
