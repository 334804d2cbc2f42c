#!/usr/bin/env python3
"""Far more adapters than memory has room for: 1,000 registered, room for 50, and a load that asks for them as
popularity goes (Zipf: the k-th most popular 1/k as often as the first).

Asserted: no request fails, as many adapters are resident as there is room for and no more, versions out of
memory and in again answer as before, no lease is left, the server ends in order. Reported: memory, the time to
the first token of adapters in memory and of those that had to be loaded, evictions, the longest wait.

usage: many_adapters.py [--seconds N] [--streams N] [--adapters N] [--room N] [--model FILE]
"""

import argparse
import bisect
import itertools
import random
import sys
import threading
import time

from load import AdapterPool, Load, Memory, ask, leases, machine, percentile, print_table, run
from server import SMOLLM2

RANK, EXPERTS, TOP_K = 8, 4, 2
UPLOADERS = 4
PROMPT = 0
PROBES = 24  # quiet requests, of each kind
CHECKED = 12  # adapters whose answers must be the same before the load and after


def register(server, pool, count, memory):
    """Uploads all; what failed."""
    failures = []

    def some(first):
        for i in range(first, count, UPLOADERS):
            reply = server.upload(f"adapter-{i}", pool.files(i))
            if reply.status != 201:
                failures.append(f"upload {i}: {reply.status} {reply.body[:200]!r}")

    threads = [threading.Thread(target=some, args=(k,)) for k in range(UPLOADERS)]
    for t in threads:
        t.start()
    while any(t.is_alive() for t in threads):
        memory.sample()
        time.sleep(0.2)
    return failures


def resident(server):
    return {a["name"] for a in server.call("GET", "/v1/adapters").json()["data"] if a["versions"][0]["resident"]}


def zipf(count, tokens):
    """A chooser of (model, prompt, tokens). Popularity has nothing to do with the order of upload."""
    order = list(range(count))
    random.Random(1).shuffle(order)
    sums = list(itertools.accumulate(1 / (k + 1) for k in range(count)))
    return lambda rng: (f"adapter-{order[min(count - 1, bisect.bisect(sums, rng.random() * sums[-1]))]}", PROMPT,
                        tokens)


def probe(server, count):
    """Milliseconds to the first token, one request at a time: of adapters that must be loaded, then of the same
    ones again."""
    cold, warm = [], []
    there = resident(server)
    names = [f"adapter-{i}" for i in range(count)]
    random.Random(2).shuffle(names)
    for name in [n for n in names if n not in there][:PROBES]:
        for times in (cold, warm):
            times.append(1000 * ask(server, name, PROMPT, 2).first_token_s)
    return cold, warm


def run_load(server, options, memory):
    """The answers, and evictions as far as samples of who is resident show them."""
    load = Load(server, options.streams, zipf(options.adapters, options.tokens))
    begin, most, left = time.monotonic(), 0, 0
    before = resident(server)
    while time.monotonic() - begin < options.seconds:
        time.sleep(0.5)
        memory.sample()
        now = resident(server)
        most, left, before = max(most, len(now)), left + len(before - now), now
    return load.stop(), most, left


def soak(server, options, pool):
    machine_name = machine()
    filling, loaded = Memory(server.process.pid), Memory(server.process.pid)
    empty, begin = filling.sample(), time.monotonic()
    failures = register(server, pool, options.adapters, filling)
    register_s = time.monotonic() - begin
    names = [f"adapter-{i * options.adapters // CHECKED}" for i in range(CHECKED)]
    before = [ask(server, n, PROMPT, options.tokens).tokens for n in names]
    answers, most, evicted = run_load(server, options, loaded)
    cold, warm = probe(server, options.adapters)
    after = [ask(server, n, PROMPT, options.tokens).tokens for n in names]
    good = [a for a in answers if not a.error]
    failures += [a.error for a in answers if a.error]
    first = [1000 * a.first_token_s for a in good]
    left, there = leases(server), len(resident(server))
    print_table([
        ("machine", machine_name),
        ("adapters", f"{options.adapters} MoELoRAs of {EXPERTS} experts of rank {RANK}, {pool.size / 1e6:.1f} MB "
                     f"each; room for {options.room}"),
        ("registering", f"{register_s:.0f} s, {1000 * register_s / options.adapters:.0f} ms each"),
        ("load", f"{options.streams} streams, Zipf, {options.tokens} tokens an answer, {options.seconds:.0f} s"),
        ("answers", f"{len(answers)} of {len({a.model for a in good})} adapters, failed {len(failures)}"),
        ("resident adapters at most, at the end", f"{most}, {there}"),
        ("evictions seen by samples, twice a second", evicted),
        ("resident memory: empty, all registered", f"{empty:.0f}, {filling.samples[-1]:.0f} MiB"),
        ("resident memory under load: start, middle, end, most",
         f"{loaded.at(0):.0f}, {loaded.at(0.5):.0f}, {loaded.at(1):.0f}, {max(loaded.samples):.0f} MiB"),
        ("first token, alone: loaded before, to be loaded",
         f"{percentile(warm, 50):.0f} ms, {percentile(cold, 50):.0f} ms (median of {len(cold)})"),
        ("first token under load: p50, p99, longest wait",
         f"{percentile(first, 50):.0f}, {percentile(first, 99):.0f}, {max(first):.0f} ms"),
        ("leases left", left),
    ])
    for line in sorted(set(failures))[:10]:
        print(line)
    return [("a request or an upload failed", not failures),
            ("more adapters are resident than there is room for", there <= options.room),
            ("nothing was evicted", evicted > 0),
            ("an adapter answers differently after it was out of memory", before == after),
            ("leases are left", left == 0)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--room", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=16)
    options = parser.parse_args()
    pool = AdapterPool(RANK, EXPERTS, TOP_K, options.adapters)
    # An adapter keeps its type in memory: its packed size is its file's, and a little for alignment.
    room = int(pool.size * (options.room + 0.5) * 1.01)
    return run(lambda server: soak(server, options, pool), options, "--adapter-bytes", str(room))


if __name__ == "__main__":
    sys.exit(main())
