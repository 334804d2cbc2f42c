"""What is measured: groups of rows, each row with our way and llama.cpp's of doing the same."""

import contextlib
import itertools
import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Callable, Optional

import models

PROMPT, LONG_PROMPT = 128, 512
TOKENS = {1: 48, 8: 24, 32: 10}  # made at each batch size: some tenths of a second
CHAT_PROMPT, CHAT_ANSWER = 32, 64
STREAMS = 8
SPIN = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"


@dataclass
class Row:
    what: str
    model: str  # type of its weights, for people
    own: Callable[[], float]
    peer: Optional[Callable[[], float]] = None
    unit: str = "tokens/s"
    less_is_better: bool = False
    base: Optional["Row"] = None  # of the same group: what is kept of its speed is printed
    roof: Optional[Callable[["Roofs"], float]] = None  # the most the machine can do
    own_values: list = field(default_factory=list)
    peer_values: list = field(default_factory=list)


@dataclass
class Group:
    name: str
    rows: list
    models: list  # paths
    last: bool = False  # of those that want these models: their processes end with it


def prompts(count, length):
    return [[1000 + (i * 131 + t * 37) % 20000 for t in range(length)] for i in range(count)]


@contextlib.contextmanager
def busy_core():
    """A process that wants all of the last core this one may use."""
    process = subprocess.Popen([sys.executable, "-c", SPIN, str(max(os.sched_getaffinity(0)))])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def while_busy(measure):
    def run():
        with busy_core():
            return measure()
    return run


class Roofs:
    """bandwidth in bytes a second of all threads; fp32 and int8 in multiply-adds a second."""

    def __init__(self, bandwidth, fp32, int8):
        self.bandwidth, self.fp32, self.int8 = bandwidth, fp32, int8

    def peak(self, kind):
        return self.fp32 if kind == "BF16" else self.int8


class Rows:
    def __init__(self, fleet):
        self.fleet = fleet
        self.texts = itertools.count(1)  # for prompts never seen before

    @staticmethod
    def users(adapters, count):
        name = {"none": "", "lora": "LoRA", "moe": "MoELoRA"}[adapters]
        return f", {count} different {name}s" if count > 1 else f", one {name}" if name else ""

    # ---- one row each ----

    def decode(self, path, kind, batch, adapters="none", count=0, base=None, tokens=None, length=PROMPT):
        fleet, tokens = self.fleet, tokens or TOKENS[batch]
        who = self.users(adapters, count)
        context = f", context {length}" if length > PROMPT else ""

        def peer():
            if adapters == "lora":
                return fleet.peer_with_loras(path, count).decode(batch, length, tokens, count)
            return fleet.peer(path).decode(batch, length, tokens)

        def roof(roofs):
            shape = fleet.peer(path).shape()
            cache = 4 * shape["layers"] * shape["kv"] * length * batch  # keys and values in f16
            size = os.path.getsize(path) + cache
            return min(batch * roofs.bandwidth / size, roofs.peak(kind) / shape["weights"])

        return Row(f"decode, batch {batch}{context}{who}", kind,
                   lambda: fleet.engine(path).decode(batch, length, tokens, adapters, count),
                   None if adapters == "moe" else peer, base=base, roof=roof if adapters == "none" else None)

    def prefill(self, path, kind, sequences, length, adapters="none", count=0, base=None):
        fleet = self.fleet
        who = self.users(adapters, count)

        def peer():
            if adapters == "lora":
                return fleet.peer_with_loras(path, count).prefill(sequences, length, count)
            return fleet.peer(path).prefill(sequences, length)

        def roof(roofs):
            shape = fleet.peer(path).shape()
            return roofs.peak(kind) / (shape["weights"] - shape["vocab"] * shape["embed"])

        return Row(f"prefill, {sequences} x {length}{who}", kind,
                   lambda: fleet.engine(path).prefill(sequences, length, adapters, count),
                   None if adapters == "moe" else peer, base=base, roof=roof if adapters == "none" else None)

    def http_decode(self, path, kind, adapters, base=None):
        fleet = self.fleet
        who = {"none": "no adapter", "lora": f"{STREAMS} different LoRAs", "moe": f"{STREAMS} different MoELoRAs"}

        def own():
            server, names = fleet.server(path), [None] * STREAMS
            if adapters != "none":
                server, names = fleet.server_with(path, adapters, STREAMS)
            return server.decode(names, prompts(STREAMS, PROMPT), TOKENS[8])

        def peer():
            if adapters == "none":
                return fleet.peer(path).decode(STREAMS, PROMPT, TOKENS[8])
            return fleet.peer_with_loras(path, STREAMS).decode(STREAMS, PROMPT, TOKENS[8], STREAMS)

        return Row(f"decode over HTTP, {STREAMS} streams, {who[adapters]}", kind, own,
                   None if adapters == "moe" else peer, base=base)

    def first_token(self, path, kind, adapters, prompts_first=False):
        fleet = self.fleet
        who = {"lora": "LoRAs", "moe": "MoELoRAs"}[adapters]

        def own():
            server, names = fleet.server_with(path, adapters, STREAMS)
            shift = next(self.texts)
            texts = [[token + shift for token in text] for text in prompts(STREAMS, CHAT_PROMPT)]
            return 1000 * server.first_token(names, texts, CHAT_ANSWER)

        def peer():
            loras = fleet.peer_with_loras(path, STREAMS)
            return 1000 * loras.first_token(STREAMS, CHAT_PROMPT, CHAT_ANSWER, prompts_first)

        what = f"first token of the last of {STREAMS} requests with {STREAMS} different {who}, over HTTP"
        return Row(what + (" (peer: all prompts first)" if prompts_first else ""), kind, own,
                   None if adapters == "moe" else peer, unit="ms", less_is_better=True)

    def overhead(self, path, kind):
        fleet, batch = self.fleet, 32
        return Row("decode, batch 32: share of a step outside the device's ops", kind,
                   lambda: 100 * fleet.engine(path).overhead(batch, PROMPT, TOKENS[batch]), unit="%", less_is_better=True)

    def http_share(self, path, kind):
        fleet, batch = self.fleet, 32
        return Row("decode over HTTP, 32 streams: share of the processor's time that HTTP and SSE take", kind,
                   lambda: fleet.server(path).http_share([None] * batch, prompts(batch, PROMPT), 2 * TOKENS[batch]),
                   unit="%", less_is_better=True)

    def http_32(self, path, kind, base):
        fleet = self.fleet
        return Row("decode over HTTP, 32 streams", kind,
                   lambda: fleet.server(path).decode([None] * 32, prompts(32, PROMPT), 2 * TOKENS[32]), base=base)

    def busy(self, base, what):
        return Row(f"{what}, one core busy with another process", base.model, while_busy(base.own),
                   while_busy(base.peer), base=base)

    # ---- groups ----

    def plain(self, kind):
        path = models.smollm2(kind)
        rows = [self.decode(path, kind, batch) for batch in (1, 8, 32)]
        return Group(f"plain {kind}", rows + [self.prefill(path, kind, 1, LONG_PROMPT)], [path])

    def http(self, kind):
        path = models.smollm2(kind)
        base = self.http_decode(path, kind, "none")
        return Group(f"adapters http {kind}", [base, self.http_decode(path, kind, "lora", base),
                                               self.http_decode(path, kind, "moe", base)], [path])

    def adapters(self, kind):
        path = models.smollm2(kind)
        one, many = self.decode(path, kind, 1), self.decode(path, kind, 32)
        many.peer = None  # the plain group has it
        return Group(f"adapters decode {kind}", [
            one, self.decode(path, kind, 1, "lora", 1, one), self.decode(path, kind, 1, "moe", 1, one),
            many, self.decode(path, kind, 32, "moe", 1, many), self.decode(path, kind, 32, "moe", 8, many)], [path])

    def adapters_prefill(self, kind):
        path = models.smollm2(kind)
        one, many = self.prefill(path, kind, 1, LONG_PROMPT), self.prefill(path, kind, 8, PROMPT)
        return Group(f"adapters prefill {kind}", [
            one, self.prefill(path, kind, 1, LONG_PROMPT, "lora", 1, one),
            self.prefill(path, kind, 1, LONG_PROMPT, "moe", 1, one),
            many, self.prefill(path, kind, 8, PROMPT, "lora", 8, many),
            self.prefill(path, kind, 8, PROMPT, "moe", 8, many)], [path])

    def waiting(self, kind):
        path = models.smollm2(kind)
        return Group(f"first token {kind}", [self.first_token(path, kind, "lora"),
                                             self.first_token(path, kind, "lora", True),
                                             self.first_token(path, kind, "moe")], [path])

    def busy_core(self, kind):
        path = models.smollm2(kind)
        one, eight = self.decode(path, kind, 1), self.decode(path, kind, 8)
        return Group(f"busy core {kind}", [one, self.busy(one, "decode, batch 1"),
                                           eight, self.busy(eight, "decode, batch 8")], [path])

    def overheads(self, kind):
        path = models.smollm2(kind)
        base = self.decode(path, kind, 32, tokens=2 * TOKENS[32])
        base.peer = None
        return Group(f"step overhead {kind}", [base, self.http_32(path, kind, base), self.overhead(path, kind),
                                               self.http_share(path, kind)], [path])

    def long_context(self, kind):
        path = models.smollm2(kind)
        long, longest = (self.decode(path, kind, 1, length=length, tokens=32) for length in (2048, 8000))
        longest.peer = None  # reading such a prompt takes it minutes
        return Group(f"long context {kind}", [long, longest], [path])

    def large(self, kind):
        path, name = models.random_1b(kind), f"1B {kind}"
        rows = [self.decode(path, name, 1, tokens=16, length=PROMPT), self.decode(path, name, 8, tokens=8),
                self.prefill(path, name, 1, PROMPT)]
        return Group(f"large 1B {kind}", rows, [path], last=True)


def makers(fleet):
    """(name, function that makes the group), in the order of the table. Making one may make its model's file."""
    rows = Rows(fleet)
    result = [(f"plain {kind}", lambda kind=kind: rows.plain(kind)) for kind in models.TYPES]
    result += [(f"adapters http {kind}", lambda kind=kind: rows.http(kind)) for kind in ("Q4_0", "Q8_0")]
    result += [(name, lambda make=make: make("Q4_0")) for name, make in (
        ("adapters decode Q4_0", rows.adapters), ("adapters prefill Q4_0", rows.adapters_prefill),
        ("first token Q4_0", rows.waiting), ("step overhead Q4_0", rows.overheads), ("busy core Q4_0", rows.busy_core),
        ("long context Q4_0", rows.long_context))]
    result += [(f"large 1B {kind}", lambda kind=kind: rows.large(kind)) for kind in models.RANDOM_TYPES]
    return result
