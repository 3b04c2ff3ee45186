"""A running server's admin API, for commands: JSON in and out, files up and down, every failure one line.

Not here: which server (server/config.py, `find_remote`), and what the answers mean (the commands).
"""

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

import httpx

from server.commands.progress import Bar
from server.commands.table import printable
from server.config import Remote, find_remote
from server.errors import SternaError

CONNECT_SECONDS = 10.0
READ_SECONDS = 300.0
"""An import of gigabytes is checked and synced before it is answered."""
BLOCK_BYTES = 1 << 20
_LOOPBACK = frozenset(("127.0.0.1", "::1", "localhost"))


class RemoteError(SternaError):
    """The server could not be reached, or it refused."""


def add_remote(parser: argparse.ArgumentParser) -> None:
    """`--url` and `--api-key`."""
    group = parser.add_argument_group("server")
    group.add_argument("--url", help="of the running server [http://127.0.0.1:8000]; also as STERNA_URL")
    group.add_argument(
        "--api-key", metavar="KEY", help="better as STERNA_API_KEY, where no process list shows it [none]"
    )


@contextmanager
def open_client(options: argparse.Namespace) -> "Iterator[ServerClient]":
    """For the flags that `add_remote` added."""
    client = ServerClient(find_remote(options.url, options.api_key))
    try:
        yield client
    finally:
        client.close()


class ServerClient:
    """Every method raises RemoteError with the server's own message. `path` begins with a slash."""

    def __init__(self, remote: Remote) -> None:
        self._url = remote.url
        key = remote.api_key
        try:
            base = httpx.URL(remote.url)
        except httpx.InvalidURL as error:
            raise RemoteError(f"{remote.url}: {error}") from None
        self._http = httpx.Client(
            base_url=base,
            headers={} if key is None else {"Authorization": f"Bearer {key.get_secret_value()}"},
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            trust_env=base.host not in _LOOPBACK,  # a proxy cannot reach what listens on loopback here
        )

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, **query: Any) -> Any:
        return self._json(self._http.build_request("GET", path, params=_given(query)))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._json(self._http.build_request("POST", path, json=_given(body)))

    def delete(self, path: str, **query: Any) -> Any:
        return self._json(self._http.build_request("DELETE", path, params=_given(query)))

    def upload(self, path: str, file: IO[bytes], num_bytes: int, *, content_type: str, what: str, **query: Any) -> Any:
        """Send the file, with a bar called `what`."""
        request = self._http.build_request(
            "POST",
            path,
            params=_given(query),
            content=_watched(iter(lambda: file.read(BLOCK_BYTES), b""), num_bytes, what),
            headers={"Content-Type": content_type, "Content-Length": str(num_bytes)},
        )
        return self._json(request)

    def download(self, path: str, target: IO[bytes], *, what: str, **query: Any) -> None:
        """Write what comes into `target`, with a bar called `what`."""
        with self._faults():
            response = self._http.send(self._http.build_request("GET", path, params=_given(query)), stream=True)
            try:
                if response.status_code != 200:
                    response.read()
                    raise self._refusal(response)
                num_bytes = int(response.headers.get("content-length", 0))
                for block in _watched(response.iter_bytes(BLOCK_BYTES), num_bytes, what):
                    target.write(block)
            finally:
                response.close()

    def _json(self, request: httpx.Request) -> Any:
        with self._faults():
            response = self._http.send(request)
        if response.status_code not in (200, 201):
            raise self._refusal(response)
        try:
            return response.json()
        except ValueError:
            raise RemoteError(f"{request.url} did not answer with JSON; is {self._url} a Sterna server?") from None

    def _refusal(self, response: httpx.Response) -> RemoteError:
        try:
            message = response.json()["error"]["message"]
        except (ValueError, TypeError, KeyError):
            where = f"{response.request.url.copy_with(query=None)}"
            return RemoteError(f"{where}: HTTP {response.status_code} {response.reason_phrase}")
        hint = " (--api-key or STERNA_API_KEY)" if response.status_code == 401 else ""
        return RemoteError(f"{printable(str(message))}{hint}")

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            raise RemoteError(
                f"no server answers at {self._url}: {error} (`sterna serve` starts one; --url says where it is)"
            ) from None
        except httpx.TimeoutException:
            raise RemoteError(f"{self._url} did not answer within {READ_SECONDS:g} s") from None
        except httpx.HTTPError as error:
            raise RemoteError(f"{self._url}: {error or type(error).__name__}") from None


def _watched(blocks: Iterator[bytes], num_bytes: int, what: str) -> Iterator[bytes]:
    bar, done = Bar(), 0
    bar.begin(what, num_bytes)
    try:
        for block in blocks:
            yield block
            done += len(block)
            bar.at(done)
    finally:
        bar.end()


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """None is "not said"."""
    return {name: value for name, value in values.items() if value is not None}
