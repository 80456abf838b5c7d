"""A stand-in for an MLflow server: the calls of its REST protocol that a tracker makes, in memory."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class MLflowServer:
    """What the server has got.

    Attributes:
        calls: the path and the content of each call, in their order.
        is_away: True has it refuse every call with status 503.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.is_away = False

    def answer(self, path: str, content: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Return the status and the content of the answer to a call."""
        if self.is_away:
            return 503, {"error_code": "TEMPORARILY_UNAVAILABLE", "message": "away"}
        self.calls.append((path, content))
        info = {"run_id": "r1", "experiment_id": "7", "status": "RUNNING", "start_time": int(time.time() * 1000)}
        if path == "experiments/get-by-name":
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such experiment"}
        if path == "experiments/create":
            return 200, {"experiment_id": "7"}
        if path == "runs/create":
            return 200, {"run": {"info": info | {"run_name": content["run_name"]}, "data": {}}}
        return 200, {"run_info": info, "run": {"info": info, "data": {}}}


@contextmanager
def serve_mlflow() -> Iterator[tuple[MLflowServer, str]]:
    """Yield the server and its address."""
    state = MLflowServer()

    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            size = int(self.headers.get("Content-Length", 0))
            content = json.loads(self.rfile.read(size) or b"{}")
            path = self.path.partition("?")[0].removeprefix("/api/2.0/mlflow/")
            status, answer = state.answer(path, content)
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PATCH = respond

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
