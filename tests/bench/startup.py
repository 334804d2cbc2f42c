#!/usr/bin/env python3
"""Seconds from exec to the first token, with packed weights kept from an earlier start and with packing at each.

The first start of a model, which packs and leaves the file, is not counted; the model file and the kept one are in the
page cache. `generate` is timed to the first byte on its standard output, `serve` to the answer of one completion of one
token, sent once it is ready.

usage: startup.py [--model FILE]... [--threads N] [--rounds N]
"""

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MEDLEY = ROOT / "build/medley"
CACHE = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
MODEL = os.environ.get("MEDLEY_TEST_MODEL", f"{CACHE}/medley/models/SmolLM2-135M-Instruct.Q4_1.gguf")
PROMPT = "The capital of France is"
WAIT_S = 600

HEADER = ["| start to first token, seconds | packed weights kept | packed at the start |", "|---|---|---|"]


def start(command, model, threads, packs, *more):
    """packs: the folder of packed weights, or 'off'."""
    words = [MEDLEY, command, "--model", model, "--threads", threads, "--pack-cache", packs, *more]
    return subprocess.Popen([str(w) for w in words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def generate_seconds(model, threads, packs):
    began = time.perf_counter()
    process = start("generate", model, threads, packs, "--max-tokens", 1, "--temperature", 0, PROMPT)
    first = process.stdout.read(1)
    seconds = time.perf_counter() - began
    process.stdout.read()
    if process.wait() or not first:
        raise SystemExit(f"startup: medley generate fails for {model}")
    return seconds


def complete(url):
    host = url.split("//", 1)[1]
    connection = http.client.HTTPConnection(host, timeout=WAIT_S)
    connection.request("POST", "/v1/completions", json.dumps({"prompt": PROMPT, "max_tokens": 1}),
                       {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


def serve_seconds(model, threads, packs):
    with tempfile.TemporaryDirectory() as data:
        began = time.perf_counter()
        process = start("serve", model, threads, packs, "--data", data, "--listen", "127.0.0.1:0")
        try:
            url = None
            for line in process.stdout:
                words = line.decode().split()
                if words[:2] == ["listening", "on"]:
                    url = words[2]
                if words == ["ready"]:
                    break
            if url is None or complete(url) != 200:
                raise SystemExit(f"startup: medley serve fails for {model}")
            return time.perf_counter() - began
        finally:
            process.terminate()
            process.wait()


def rows(model, threads, rounds):
    """Markdown rows, medians of `rounds` starts of each kind by turns."""
    with tempfile.TemporaryDirectory() as packs:
        generate_seconds(model, threads, packs)
        for name, seconds in (("generate", generate_seconds), ("serve", serve_seconds)):
            kept, packed = [], []
            for _ in range(rounds):
                kept.append(seconds(model, threads, packs))
                packed.append(seconds(model, threads, "off"))
            yield (f"| {name}, {Path(model).name} | {statistics.median(kept):.2f} | "
                   f"{statistics.median(packed):.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="repeat for several; default: the default model")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print("\n".join(HEADER), flush=True)
    for model in options.model or [MODEL]:
        for row in rows(model, options.threads, options.rounds):
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
