"""Jobs by POST /v1/adapters/{name}/train: what they change, what they refuse, and who notices."""

import json
import struct
import threading
import time

import pytest

from server import adapter_files, eventually

EXAMPLES = [{"prompt": "The dog", "completion": " ran to the house"},
            {"prompt": "The cat", "completion": " sat on the house"},
            {"text": "The dog sat"}, {"prompt": "One", "completion": " two three four"}]
QUICK = {"steps": 6, "learning_rate": 0.02, "held_out": 0, "batch_tokens": 64}


def create(server, name, **body):
    reply = server.call("POST", "/v1/adapters", {"name": name, "r": 4, **body})
    assert reply.status == 201, reply.body
    return reply.json()["version"]


def train(server, name, **body):
    return server.call("POST", f"/v1/adapters/{name}/train", {"examples": EXAMPLES, **QUICK, **body})


def trained(server, name, **body):
    reply = train(server, name, wait=True, **body)
    assert reply.status == 200, reply.body
    job = reply.json()
    assert job["status"] == "succeeded", job
    return job


def job_of(server, job_id):
    return server.call("GET", f"/v1/fine_tuning/jobs/{job_id}").json()


def versions(server, name):
    return server.call("GET", f"/v1/adapters/{name}").json()["versions"]


def test_a_job_publishes_the_next_version(server):
    before = create(server, "learns")
    asked = {"prompt": "The dog", "max_tokens": 8, "logprobs": 1}
    untrained = server.complete(model="learns", **asked)
    job = trained(server, "learns", examples=EXAMPLES * 3, steps=30, held_out=0.25)
    assert (job["version_before"], job["step"], job["steps"]) == (before, 30, 30)
    assert job["examples"] == 9 and job["held_out"] == 3
    assert isinstance(job["loss_before"], float) and isinstance(job["loss_after"], float)
    assert job["fine_tuned_model"] == f"learns@{job['version_after']}"
    info = server.call("GET", "/v1/adapters/learns").json()
    assert info["version"] == job["version_after"] != before
    assert [v["source"] for v in info["versions"]][0] == "train"

    after = server.complete(model="learns", **asked)
    assert after["choices"] != untrained["choices"]
    old = server.complete(model=f"learns@{before}", **asked)
    assert old["choices"] == untrained["choices"]
    assert server.complete(model=job["fine_tuned_model"], **asked)["choices"] == after["choices"]

    back = server.call("POST", "/v1/adapters/learns/rollback", {"version": before})
    assert back.status == 200
    assert server.complete(model="learns", **asked)["choices"] == untrained["choices"]


def test_what_is_learnt_is_what_was_taught(server):
    create(server, "parrot", r=8)
    taught = [{"prompt": "The dog", "completion": " sat on the house"}]
    job = trained(server, "parrot", examples=taught, steps=60, learning_rate=0.005)
    said = server.complete(model="parrot", prompt="The dog", max_tokens=16)["choices"][0]
    assert said["text"] == " sat on the house", (said, job["loss"])
    assert said["finish_reason"] == "stop", "the end token is trained too"


def test_the_same_job_gives_the_same_version(server):
    results = []
    for name in ("same1", "same2"):
        create(server, name, num_experts=4, seed=3)
        results.append(trained(server, name, seed=11)["version_after"])
    create(server, "same3", num_experts=4, seed=3)
    assert results[0] == results[1] != trained(server, "same3", seed=12)["version_after"]


def test_a_mixture_tells_its_load(server):
    create(server, "mixture", num_experts=4, top_k=2, target_modules=["q_proj", "down_proj"])
    job = trained(server, "mixture", contrast=0.05)
    assert all(name.endswith((".q_proj", ".down_proj")) for name in job["expert_load"])
    assert all(len(v) == 4 and sum(v) == pytest.approx(2, abs=0.01) for v in job["expert_load"].values())
    routing = server.call("GET", "/v1/adapters/mixture/routing").json()["training"]
    assert routing["step"] == QUICK["steps"]
    assert -1 <= routing["similarity"] <= 1 and -1 <= routing["cohesion"] <= 1
    for site in routing["sites"]:
        assert sum(site["gate"]) == pytest.approx(1, abs=0.01) and sum(site["probability"]) == pytest.approx(1, abs=0.01)
    assert server.call("GET", "/v1/adapters/nobody/routing").status == 404


def test_a_stream_tells_every_step(server):
    create(server, "streamed", num_experts=2)
    events = stream_train(server, "streamed")
    assert events[0]["type"] == "job" and events[-1]["type"] == "done"
    steps = [e for e in events if e["type"] == "step"]
    assert [e["step"] for e in steps] == list(range(1, QUICK["steps"] + 1))
    for e in steps:
        assert {"loss", "cross_entropy", "balance", "contrast", "grad_norm", "learning_rate", "tokens_per_second"} <= set(e)
    assert set(steps[-1]["expert_load"]) == {f"{layer}.{p}" for layer in range(layers(steps[-1]))
                                             for p in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")}
    assert events[-1]["job"]["status"] == "succeeded"


def stream_train(server, name, **body):
    connection, response = server.open("POST", f"/v1/adapters/{name}/train",
                                       {"examples": EXAMPLES, **QUICK, "stream": True, **body})
    try:
        assert response.status == 200, response.read()
        lines = [line[6:].strip() for line in response if line.startswith(b"data: ")]
    finally:
        connection.close()
    assert lines[-1] == b"[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def layers(step):
    return 1 + max(int(site.split(".")[0]) for site in step["expert_load"])


def test_a_job_goes_on_without_its_client(server):
    create(server, "orphan")
    connection, response = server.open("POST", "/v1/adapters/orphan/train",
                                       {"examples": EXAMPLES, **QUICK, "steps": 40, "stream": True})
    job_id = response.headers["x-training-job"]
    response.read(20)
    connection.close()
    eventually(lambda: job_of(server, job_id)["status"] == "succeeded", "the job ended")
    assert versions(server, "orphan")[0]["version"] == job_of(server, job_id)["version_after"]


def test_cancel_publishes_nothing(server):
    before = create(server, "cancelled")
    reply = train(server, "cancelled", steps=100000)
    assert reply.status == 202
    job = reply.json()
    eventually(lambda: job_of(server, job["id"])["step"] > 2, "it runs")
    reply = server.call("POST", f"/v1/fine_tuning/jobs/{job['id']}/cancel")
    assert reply.status == 200 and (reply.json()["cancel_asked"] or reply.json()["status"] == "cancelled")
    eventually(lambda: job_of(server, job["id"])["status"] == "cancelled", "it is cancelled")
    assert [v["version"] for v in versions(server, "cancelled")] == [before]
    assert server.call("POST", f"/v1/fine_tuning/jobs/{job['id']}/cancel").status == 200


def test_publishing_by_hand(server):
    before = create(server, "manual")
    job = trained(server, "manual", publish="manual")
    assert job["version_after"] is None and job["can_publish"] and job["fine_tuned_model"] is None
    assert [v["version"] for v in versions(server, "manual")] == [before]
    reply = server.call("POST", "/v1/adapters/manual/publish", {"job": job["id"], "expected_version": "0" * 16})
    assert reply.status == 409
    other = create(server, "manual-other")
    assert server.call("POST", "/v1/adapters/manual-other/publish", {"job": job["id"]}).status == 404
    reply = server.call("POST", "/v1/adapters/manual/publish", {"job": job["id"], "expected_version": before})
    assert reply.status == 200 and reply.json()["version_after"] == versions(server, "manual")[0]["version"]
    assert [v["version"] for v in versions(server, "manual-other")] == [other]


def test_a_key_finds_its_job(server):
    create(server, "keyed")
    first, second = (train(server, "keyed", idempotency_key="k1").json() for _ in range(2))
    assert first["id"] == second["id"]
    reply = train(server, "keyed", idempotency_key="k1", steps=7)
    assert reply.status == 409 and reply.headers["x-should-retry"] == "false"


def test_jobs_of_an_adapter_are_listed(server):
    create(server, "listed")
    ids = [trained(server, "listed", seed=i, steps=1)["id"] for i in range(3)]
    page = server.call("GET", "/v1/adapters/listed/jobs?limit=2").json()
    assert [j["id"] for j in page["data"]] == ids[:0:-1] and page["has_more"]
    page = server.call("GET", f"/v1/adapters/listed/jobs?after={page['last_id']}").json()
    assert [j["id"] for j in page["data"]] == ids[:1] and not page["has_more"]
    assert server.call("DELETE", f"/v1/fine_tuning/jobs/{ids[0]}").json()["deleted"]
    assert server.call("GET", f"/v1/fine_tuning/jobs/{ids[0]}").status == 404


def test_refusals(server):
    create(server, "refused")
    long = [{"prompt": "The dog", "completion": " ran" * 3000}]
    for body, param, word in [
            ({"examples": []}, "examples", "empty"), ({"examples": "x"}, "examples", "array"),
            ({"examples": EXAMPLES * 4 + [{"prompt": "a"}]}, "examples", "line 17"),
            ({"examples": EXAMPLES * 4 + [7]}, "examples", "line 17"),
            ({"examples": [{"messages": [{"role": "wizard", "content": "x"}]}]}, "examples", "wizard"),
            ({"examples": long}, "examples", "line 1"),
            ({"learning_rate": "fast"}, "learning_rate", "learning_rate"),
            ({"learning_rate": -1}, "learning_rate", "learning_rate"), ({"steps": 1.5}, "steps", "steps"),
            ({"learningrate": 1}, "learningrate", "learningrate"), ({"publish": "never"}, "publish", "publish"),
            ({"loss": "hinge"}, "loss", "loss"), ({"loss": "dpo"}, "examples", "dpo")]:
        reply = train(server, "refused", **body)
        assert (reply.status, reply.error["param"]) == (400, param), (body, reply.body)
        assert word in reply.error["message"], reply.body
    assert train(server, "nobody").status == 404
    assert train(server, "nobody").error["code"] == "model_not_found"
    assert train(server, "refused", version="0123456789abcdef").status == 404
    reply = train(server, "refused", expected_version="0123456789abcdef")
    assert reply.status == 409
    assert len(versions(server, "refused")) == 1
    reply = server.call("POST", "/v1/adapters/refused/train", b'{"examples": [{]}', {"Content-Type": "application/json"})
    assert reply.status == 400


def enormous(tensors):
    """The same safetensors file with all numbers at 1e30: finite, but no product of two of them is."""
    size = struct.unpack("<Q", tensors[:8])[0]
    header = json.loads(tensors[8:8 + size])
    assert all(t["dtype"] == "F32" for name, t in header.items() if name != "__metadata__")
    return tensors[:8 + size] + struct.pack("<f", 1e30) * ((len(tensors) - 8 - size) // 4)


def test_a_loss_that_is_not_finite_publishes_nothing(server):
    files = adapter_files("lora_gqa_tied")
    files["adapter_model.safetensors"] = enormous(files["adapter_model.safetensors"])
    reply = server.upload("infinite", files)
    assert reply.status == 201, reply.body
    job = train(server, "infinite", wait=True).json()
    assert job["status"] == "failed" and "not finite" in job["error"]["message"] and "step 1" in job["error"]["message"], job
    assert [v["version"] for v in versions(server, "infinite")] == [reply.json()["version"]]


def test_streams_do_not_notice(server):
    """Texts of running answers are the same to the bit with a job beside them, of another tenant's adapter or their own."""
    create(server, "beside", num_experts=4)
    trained(server, "beside", steps=10)
    name = f"beside@{versions(server, 'beside')[0]['version']}"

    def texts():
        out = {}

        def one(i):
            out[i] = server.complete(prompt=f"The dog {i}", max_tokens=60, seed=i, temperature=0.8, logprobs=1, ignore_eos=True,
                                     model=name if i % 2 else server.name)["choices"]
        threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        return out

    alone = texts()
    job = train(server, "beside", steps=100000).json()
    eventually(lambda: job_of(server, job["id"])["step"] > 0, "it runs")
    step = job_of(server, job["id"])["step"]
    assert texts() == alone
    eventually(lambda: job_of(server, job["id"])["step"] > step, "it went on")
    assert server.call("POST", f"/v1/fine_tuning/jobs/{job['id']}/cancel").status == 200


def test_jobs_survive_kill_9(start):
    server = start("--kv-type", "f32")
    create(server, "alone", num_experts=2, seed=1)
    whole = trained(server, "alone", steps=40, checkpoint_steps=5)
    create(server, "killed", num_experts=2, seed=1)
    job = train(server, "killed", steps=40, checkpoint_steps=5).json()
    eventually(lambda: job_of(server, job["id"])["step"] > 7, "it has a checkpoint", 300)
    server.kill()
    server = start("--kv-type", "f32", data=server.data)
    eventually(lambda: job_of(server, job["id"])["status"] == "succeeded", "it went on", 300)
    assert job_of(server, job["id"])["version_after"] == whole["version_after"]


def test_sigterm_does_not_wait_for_jobs(start):
    server = start()
    create(server, "long")
    answer = {}
    waiter = threading.Thread(target=lambda: answer.update(
        reply=train(server, "long", steps=1000000, wait=True)))
    waiter.start()
    eventually(lambda: server.call("GET", "/v1/adapters/long/jobs").json()["data"][:1] and
               server.call("GET", "/v1/adapters/long/jobs").json()["data"][0]["step"] > 0, "it runs")
    began = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - began < 25, "it waited for the drain to be over"
    waiter.join()
    assert answer["reply"].status == 503 and answer["reply"].error["code"] == "shutting_down"


def test_no_training(start):
    server = start("--no-training")
    assert server.call("POST", "/v1/adapters", {"name": "a"}).status == 201
    for method, path, body in [("POST", "/v1/adapters/a/train", {"examples": EXAMPLES}), ("GET", "/v1/fine_tuning/jobs", None),
                               ("POST", "/v1/adapters/a/optim_step", {}), ("GET", "/v1/files", None)]:
        reply = server.call(method, path, body)
        assert reply.status == 400 and "--no-training" in reply.error["message"]
