#!/usr/bin/env python3
"""Adapters are replaced while streams decode with them: 32 streams over 16 adapters, each adapter replaced several
times a second by the next of its versions. There are more of these than the server keeps, so that whatever comes
is new to it: it has forgotten those before.

Asserted: no request and no upload fails; every answer is, token for token, what exactly one version gives alone;
no lease is left; the server ends in order. Reported: gaps between tokens with swaps next to those without, of
the same run by turns, and memory.

usage: swap.py [--seconds N] [--streams N] [--adapters N] [--versions N] [--keep N] [--rate N] [--model FILE]
"""

import argparse
import http.client
import multiprocessing
import os
import sys
import threading
import time

from load import (PROMPTS, AdapterPool, Load, Machine, Memory, ask, leases, machine, percentile, print_table, run)
from server import SMOLLM2

UPLOADERS = 16  # connections of the swapping client: each adapter's owner has one
CLIENT_NICENESS = 10
SLICES = 12  # by turns without swaps and with them
WARM_UP_S = 3  # before the first
LONGEST = 1.5  # answers, of --tokens: equal ones would end together and fill a step with prompts
PROMPTS_USED = PROMPTS[:2]


def upload(connection, pool, name, index):
    """The error, or None. The connection stays open for the next."""
    headers, pieces = pool.form(index)
    try:
        connection.request("PUT", f"/v1/adapters/{name}", iter(pieces), headers)
        response = connection.getresponse()
        answer = response.read()
        return None if response.status == 200 else f"upload: {response.status} {answer[:200]!r}"
    except (OSError, http.client.HTTPException) as e:
        connection.close()
        return f"upload: {type(e).__name__}: {e}"


def upload_for_ever(server, pool, options, seed, swapping, counts, failures):
    names = range(seed, options.adapters, UPLOADERS)
    connection = server.connect()
    turn, due, phase = 0, 0, seed / UPLOADERS / options.rate  # not all of them at once
    while swapping["on"] is not None:
        if not swapping["on"]:
            connection.close()  # the server ends idle ones; the next request opens it again
            time.sleep(0.01)
            due = time.monotonic() + phase
            continue
        if (wait := due - time.monotonic()) > 0:
            time.sleep(wait)
            continue
        turn += 1
        for i in names:
            error = upload(connection, pool, f"adapter-{i}", i * options.versions + turn % options.versions)
            if error:
                failures.append(error)
            else:
                counts.append(time.monotonic())
        due += 1 / options.rate


def swapper(server, pool, options, pipe):
    """A process of its own, so that its work delays no stream's clock, and a humble one: elsewhere clients have
    machines of their own. Obeys True (swap), False (pause), None (end)."""
    os.nice(CLIENT_NICENESS)
    swapping, counts, failures = {"on": False}, [], []
    threads = [threading.Thread(target=upload_for_ever,
                                args=(server, pool, options, k, swapping, counts, failures), daemon=True)
               for k in range(UPLOADERS)]
    for t in threads:
        t.start()
    while swapping["on"] is not None:
        swapping["on"] = pipe.recv()
    for t in threads:
        t.join()
    pipe.send((len(counts), failures))


def run_slices(seconds, pipe, memory, cores):
    """The (begin, end, swaps?) of each slice."""
    slices = []
    for k in range(SLICES):
        begin, swaps = time.monotonic(), k % 2 == 1
        pipe.send(swaps)
        while time.monotonic() - begin < seconds / SLICES:
            time.sleep(0.25)
            memory.sample()
        cores.end_slice(swaps)
        slices.append((begin, time.monotonic(), swaps))
    pipe.send(None)
    return slices


def longest(options):
    return int(LONGEST * options.tokens)


def question(options, rng):
    return (f"adapter-{rng.randrange(options.adapters)}", rng.randrange(len(PROMPTS_USED)),
            rng.randint(options.tokens, longest(options)))


def solo_outputs(server, pool, options, wanted):
    """{(adapter, prompt): {version: tokens}} of each version alone. wanted: {(version, prompt): how many}"""
    outputs = {}
    for i in range(options.adapters):
        for k in range(options.versions):
            version = server.upload(f"adapter-{i}", pool.files(i * options.versions + k)).json()["version"]
            for prompt in range(len(PROMPTS_USED)):
                tokens = wanted.get((f"adapter-{i}@{version}", prompt))
                if not tokens:
                    continue
                answer = ask(server, f"adapter-{i}", prompt, tokens)
                assert not answer.error and answer.version == f"adapter-{i}@{version}", answer.error
                outputs.setdefault((f"adapter-{i}", prompt), {})[version] = answer.tokens
    return outputs


def compare(answers, outputs):
    """(answers that are not their version's, answers that could be of two versions)"""
    wrong = ambiguous = 0
    for a in answers:
        name, version = a.version.split("@")
        by_version = outputs[name, a.prompt]  # each as long as the longest answer of that version
        wrong += by_version.get(version, [])[:a.wanted] != a.tokens
        ambiguous += sum(alone[:a.wanted] == a.tokens[:len(alone)] for alone in by_version.values()) > 1
    return wrong, ambiguous


def gaps_within(answers, slices, swaps):
    """Milliseconds between tokens that came within slices of a kind."""
    spans = [(begin, end) for begin, end, kind in slices if kind == swaps]
    return [1000 * gap for a in answers for when, gap in a.gaps() if any(b <= when < e for b, e in spans)]


def spread(answers, slices, swaps, p):
    """The least and the most that a percentile is within one slice of a kind."""
    each = [percentile(gaps_within(answers, [s], swaps), p) for s in slices if s[2] == swaps]
    return f"{min(each):.0f} to {max(each):.0f} ms"


def print_times(options, pool, started, cores, slices, answers, uploads):
    quiet, swapped = gaps_within(answers, slices, False), gaps_within(answers, slices, True)
    swap_s = sum(end - begin for begin, end, swaps in slices if swaps)
    quiet_s = sum(end - begin for begin, end, swaps in slices if not swaps)
    print_table([
        ("machine", started),
        *((f"a core's share that {who} took, without and with swaps",
           f"{100 * cores.shares(False)[k]:.0f}%, {100 * cores.shares(True)[k]:.0f}%")
          for k, who in enumerate(("other programs", "the host"))),
        ("load", f"{options.streams} streams over {options.adapters} adapters of {options.versions} versions, the last "
                 f"{options.keep} kept, {pool.size / 1e6:.1f} MB each; {options.tokens} to {longest(options)} tokens "
                 "an answer"),
        ("replaced", f"{uploads} times, {uploads / swap_s / options.adapters:.1f} times a second each"),
        ("tokens/s without and with swaps", f"{len(quiet) / quiet_s:.0f}, {len(swapped) / swap_s:.0f}"),
        *((f"gap between tokens, p{p}, without and with swaps",
           f"{percentile(quiet, p):.0f} ms, {percentile(swapped, p):.0f} ms, "
           f"{percentile(swapped, p) / percentile(quiet, p):.2f} x") for p in (50, 95, 99)),
        ("p99 of single slices, without and with swaps",
         f"{spread(answers, slices, False, 99)}, {spread(answers, slices, True, 99)}"),
        ("longest gap, without and with swaps", f"{max(quiet):.0f} ms, {max(swapped):.0f} ms"),
    ])


def soak(server, options):
    pool = AdapterPool(options.rank, options.experts, 2, options.adapters * options.versions)
    for i in range(options.adapters):
        reply = server.upload(f"adapter-{i}", pool.files(i * options.versions))
        assert reply.status == 201, reply.body
    memory, started = Memory(server.process.pid), machine()
    pipe, far = multiprocessing.Pipe()
    process = multiprocessing.Process(target=swapper, args=(server, pool, options, far), daemon=True)
    process.start()
    load = Load(server, options.streams, lambda rng: question(options, rng))
    time.sleep(WARM_UP_S)
    cores = Machine(server.process.pid, process.pid, os.getpid())
    slices = run_slices(options.seconds, pipe, memory, cores)
    uploads, upload_failures = pipe.recv()
    process.join()
    answers = load.stop()
    for a in answers:
        if not a.error and not a.version:
            a.error = "an answer without a version"
    good = [a for a in answers if not a.error]
    failures = upload_failures + [a.error for a in answers if a.error]
    left = leases(server)
    print_times(options, pool, started, cores, slices, good, uploads)
    wanted = {}
    for a in good:
        wanted[a.version, a.prompt] = max(a.wanted, wanted.get((a.version, a.prompt), 0))
    wrong, ambiguous = compare(good, solo_outputs(server, pool, options, wanted))
    print_table([
        ("answers", f"{len(answers)}, failed {len(failures)}"),
        ("versions that answered", len({a.version for a in good})),
        ("answers unlike their version alone", wrong),
        ("answers that two versions would give", ambiguous),
        ("resident memory at 1/6, 1/2 and the end",
         ", ".join(f"{memory.at(share):.0f}" for share in (1 / 6, 0.5, 1)) + " MiB"),
        ("leases left", left),
    ])
    for line in sorted(set(failures))[:10]:
        print(line)
    return [("a request or an upload failed", not failures),
            ("an answer is not its version's", not wrong),
            ("two versions answer alike, so the comparison proves nothing", not ambiguous),
            ("leases are left", left == 0),
            ("nothing was replaced", uploads > options.adapters)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--versions", type=int, default=12, help="that each adapter is replaced by, by turns")
    parser.add_argument("--keep", type=int, default=4, help="versions that the server keeps of each")
    parser.add_argument("--rate", type=float, default=3, help="replacements a second of each adapter")
    parser.add_argument("--tokens", type=int, default=32, help="of the shortest answers")
    parser.add_argument("--prefill-chunk", type=int, default=32, help="the server's: fewer than its 128 make steadier gaps")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--experts", type=int, default=4)
    options = parser.parse_args()
    return run(lambda server: soak(server, options), options, "--keep-versions", str(options.keep),
               "--prefill-chunk", str(options.prefill_chunk))


if __name__ == "__main__":
    sys.exit(main())
