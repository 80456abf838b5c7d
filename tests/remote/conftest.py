"""An S3 server (moto's, in a process of its own) and a web server that can be told to fail."""

import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.remote.copies import local_data

BUCKET = "bucket"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server with an empty bucket."""
    pytest.importorskip("moto")
    code = (
        "from moto.server import ThreadedMotoServer\n"
        "server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)\n"
        "server.start(); print(server.get_host_and_port()[1], flush=True)\n"
        "import sys; sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "MOTO_ACCOUNT_ID": "123456789012"},
    )
    assert process.stdout is not None and process.stdin is not None
    address = f"http://127.0.0.1:{process.stdout.readline().strip()}"
    request = urllib.request.Request(f"{address}/{BUCKET}", method="PUT")
    urllib.request.urlopen(request, timeout=30).close()
    yield address
    process.stdin.close()
    process.wait(20)


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A URL of an empty directory on the server, with what the client needs in the environment."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    local_data.cache_clear()
    return f"s3://{BUCKET}/{tmp_path.name}"


class WebServer:
    """A web server for the files of a directory.

    Attributes:
        url: its address.
        failures: number of requests that it answers with status 503 from now on.
        requests: paths that were asked for.
    """

    def __init__(self, folder: Path) -> None:
        self.failures, self.requests = 0, list[str]()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                server.requests.append(self.path)
                file = folder / self.path.lstrip("/")
                status = 404 if not file.is_file() else 200
                if server.failures > 0:
                    server.failures -= 1
                    status = 503
                content = file.read_bytes() if status == 200 else b""
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("ETag", f'"{len(content)}-{hash(content)}"')
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

            def log_message(self, *arguments: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    """A web server for tmp_path/web."""
    (tmp_path / "web").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MEGATRON_DS_REMOTE_WAITS_S", "0.05 0.05 0.05")
    local_data.cache_clear()
    server = WebServer(tmp_path / "web")
    yield server
    server.close()
