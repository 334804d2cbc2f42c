#!/usr/bin/env python3
"""Runs every test program that is built, then the end-to-end tests, and adds up what they say.

usage: run.py [--variant NAME[,NAME]] [--only unit|kernels|fuzz|python] [--match TEXT]

A variant is a build: release, address, undefined or thread (`make SAN=... tests` makes one). The
thread variant runs only programs that use threads. Each program reports its own count, in cmocka's,
pytest's or the plain form `N passed, N failed`; one that reports none counts as one check.
The last line of the output is the sum: `N passed, N failed`.
"""
import argparse
import concurrent.futures
import glob
import os
import re
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOLDERS = {"release": "build", "address": "build/san-address", "undefined": "build/san-undefined",
           "thread": "build/san-thread"}
THREADED = ("test_device", "test_engine", "test_grad", "test_grad_routing", "test_log", "test_pack",
            "test_pack_file", "test_pool", "test_prefix_cache", "test_registry_residency", "test_routed_ffn",
            "test_site_group", "test_training_jobs", "test_training_pass",
            "test_training_restarts", "test_training_sessions", "test_turns")
TIMEOUT_S = 900
CMOCKA = tuple(re.compile(rf"^\[  {word} \] (\d+) test", re.M) for word in ("PASSED ", "FAILED ", "SKIPPED"))
PLAIN = tuple(re.compile(pattern) for pattern in (r"(\d+) passed", r"(\d+) (?:failed|error)", r"(\d+) skipped"))


def counts(text, exit_code):
    """(passed, failed, skipped) of one program's output; a failing exit is never without a failure."""
    for patterns in (CMOCKA, PLAIN):
        found = [p.findall(text) for p in patterns]
        if any(found):
            passed, failed, skipped = (sum(map(int, f)) if patterns is CMOCKA else int(f[-1]) if f else 0
                                       for f in found)
            break
    else:
        passed, failed, skipped = int(exit_code == 0), 0, 0
    if exit_code != 0:
        failed = max(failed, 1)
    return passed, failed, skipped


def environment():
    env = dict(os.environ)
    cache = env.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    env.setdefault("MEDLEY_TEST_MODEL",
                   os.path.join(cache, "medley/models/SmolLM2-135M-Instruct.Q4_1.gguf"))
    env["MEDLEY_TEST_FIXTURES"] = os.path.join(ROOT, "tests/fixtures")
    env["ASAN_OPTIONS"] = "detect_leaks=1:strict_string_checks=1:allocator_may_return_null=1"
    env["UBSAN_OPTIONS"] = "print_stacktrace=1"
    env["TSAN_OPTIONS"] = "second_deadlock_stack=1"
    return env


def run(label, command, env):
    start = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, timeout=TIMEOUT_S,
                              stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        text, code = done.stdout.decode("utf-8", "replace"), done.returncode
    except subprocess.TimeoutExpired as e:
        text, code = (e.stdout or b"").decode("utf-8", "replace") + f"\nno end after {TIMEOUT_S} s", -1
    return label, text, code, time.monotonic() - start


def programs(variant, only):
    folder = os.path.join(ROOT, FOLDERS[variant])
    kinds = {"unit": "tests/unit/test_*", "kernels": "tests/kernels/checkkernels", "fuzz": "tests/fuzz/fuzz_*"}
    for kind, pattern in kinds.items():
        if only and kind != only:
            continue
        for path in sorted(glob.glob(os.path.join(folder, pattern))):
            name = os.path.basename(path)
            if "." in name or (variant == "thread" and name not in THREADED):
                continue
            yield f"{variant:9} {kind}/{name}", [path]


class Tally:
    def __init__(self):
        self.passed = self.failed = self.skipped = 0

    def add(self, label, text, code, seconds):
        passed, failed, skipped = counts(text, code)
        self.passed += passed
        self.failed += failed
        self.skipped += skipped
        mark = "FAIL" if failed else "ok  "
        print(f"{mark} {label:45} {passed:6} passed {failed:4} failed {seconds:7.1f} s", flush=True)
        if failed:
            print(text, flush=True)

    def __str__(self):
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        return f"{self.passed} passed, {self.failed} failed{skipped}"


def run_programs(tally, jobs, env):
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for result in pool.map(lambda job: run(*job, env), jobs):
            tally.add(*result)


def python_jobs(variants):
    """The end-to-end tests against the release server, and the hostile ones against the
    address-sanitized one as well."""
    for variant, targets in (("release", ["tests"]), ("address", ["tests/e2e/test_hostile.py"])):
        medley = os.path.join(ROOT, FOLDERS[variant], "medley")
        if variant in variants and os.path.exists(medley):
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *targets]
            yield f"{variant:9} pytest {' '.join(targets)}", command, medley


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variant", default="release,address,undefined,thread")
    parser.add_argument("--only", choices=["unit", "kernels", "fuzz", "python"])
    parser.add_argument("--match", default="", help="only programs whose label contains this")
    options = parser.parse_args()
    variants = options.variant.split(",")

    tally, env = Tally(), environment()
    jobs = [] if options.only == "python" else [
        job for v in variants for job in programs(v, options.only) if options.match in job[0]]
    run_programs(tally, jobs, env)
    suites = [] if options.only not in (None, "python") else [
        job for job in python_jobs(variants) if options.match in job[0]]
    for label, command, medley in suites:
        tally.add(*run(label, command, dict(env, MEDLEY_BIN=medley)))
    if not jobs and not suites:
        print("Nothing was run: build the tests first (make tests).")
        tally.failed += 1
    print(tally)
    return 1 if tally.failed else 0


if __name__ == "__main__":
    sys.exit(main())
