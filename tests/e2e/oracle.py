"""The expected logits of tests/fixtures/logits or formats, without packages beyond Python's own."""

import array
import functools
import json
import math

from server import FIXTURES


@functools.cache
def cases(folder="logits"):
    listed = json.loads((FIXTURES / folder / "cases.json").read_text())["cases"]
    return {case["name"]: case for case in listed}


@functools.cache
def _file(name, folder):
    data = (FIXTURES / folder / f"{name}.safetensors").read_bytes()
    header_size = int.from_bytes(data[:8], "little")
    return json.loads(data[8:8 + header_size]), memoryview(data)[8 + header_size:]


def rows(file, name, folder="logits"):
    """The rows of an F32 matrix."""
    header, data = _file(file, folder)
    entry = header[name]
    values = array.array("f")
    values.frombytes(data[slice(*entry["data_offsets"])])
    count, width = entry["shape"]
    return [values[r * width:(r + 1) * width] for r in range(count)]


def logprobs(name, folder="logits"):
    """Of one case: by position, the log-probability of each next token."""
    result = []
    for row in rows(cases(folder)[name]["model"], name, folder):
        top = max(row)
        total = top + math.log(math.fsum(math.exp(v - top) for v in row))
        result.append([v - total for v in row])
    return result


def best(row):
    return max(range(len(row)), key=row.__getitem__)


@functools.cache
def smollm2():
    return json.loads((FIXTURES / "logits" / "smollm2.json").read_text())["prompts"]
