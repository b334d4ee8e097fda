import pytest

from gui.guard import Guard, Hosts, RefusedError, host_of, is_loopback, require_password


@pytest.mark.parametrize(
    ("listen", "share", "password"),
    [
        ("127.0.0.1", False, None),
        ("localhost", False, None),
        ("::1", False, None),
        ("0.0.0.0", False, "x"),
        ("", True, "x"),
    ],
)
def test_welcome(listen, share, password):
    require_password(listen, share, password)


@pytest.mark.parametrize(
    ("listen", "share"),
    [("0.0.0.0", False), ("::", False), ("192.168.1.4", False), ("127.0.0.1", True), ("gpu.example", False)],
)
def test_others_need_a_password_and_get_a_command_with_one(listen, share):
    with pytest.raises(RefusedError) as refused:
        require_password(listen, share, "")
    text = str(refused.value)
    assert "--password " in text and len(text.split("--password ")[1].strip()) >= 12
    assert ("--share" in text) == share


def test_each_password_is_new():
    messages = set()
    for _ in range(3):
        with pytest.raises(RefusedError) as refused:
            require_password("0.0.0.0", False, None)
        messages.add(str(refused.value))
    assert len(messages) == 3


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
