"""The processes that are measured: Medley's engine, Medley's server over HTTP, llama.cpp. Each is started when a row
first wants it; one that fails is started anew for the next row."""

import json
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from adapters import moelora_files, write_lora

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent / "e2e"))
from server import Server  # noqa: E402

REPLY_S = 300  # the longest anything may be silent


class Lines:
    """A process that answers a line with a line."""

    def __init__(self, *command):
        self.name = Path(command[1] if command[0] == sys.executable else command[0]).name
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.errors, text=True)
        self.hello = self._read()

    def _read(self):
        watch = threading.Timer(REPLY_S, self.process.kill)
        watch.start()
        line = self.process.stdout.readline()
        watch.cancel()
        if not line:
            self.errors.seek(0)
            said = self.errors.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"{self.name} ended: {said[-1] if said else 'it said nothing'}")
        return line.strip()

    @property
    def dead(self):
        return self.process.poll() is not None

    def ask(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self):
        self.process.kill()
        self.process.wait()


class Engine(Lines):
    def __init__(self, model, threads, *level):
        super().__init__(ROOT / "build/tests/bench/bench_engine", model, threads, *level)

    def numbers(self, *words):
        return [float(word) for word in self.ask(" ".join(map(str, words))).split()]

    def prefill(self, sequences, length, kind="none", adapters=0):
        return self.numbers("prefill", sequences, length, kind, adapters)[0]

    def decode(self, sequences, length, tokens, kind="none", adapters=0):
        return self.numbers("decode", sequences, length, tokens, kind, adapters)[0]

    def overhead(self, sequences, length, tokens):
        return self.numbers("decode", sequences, length, tokens, "none", 0)[1]

    def logprobs(self, tokens):
        return self.numbers("logprobs", *tokens)


class LlamaCpp(Lines):
    def __init__(self, model, threads):
        super().__init__(sys.executable, HERE / "peer.py", model, threads)
        self.adapters = 0

    def call(self, job, *arguments):
        reply = json.loads(self.ask(json.dumps({"job": job, "arguments": arguments})))
        if "error" in reply:
            raise RuntimeError(f"llama.cpp: {reply['error']}")
        return reply["value"]

    def want_adapters(self, paths):
        for path in paths[self.adapters:]:
            self.call("load_lora", str(path))
            self.adapters += 1

    def __getattr__(self, job):
        return lambda *arguments: self.call(job, *arguments)


class Stream:
    """One answer as it arrives; times of time.perf_counter()."""

    def __init__(self, port, body):
        text = json.dumps(body).encode()
        self.first = self.last = None
        self.tail = b""
        self.request = (b"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
                        b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(text)) + text
        self.socket = socket.create_connection(("127.0.0.1", port))

    def send(self):
        self.socket.sendall(self.request)

    def receive(self):
        """False when the answer is whole."""
        data = self.socket.recv(65536)
        now = time.perf_counter()
        if not data:
            raise RuntimeError(f"the answer ended early: {self.tail[-200:]!r}")
        data = self.tail + data
        if self.first is None and b'"token_ids": [' in data:
            self.first = now
        self.tail = data[-400:]
        if b"data: [DONE]" not in data:
            return True
        self.last = now
        self.socket.close()
        return False


class HttpServer:
    """medley serve with its defaults, spoken to as any client would."""

    def __init__(self, model, threads):
        self.folder = tempfile.TemporaryDirectory()
        self.server = Server(model, f"{self.folder.name}/data", "--threads", str(threads))
        self.uploaded = set()

    @property
    def dead(self):
        return self.server.process.poll() is not None

    def upload(self, name, files, pack=None):
        if name in self.uploaded:
            return
        reply = self.server.upload(name, files, pack) if pack else self.server.upload(name, files)
        if reply.status != 201:
            raise RuntimeError(f"upload of {name}: {reply.status} {reply.body[:200]!r}")
        self.uploaded.add(name)

    def streams(self, models, prompts, tokens):
        """The Streams of one request for each model name (None: the base), all sent at once, and when they were."""
        streams = []
        for model, prompt in zip(models, prompts):
            body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
                    "return_token_ids": True}
            streams.append(Stream(self.server.port, {**body, "model": model} if model else body))
        selector = selectors.DefaultSelector()
        begin = time.perf_counter()
        for stream in streams:
            stream.send()
            selector.register(stream.socket, selectors.EVENT_READ, stream)
        left = len(streams)
        while left:
            ready = selector.select(REPLY_S)
            if not ready:
                raise RuntimeError(f"no answer within {REPLY_S} s")
            for key, _ in ready:
                stream = key.data
                socket_ = stream.socket
                if not stream.receive():
                    selector.unregister(socket_)
                    left -= 1
        return streams, begin

    def decode(self, models, prompts, tokens):
        """Tokens a second of all streams together, each counted from its first token on."""
        streams, _ = self.streams(models, prompts, tokens)
        return sum((tokens - 1) / (s.last - s.first) for s in streams)

    def first_token(self, models, prompts, tokens):
        """Seconds to the first token of the stream that got it last."""
        streams, begin = self.streams(models, prompts, tokens)
        return max(s.first for s in streams) - begin

    def http_share(self, models, prompts, tokens):
        """Percent of the server's processor time that its I/O thread, the main one, takes of such an answer."""
        before = self._thread_seconds()
        self.streams(models, prompts, tokens)
        spent = {thread: s - before.get(thread, 0) for thread, s in self._thread_seconds().items()}
        return 100 * spent[str(self.server.process.pid)] / sum(spent.values())

    def _thread_seconds(self):
        tasks = Path(f"/proc/{self.server.process.pid}/task")
        return {task.name: int((task / "schedstat").read_text().split()[0]) / 1e9 for task in tasks.iterdir()}

    def close(self):
        self.server.kill()
        self.folder.cleanup()


def pack_gguf(path):
    return "application/octet-stream", Path(path).read_bytes()


class Fleet:
    """All processes of one bench."""

    def __init__(self, threads, folder):
        self.threads, self.folder = threads, Path(folder)
        self.running = {}
        self.loras = {}

    def _get(self, key, make):
        if key not in self.running:
            self.running[key] = make()
        return self.running[key]

    def engine(self, model, *level):
        return self._get(("engine", model, *level), lambda: Engine(model, self.threads, *level))

    def peer(self, model):
        return self._get(("peer", model), lambda: LlamaCpp(model, self.threads))

    def server(self, model):
        return self._get(("server", model), lambda: HttpServer(model, self.threads))

    def lora_paths(self, model, count):
        shape = self.peer(model).shape()
        paths = self.loras.setdefault(json.dumps(shape), [])
        for i in range(len(paths), count):
            paths.append(self.folder / f"lora-{len(self.loras)}-{i}.gguf")
            write_lora(paths[-1], shape, i)
        return paths[:count]

    def peer_with_loras(self, model, count):
        peer = self.peer(model)
        peer.want_adapters(self.lora_paths(model, count))
        return peer

    def server_with(self, model, kind, count):
        """(server, names of its adapters)"""
        server = self.server(model)
        names = [f"{kind}-{i}" for i in range(count)]
        for i, name in enumerate(names):
            if name in server.uploaded:
                continue
            if kind == "lora":
                server.upload(name, self.lora_paths(model, count)[i], pack_gguf)
            else:
                server.upload(name, moelora_files(self.peer(model).shape(), i))
        return server, names

    def close(self, which=lambda model, process: True):
        """Of those that are closed another is started when it is wanted again."""
        for key in [key for key, process in self.running.items() if which(key[1], process)]:
            self.running.pop(key).close()
