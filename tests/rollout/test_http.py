"""Deadlines, limits and failures, against sockets of loopback that answer whatever a test says."""

import socket
import threading
import time

import pytest

from ds_moe.rollout.http import Abandoned, Http, Malformed, Refused, Unanswered, finite
from ds_moe.rollout.server_api import token_ids


@pytest.fixture
def answering():
    """`answering(data, ...)`: an `Http` of a server that sends each piece of `data`, one every `pause` seconds."""
    listeners, asked = [], []

    def start(*pieces, pause=0.0, key=None):
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def serve():
            try:
                connection, _ = listener.accept()
                asked.append(whole_request(connection))
                for piece in pieces:
                    connection.sendall(piece)
                    time.sleep(pause)
                connection.close()
            except OSError:
                pass

        threading.Thread(target=serve, daemon=True).start()
        http = Http(f"http://127.0.0.1:{listener.getsockname()[1]}", key)
        http.asked = asked
        return http

    yield start
    for listener in listeners:
        listener.close()


def whole_request(connection):
    """All of it: a connection that is closed with something unread is reset, and the answer may be lost."""
    found = b""
    while b"\r\n\r\n" not in found or len(found.split(b"\r\n\r\n", 1)[1]) < body_length(found):
        found += connection.recv(65536)
    return found


def body_length(request):
    lengths = [line.split(b":")[1] for line in request.split(b"\r\n") if line.lower().startswith(b"content-length")]
    return int(lengths[0]) if lengths else 0


def reply(status=200, body=b"{}", length=None, more=b""):
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n%s\r\n%s" % (status, length or len(body), more, body)


def test_an_answer_and_what_was_asked(answering, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # which nobody asks
    http = answering(reply(body=b'{"a": 1}'), key="secret")
    assert http.post("/x", {"b": None}, 5.0) == {"a": 1}
    assert b"POST /x HTTP/1.1" in http.asked[0] and b"Authorization: Bearer secret" in http.asked[0]


@pytest.mark.parametrize(
    "answer, kind, said",
    [
        (reply(length=100), Unanswered, "IncompleteRead"),
        (b"", Unanswered, "closed connection|reset"),
        (b"SSH-2.0-x\r\n", Unanswered, "SSH"),
        (reply(503, b'{"error": "starting"}'), Unanswered, "HTTP 503: starting"),
        (reply(429, b"busy"), Unanswered, "HTTP 429: busy"),
        (reply(body=b"<html>"), Malformed, "no JSON"),
        (reply(body=b"[" * 100_000), Malformed, "no JSON"),
        (reply(400, b'{"error": {"message": "too\\nlong"}}'), Refused, "HTTP 400: too long"),
        (reply(422, b'{"detail": [{"msg": "Field required"}]}'), Refused, "Field required"),
        (reply(401, b'{"error": "Unauthorized"}'), Refused, "rl.engine.key_from"),
        (reply(302, b"", more=b"Location: http://127.0.0.1:1/\r\n"), Refused, "HTTP 302"),
    ],
)
def test_failures(answering, answer, kind, said):
    with pytest.raises(kind, match=said) as raised:
        answering(answer).post("/x", {}, 5.0)
    assert type(raised.value) is kind and "\n" not in str(raised.value)


def test_a_large_answer_is_not_read(answering):
    with pytest.raises(Malformed, match="more than 1 MiB"):
        answering(reply(length=2**40), *[bytes(2**18)] * 8).get("/x", 5.0, most=2**20)


def test_an_answer_that_trickles_has_a_deadline(answering):
    began = time.monotonic()
    with pytest.raises(Unanswered, match="no answer in 0.3 s"):
        answering(reply(length=100), *[b" "] * 50, pause=0.1).get("/x", 0.3)
    assert time.monotonic() - began < 3


def test_close_ends_what_is_under_way(answering):
    http = answering(reply(length=100), pause=30.0)
    timer = threading.Timer(0.2, http.close)
    timer.start()
    with pytest.raises(Abandoned):
        http.get("/x", 30.0)
    with pytest.raises(Abandoned):
        http.get("/x", 30.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, -(10**400), 2**63, True, "1", None])
def test_what_is_no_finite_number(value):
    assert not finite(value)


def test_numbers_without_end_are_no_token_ids():
    assert finite(-9999.0) and finite(3) and token_ids([0, 2**31 - 1], "ids", "here") == [0, 2**31 - 1]
    for ids in ([10**400], [2**31], [-1], [1.0], [True], [], None):
        with pytest.raises(Malformed, match="here: ids are no token ids"):
            token_ids(ids, "ids", "here")
