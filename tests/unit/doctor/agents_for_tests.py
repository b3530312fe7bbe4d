"""Real HTTP servers that answer as an agent, or as something that is none."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from mcp_vllm.agent import wire


def hello(
    agent_id: str = "a1", *fingerprints: dict[str, str], version: int = wire.WIRE_VERSION
) -> bytes:
    return wire.encode(wire.PeerHello(version, agent_id, list(fingerprints)))


@contextmanager
def serving(answers: Mapping[str, bytes]) -> Iterator[str]:
    """Serve `answers` by path on a free loopback port; yields HOST:PORT."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = answers.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
