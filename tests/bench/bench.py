#!/usr/bin/env python3
"""Speed of Medley beside llama.cpp, on the same files, in the same run.

Every figure is the median of --rounds measurements, ours and the peer's by turns; rows of a group take turns as well.
On a shared machine single figures move by half, ratios much less. A row that fails prints its error, and the others
go on. With the default rounds it takes about thirteen minutes on two cores; progress goes to standard error.

usage: bench.py [--threads N] [--rounds N] [--only TEXT] [--list] [--write FILE.md]
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import accuracy
import models
import startup
from engines import ROOT, Fleet
from rows import Roofs, makers

PAUSE_S = 0.15  # lets the other side's waiting threads go to sleep
HEAD = ["| what | weights | Medley | llama.cpp | | times better | of the roof | kept of its base | llama.cpp keeps |",
        "|---|---|---|---|---|---|---|---|---|"]
STARTED = time.monotonic()


def tell(text):
    minutes, seconds = divmod(int(time.monotonic() - STARTED), 60)
    print(f"bench {minutes:2d}:{seconds:02d}  {text}", file=sys.stderr, flush=True)


def machine():
    cpu = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
               platform.machine())
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores"


def roofs(threads):
    """(lines for people, Roofs)"""
    done = subprocess.run([str(ROOT / "build/tests/bench/bench_machine"), str(threads)], stdout=subprocess.PIPE,
                          text=True, check=True)
    one, all_, fp32, int8 = map(float, done.stdout.split())
    lines = ["| limit of this machine, in this run | |", "|---|---|",
             f"| memory read, 1 thread | {one / 1e9:.1f} GB/s |",
             f"| memory read, {threads} threads | {all_ / 1e9:.1f} GB/s |",
             f"| fp32, fused multiply-adds, {threads} threads | {fp32 / 1e9:.0f} G/s |",
             f"| int8, multiply-adds, {threads} threads | {int8 / 1e9:.0f} G/s |"]
    return lines, Roofs(all_, fp32, int8)


# ---------------------------------------------------------------- rows

def measure(fleet, group, rounds):
    """Fills the rows' values. A row that fails is left out from then on; its error comes back by row."""
    failed = {}
    for i in range(rounds):
        tell(f"{group.name}, round {i + 1} of {rounds}")
        for row in group.rows:
            if id(row) in failed:
                continue
            try:
                row.own_values.append(row.own())
                time.sleep(PAUSE_S)
                if row.peer:
                    row.peer_values.append(row.peer())
                    time.sleep(PAUSE_S)
            except Exception as e:  # whatever it is, the other rows go on
                failed[id(row)] = f"{type(e).__name__}: {e}"
                tell(f"{row.what}: {failed[id(row)]}")
                fleet.close(lambda model, process: process.dead)
    return failed


def number(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def kept(values, base):
    return f"{statistics.median(values) / statistics.median(base):.2f}" if values and base else ""


def line_of(row, limits):
    own = statistics.median(row.own_values)
    peer = statistics.median(row.peer_values) if row.peer_values else None
    better = (peer / own if row.less_is_better else own / peer) if peer else None
    cells = [row.what, row.model, number(own), number(peer) if peer else "", row.unit,
             f"{better:.2f}" if better else "",
             f"{100 * own / row.roof(limits):.0f} %" if row.roof and limits else "",
             kept(row.own_values, row.base.own_values) if row.base else "",
             kept(row.peer_values, row.base.peer_values) if row.base else ""]
    return f"| {' | '.join(cells)} |"


def run_group(fleet, make, rounds, limits):
    group = make()
    failed = measure(fleet, group, rounds)
    lines = []
    for row in group.rows:
        try:
            lines.append(f"| {row.what} | {row.model} | failed: {failed[id(row)]} | | | | | | |" if id(row) in failed
                         else line_of(row, limits))
        except Exception as e:
            lines.append(f"| {row.what} | {row.model} | failed: {type(e).__name__}: {e} | | | | | | |")
    return group, lines


def run_speed(fleet, chosen, rounds, limits, out):
    out(HEAD)
    for i, (name, make) in enumerate(chosen):
        tell(f"group {i + 1} of {len(chosen)}: {name}")
        try:
            group, lines = run_group(fleet, make, rounds, limits)
        except Exception as e:
            group, lines = None, [f"| {name} | | failed: {type(e).__name__}: {e} | | | | | | |"]
        out(lines)
        if group and group.last:
            fleet.close(lambda model, process: model in group.models)


# ---------------------------------------------------------------- the rest

def run_accuracy(fleet, out):
    out(["", f"Error against fp32, over {accuracy.TOKENS} tokens of `docs/{accuracy.TEXT.name}`:", "", *accuracy.HEAD])
    for kind in models.TYPES:
        tell(f"accuracy {kind}")
        try:
            out([accuracy.row(fleet, kind)])
        except Exception as e:
            out([f"| {kind} | failed: {type(e).__name__}: {e} | | | | | | |"])


def run_start(threads, rounds, out):
    """Files are made or found one by one: without one the others go on."""
    out(["", "From the start of the process to the first token:", "", *startup.HEADER])
    for make in (lambda: models.DEFAULT, lambda: models.random_1b("Q4_0")):
        tell("start")
        try:
            for line in startup.rows(make(), threads, rounds):
                out([line])
        except (Exception, SystemExit) as e:
            out([f"| failed: {e} | | |"])


def run(options, out):
    if os.getloadavg()[0] > 0.5:
        tell(f"the load average is {os.getloadavg()[0]:.1f}: figures mean little beside other work")
    limits = None
    with tempfile.TemporaryDirectory() as folder:
        fleet = Fleet(options.threads, folder)
        groups = makers(fleet)
        chosen = [(name, make) for name, make in groups if options.only in name]
        out([f"{machine()}, {options.threads} threads; load average {os.getloadavg()[0]:.1f} at the start; medians of "
             f"{options.rounds} rounds.", ""])
        try:
            tell("the machine's limits")
            lines, limits = roofs(options.threads)
            out([*lines, ""])
        except Exception as e:
            out([f"The machine's limits could not be measured: {e}", ""])
        try:
            if chosen:
                run_speed(fleet, chosen, options.rounds, limits, out)
            if options.only in "accuracy":
                run_accuracy(fleet, out)
        finally:
            fleet.close()
    if options.only in "start":
        run_start(options.threads, options.rounds, out)
    tell("done")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", metavar="TEXT", help="only groups whose name contains this: see --list")
    parser.add_argument("--list", action="store_true", help="print the groups' names")
    parser.add_argument("--write", metavar="FILE", help="also write the tables there, as Markdown")
    options = parser.parse_args()
    if options.list:
        print("\n".join([name for name, _ in makers(None)] + ["accuracy", "start"]))
        return 0
    written = []

    def out(lines):
        print("\n".join(lines), flush=True)
        written.extend(lines)
        if options.write:  # after every group: what was measured stays if the run is cut short
            Path(options.write).write_text("# Speed beside llama.cpp\n\n" + "\n".join(written) + "\n\n" + METHOD)

    run(options, out)
    return 0


METHOD = (Path(__file__).parent / "method.md").read_text()


if __name__ == "__main__":
    sys.exit(main())
