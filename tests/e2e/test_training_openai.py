"""Fine-tuning by the official client, unchanged."""

import io
import json

import openai
import pytest

from server import eventually

ROWS = [{"prompt": "The dog", "completion": " ran to the house"}, {"prompt": "The cat", "completion": " sat"}]


def jsonl(rows):
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def upload(client, data=jsonl(ROWS * 4), name="examples.jsonl"):
    return client.files.create(file=(name, data), purpose="fine-tune")


def finished(client, job):
    def look():
        return client.fine_tuning.jobs.retrieve(job.id).status in ("succeeded", "failed", "cancelled")
    eventually(look, "the job ended", 60)
    return client.fine_tuning.jobs.retrieve(job.id)


def test_files(client, server):
    data = jsonl(ROWS)
    file = upload(client, data, "some/where/exämple.jsonl")
    assert file.bytes == len(data) and file.filename == "exämple.jsonl" and file.purpose == "fine-tune"
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == data
    assert file.id in [f.id for f in client.files.list(purpose="fine-tune")]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_files_page_by_page(client):
    ids = [upload(client, name=f"{i}.jsonl").id for i in range(5)]
    listed = [f.id for f in client.files.list(limit=2)]
    assert listed[:5] == ids[::-1]


def test_large_files_go_through(client):
    data = jsonl(ROWS) * 60000
    file = upload(client, data)
    assert file.bytes == len(data) > 5e6
    assert client.files.content(file.id).read() == data
    client.files.delete(file.id)


def test_files_too_large_are_refused(start):
    server = start("--train-file-bytes", "1M")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as c:
        assert upload(c, b"x" * (1 << 20)).bytes == 1 << 20
        for size in ((1 << 20) + 1, 3 << 20):
            with pytest.raises(openai.APIStatusError) as e:
                upload(c, b"x" * size)
            assert e.value.status_code == 413
        assert len(list(c.files.list())) == 1


def test_forms_that_are_none(server):
    for parts, status in [({"file": b"x"}, 400), ({"purpose": b"fine-tune"}, 400),
                          ({"file": b"x", "purpose": b"assistants"}, 400),
                          ({"file": b"x", "purpose": b"fine-tune", "other": b"y"}, 400),
                          ({"file": b"x", "purpose": b"p" * 100}, 400)]:
        boundary = "b0"
        body = b"".join(f'--{boundary}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n'.encode() + v + b"\r\n"
                        for k, v in parts.items()) + f"--{boundary}--\r\n".encode()
        reply = server.call("POST", "/v1/files", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})
        assert reply.status == status and reply.error, (parts, reply.body)
    assert server.call("POST", "/v1/files", b"{}", {"Content-Type": "application/json"}).status == 415
    assert server.call("POST", "/v1/files", b"--b\r\n", {"Content-Type": "multipart/form-data; boundary=b"}).status == 400


def test_a_job_from_the_base(client, server):
    file = upload(client)
    job = client.fine_tuning.jobs.create(model=server.name, training_file=file.id, suffix="support", seed=5,
                                         hyperparameters={"n_epochs": 2, "batch_size": 1, "learning_rate_multiplier": 2},
                                         metadata={"who": "me"})
    assert job.object == "fine_tuning.job" and job.status in ("queued", "validating_files", "running", "succeeded")
    assert job.model == server.name and job.training_file == file.id and job.metadata == {"who": "me"}
    done = finished(client, job)
    assert done.status == "succeeded", done
    assert done.error is None and done.finished_at >= done.created_at and done.seed == 5
    assert done.hyperparameters.n_epochs == 2 and done.trained_tokens > 0
    assert done.settings["learning_rate"] == 0.002 and done.settings["epochs"] == 2
    name, version = done.fine_tuned_model.split("@")
    assert name.startswith("support-") and len(version) == 16
    said = client.completions.create(model=done.fine_tuned_model, prompt="The dog", max_tokens=4)
    assert said.model == done.fine_tuned_model or said.choices[0].text is not None

    more = finished(client, client.fine_tuning.jobs.create(model=name, training_file=file.id))
    assert more.status == "succeeded" and more.version_before == version
    assert {j.id for j in client.fine_tuning.jobs.list(limit=1)} >= {job.id, more.id}


def test_a_request_sent_twice_is_one_job(client, server):
    file = upload(client)
    jobs = [client.fine_tuning.jobs.create(model=server.name, training_file=file.id, suffix="once",
                                           extra_headers={"Idempotency-Key": "key-1"}) for _ in range(2)]
    assert jobs[0].id == jobs[1].id and jobs[0].adapter == jobs[1].adapter
    names = [a["name"] for a in server.call("GET", "/v1/adapters").json()["data"]]
    assert len([n for n in names if n.startswith("once-")]) == 1
    finished(client, jobs[0])


def test_a_job_from_an_older_version(client, server):
    file = upload(client)
    first = server.call("POST", "/v1/adapters", {"name": "older", "r": 2}).json()["version"]
    second = finished(client, client.fine_tuning.jobs.create(model="older", training_file=file.id))
    assert second.version_before == first and second.version_after != first
    for model in (f"older@{first}", f"{server.name}:older@{first}"):
        again = finished(client, client.fine_tuning.jobs.create(model=model, training_file=file.id))
        assert again.status == "succeeded" and again.version_before == first
        assert again.version_after == second.version_after, "the same work on the same version"


def test_events_and_checkpoints(client, server):
    file = upload(client)
    job = finished(client, client.fine_tuning.jobs.create(
        model=server.name, training_file=file.id, extra_body={"steps": 8, "checkpoint_steps": 2}))
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=3))
    numbers = [int(e.id.split("-")[1]) for e in events]
    assert numbers == sorted(numbers, reverse=True) and len(set(numbers)) == len(numbers)
    steps = [e.data["step"] for e in events if e.kind == "metrics"]
    assert steps == list(range(8, 0, -1))
    assert all(e.message and e.level in ("info", "warn", "error") and e.type in ("message", "metrics") for e in events)
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert all(c.fine_tuning_job_id == job.id and c.metrics.step == c.step_number for c in checkpoints)


def test_cancel(client, server):
    file = upload(client)
    job = client.fine_tuning.jobs.create(model=server.name, training_file=file.id, extra_body={"steps": 1000000})
    client.fine_tuning.jobs.cancel(job.id)
    done = finished(client, job)
    assert done.status == "cancelled" and done.fine_tuned_model is None


def test_dpo(client, server):
    rows = [{"input": {"messages": [{"role": "user", "content": "Who ran?"}], "tools": [], "parallel_tool_calls": True},
             "preferred_output": [{"role": "assistant", "content": "The dog"}],
             "non_preferred_output": [{"role": "assistant", "content": "The cat"}]}] * 4
    file = upload(client, jsonl(rows))
    job = client.fine_tuning.jobs.create(
        model=server.name, training_file=file.id,
        method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 2}}}, extra_body={"held_out": 0})
    done = finished(client, job)
    assert done.status == "succeeded", done
    assert done.settings["loss"] == "dpo" and done.settings["dpo_beta"] == 0.2
    assert done.method.type == "dpo"


def test_bad_lines_fail_the_job_with_their_line(client, server):
    good = jsonl(ROWS) * 8
    for line, word in [(b"not json", "line 17"), (b'{"messages": [{"role": "wizard", "content": "x"}]}', "wizard"),
                       (b'{"prompt": "a", "completion": "' + b" dog" * 3000 + b'"}', "line 17")]:
        file = upload(client, good + line + b"\n")
        job = finished(client, client.fine_tuning.jobs.create(model=server.name, training_file=file.id))
        assert job.status == "failed", job
        assert word in job.error.message and "17" in job.error.message, job.error
        assert job.fine_tuned_model is None
    job = finished(client, client.fine_tuning.jobs.create(model=server.name, training_file=upload(client, b"").id))
    assert job.status == "failed" and job.error.message


def test_refusals(client, server):
    file = upload(client)
    jobs = client.fine_tuning.jobs
    for error, arguments, param in [
            (openai.NotFoundError, {"model": "nobody", "training_file": file.id}, "model"),
            (openai.NotFoundError, {"model": server.name, "training_file": "file-0"}, "training_file"),
            (openai.NotFoundError, {"model": server.name, "training_file": file.id, "validation_file": "x"}, "validation_file"),
            (openai.BadRequestError, {"model": server.name, "training_file": file.id, "suffix": "a b"}, "suffix"),
            (openai.BadRequestError, {"model": server.name, "training_file": file.id,
                                      "hyperparameters": {"n_epochs": "x"}}, "n_epochs"),
            (openai.BadRequestError, {"model": server.name, "training_file": file.id,
                                      "method": {"type": "reinforcement"}}, "method")]:
        with pytest.raises(error) as e:
            jobs.create(**arguments)
        assert e.value.param == param, e.value
    before = len(server.call("GET", "/v1/adapters").json()["data"])
    with pytest.raises(openai.NotFoundError):
        jobs.create(model=server.name, training_file="file-0")
    assert len(server.call("GET", "/v1/adapters").json()["data"]) == before, "no adapter is left of a refused job"
    with pytest.raises(openai.NotFoundError):
        jobs.retrieve("ftjob-0")
    with pytest.raises(openai.NotFoundError):
        jobs.list_events("ftjob-0")
