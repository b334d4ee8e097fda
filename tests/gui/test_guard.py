import errno
import socket

import pytest

import app
from gui.guard import ANSWERED, Guard, Hosts, answered, cannot_listen, host_of, is_loopback, password_for, path_of


@pytest.mark.parametrize("listen", ["127.0.0.1", "localhost", "::1", ""])
def test_on_this_machine_no_password_is_asked_for(listen):
    assert password_for(listen, False, None) is None


@pytest.mark.parametrize(
    ("listen", "share"),
    [("0.0.0.0", False), ("::", False), ("192.168.1.4", False), ("127.0.0.1", True), ("gpu.example", False)],
)
@pytest.mark.parametrize("given", [None, ""])
def test_where_others_could_reach_the_page_a_new_password_is_made(listen, share, given):
    made = {password_for(listen, share, given) for _ in range(3)}
    assert len(made) == 3 and all(len(password) >= 16 for password in made)


def test_a_given_password_is_kept():
    assert password_for("0.0.0.0", True, "mine") == password_for("127.0.0.1", False, "mine") == "mine"


@pytest.mark.parametrize("path", [*ANSWERED, "/assets/x.js", "/gradio_api/file=/tmp/x.png", "/view/x/poll"])
def test_what_the_page_uses_is_answered(path):
    assert answered(path) and answered(f"{path}/")


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/upload",
        "/gradio_api/proxy=http://elsewhere.example",
        "/gradio_api/file=http://elsewhere.example/x.png",
        "/gradio_api/file=https:/elsewhere.example",
        "/gradio_api/queue/join",
        "/gradio_api/run/predict",
        "/gradio_api/call/x",
        "/gradio_api/process_recording",
        "/gradio_api/vibe-code",
        "/gradio_api/token",
        "/logout",
        "/monitoring",
        "/x",
        "//",
        "/viewer",
    ],
)
def test_routes_that_the_page_does_not_use_are_closed(path):
    assert answered(path) == (path == "//")


@pytest.mark.parametrize(
    ("path", "root", "rest"),
    [
        ("/lora/login", "/lora", "/login"),
        ("/login", "/lora", "/login"),
        ("/lorax/login", "/lora", "/lorax/login"),
        ("/login", "", "/login"),
        ("/lora/", "/lora/", "/"),
    ],
)
def test_what_a_proxy_puts_in_front_of_a_path_is_taken_off(path, root, rest):
    assert path_of({"path": path, "root_path": root}) == rest


@pytest.mark.parametrize(
    ("netloc", "host"),
    [
        ("Example.com:7860", "example.com"),
        ("[::1]:7860", "::1"),
        ("example.com.", "example.com"),
        ("", ""),
        ("[bad", ""),
    ],
)
def test_host_of(netloc, host):
    assert host_of(netloc) == host


def test_loopback_is_more_than_one_address():
    assert is_loopback("127.3.2.1") and not is_loopback("10.0.0.1") and not is_loopback("localhost.example")


OPEN = Guard(None, Hosts([], password=False))


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "[::1]:7860", "192.168.1.4:7860"])
def test_own_names_and_addresses_are_known(host):
    assert OPEN.refusal("GET", {"host": host}) == ""


@pytest.mark.parametrize("host", ["evil.example:7860", "", "127.0.0.1.evil.example"])
def test_other_names_are_refused_even_for_reading(host):
    assert OPEN.refusal("GET", {"host": host})


def test_a_trusted_name_is_known_and_the_refusal_says_how_to_trust_one():
    assert "--trusted_host gpu.example" in OPEN.refusal("GET", {"host": "gpu.example:80"})
    assert Guard(None, Hosts(["gpu.example"], password=False)).refusal("GET", {"host": "gpu.example:80"}) == ""


def test_behind_a_password_any_name_reaches_the_login():
    assert Guard(None, Hosts([], password=True)).refusal("GET", {"host": "pod-7860.proxy.example"}) == ""


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "http://127.0.0.1:8080", "https://localhost", "http://127.0.0.1.evil.example:7860"],
)
def test_orders_from_other_pages_are_refused(origin):
    assert OPEN.refusal("POST", {"host": "127.0.0.1:7860", "origin": origin})
    assert OPEN.refusal("GET", {"host": "127.0.0.1:7860", "origin": origin}) == ""


def test_orders_from_the_page_itself_and_from_programs_are_taken():
    assert OPEN.refusal("POST", {"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:7860"}) == ""
    assert OPEN.refusal("POST", {"host": "127.0.0.1:7860"}) == ""


def test_a_proxy_may_say_under_which_name_it_was_asked():
    guard = Guard(None, Hosts([], password=True))
    headers = {"host": "127.0.0.1:7860", "origin": "https://lora.example", "x-forwarded-host": "lora.example"}
    assert guard.refusal("POST", headers) == ""
    assert guard.refusal("POST", {**headers, "origin": "https://evil.example"})


def test_a_websocket_counts_as_an_order():
    assert OPEN.refusal("GET", {"host": "127.0.0.1:7860", "origin": "http://evil.example"}, "websocket")


@pytest.fixture
def taken():
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def test_a_port_or_an_address_that_cannot_be_had_is_told_with_the_flag_and_what_to_give(taken):
    assert f"--server_port {taken} is taken: something is served at 127.0.0.1" in cannot_listen("127.0.0.1", taken)
    assert f"--server_port {taken} is taken" in cannot_listen("0.0.0.0", taken)
    assert f"--server_port {taken} is taken" in cannot_listen("127.0.0.2", taken), "Gradio asks for 127.0.0.1, too"
    assert "--server_port 80000 is no port. Give one from 1 to 65535" in cannot_listen("127.0.0.1", 80000)
    assert "--server_port -1 is no port" in cannot_listen("127.0.0.1", -1)
    for address in ("192.0.2.1", "192.168..5", "x" * 64, "no.such.name.invalid"):
        assert f'--listen "{address}" is no address of this machine (' in cannot_listen(address, 0)
    assert cannot_listen("127.0.0.1", 0) is cannot_listen("0.0.0.0", 0) is None


def test_a_port_that_may_not_be_used_is_told(monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket, "create_server", refuse)
    assert cannot_listen("127.0.0.1", 80) == "--server_port 80 is not allowed to this user. Give one from 1024 on."


def test_a_port_that_was_just_left_can_be_had_at_once():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            server.accept()[0].close()  # the server's end waits behind the connection for a minute
    assert cannot_listen("127.0.0.1", port) is None


def test_the_program_ends_with_a_sentence_where_it_cannot_serve(taken, tmp_path, capsys):
    assert app.main(["--runs", str(tmp_path / "runs"), "--server_port", str(taken)]) == 1
    assert capsys.readouterr().err.startswith(f"The page cannot be served: --server_port {taken} is taken")
    assert not (tmp_path / "runs").exists()
