"""Hang-ups, drains, and the limits of a server."""

import os
import shutil
import signal
import socket
import threading
import time

from server import adapter_files, eventually, model_file

LONG = {"prompt": "abc", "max_tokens": 480, "ignore_eos": True, "stream": True}


def leases(server, name):
    return sum(v["leases"] for v in server.call("GET", f"/v1/adapters/{name}").json()["versions"])


def test_a_hang_up_frees_the_sequence(start):
    """With room for one sequence, the next can only run when the first is gone."""
    server = start("--max-batch", "1", "--context", "512", "--cpu-level", "reference", "--threads", "1")
    server.upload("held", adapter_files("moe_topk"))
    for _ in range(5):
        connection, response = server.open("POST", "/v1/completions", {**LONG, "model": "held"})
        assert response.readline().startswith(b"data: ")
        assert leases(server, "held") == 1
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        response.close()
        eventually(lambda: leases(server, "held") == 0, "the hung-up request's lease is released")
        assert server.complete(prompt="x", max_tokens=2)["choices"]


def test_a_hang_up_while_waiting(start):
    server = start("--max-batch", "1")
    server.upload("waits", adapter_files("moe_topk"))
    running = server.stream("/v1/completions", **LONG)
    next(running)
    waiting = server.connect()
    body = b'{"prompt": "abc", "max_tokens": 400, "ignore_eos": true, "model": "waits"}'
    waiting.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    waiting.close()
    eventually(lambda: leases(server, "waits") == 0, "nobody holds the adapter")
    assert len(list(running)) > 0


def test_deleting_waits_for_nobody(start):
    server = start()
    server.upload("short", adapter_files("moe_topk"))
    expected = [e["choices"][0]["text"] for e in server.stream("/v1/completions", **{**LONG, "model": "short"})]
    running = server.stream("/v1/completions", **{**LONG, "model": "short"})
    texts = [next(running)["choices"][0]["text"]]
    assert server.call("DELETE", "/v1/adapters/short").status == 200
    texts += [e["choices"][0]["text"] for e in running]
    assert "".join(texts) == "".join(expected)
    assert server.call("POST", "/v1/completions", {"prompt": "a", "model": "short"}).status == 404


def test_sigterm_drains(start):
    server = start("--cpu-level", "reference", "--threads", "1")
    alone = "".join(e["choices"][0]["text"] for e in server.stream("/v1/completions", **LONG))
    streams = [server.stream("/v1/completions", **LONG) for _ in range(4)]
    texts = [next(s)["choices"][0]["text"] for s in streams]
    server.process.send_signal(signal.SIGTERM)

    def read(i):
        texts[i] += "".join(e["choices"][0]["text"] for e in streams[i])

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert texts == [alone] * 4
    assert server.process.wait(60) == 0


def test_sigterm_when_idle(start):
    server = start()
    keep_alive = server.connect()
    keep_alive.request("GET", "/health")
    assert keep_alive.getresponse().read()
    began = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - began < 30, "an idle connection held the server up"
    keep_alive.close()


def test_a_full_queue_says_so(start):
    server = start("--max-batch", "1", "--max-queue", "2", "--cpu-level", "reference", "--threads", "1")
    running = server.stream("/v1/completions", **LONG)
    next(running)
    replies = []

    def ask():
        replies.append(server.call("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1}))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    list(running)
    assert len(replies) == 8
    refused = [r for r in replies if r.status == 429]
    assert refused and all(r.error["code"] and r.headers["retry-after"] for r in refused)
    assert all(r.status in (200, 429) for r in replies)


def test_one_connection_many_requests(start):
    server = start()
    connection = server.connect()
    for i in range(50):
        connection.request("POST", "/tokenize", b'{"content": "abc"}', {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200 and response.read()
    connection.close()


def test_the_command_line(start):
    import subprocess
    from server import BINARY, model_file

    for arguments in (["--version"], ["--help"], ["serve", "--help"]):
        done = subprocess.run([BINARY, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stdout and not done.stderr
    for arguments in ([], ["nothing"], ["serve"], ["serve", "--model"], ["serve", "--model", "/nowhere.gguf"],
                      ["serve", "--model", str(model_file("gqa_tied")), "--threads", "many"]):
        done = subprocess.run([BINARY, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode != 0 and done.stderr, arguments
    done = subprocess.run([BINARY, "generate", "--model", str(model_file("gqa_tied")), "--temperature", "0",
                           "--max-tokens", "8", "Hello"], capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stdout


def test_a_model_file_cut_short_while_it_is_in_use(start, tmp_path):
    """Nothing can be answered any more; why is said."""
    model = tmp_path / "model.gguf"
    shutil.copy(model_file("gqa_tied"), model)
    server = start("--cpu-level", "reference", model=model)
    os.truncate(model, 0)
    connection = server.connect()
    connection.request("POST", "/v1/completions", b'{"prompt": "abc"}', {"Content-Type": "application/json"})
    assert server.process.wait(60) == 1
    connection.close()
    assert "was cut short" in server.log
