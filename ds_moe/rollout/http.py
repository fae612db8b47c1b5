"""JSON over HTTP to one server: deadlines, a limit on what is read, and which failures may pass.

The standard library alone. It follows no redirect and asks no proxy: a request goes to the address in the url.
"""

import http.client
import json
import math
import socket
import ssl
import threading
import time
from typing import NoReturn
from urllib.parse import urlsplit

from ds_moe.errors import UserError, one_line

CONNECT_S = 10.0  # for a connection; at most, of what a request has
CHUNK = 2**18  # bytes
MOST_BYTES = 2**30  # of one answer: 16 completions of 32k tokens with the experts of 94 layers are half of it
PASSING = (408, 409, 425, 429)  # statuses below 500 that another try may not meet

Json = dict[str, object]


class Unanswered(Exception):
    """A request that has no usable answer, for a reason that may pass: another server, or this one later, may answer.

    Attributes:
        reached: whether a server was there, so that it can be asked other things meanwhile.
    """

    def __init__(self, text: str, reached: bool) -> None:
        super().__init__(text)
        self.reached = reached


class Malformed(Unanswered):
    """An answer that cannot be used as it is. Where every server gives such ones, its text is the error."""

    def __init__(self, text: str) -> None:
        super().__init__(text, reached=True)


class Abandoned(Exception):
    """The request was closed by this process."""


class Http:
    """One server. Its methods may be called from several threads; each request has a connection of its own."""

    def __init__(self, url: str, key: str | None = None) -> None:
        parts = urlsplit(url)
        self.url = url
        self._host, self._port, self._path = parts.hostname or "", parts.port, parts.path.rstrip("/")
        self._context = ssl.create_default_context() if parts.scheme == "https" else None
        self._headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = False

    def get(self, path: str, timeout_s: float, most: int = MOST_BYTES) -> object:
        return self._ask("GET", path, None, timeout_s, most)

    def post(self, path: str, body: Json | None, timeout_s: float, most: int = MOST_BYTES) -> object:
        """The JSON of an answer; None for an empty one.

        Raises:
            Unanswered: no connection, no answer in `timeout_s` seconds, a status that may pass, no JSON.
            UserError: a status that says that the request itself is wrong, with the server's own words.
            Abandoned: `close` was called meanwhile.
        """
        return self._ask("POST", path, body, timeout_s, most)

    def close(self) -> None:
        """End every request that is under way, which servers notice and stop computing; no other is begun."""
        with self._lock:
            self._closed = True
            sockets = list(self._open)
        for one in sockets:
            try:
                one.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it
            except OSError:
                pass  # it is closed already

    def open_again(self) -> None:
        with self._lock:
            self._closed = False

    def _ask(self, method: str, path: str, body: Json | None, timeout_s: float, most: int) -> object:
        ends = time.monotonic() + timeout_s
        connection = self._connection(min(timeout_s, CONNECT_S))
        if self._closed:
            raise Abandoned
        try:
            status, text = self._exchange(connection, method, path, body, ends, most)
        except TimeoutError as error:
            self._fail(f"no answer in {timeout_s:g} s", error)
        except (OSError, http.client.HTTPException) as error:
            self._fail(one_line(error, 200), error)
        finally:
            connection.close()
        return self._read(status, text, path)

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        if self._context is not None:
            return http.client.HTTPSConnection(self._host, self._port, timeout=timeout_s, context=self._context)
        return http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: Json | None,
        ends: float,
        most: int,
    ) -> tuple[int, bytes]:
        connection.connect()
        sock = connection.sock  # which `getresponse` forgets where the answer is the last of the connection
        with self._lock:
            if self._closed:
                raise Abandoned
            self._open.add(sock)
        try:
            return self._answer(connection, sock, method, path, body, ends, most)
        finally:
            with self._lock:
                self._open.discard(sock)

    def _answer(
        self,
        connection: http.client.HTTPConnection,
        sock: socket.socket,
        method: str,
        path: str,
        body: Json | None,
        ends: float,
        most: int,
    ) -> tuple[int, bytes]:
        sock.settimeout(_left(ends))
        data = None if body is None else json.dumps(body, allow_nan=False).encode()
        connection.request(method, self._path + path, data, self._headers)
        sock.settimeout(_left(ends))
        with connection.getresponse() as response:
            chunks, size = [], 0
            while True:
                sock.settimeout(_left(ends))
                chunk = response.read1(CHUNK)
                if not chunk:
                    break
                size += len(chunk)
                if size > most:
                    raise Malformed(
                        f"{self.url}{path}: an answer of more than {most / 2**20:g} MiB (is it the server?)"
                    )
                chunks.append(chunk)
            if response.length:  # a chunked answer that is cut off raises by itself
                raise http.client.IncompleteRead(b"".join(chunks), response.length)
            return response.status, b"".join(chunks)

    def _fail(self, reason: str, error: Exception) -> NoReturn:
        with self._lock:
            if self._closed:
                raise Abandoned from error
        raise Unanswered(f"{self.url}: {reason}", reached=False) from error

    def _read(self, status: int, data: bytes, path: str) -> object:
        where = f"{self.url}{path}"
        try:
            answer = json.loads(data) if data.strip() else None
        except (ValueError, RecursionError) as error:
            if status < 400:
                raise Malformed(f"{where}: the answer is no JSON ({one_line(error, 100)})") from error
            answer = data[:500].decode(errors="replace")
        if status < 300:
            return answer
        said = f"{where}: HTTP {status}: {words_of(answer)}"
        if status >= 500 or status in PASSING:
            raise Unanswered(said, reached=True)
        raise Refused(said + (" (set rl.engine.key_from)" if status in (401, 403) else ""), status)


class Refused(UserError):
    """A request that the server says is wrong: asking again does not help."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


def words_of(answer: object) -> str:
    """The message in a server's answer to a request that failed, on one line."""
    if isinstance(answer, dict):
        for key in ("error", "message", "detail"):
            if answer.get(key):
                return words_of(answer[key])
    return one_line(Exception(answer if isinstance(answer, str) else json.dumps(answer)), 300) or "no reason given"


def _left(ends: float) -> float:
    left = ends - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def finite(value: object) -> bool:
    """Whether it is a number, and not NaN or an infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63  # JSON's integers have no end
