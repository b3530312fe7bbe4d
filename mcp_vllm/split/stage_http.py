"""`/healthz` and `/metrics` of a stage, on a port of their own, which asks nobody who they are."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from mcp_vllm.config.address import Address
from mcp_vllm.telemetry.stage_metrics import StageMetrics


def serve_http(
    listen: Address, metrics: StageMetrics, is_ready: Callable[[], bool]
) -> ThreadingHTTPServer:
    """Serve in the background. Raises OSError: the address cannot be had."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # of a slow client's request

        def do_GET(self) -> None:
            if self.path == "/healthz":
                ready = is_ready()
                self._answer(
                    200 if ready else 503, b"ok\n" if ready else b"loading\n", "text/plain"
                )
            elif self.path == "/metrics":
                self._answer(200, generate_latest(metrics.registry), CONTENT_TYPE_LATEST)
            else:
                self._answer(404, b"not found\n", "text/plain")

        def log_message(self, format: str, *args: object) -> None:
            """Requests are not logged."""

        def _answer(self, status: int, body: bytes, content_type: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer((listen.host, listen.port), Handler)
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return server
