"""Mutated requests and adapter files: each ends in an answer or a closed connection, an error has its whole shape,
and the server still answers afterwards. Run against a sanitized server too (MEDLEY_BIN).

A failure prints its seed: that number alone makes the same bytes again."""

import http.client
import json
import random
import socket

import pytest

from server import adapter_files, eventually, pack_multipart, pack_tar

BODIES = 1000
HTTP_BYTES = 250
UPLOADS = 1000
TRAININGS = 500

SEED_BODIES = [
    ("/v1/completions", {"prompt": "Hello, world", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "n": 2,
                         "seed": 12345678901234567890, "stop": ["a", "b"], "logit_bias": {"5": 1.5}, "logprobs": 2}),
    ("/v1/completions", {"prompt": [[1, 2, 3], [4, 5]], "max_tokens": 2, "stream": True, "echo": True,
                         "stream_options": {"include_usage": True}, "adapters": [{"name": "a", "weight": 0.5}]}),
    ("/v1/chat/completions", {"messages": [{"role": "system", "content": "x"},
                                           {"role": "user", "content": [{"type": "text", "text": "hé🙂"}]}],
                              "max_tokens": 2, "logprobs": True, "top_logprobs": 2, "model": "a"}),
    ("/tokenize", {"content": "some \u0001 text 漢字", "add_special": True, "with_pieces": True}),
    ("/detokenize", {"tokens": [1, 2, 3, 300, 400]}),
]
TRAINING_BODIES = [
    ("/v1/adapters", {"name": "fresh", "r": 2, "num_experts": 2, "top_k": 1, "lora_alpha": 4, "gate": "topk", "seed": 1,
                      "target_modules": ["q_proj", "v_proj"], "use_rslora": True, "description": "d"}),
    ("/v1/adapters/a/train", {"examples": [{"prompt": "The dog", "completion": " ran"}, {"text": "hé🙂"},
                                           {"tokens": [1, 2, 3], "weights": [0, 1, 0.5]}],
                              "steps": 1, "held_out": 0, "publish": "manual", "learning_rate": 0.001, "seed": 7}),
    ("/v1/adapters/a/forward_backward", {"examples": [{"text": "The dog"}], "balance": 0.1, "reduction": "sum"}),
    ("/v1/adapters/a/optim_step", {"learning_rate": 0.001, "beta1": 0.9, "clip": 1}),
    ("/v1/fine_tuning/jobs", {"model": "a", "training_file": "file-0", "suffix": "x", "method": {
        "type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1, "n_epochs": "auto", "batch_size": 2}}}, "metadata": {"k": "v"}}),
]
SPLICES = [b"\x00", b"\xff\xfe", b"\\u0000", b"\\ud800", b"1e999", b"-0", b"99999999999999999999", b"null", b"[]",
           b"{}", b'"', b"[[[[", b"\xf0\x9f\x98", b'"n":128,', b"true", b"-1", b"0.5"]


def mutate(data, choose):
    """One to four faults: a flipped bit, another byte, a cut, a copy, a splice, a swapped pair."""
    data = bytearray(data)
    for _ in range(choose.choice([1, 1, 2, 4])):
        at = choose.randrange(len(data)) if data else 0
        end = min(len(data), at + choose.choice([1, 2, 4, 8, 64]))
        kind = choose.randrange(7)
        if kind == 0 and data:
            data[at] ^= 1 << choose.randrange(8)
        elif kind == 1 and data:
            data[at] = choose.choice(b"\x00\xff\"{}[],:09-")
        elif kind == 2:
            del data[at:end]
        elif kind == 3:
            data[at:at] = data[at:end] * choose.choice([1, 2, 50])
        elif kind == 4:
            data[at:at] = choose.choice(SPLICES)
        elif kind == 5:
            del data[at:]
        elif kind == 6 and data:
            other = choose.randrange(len(data))
            data[at], data[other] = data[other], data[at]
    return bytes(data)


def check_alive(server):
    assert server.process.poll() is None, f"the server ended:\n{server.log[-8000:]}"
    assert server.call("GET", "/health").status == 200


def check_reply(reply, allowed):
    assert reply.status in allowed, (reply.status, reply.body[:500])
    if reply.status >= 400:
        assert reply.error


@pytest.fixture(scope="module", autouse=True)
def adapter_a(server):
    assert server.upload("a", adapter_files("moe_raw")).status == 201
    yield
    check_alive(server)
    again = server.complete(prompt="Hello", max_tokens=4, model="a")
    assert again["usage"]["completion_tokens"] >= 1


def post_mutations(server, bodies, count, allowed):
    answered = 0
    for seed in range(count):
        choose = random.Random(seed)
        path, body = bodies[seed % len(bodies)]
        data = mutate(json.dumps(body, ensure_ascii=False).encode(), choose)
        try:
            reply = server.call("POST", path, data, {"Content-Type": "application/json"})
            check_reply(reply, allowed)
        except (AssertionError, http.client.HTTPException, OSError) as e:
            raise AssertionError(f"seed {seed}, {path} {data[:300]!r}: {e}\n{server.log[-4000:]}") from e
        answered += reply.status < 300
    check_alive(server)
    assert 0 < answered < count  # some mutations are harmless, most are not


def test_mutated_bodies(server):
    post_mutations(server, SEED_BODIES, BODIES, {200, 400, 404, 413, 429})


def test_mutated_training(server):
    """What was asked for by chance may run long: it is cancelled in the end."""
    try:
        post_mutations(server, TRAINING_BODIES, TRAININGS, {200, 201, 202, 400, 404, 409, 413, 422, 429})
    finally:
        for job in server.call("GET", "/v1/fine_tuning/jobs?limit=1000").json()["data"]:
            server.call("POST", f"/v1/fine_tuning/jobs/{job['id']}/cancel")


def http_request(choose):
    path, body = choose.choice(SEED_BODIES)
    text = json.dumps(body).encode()
    head = (f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer x\r\nX-Request-Id: abc\r\nContent-Length: {len(text)}\r\n\r\n").encode()
    return mutate(head, choose) + text


def send_and_listen(server, data):
    """Sends, ends our side (so that a length that is too large ends the request too), and reads what comes. A
    connection on which the server waits for the rest of something is left to its idle limit."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=0.1) as s:
        try:
            s.sendall(data)
            s.shutdown(socket.SHUT_WR)
            while s.recv(65536):
                pass
        except (ConnectionError, TimeoutError):
            pass


def test_mutated_http(server):
    """Whatever the head of a request is, the worst that happens is that this connection ends."""
    for seed in range(HTTP_BYTES):
        data = http_request(random.Random(seed))
        try:
            send_and_listen(server, data)
            if seed % 20 == 0:
                check_alive(server)
        except (AssertionError, OSError) as e:
            raise AssertionError(f"seed {seed}: {data[:400]!r}: {e}\n{server.log[-4000:]}") from e
    check_alive(server)


def mutated_upload(seed, choose):
    """(content type, body, whether it is worth using afterwards)"""
    files = adapter_files(["moe_raw", "lora_gqa_tied", "moe_dense"][seed % 3])
    where = choose.randrange(4)
    if where == 0:
        files["adapter_config.json"] = mutate(files["adapter_config.json"], choose)
    elif where == 1:  # the header of the tensors
        tensors = files["adapter_model.safetensors"]
        size = 8 + int.from_bytes(tensors[:8], "little")
        files["adapter_model.safetensors"] = mutate(tensors[:size], choose) + tensors[size:]
    elif where == 2:  # anywhere in them
        files["adapter_model.safetensors"] = mutate(files["adapter_model.safetensors"], choose)
    kind, body = choose.choice([pack_multipart, pack_tar, lambda f: pack_tar(f, "gz")])(files)
    if where == 3:  # the envelope
        head = choose.choice([len(body), 600])
        body = mutate(body[:head], choose) + body[head:]
    return kind, body


def test_mutated_uploads(server):
    accepted = 0
    for seed in range(UPLOADS):
        choose = random.Random(seed)
        kind, body = mutated_upload(seed, choose)
        try:
            reply = server.call("PUT", "/v1/adapters/mutant", body, {"Content-Type": kind})
            check_reply(reply, {200, 201, 400, 413, 422})
            if reply.status < 300:  # finite weights may still overflow in use, which is said clearly
                accepted += 1
                answer = server.call("POST", "/v1/completions", {"prompt": "abc", "max_tokens": 3, "model": "mutant"})
                check_reply(answer, {200, 422})
        except (AssertionError, http.client.HTTPException, OSError) as e:
            raise AssertionError(f"seed {seed}: {e}\n{server.log[-4000:]}") from e
    check_alive(server)
    assert 0 < accepted < UPLOADS
    eventually(lambda: not list((server.data / "staging").iterdir()), "what was refused is gone")


def test_cut_uploads(server):
    """The client goes away in the middle of an upload."""
    kind, body = pack_tar(adapter_files("moe_topk"))
    for seed in range(100):
        choose = random.Random(seed)
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as s:
            s.sendall(f"PUT /v1/adapters/cut HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
                      f"Content-Length: {len(body)}\r\n\r\n".encode() + body[:choose.randrange(len(body))])
    check_alive(server)
    assert server.call("GET", "/v1/adapters/cut").status == 404
