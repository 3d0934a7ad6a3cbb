"""`ReportServer`: a report on this machine that is written again whenever its sources change.

The page asks for ``build`` every second, which names the present page, and loads itself anew when
that is another; what the reader chose stands in its address and stays.
"""

import hashlib
import threading
from collections.abc import Callable, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from mmrl.agents import runs
from mmrl.agents.report import PAGE, write_report
from mmrl.agents.results import FILES
from mmrl.agents.suite import RESULT
from mmrl.errors import InputError
from mmrl.pages import PLOTLY

HOST = "127.0.0.1"
EVERY_S = 2.0  # between two looks at the files
WATCHED = {runs.METRICS, RESULT, *FILES}
Stamp = tuple[tuple[str, int, int], ...]


class ReportServer:
    """Serves a report's folder and keeps it fresh; a context manager.

    Args:
        sources: As for `write_report`.
        out: The report's folder; the first report is written at once.
        port: Where it listens; 0 for any free port.
        say: Told of each refresh, and of what went wrong with one.
        every_s: Time between two looks at the files.

    Attributes:
        page: The file.
        url: Of it.

    Raises:
        InputError: The port is taken, or a source cannot be read.
    """

    def __init__(
        self,
        sources: Sequence[Path],
        out: Path,
        port: int,
        say: Callable[[str], None] = lambda line: None,
        every_s: float = EVERY_S,
    ) -> None:
        self._sources, self._out, self._say, self._every_s = sources, out, say, every_s
        self._seen = stamp(sources)  # before they are read: what changes meanwhile is seen
        self.page = write_report(sources, out)
        self._ended = threading.Event()
        try:
            self._http = ThreadingHTTPServer((HOST, port), partial(_Handler, directory=str(out)))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise InputError(f"cannot serve on port {port}: {reason}", "try --port 0") from error
        self._http.daemon_threads = True
        self.url = f"http://{HOST}:{self._http.server_address[1]}/"
        self._threads = [
            threading.Thread(target=self._http.serve_forever, daemon=True),
            threading.Thread(target=self._watch, daemon=True),
        ]

    def __enter__(self) -> "ReportServer":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._http.shutdown()
        for thread in self._threads:
            thread.join()
        self._http.server_close()

    def wait(self) -> None:
        """Wait for Ctrl-C."""
        try:
            self._ended.wait()
        except KeyboardInterrupt:
            self._say("stopped")

    def _watch(self) -> None:
        while not self._ended.wait(self._every_s):
            now = stamp(self._sources)
            if now == self._seen:
                continue
            try:
                write_report(self._sources, self._out)
            except Exception as error:  # of results that are being written; the next look may do
                self._say(f"not refreshed: {error}")
                continue
            self._seen = now
            self._say("refreshed")


def stamp(sources: Sequence[Path]) -> Stamp:
    """Return name, time and size of each file that a report about these sources may read."""
    found = []
    for source in sources:
        paths = [source] if source.is_file() else source.rglob("*")
        for path in paths:
            if path.name in WATCHED or path == source:
                try:
                    status = path.stat()
                except OSError:  # removed meanwhile
                    continue
                found.append((str(path), status.st_mtime_ns, status.st_size))
    return tuple(sorted(found))


class _Handler(SimpleHTTPRequestHandler):
    """The files of the folder, and the name of the present build."""

    def do_GET(self) -> None:
        if self.path != "/build":
            super().do_GET()
            return
        page = (Path(self.directory) / PAGE).read_bytes()
        build = hashlib.sha256(page).hexdigest()[:12].encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(build)))
        self.end_headers()
        self.wfile.write(build)

    def end_headers(self) -> None:
        kept = self.path.endswith(PLOTLY.name)
        self.send_header("Cache-Control", "max-age=86400" if kept else "no-store")
        super().end_headers()

    def log_message(self, format: str, *values: Any) -> None:
        """Say nothing of each request."""
