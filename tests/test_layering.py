"""Who may include whom: the table of docs/architecture.md, read off every #include line.

Also: includes are rooted at the repository, nothing includes a .c file, libraries stay where
they belong, and every header compiles alone.
"""
import concurrent.futures
import fnmatch
import os
import re
import shlex
import subprocess

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# folder: what its files may include of the project, besides their own folder
ALLOWED = {
    "base": [],
    "kernels": ["base/*.h"],
    "adapters": ["base/*.h", "kernels/device.h", "kernels/lowrank.h"],
    "engine": ["base/*.h", "kernels/device.h", "kernels/lowrank.h", "adapters/view.h"],
    "training": ["base/*.h", "kernels/device.h", "kernels/lowrank.h", "kernels/grad.h", "engine/engine.h",
                 "engine/model.h", "engine/tokenizer.h", "engine/chat.h", "adapters/*.h"],
    "api": ["base/*.h"],
    "server": ["base/*.h", "api/*.h", "training/*.h", "engine/engine.h", "engine/tokenizer.h", "engine/chat.h",
               "adapters/convert.h", "adapters/export.h", "adapters/inspect.h", "adapters/reader.h", "adapters/registry.h", "adapters/view.h",
               "kernels/device.h"],
}
# One kernel table knows the CPU's table layout and itself, no other table and nothing of the device.
KERNEL_TABLES = ("reference", "avx2", "avxvnni", "avx512")
TABLE_ALLOWED = ["base/*.h", "kernels/device.h", "kernels/lowrank.h", "kernels/cpu/kernels.h"]
# A faster table starts as a copy of the one below it and may call its helpers.
TABLE_BELOW = {"avx2": ["kernels/reference/*.h"], **{table: ["kernels/avx2/*.h", "kernels/avx2/*.inc", "kernels/reference/*.h"]
                                                     for table in ("avxvnni", "avx512")}}

# header of a library: the folders that may include it
LIBRARIES = {
    "cjson/*": {"base", "api", "adapters", "server", "training"},
    "sodium*": {"base", "adapters", "engine", "server", "training"},
    "sqlite3.h": {"adapters", "training"},
    "cblas.h": {"kernels"},
    "archive*.h": {"adapters"},
    "pcre2.h": {"engine", "adapters"},
    "uv.h": {"server"},
    "microhttpd.h": {"server"},
    "curl/*": {"server"},
}

INCLUDE = re.compile(r'^\s*#\s*include\s*(?:"([^"]+)"|<([^>]+)>)', re.M)


def matches(name, patterns):
    return any(fnmatch.fnmatchcase(name, p) for p in patterns)


def sources(root):
    for folder in ALLOWED:
        for path, _, names in os.walk(os.path.join(root, folder)):
            for name in sorted(names):
                if name.endswith((".c", ".h")):
                    yield os.path.relpath(os.path.join(path, name), root)


def may_include(source, target):
    parts = source.split("/")
    if parts[0] == "kernels" and parts[1] in KERNEL_TABLES:
        table = parts[1]
        return matches(target, TABLE_ALLOWED + TABLE_BELOW.get(table, []) + [f"kernels/{table}/*.h", f"kernels/{table}/*.inc"])
    return target.startswith(parts[0] + "/") or matches(target, ALLOWED[parts[0]])


def violations(root):
    found = []
    for source in sources(root):
        with open(os.path.join(root, source), encoding="utf-8") as f:
            text = f.read()
        for project, library in INCLUDE.findall(text):
            if project.endswith(".c"):
                found.append(f"{source} includes the source file {project}")
            elif project and not os.path.isfile(os.path.join(root, project)):
                found.append(f"{source} includes {project}, which is not a path from the repository's root")
            elif project and not may_include(source, project):
                found.append(f"{source} may not include {project}")
            for pattern, folders in LIBRARIES.items():
                if library and matches(library, [pattern]) and source.split("/")[0] not in folders:
                    found.append(f"{source} may not include <{library}>")
    return found


def test_the_table_is_kept():
    assert list(sources(ROOT)), "no sources were found"
    assert violations(ROOT) == []


@pytest.mark.parametrize("source, line, caught", [
    ("base/a.h", '#include "kernels/device.h"', True),
    ("base/a.h", "#include <uv.h>", True),
    ("kernels/cpu/a.c", '#include "engine/engine.h"', True),
    ("kernels/cpu/a.c", '#include "adapters/view.h"', True),
    ("kernels/avx2/a.c", '#include "kernels/cpu/pool.h"', True),
    ("kernels/reference/a.c", '#include "kernels/avx2/avx2.h"', True),
    ("kernels/avx2/a.c", '#include "kernels/reference/reference.h"', False),
    ("adapters/a.c", '#include "engine/engine.h"', True),
    ("adapters/a.c", '#include "kernels/cpu/kernels.h"', True),
    ("adapters/a.c", '#include "kernels/lowrank.h"', False),
    ("engine/a.c", '#include "adapters/view.h"', False),
    ("engine/a.c", '  #  include "adapters/registry.h"', True),
    ("engine/a.c", '#include "kernels/cpu/kernels.h"', True),
    ("api/a.c", '#include "engine/engine.h"', True),
    ("api/a.c", "#include <microhttpd.h>", True),
    ("server/a.c", '#include "engine/engine.h"', False),
    ("server/a.c", '#include "engine/step.h"', True),
    ("server/a.c", '#include "adapters/store.h"', True),
    ("server/a.c", "#include <uv.h>", False),
    ("engine/a.c", '#include "engine.h"', True),
    ("engine/a.c", '#include "engine/step.c"', True),
])
def test_a_planted_include_is_caught(tmp_path, source, line, caught):
    quoted = INCLUDE.match(line).group(1)
    for name, text in ((quoted, ""), (source, line + "\n")):
        if name and (name == source or "/" in name):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    assert bool(violations(str(tmp_path))) == caught


def compile_alone(header):
    flags = ["-mavx2", "-mfma", "-mf16c"] if "/avx" in header else []
    if "/avx512/" in header:
        flags += ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
    packages = subprocess.run(["pkg-config", "--cflags", "libcjson"], capture_output=True, text=True)
    command = [os.environ.get("CC", "cc"), "-std=c11", "-I.", "-D_GNU_SOURCE", *shlex.split(packages.stdout), *flags,
               "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-include", header, "-x", "c", os.devnull]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return "" if done.returncode == 0 else f"{header}:\n{done.stderr}"


def test_every_header_compiles_alone():
    headers = [s for s in sources(ROOT) if s.endswith(".h")]
    assert headers
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        assert [failure for failure in pool.map(compile_alone, headers) if failure] == []
