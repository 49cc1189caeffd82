"""HTTP servers on loopback that speak the OpenAI protocol: scripted answers, a proxy that injects faults, real ones."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Reply:
    """delay: seconds before it is sent. cut: the connection is closed after so many bytes of the body."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: int | None = None


def completion(content: Any, finish_reason: str = "stop", logprobs: Any = None, **message: Any) -> Reply:
    message = {"role": "assistant", "content": content} | message
    choice = {"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": logprobs}
    usage = {"prompt_tokens": 20, "completion_tokens": 10, "total_tokens": 30}
    payload = {"id": "x", "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}
    return Reply(json.dumps(payload).encode())


def refusal(status: int, message: str, **headers: str) -> Reply:
    return Reply(json.dumps({"error": {"message": message}}).encode(), status, headers)


Respond = Callable[[dict[str, Any], int], Reply]  # (request body, number of earlier requests)


@dataclass
class Loopback:
    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most_at_once: int = 0

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]


@contextmanager
def loopback(respond: Respond) -> Iterator[Loopback]:
    lock = threading.Lock()
    at_once = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            nonlocal at_once
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                number = len(server.bodies)
                server.bodies.append(body)
                server.headers.append({name.lower(): value for name, value in self.headers.items()})
                server.times.append(time.monotonic())
                at_once += 1
                server.most_at_once = max(server.most_at_once, at_once)
            try:
                reply = respond(body, number)
                time.sleep(reply.delay)
            finally:
                with lock:
                    at_once -= 1
            try:
                self.send_response(reply.status)
                for name, value in ({"content-type": "application/json"} | reply.headers).items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("content-length", str(len(reply.body)))
                self.end_headers()
                self.wfile.write(reply.body[: reply.cut])
            except ConnectionError:  # the client has gone
                self.close_connection = True
            if reply.cut is not None:
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128  # connections that a busy machine has not got round to

    http = Server(("127.0.0.1", 0), Handler)
    server = Loopback(f"http://127.0.0.1:{http.server_port}/v1")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


@contextmanager
def real_server(command: list[str], folder: Path, seconds: float, **variables: str) -> Iterator[str]:
    """The address of what `command` starts, once it is healthy. seconds: of its start; its log is in the folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*command, "--host", "127.0.0.1", "--port", str(port)]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, env=os.environ | variables, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + seconds
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def forward(upstream: str) -> Respond:
    """The real server's replies."""

    def respond(body: dict[str, Any], number: int) -> Reply:
        data, headers = json.dumps(body).encode(), {"content-type": "application/json"}
        request = urllib.request.Request(f"{upstream}/chat/completions", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return Reply(response.read(), response.status)
        except urllib.error.HTTPError as error:
            return Reply(error.read(), error.code)

    return respond


def solve(body: dict[str, Any], number: int = 0) -> Reply:
    """Answers "What is A + B?" as told to, in words that depend on the prompt."""
    prompt = body["messages"][0]["content"]
    a, b = map(int, re.findall(r"What is (\d+) \+ (\d+)", prompt)[0])
    words = " ".join(prompt.split()[4:24])
    return completion(f"{words}. We add {a} and {b} and get {a + b}.\nThe answer is {a + b}.")


def sums(count: int) -> list[dict[str, Any]]:
    """Questions that `solve` answers."""
    return [
        {"id": f"sum-{i}", "question": f"What is {i} + {i + 3}?", "answer": str(2 * i + 3), "source": "sums"}
        for i in range(count)
    ]
