#!/usr/bin/env python3
"""Training speed and memory of Medley beside PyTorch (with PEFT for LoRA): same model, same batch, same run.

Each contestant is a process of its own and makes a step in its turn, --rounds times after one to warm up; medians are
printed. Memory is the largest resident size from the end of loading on (loading costs PyTorch more).

usage: train_bench.py [--model FILE] [--threads N] [--rounds N] [--only TEXT] [--peer PYTHON] [--write FILE.md]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
MODEL = os.environ.get("MEDLEY_TEST_MODEL", f"{CACHE}/medley/models/SmolLM2-135M-Instruct.Q4_1.gguf")

# what: (experts, rank, top-k)
ADAPTERS = {"LoRA r16": (1, 16, 1), "MoELoRA 8 x r4, top 2": (8, 4, 2)}
# what: (sequences, length, tokens at the end that are learned)
BATCHES = {"16 x 64, all learned": (16, 64, 63), "16 x 64, the last 8 learned": (16, 64, 8),
           "2 x 512, all learned": (2, 512, 511)}
PEER = Path(__file__).with_name("train_peer.py")
VARIANTS = ["eager", "sdpa", "sdpa-bf16", "sdpa-checkpoint"]


class Contestant:
    def __init__(self, name, command):
        self.name, self.times, self.loss = name, [], None
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self.line()
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")  # the peak starts anew

    def line(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended; what it said is above")
        return line.strip()

    def step(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        seconds, self.loss = map(float, self.line().split())
        return seconds

    def peak_bytes(self):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def contestants(options, decoded, adapter, batch):
    words = [*map(str, (options.threads, *adapter, *batch))]
    yield Contestant("Medley", [str(ROOT / "build/tests/bench/bench_train"), str(options.model), *words])
    for variant in options.variants.split(","):
        yield Contestant(f"PyTorch {variant}", [options.peer, str(PEER), decoded, *words, variant])


def rows_of(what, batch, field):
    tokens = batch[0] * batch[1]
    speed = {c.name: tokens / statistics.median(c.times) for c in field}
    own = field[0]
    for c in field:
        ratio, share = speed[own.name] / speed[c.name], own.peak_bytes() / c.peak_bytes()
        compared = f"{ratio:.2f} | {share:.2f}" if c is not own else "1 | 1"
        yield f"| {what} | {c.name} | {speed[c.name]:.0f} | {c.peak_bytes() / 1e6:.0f} | {compared} | {c.loss:.3f} |"


def measure(options, decoded, what, adapter, batch):
    field = list(contestants(options, decoded, adapter, batch))
    for turn in range(options.rounds + 1):
        for c in field:
            seconds = c.step()
            if turn > 0:
                c.times.append(seconds)
    rows = list(rows_of(what, batch, field))
    for c in field:
        c.close()
    return rows


def run(options):
    if os.getloadavg()[0] > 0.5:
        print(f"train_bench: the load average is {os.getloadavg()[0]:.1f}: only ratios mean something",
              file=sys.stderr)
    cpu = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
    lines = [f"{cpu}, {options.threads} threads, `{Path(options.model).name}` (PyTorch: decoded to fp32); load average "
             f"{os.getloadavg()[0]:.1f} at the start; medians of {options.rounds} steps taken by turns.", "",
             "| adapter and batch | who | tokens/s | peak memory, MB | Medley is faster by | Medley's memory, share of "
             "it | loss after |", "|---|---|---|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as decoded:
        subprocess.run([options.peer, str(PEER), "decode", str(options.model), decoded], check=True)
        for name, adapter in ADAPTERS.items():
            for shape, batch in BATCHES.items():
                what = f"{name}; {shape}"
                if options.only in what:
                    rows = measure(options, decoded, what, adapter, batch)
                    print("\n".join(rows), flush=True)
                    lines += rows
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="only rows that contain this, for instance 'LoRA r16'")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--peer", default=sys.executable, help="a Python that has torch, transformers, peft and gguf")
    parser.add_argument("--write", metavar="FILE", help="also write the table there, as Markdown")
    options = parser.parse_args()
    lines = run(options)
    if options.write:
        Path(options.write).write_text("# Training speed beside PyTorch\n\n" + "\n".join(lines) + "\n\n" + METHOD)
    return 0


METHOD = """How: `make bench-train`. A step is forward, backward, clipping to norm 1 and AdamW, on one batch of equal sequences,
so nothing is padding. PyTorch computes logits only for the tokens that are learned, as Medley does (its usual training loop
computes all), and its AdamW is the fused one. Variants: eager or sdpa attention; bf16 autocast; activations
recomputed as Medley does. The loss after the run shows that both learn the same: Medley's forward products have 8-bit
activations, and A begins with other random numbers.
"""


if __name__ == "__main__":
    sys.exit(main())
