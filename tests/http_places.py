"""A real HTTP server of files on this machine, which can be told to misbehave."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FileServer(http.server.ThreadingHTTPServer):
    """Serves the files of one folder over HTTP, and parts of them if ``ranges`` is true.

    A path that begins with an HTTP status, as ``/403/a.tif``, is answered with it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranges = True
        self.status: int | None = None
        """The status with which every request is answered; None for the normal answers."""
        self.sent = 0
        """Bytes of files sent so far."""
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore errors, as a client that has read enough hangs up."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FileServer

    def log_message(self, *args: object) -> None:
        return

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        wanted = self.path.partition("?")[0].lstrip("/")
        status = re.match(r"(\d{3})/", wanted)
        if status is not None or self.server.status is not None:
            return self.send_error(self.server.status or int(status[1]))  # type: ignore[index]
        path = self.server.folder / wanted
        if not path.is_file():
            return self.send_error(404)
        content = path.read_bytes()
        part = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if part is None or not self.server.ranges:
            self.send_response(200)
        else:
            start = int(part[1]) if part[1] else len(content) - int(part[2])
            stop = int(part[2]) + 1 if part[1] and part[2] else len(content)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{min(stop, len(content)) - 1}/{len(content)}")
            content = content[start:stop]
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.server.sent += len(content)
            self.wfile.write(content)


@contextmanager
def serving(folder: Path) -> Iterator[FileServer]:
    """Serve the files in ``folder`` until the block ends."""
    server = FileServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
