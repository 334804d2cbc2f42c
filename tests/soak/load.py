"""What the soaks share: cheap random adapters, streams that time their tokens, a server's memory."""

import bisect
import itertools
import json
import os
import random
import re
import socket
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))

from server import Server, pack_multipart  # noqa: E402

LAYERS, D_IN = 30, 576  # of SmolLM2-135M
TARGETS = {"q_proj": 576, "v_proj": 192}  # outputs of each projection
SPREAD = 0.05  # standard deviation of A, B and routers
KV_BYTES = "192M"  # running answers and shared prefixes soon fill it, after which memory must not grow
PROMPTS = ["The best way to travel through the mountains is", "Once upon a time, a small robot",
           "To make good bread you need", "The history of the city begins with"]


class AdapterPool:
    """Any number of MoELoRA adapters out of one stretch of random F16 values: each is a window of it that
    begins elsewhere, so that making one costs a copy."""

    def __init__(self, rank, experts, top_k, count):
        shapes = {}
        for layer in range(LAYERS):
            for projection, d_out in TARGETS.items():
                site = f"base_model.model.model.layers.{layer}.self_attn.{projection}"
                shapes[f"{site}.moe_gate.weight"] = (experts, D_IN)
                for e in range(experts):
                    shapes[f"{site}.experts.{e}.lora_A.weight"] = (rank, D_IN)
                    shapes[f"{site}.experts.{e}.lora_B.weight"] = (d_out, rank)
        header, offset = {}, 0
        for name, shape in shapes.items():
            size = 2 * shape[0] * shape[1]
            header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.header, self.size = struct.pack("<Q", len(text)) + text, offset
        self.config = json.dumps({
            "peft_type": "MOELORA", "r": rank, "lora_alpha": rank, "num_experts": experts, "top_k": top_k,
            "gate": "topk", "temperature": 0.1, "target_modules": list(TARGETS)}).encode()
        files = {"adapter_config.json": self.config, "adapter_model.safetensors": self.header}
        self.form_type, frame = pack_multipart(files)
        middle = frame.index(self.header) + len(self.header)
        self.form_head, self.form_tail = frame[:middle], frame[middle:]
        rng = random.Random(rank)
        values = [rng.gauss(0, SPREAD) for _ in range(1 << 16)]
        # A prime number of values repeats, so no two windows and no two rows of one are alike.
        block = struct.pack("<65521e", *values[:65521])
        self.values = block * ((offset + 2 * 61 * count) // len(block) + 1)

    def _window(self, index):
        start = 2 * 61 * index
        return memoryview(self.values)[start:start + self.size]

    def files(self, index):
        return {"adapter_config.json": self.config,
                "adapter_model.safetensors": self.header + bytes(self._window(index))}

    def form(self, index):
        """(headers, body in pieces) of an upload, without a copy of the values: what the client spends here, the
        server beside it lacks."""
        pieces = [self.form_head, self._window(index), self.form_tail]
        return {"Content-Type": self.form_type, "Content-Length": str(sum(map(len, pieces)))}, pieces


class Answer:
    """One answer of one stream. Times are of time.monotonic()."""

    def __init__(self, model, prompt, wanted):
        """wanted: tokens to ask for."""
        self.model, self.prompt, self.wanted = model, prompt, wanted
        self.version = None
        self.error = None
        self.tokens = []
        self.asked = time.monotonic()
        self.times = []  # when each token came
        self.pieces = []  # (when, bytes) as they came, until they are read

    @property
    def first_token_s(self):
        return self.times[0] - self.asked

    def gaps(self):
        """(when, seconds) between tokens."""
        return [(b, b - a) for a, b in zip(self.times, self.times[1:])]


def body(model, prompt, tokens):
    """Sampled with a seed: the likeliest words of a random adapter end in a loop, and two of them in the same."""
    return {"prompt": PROMPTS[prompt], "model": model, "max_tokens": tokens, "temperature": 1, "seed": 7,
            "ignore_eos": True, "return_token_ids": True, "stream": True}


def stream(server, answer):
    """Asks, and puts aside what comes with its time. Reading it can wait until nobody streams: what clients spend, the
    server beside them lacks. HTTP/1.0, whose bodies come as they are."""
    text = json.dumps(body(answer.model, answer.prompt, answer.wanted)).encode()
    head = f"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=120) as connection:
            connection.sendall(head.encode() + text)
            while piece := connection.recv(65536):
                answer.pieces.append((time.monotonic(), piece))
    except OSError as e:  # one failed request: counted, the soak goes on
        answer.error = f"{type(e).__name__}: {e}"
    return answer


def read(answer):
    """Fills in what an answer says."""
    ends = list(itertools.accumulate(len(piece) for _, piece in answer.pieces))
    text = b"".join(piece for _, piece in answer.pieces)
    head, _, rest = text.partition(b"\r\n\r\n")
    status, version = re.match(rb"HTTP/1\.[01] (\d+)", head), re.search(rb"\r\nx-adapter-version: (\S+)", head, re.I)
    if answer.error:
        return answer
    if not status or status[1] != b"200":
        answer.error = f"{head.splitlines()[:1]}: {rest[:200]!r}"
        return answer
    answer.version = version[1].decode() if version else None  # None: the bare model
    for line in re.finditer(rb"^data: (\{.*\})\r?\n", text, re.M):
        event = json.loads(line[1])
        if "error" in event:
            answer.error = event["error"]["message"]
            return answer
        ids = event["choices"][0].get("token_ids", []) if event["choices"] else []
        answer.tokens += ids
        answer.times += [answer.pieces[bisect.bisect_left(ends, line.end())][0]] * len(ids)
    if len(answer.tokens) != answer.wanted or not text.endswith(b"data: [DONE]\n\n"):
        answer.error = f"{len(answer.tokens)} tokens instead of {answer.wanted}, or no end"
    answer.pieces = []
    return answer


def ask(server, model, prompt, tokens):
    """An Answer, with its error instead of an exception."""
    return read(stream(server, Answer(model, prompt, tokens)))


class Load:
    """Streams that ask one question after another until they are stopped."""

    def __init__(self, server, streams, choose):
        """choose(random.Random): the (model, prompt, tokens) of the next request."""
        self.answers, self._lock, self._stop = [], threading.Lock(), threading.Event()
        self.threads = [threading.Thread(target=self._run, args=(server, random.Random(i), choose), daemon=True)
                        for i in range(streams)]
        for t in self.threads:
            t.start()

    def _run(self, server, rng, choose):
        while not self._stop.is_set():
            answer = stream(server, Answer(*choose(rng)))
            with self._lock:
                self.answers.append(answer)

    def count(self):
        with self._lock:
            return len(self.answers)

    def stop(self):
        """Waits for the answers under way; all answers."""
        self._stop.set()
        for t in self.threads:
            t.join()
        return [read(answer) for answer in self.answers]


class Memory:
    """A process's resident memory in MiB, sampled by whoever calls sample()."""

    def __init__(self, pid):
        self.pid, self.samples = pid, []

    def now(self):
        text = Path(f"/proc/{self.pid}/status").read_text()
        return int(text.split("VmRSS:")[1].split()[0]) / 1024

    def sample(self):
        self.samples.append(self.now())
        return self.samples[-1]

    def at(self, share):
        """The median of the samples around this share of the run."""
        n = len(self.samples)
        around = self.samples[max(0, int(share * n) - 3):int(share * n) + 4]
        return percentile(around, 50)


class Machine:
    """What others took of its cores: a comparison of times holds where that is little, and alike."""

    TICK = os.sysconf("SC_CLK_TCK")

    def __init__(self, *pids):
        self.pids = pids
        self.last = self._read()
        self.sums = {}  # of each kind of slice: seconds that passed, that other programs had, that the host took

    def _read(self):
        ticks = [int(t) for t in open("/proc/stat").readline().split()[1:9]]
        idle, host = ticks[3] + ticks[4], ticks[7]
        own = sum(sum(map(int, open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[11:13])) for pid in self.pids)
        return time.monotonic(), (sum(ticks) - idle - host - own) / self.TICK, host / self.TICK

    def end_slice(self, kind):
        now = self._read()
        self.sums[kind] = [s + b - a for s, a, b in zip(self.sums.get(kind, [0, 0, 0]), self.last, now)]
        self.last = now

    def shares(self, kind):
        """(of other programs, of a virtual machine's host), as shares of one core."""
        seconds, programs, host = self.sums[kind]
        return programs / seconds, host / seconds


def percentile(values, p):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * p / 100))] if ordered else float("nan")


def leases(server):
    """Leases that any version of any adapter has."""
    listed = server.call("GET", "/v1/adapters").json()["data"]
    return sum(v["leases"] for a in listed for v in a["versions"])


def machine():
    cpu = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores, load average {os.getloadavg()[0]:.1f} at the start"


def print_table(rows):
    print("\n| what | |\n|---|---|")
    for name, value in rows:
        print(f"| {name} | {value} |")
    print(flush=True)


def run(soak, options, *arguments):
    """Runs soak(server) on a server of options.model; what it returns are (what would be wrong, whether it is fine)."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(options.model, f"{folder}/data", "--kv-bytes", KV_BYTES, *arguments)
        try:
            checks = soak(server)
            code = server.stop()
        finally:
            server.kill()
        checks.append((f"exit code {code} at SIGTERM:\n{server.log}", code == 0))
    return verdict(checks)


def verdict(checks):
    """Prints what failed; the exit code."""
    failed = [what for what, good in checks if not good]
    for what in failed:
        print(f"FAIL: {what}")
    if not failed:
        print("PASS")
    return 1 if failed else 0
