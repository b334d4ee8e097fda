import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from gui.login import LONGEST_WAIT_S, MOST_ADDRESSES, Login, Patience


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def app(clock):
    def everything(request):
        return PlainTextResponse(f"inside: {request.url.path}")

    login = Middleware(Login, username="me", password="let mé in", beside="/view/", patience=Patience(clock))
    return Starlette(routes=[Route("/{rest:path}", everything, methods=["GET", "POST"])], middleware=[login])


def visitor(app, address="192.0.2.1", **options):
    return TestClient(app, client=(address, 5000), follow_redirects=False, **options)


def log_in(client, password="let mé in", username="me"):
    return client.post("/login", data={"username": username, "password": password})


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/component_server/"),
        ("GET", "/config"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/heartbeat/x"),
        ("POST", "/gradio_api/startup-events"),
        ("GET", "/views/x"),
        ("PUT", "/login"),
        ("GET", "//login"),
    ],
)
def test_nothing_is_answered_before_the_login(app, method, path):
    answer = visitor(app).request(method, path)
    assert answer.status_code == 401 and "inside" not in answer.text


@pytest.mark.parametrize("path", ["/", "/login"])
def test_who_comes_first_finds_the_form(app, path):
    answer = visitor(app).get(path)
    assert answer.status_code == 401 and '<form method="post" action="login">' in answer.text


def test_what_asks_for_a_secret_of_its_own_is_passed_on(app):
    assert visitor(app).get("/view/x").text == "inside: /view/x"


def test_the_password_opens_the_page_for_this_browser_only(app):
    client = visitor(app)
    answer = log_in(client)
    assert (answer.status_code, answer.headers["location"]) == (303, "./")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=lax" in cookie and "secure" not in cookie
    assert client.get("/config").text == "inside: /config"
    assert client.get("/login").headers["location"] == "./"
    assert visitor(app).get("/config").status_code == 401


def test_over_https_the_cookie_never_travels_in_the_clear(app):
    assert "secure" in log_in(visitor(app, base_url="https://gpu.example")).headers["set-cookie"].lower()


@pytest.mark.parametrize(
    ("username", "password"), [("me", "wrong"), ("you", "let mé in"), ("", ""), ("me", ""), ("me", "let mé in\0")]
)
def test_anything_else_does_not(app, username, password):
    client = visitor(app)
    answer = log_in(client, password, username)
    assert answer.status_code == 401 and "wrong" in answer.text and "set-cookie" not in answer.headers
    assert client.get("/config").status_code == 401


def test_who_mistypes_the_password_finds_the_name_as_it_was_and_the_cursor_behind_it(app):
    first = visitor(app).get("/").text
    assert 'value=""' in first and "“me” where no other was chosen" in first
    again = log_in(visitor(app), "wrong", '"><b>{{then}}').text
    assert 'value="&quot;&gt;&lt;b&gt;{{then}}"' in again
    inputs = again.split("<input")
    assert ["autofocus" in text for text in inputs] == [False, False, True]
    assert ["autofocus" in text for text in first.split("<input")] == [False, True, False]


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b"a=1&" * 400, b"username=me&password=" + b"x" * 100_000])
def test_a_form_that_is_none_is_a_wrong_one(app, body):
    assert visitor(app).post("/login", content=body).status_code in (400, 401)


def test_an_invented_session_is_none(app):
    for cookie in ("lorawright-80=x", "lorawright-80=", 'lorawright-80="\\"', "lorawright-80=%00;;=,"):
        assert visitor(app).get("/config", headers={"cookie": cookie}).status_code == 401


def test_guesses_become_slow_for_their_address_alone(app, clock):
    thief, owner = visitor(app), visitor(app, "192.0.2.2")
    for _ in range(5):
        assert log_in(thief, "guess").status_code == 401
    waits = []
    for _ in range(9):
        refused = log_in(thief)
        assert refused.status_code == 429 and "Too many wrong tries" in refused.text
        waits.append(int(refused.headers["retry-after"]))
        assert f"counts: {waits[-1]}." in refused.text
        clock.now += waits[-1]
        assert log_in(thief, "guess").status_code == 401
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert log_in(owner).status_code == 303


def test_whoever_waited_may_log_in_and_the_count_begins_anew(app, clock):
    client = visitor(app)
    for _ in range(6):
        log_in(client, "guess")
    for _ in range(20):
        assert log_in(client).status_code == 429  # asking during the wait does not lengthen it
    clock.now += 1
    assert log_in(client).status_code == 303
    assert log_in(client, "guess").status_code == 401


def test_after_a_quiet_hour_all_is_forgotten(clock):
    patience = Patience(clock)
    for _ in range(30):
        patience.failed("192.0.2.1")
    assert patience.wait_s("192.0.2.1") == LONGEST_WAIT_S
    clock.now += 3601
    assert patience.wait_s("192.0.2.1") == 0


def test_one_customers_ipv6_addresses_count_as_one(clock):
    patience = Patience(clock)
    for n in range(6):
        patience.failed(f"2001:db8::{n}")
    assert patience.wait_s("2001:db8::ffff") > 0
    assert patience.wait_s("2001:db8:1::1") == 0


def test_many_addresses_do_not_fill_the_memory(clock):
    patience = Patience(clock)
    for n in range(MOST_ADDRESSES + 100):
        patience.failed(str(n))
    assert len(patience._wrong) == MOST_ADDRESSES
