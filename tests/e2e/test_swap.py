"""Adapters are uploaded, replaced and deleted while 16 streams decode: every stream's tokens are those of
exactly one version, the one its header names."""

import json
import random
import threading
from pathlib import Path

from server import adapter_files

FIXTURE_NAMES = ["lora_gqa_tied", "lora_rslora", "moe_topk", "moe_raw", "moe_dense"]
NAMES = ["alpha", "beta", "gamma", "delta"]
STREAMS = 16
REQUESTS = 12  # of each stream
PROMPT = [1, 300, 17, 401, 88, 259, 260] * 6  # long enough for pages of KV to be shared
TOKENS = 150


def body(model, stream):
    return {"prompt": PROMPT, "model": model, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, "stream": stream}


def solo_outputs(server):
    """By version, the tokens that it gives alone."""
    outputs = {}
    for fixture in FIXTURE_NAMES:
        name = f"solo-{fixture}"  # which shares nothing with the others
        version = server.upload(name, adapter_files(fixture)).json()["version"]
        outputs[version] = server.complete(**body(name, False))["choices"][0]["token_ids"]
        assert server.call("DELETE", f"/v1/adapters/{name}").status == 200
    assert len({tuple(o) for o in outputs.values()}) == len(FIXTURE_NAMES)
    return outputs


def run_stream(server, index, outputs, tally, failures):
    choose = random.Random(index)
    for _ in range(REQUESTS):
        name = choose.choice(NAMES)
        connection, response = server.open("POST", "/v1/completions", body(name, True))
        try:
            if response.status == 404:  # deleted at this moment
                tally["missing"] += 1
                response.read()
                continue
            assert response.status == 200, response.read()
            served, version = response.headers["x-adapter-version"].split("@")
            tokens = []
            for line in response:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    tokens += event["choices"][0].get("token_ids", [])
            assert served == name
            assert tokens == outputs[version], f"{name}@{version}: not that version's tokens"
            tally[version] = tally.get(version, 0) + 1
        except Exception as e:  # reported by the main thread
            failures.append(e)
            return
        finally:
            connection.close()


def churn(server, stop, counts):
    choose = random.Random(99)
    while not stop.is_set():
        name = choose.choice(NAMES)
        if choose.random() < 0.1:
            assert server.call("DELETE", f"/v1/adapters/{name}").status in (200, 404)
            counts["deleted"] += 1
        reply = server.upload(name, adapter_files(choose.choice(FIXTURE_NAMES)))
        assert reply.status in (200, 201), reply.body
        counts["put"] += 1


def test_streams_never_mix_versions(server):
    outputs = solo_outputs(server)
    for name in NAMES:
        server.upload(name, adapter_files(FIXTURE_NAMES[0]))
    stop, counts, failures = threading.Event(), {"put": 0, "deleted": 0}, []
    tally = {"missing": 0}
    churner = threading.Thread(target=churn, args=(server, stop, counts))
    streams = [threading.Thread(target=run_stream, args=(server, i, outputs, tally, failures))
               for i in range(STREAMS)]
    churner.start()
    for t in streams:
        t.start()
    for t in streams:
        t.join()
    stop.set()
    churner.join()
    print(tally, counts)
    assert not failures, failures[0]
    assert counts["put"] > 10 and len(tally) > 3, "nothing was swapped meanwhile"
    assert tally["missing"] < STREAMS * REQUESTS / 4
    for name in NAMES:
        versions = server.call("GET", f"/v1/adapters/{name}").json()["versions"]
        assert not any(v["leases"] for v in versions)


def threads_of(server):
    """{thread: (niceness, processor time in ticks)}"""
    found = {}
    for stat in Path(f"/proc/{server.process.pid}/task").glob("*/stat"):
        fields = stat.read_text().rsplit(")", 1)[1].split()
        found[stat.parent.name] = int(fields[16]), int(fields[11]) + int(fields[12])
    return found


def test_uploads_yield_to_the_engine(server):
    """Workers give way to the threads that compute, which must not inherit their niceness."""
    own = threads_of(server)[str(server.process.pid)][0]
    assert server.upload("alpha", adapter_files("moe_topk")).status in (200, 201)
    before = threads_of(server)
    assert own == 19 or any(niceness > own for niceness, _ in before.values())
    ticks = {}
    while max(ticks.values(), default=0) < 10:
        server.complete(**body("alpha", False))
        ticks = {t: used - before[t][1] for t, (_, used) in threads_of(server).items() if t in before}
    assert before[max(ticks, key=ticks.get)][0] == own
