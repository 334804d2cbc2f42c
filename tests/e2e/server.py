"""A medley server under test: started on a free port, spoken to over plain sockets, always stopped."""

import http.client
import io
import json
import os
import re
import signal
import subprocess
import tarfile
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = Path(os.environ.get("MEDLEY_TEST_FIXTURES", ROOT / "tests" / "fixtures"))
BINARY = os.environ.get("MEDLEY_BIN", str(ROOT / "build" / "medley"))
CACHE = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
SMOLLM2 = Path(os.environ.get("MEDLEY_TEST_MODEL",
                              f"{CACHE}/medley/models/SmolLM2-135M-Instruct.Q4_1.gguf"))

START_S = 120  # generous: a sanitized server on a busy machine
STOP_S = 60


def model_file(name):
    return FIXTURES / "models" / f"{name}.gguf"


def adapter_files(name):
    """The two files of a fixture adapter, as {file name: bytes}."""
    folder = FIXTURES / "adapters" / name
    return {file: (folder / file).read_bytes()
            for file in ("adapter_config.json", "adapter_model.safetensors")}


def eventually(condition, what, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"still not: {what}"
        time.sleep(0.01)


class Reply:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        """The error object, after a check that the body is one."""
        error = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert error["message"] and error["type"] and error["code"], error
        return error


def pack_multipart(files):
    """(content type, body)"""
    boundary = uuid.uuid4().hex
    parts = [f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}"\r\n'
             f"Content-Type: application/octet-stream\r\n\r\n".encode() + data + b"\r\n"
             for name, data in files.items()]
    return (f"multipart/form-data; boundary={boundary}",
            b"".join(parts) + f"--{boundary}--\r\n".encode())


def pack_tar(files, compression=""):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return "application/x-tar", buffer.getvalue()


class Server:
    """Runs `medley serve`; a context manager. Leaving it expects a clean exit."""

    def __init__(self, model, data, *options, env=None):
        self.data = Path(data)
        self.log_file = self.data.parent / f"{self.data.name}-{uuid.uuid4().hex[:8]}.log"
        # setpriv: a test run that is killed takes its servers along.
        command = ["setpriv", "--pdeathsig", "KILL", BINARY, "serve", "--model", str(model), "--data", str(data),
                   "--listen", "127.0.0.1:0", "--threads", "2", *options]
        self.name = Path(model).stem
        self.key = (env or {}).get("MEDLEY_API_KEY")
        with open(self.log_file, "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                            env={**os.environ, **(env or {})})
        try:
            self.port = self._wait_until_ready()
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    @property
    def log(self):
        return self.log_file.read_text(errors="replace")

    def _wait_until_ready(self):
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            assert self.process.poll() is None, f"the server ended at its start:\n{self.log}"
            found = re.search(r"http://127\.0\.0\.1:(\d+)", self.log)
            if found:
                self.port = int(found[1])
                try:
                    if self.call("GET", "/ready").status == 200:
                        return self.port
                except OSError:
                    pass
            time.sleep(0.02)
        raise AssertionError(f"not ready after {START_S} s:\n{self.log}")

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    def open(self, method, path, body=None, headers=None):
        """(connection, response with its body unread); the caller closes the connection."""
        headers = dict(headers or {})
        if isinstance(body, (dict, list)):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        if self.key:
            headers.setdefault("Authorization", f"Bearer {self.key}")
        connection = self.connect()
        connection.request(method, path, body=body, headers=headers)
        return connection, connection.getresponse()

    def call(self, method, path, body=None, headers=None):
        connection, response = self.open(method, path, body, headers)
        try:
            return Reply(response.status, response.headers, response.read())
        finally:
            connection.close()

    def complete(self, **body):
        """POST /v1/completions, greedy unless said otherwise; the reply's JSON."""
        reply = self.call("POST", "/v1/completions", {"temperature": 0, **body})
        assert reply.status == 200, (reply.status, reply.body)
        return reply.json()

    def stream(self, path, **body):
        """Yields the parsed events of a stream; checks that [DONE] comes last."""
        connection, response = self.open("POST", path, {"temperature": 0, "stream": True, **body})
        try:
            assert response.status == 200, response.read()
            assert response.headers["Content-Type"].startswith("text/event-stream")
            done = False
            for line in response:
                if line.startswith(b"data: "):
                    assert not done, "an event after [DONE]"
                    done = line.strip() == b"data: [DONE]"
                    if not done:
                        yield json.loads(line[6:])
                else:
                    assert line.strip() == b"" or line.startswith(b":"), line
            assert done, "the stream ended without [DONE]"
        finally:
            connection.close()

    def upload(self, name, files, pack=pack_multipart, **headers):
        kind, body = pack(files)
        return self.call("PUT", f"/v1/adapters/{name}", body,
                         {"Content-Type": kind, **{k.replace("_", "-"): v for k, v in headers.items()}})

    def stop(self):
        """SIGTERM; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"no end {STOP_S} s after SIGTERM:\n{self.log}")

    def kill(self):
        self.process.kill()
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        code = self.stop()
        if kind is None:
            assert code == 0, f"exit code {code}:\n{self.log}"
