"""The expected logits of tests/fixtures/logits, without packages beyond Python's own."""

import array
import functools
import json
import math

from server import FIXTURES


@functools.cache
def cases():
    listed = json.loads((FIXTURES / "logits" / "cases.json").read_text())["cases"]
    return {case["name"]: case for case in listed}


@functools.cache
def _tensors(model):
    data = (FIXTURES / "logits" / f"{model}.safetensors").read_bytes()
    header_size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + header_size])
    header.pop("__metadata__", None)
    return header, memoryview(data)[8 + header_size:]


def logprobs(name):
    """Of one case: by position, the log-probability of each next token."""
    header, data = _tensors(cases()[name]["model"])
    entry = header[name]
    values = array.array("f")
    values.frombytes(data[slice(*entry["data_offsets"])])
    rows, vocab = entry["shape"]
    result = []
    for r in range(rows):
        row = values[r * vocab:(r + 1) * vocab]
        top = max(row)
        total = top + math.log(math.fsum(math.exp(v - top) for v in row))
        result.append([v - total for v in row])
    return result


def best(row):
    return max(range(len(row)), key=row.__getitem__)


@functools.cache
def smollm2():
    return json.loads((FIXTURES / "logits" / "smollm2.json").read_text())["prompts"]
