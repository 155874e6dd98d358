"""One HTTP request and its answer, which another thread can cut."""

import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from opsd_train.engines.base import EngineError

HEAD = 500  # characters of an error's body that are shown
CONNECTIONS = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}


class Exchange:
    """A request on a connection of its own.

    Args:
        url: of the server.
        method: GET or POST.
        path: on the server, with its query.
        timeout: seconds that the server may be silent.
        headers: further ones of the request.
    """

    def __init__(
        self, url: str, method: str, path: str, timeout: float, headers: Mapping[str, str] | None = None
    ) -> None:
        parts = urlsplit(url)
        self.url, self.method, self.path, self.timeout = url, method, path, timeout
        self.headers = {"Connection": "close", **(headers or {})}
        self.prefix = parts.path.rstrip("/")
        assert parts.hostname is not None
        self.connection = CONNECTIONS[parts.scheme](parts.hostname, parts.port)
        self.socket: socket.socket | None = None
        self.is_cut = False
        self.waiting = timeout

    def send(self, body: Any, connect: float) -> None:
        """Connect within `connect` seconds and send the body as JSON, if there is one."""
        self.connection.timeout = self.waiting = min(connect, self.timeout)
        data = None if body is None else json.dumps(body)
        headers = self.headers | ({} if data is None else {"Content-Type": "application/json"})
        try:
            self.connection.connect()
            self.socket = self.connection.sock
            if self.is_cut:
                self.cut()
            self.waiting = self.timeout
            self.connection.sock.settimeout(self.timeout)
            self.connection.request(self.method, f"{self.prefix}{self.path}", data, headers)
        except OSError as error:
            raise self._error(error) from None

    def answer(self) -> Any:
        """The JSON of the answer; None if it is empty, or words that do not claim to be JSON."""
        response = self._response()
        text = self._read(response)
        # vLLM answers some requests, such as that to load an adapter, with a sentence of no type.
        said = response.getheader("Content-Type") is None
        return None if said or not text.strip() else self._json(text)

    def events(self) -> Iterator[Any]:
        """The JSON of each server-sent event up to `[DONE]`; EngineError if the stream ends before."""
        response = self._response()
        while True:
            try:
                raw = response.readline()
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise self._error(error) from None
            if not raw:
                raise EngineError(f"{self._where}: died: the stream ended before its end")
            line = raw.decode(errors="replace").strip()
            if line == "data: [DONE]":
                return
            if line.startswith("data: "):
                event = self._json(line[6:])
                if "error" in event:
                    raise EngineError(f"{self._where}: failed: {_head(json.dumps(event['error']))}")
                yield event

    def cut(self) -> None:
        """End the exchange from another thread: whoever reads gets an error."""
        self.is_cut = True
        if self.socket is not None:
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()

    def _json(self, text: str) -> Any:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise EngineError(f"{self._where}: answered with what is no JSON: {_head(text)}") from None

    def _response(self) -> http.client.HTTPResponse:
        try:
            response = self.connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise self._error(error) from None
        if response.status != http.HTTPStatus.OK:
            text = self._read(response)
            raise StatusError(f"{self._where}: answered {response.status}: {_head(text)}", response.status)
        return response

    def _read(self, response: http.client.HTTPResponse) -> str:
        try:
            return response.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise self._error(error) from None

    def _error(self, error: Exception) -> EngineError:
        if isinstance(error, TimeoutError):
            return EngineError(f"{self._where}: stalled, no answer within {self.waiting:.0f} s")
        what = f"{type(error).__name__}: {error}"
        return EngineError(f"{self._where}: died or is not there ({what})")

    @property
    def _where(self) -> str:
        return f"vLLM server at {self.url}, {self.path.partition('?')[0]}"


class StatusError(EngineError):
    """The server answered, but not with 200.

    Args:
        message: what it said.
        status: of the answer.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def _head(text: str) -> str:
    """The beginning of a body, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= HEAD else f"{line[:HEAD]}..."
