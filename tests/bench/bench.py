#!/usr/bin/env python3
"""Prefill and decode speed of Medley beside llama.cpp, on the same file, in the same run.

Every measurement is taken --rounds times, ours and the peer's by turns, and the medians are printed with their
ratio: on a shared machine single figures move by half, ratios much less. The roof of decoding one sequence is
the measured memory bandwidth over the bytes of the model.

usage: bench.py [--model FILE] [--threads N] [--rounds N] [--only TEXT] [--write FILE.md]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peer import Peer, write_lora

ROOT = Path(__file__).resolve().parents[2]
CACHE = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
MODEL = os.environ.get("MEDLEY_TEST_MODEL", f"{CACHE}/medley/models/SmolLM2-135M-Instruct.Q4_1.gguf")
DECODE_LENGTH, DECODE_TOKENS = 128, 64
LORA_RANK, ADAPTERS_MAX = 16, 8
PAUSE_S = 0.2  # lets the other side's waiting threads go to sleep

# (what, sequences, prompt length, kind of adapters, how many)
CASES = [("prefill", batch, length, kind, adapters)
         for batch, length in ((1, 512), (8, 128), (32, 128))
         for kind, adapters in (("none", 0), ("lora", 1), ("lora", 8), ("moe", 1), ("moe", 8))
         if adapters <= batch]
CASES += [("decode", batch, DECODE_LENGTH, kind, adapters)
          for batch in (1, 8, 32)
          for kind, adapters in (("none", 0), ("lora", 1), ("lora", 8), ("moe", 1), ("moe", 8))
          if adapters <= batch]
NAMES = {"none": "no adapter", "lora": "LoRA r16", "moe": "MoELoRA 8 x r4, top 2"}


class Ours:
    """tests/bench/bench_engine in a process of its own."""

    def __init__(self, model, threads):
        self.process = subprocess.Popen([str(ROOT / "build/tests/bench/bench_engine"), str(model), str(threads)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.device = self.process.stdout.readline().strip()

    def ask(self, *words):
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("bench_engine ended; what it said is above")
        return float(line)

    def measure(self, what, sequences, length, kind, adapters):
        tokens = [DECODE_TOKENS] if what == "decode" else []
        return self.ask(what, sequences, length, *tokens, kind, adapters)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def measure_peer(peer, what, sequences, length, kind, adapters):
    """None where llama.cpp has nothing to compare: it has no routed adapters."""
    if kind == "moe":
        return None
    if what == "prefill":
        return peer.prefill(sequences, length, adapters)
    return peer.decode(sequences, length, DECODE_TOKENS, adapters)


def medians(ours, peer, case, rounds):
    own, other = [], []
    for _ in range(rounds):
        own.append(ours.measure(*case))
        time.sleep(PAUSE_S)
        value = measure_peer(peer, *case)
        if value is not None:
            other.append(value)
            time.sleep(PAUSE_S)
    return statistics.median(own), statistics.median(other) if other else None


def describe(case):
    what, sequences, length, kind, adapters = case
    shape = f"{sequences} x {length} tokens" if what == "prefill" else f"batch {sequences}"
    who = NAMES[kind] if adapters < 2 else f"{NAMES[kind]}, {adapters} different"
    return f"{what} | {shape} | {who}"


def row_of(case, own, other, base):
    ratio = f"{own / other:.2f}" if other else ""
    return f"| {describe(case)} | {own:.0f} | {f'{other:.0f}' if other else 'cannot'} | {ratio} | {own / base:.2f} |"


def run(options):
    if os.getloadavg()[0] > 0.5:
        print(f"bench: the load average is {os.getloadavg()[0]:.1f}: figures mean little beside other work",
              file=sys.stderr)
    cpu = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
    ours, peer = Ours(options.model, options.threads), Peer(options.model, options.threads)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(ADAPTERS_MAX):
            path = Path(folder) / f"lora{i}.gguf"
            write_lora(path, peer.shape(), LORA_RANK, i)
            peer.load_lora(path)
    bandwidth, size = ours.ask("bandwidth"), os.path.getsize(options.model)
    lines = [
        f"{cpu}, {options.threads} threads, `{Path(options.model).name}`; ours: {ours.device}; load average "
        f"{os.getloadavg()[0]:.1f} at the start; medians of {options.rounds}.", "",
        f"Memory reads {bandwidth / 1e9:.1f} GB/s; the model is {size / 1e6:.0f} MB, so one sequence decodes "
        f"{bandwidth / size:.0f} tokens/s at most.", "",
        "| what | shape | adapters | Medley, tokens/s | llama.cpp, tokens/s | ratio | of our own without adapters |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    base = {}
    for case in CASES:
        if options.only not in describe(case):
            continue
        own, other = medians(ours, peer, case, options.rounds)
        lines.append(row_of(case, own, other, base.setdefault(case[:3], own)))
        print(lines[-1], flush=True)
    ours.close()
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="only rows that contain this, for instance 'decode'")
    parser.add_argument("--write", metavar="FILE", help="also write the table there, as Markdown")
    options = parser.parse_args()
    lines = run(options)
    if options.write:
        Path(options.write).write_text("# Speed beside llama.cpp\n\n" + "\n".join(lines) + "\n\n" + METHOD)
    return 0


METHOD = """How: `make bench`. Ours and the peer's measurements alternate in one run. Decoding starts from prompts of
128 tokens and makes 64; ours counts whole engine steps with greedy sampling, the peer's the model alone. Adapters are on all
seven projections. llama.cpp cannot put rows of different adapters into one batch, so it decodes them one adapter
after the other, as its server does; it has no mixtures.
"""


if __name__ == "__main__":
    sys.exit(main())
