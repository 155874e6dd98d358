"""A vLLM server over HTTP: every call ends, with an answer or an `EngineError` that says what went wrong.

The standard library's `http.client` does it: what comes with transformers differs between its versions.
"""

import base64
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

from opsd_train.engines.base import EngineError
from opsd_train.engines.exchange import Exchange
from opsd_train.engines.patience import Patience
from opsd_train.redaction import redacted_url
from opsd_train.safety import stops

LOOK = 1.0  # seconds between two looks for a signal
Heed = Callable[[int], None]  # hears at each of them how many calls are done


class ServerClient:
    """Calls to one server.

    Args:
        url: such as http://127.0.0.1:8000, or http://user:password@host:port; `url` has no password.
        patience: when a call is given up.
        api_key: of the server, which is sent with every call.
        option: that gave the URL.

    Raises:
        ValueError: a URL that is none.
    """

    def __init__(
        self,
        url: str,
        patience: Patience | None = None,
        api_key: str | None = None,
        option: str = "vllm_url",
    ) -> None:
        try:
            parts = urlsplit(url)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 0) >= 0
        except ValueError:  # of the port, or of brackets
            sound = False
        if not sound:
            raise ValueError(f"{option}: expected http://host:port, got {redacted_url(url)!r}")
        self.url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")
        self.patience = patience or Patience()
        self.headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        if parts.username is not None:
            if api_key is not None:
                raise ValueError(f"{option}: expected no password beside an API key")
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self.headers = {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}

    def get(self, path: str) -> Any:
        """The JSON that the server answers; None for an empty answer."""
        return self._ask("GET", path, None, self.patience.answer)

    def get_slowly(self, path: str) -> Any:
        """The same of a route that takes its time; the server has to stay healthy until then."""
        return self._whole("GET", path, [None], 1, self.patience.request)[0]

    def post(self, path: str, body: Any = None, size: float = 0) -> Any:
        """The JSON that the server answers when it has done it; it has to stay healthy until then.

        Args:
            path: on the server.
            body: of the request.
            size: bytes of weights that are moved before the answer.
        """
        return self._whole("POST", path, [body], 1, self.patience.moving(size))[0]

    def post_all(self, path: str, bodies: Sequence[Any], concurrency: int, quiet: float) -> list[Any]:
        """The answers to several requests, in their order; some answer has to come in `quiet` seconds.

        Raises:
            Stopped: a signal asked for it, see `stops`.
        """
        return self._whole("POST", path, bodies, concurrency, self.patience.request, quiet, _ignored)

    def _whole(
        self,
        method: str,
        path: str,
        bodies: Sequence[Any],
        concurrency: int,
        seconds: float,
        quiet: float = math.inf,
        heed: Heed | None = None,
    ) -> list[Any]:
        def one(body: Any, beat: "_Beat") -> Any:
            with beat.exchange(self, self._exchange(method, path, seconds), body) as exchange:
                return exchange.answer()

        return self._each(one, bodies, concurrency, quiet, heed)

    def stream_all(
        self, path: str, bodies: Sequence[Any], concurrency: int, heed: Heed | None = None
    ) -> list[list[Any]]:
        """The events that the server streams for each request; some event has to come in `stall` seconds.

        Args:
            path: on the server.
            bodies: of the requests.
            concurrency: requests under way at once.
            heed: is told now and then how many have been answered.

        Raises:
            Stopped: a signal asked for it, see `stops`.
        """

        def one(body: Any, beat: "_Beat") -> list[Any]:
            found = []
            request = self._exchange("POST", path, self.patience.request)
            with beat.exchange(self, request, body) as exchange:
                for event in exchange.events():
                    beat.hear()
                    found.append(event)
            return found

        return self._each(one, bodies, concurrency, self.patience.answer, heed or _ignored)

    def healthy(self, timeout: float) -> str | None:
        """None if the server says that it is well, else what is wrong."""
        try:
            self._ask("GET", "/health", None, timeout)
        except EngineError as error:
            return str(error)
        return None

    def wait(self, seconds: float) -> None:
        """Until the server is healthy; EngineError if it is not after so many seconds."""
        end = time.monotonic() + seconds
        while (ill := self.healthy(2.0)) is not None:
            if time.monotonic() > end:
                raise EngineError(f"{ill}; it was waited for {seconds:.0f} s")
            time.sleep(0.5)

    def _exchange(self, method: str, path: str, timeout: float) -> Exchange:
        return Exchange(self.url, method, path, timeout, self.headers)

    def _ask(self, method: str, path: str, body: Any, timeout: float) -> Any:
        exchange = self._exchange(method, path, timeout)
        try:
            exchange.send(body, timeout)
            return exchange.answer()
        finally:
            exchange.close()

    def _each(
        self,
        one: Callable[[Any, "_Beat"], Any],
        bodies: Sequence[Any],
        concurrency: int,
        quiet: float,
        heed: Heed | None = None,
    ) -> list[Any]:
        """Run the calls beside each other; the first error, or silence, ends all of them.

        So does a signal that asks the run to stop, if there is a `heed`.
        """
        beat = _Beat()
        watcher = threading.Thread(target=self._watch, args=(beat, quiet), daemon=True)
        pool = ThreadPoolExecutor(max_workers=max(1, min(concurrency, len(bodies))))
        try:
            watcher.start()
            calls = [pool.submit(one, body, beat) for body in bodies]
            self._await(calls, heed)
            failed = [error for call in calls if call.done() and (error := call.exception())]
            if failed:
                raise EngineError(beat.reason) if beat.reason else failed[0]
            return [call.result() for call in calls]
        finally:
            beat.end()
            pool.shutdown(wait=True, cancel_futures=True)
            watcher.join()

    @staticmethod
    def _await(calls: Sequence[Future[Any]], heed: Heed | None) -> None:
        """Until all of them are done, or one failed."""
        pending: set[Future[Any]] = set(calls)
        while pending and not any(call.done() and call.exception() for call in calls):
            seconds = None if heed is None else LOOK
            pending = wait(pending, timeout=seconds, return_when=FIRST_EXCEPTION).not_done
            if heed is not None:
                heed(len(calls) - len(pending))
                stops.check()

    def _watch(self, beat: "_Beat", quiet: float) -> None:
        """Ask for the server's health while it is silent; cut every call if it is ill, or silent for long."""
        stall = self.patience.stall
        while not beat.ended.wait(max(0.01, min(stall / 6, quiet - beat.silent))):
            if beat.silent < stall / 3:
                continue
            ill = self.healthy(stall / 3)
            if beat.ended.is_set():
                break
            if ill is not None:
                beat.give_up(f"vLLM server at {self.url}: stalled, silent for {beat.silent:.0f} s: {ill}")
            elif beat.silent >= quiet:
                beat.give_up(
                    f"vLLM server at {self.url}: stalled, it answers /health but has written no token for "
                    f"{beat.silent:.0f} s"
                )


def _ignored(done: int) -> None:
    """Nobody asked."""


class _Beat:
    """What the calls of a batch share: when the server was heard last, and how all of them are cut."""

    def __init__(self) -> None:
        self.heard = time.monotonic()
        self.ended = threading.Event()
        self.reason: str | None = None
        self._lock = threading.Lock()
        self._open: set[Exchange] = set()

    @property
    def silent(self) -> float:
        """Seconds since then."""
        return time.monotonic() - self.heard

    def hear(self) -> None:
        """The server said something."""
        self.heard = time.monotonic()

    @contextmanager
    def exchange(self, client: ServerClient, exchange: Exchange, body: Any) -> Iterator[Exchange]:
        """A request that was sent, and that `end` and `give_up` can cut."""
        with self._lock:
            self._open.add(exchange)
        try:
            if self.ended.is_set():
                raise EngineError(self.reason or f"vLLM server at {client.url}: {exchange.path} was given up")
            exchange.send(body, client.patience.answer)
            yield exchange
            self.hear()
        finally:
            with self._lock:
                self._open.discard(exchange)
            exchange.close()

    def give_up(self, reason: str) -> None:
        """End the calls with this error."""
        self.reason = reason
        self.end()

    def end(self) -> None:
        """Cut what is still open."""
        self.ended.set()
        with self._lock:
            for exchange in self._open:
                exchange.cut()
