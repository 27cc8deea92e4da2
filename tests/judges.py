"""An endpoint on this machine that answers as OpenAI-compatible ones do, for tests."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_PARTS = re.compile(
    r"<request>\n(.*)\n</request>.*<answer_a>\n(.*)\n</answer_a>.*<answer_b>\n(.*)\n</answer_b>",
    re.DOTALL,
)


@dataclass
class Endpoint:
    """What was asked, and what to answer."""

    reply: Callable[[str, str, str], str]
    """Of prompt and both answers: the whole reply."""
    faults: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """Codes and headers for the first requests, before any is answered."""
    bodies: list[Any] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    url: str = ""


@contextmanager
def endpoint(reply: Callable[[str, str, str], str], *faults: Any) -> Iterator[Endpoint]:
    """Serve on a free port of loopback while the block runs."""
    state, lock = Endpoint(reply, list(faults)), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                state.bodies.append(body)
                state.headers.append(dict(self.headers))
                fault = state.faults.pop(0) if state.faults else None
            code, more = fault or (200, {})
            message = {"role": "assistant", "content": ""}
            if fault is None:
                parts = _PARTS.search(body["messages"][-1]["content"])
                assert parts is not None
                message["content"] = state.reply(*parts.groups())
            said = {"choices": [{"message": message}]} if fault is None else {"error": "no"}
            text = json.dumps(said).encode()
            self.send_response(200 if self.path == "/v1/chat/completions" and not fault else code)
            for key, value in {**more, "Content-Length": str(len(text))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
