"""`medley train` in a process of its own: what it writes, that it can be interrupted, and what it says of mistakes."""
import json
import signal
import subprocess
import time

import pytest

from server import BINARY, eventually, model_file


def train(tmp_path, *options, out="out", wait=True, model="gqa_tied"):
    command = [BINARY, "train", "--model", model_file(model), "--threads", "2", "--batch-tokens", "64",
               "--out", tmp_path / out, *options]
    process = subprocess.Popen([str(c) for c in command], stderr=subprocess.PIPE, text=True)
    if not wait:
        return process
    _, said = process.communicate(timeout=300)
    return process.returncode, said


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(
        json.dumps({"tokens": [1, 20 + i, 9, 100 + 3 * i, 200 + i % 5, 2], "weights": [0, 0, 0, 1, 1, 1]}) + "\n"
        for i in range(24)))
    return path


CREATE = ("--create", "--rank", "2", "--experts", "4", "--seed", "3")


def tensors(tmp_path, out):
    return (tmp_path / out / "adapter_model.safetensors").read_bytes()


def test_a_new_adapter_learns_and_is_trained_on(tmp_path, data):
    log = tmp_path / "log.jsonl"
    code, said = train(tmp_path, "--data", data, *CREATE, "--steps", "12", "--learning-rate", "0.01", "--log", log)
    assert code == 0, said
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [line for line in lines if "step" in line]
    evaluations = [line["evaluation"] for line in lines if "evaluation" in line]
    assert [s["step"] for s in steps] == list(range(1, 13))
    assert steps[-1]["cross_entropy"] < steps[0]["cross_entropy"]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]
    assert len(lines[-1]["routing"]["sites"]) == 14
    for site in lines[-1]["routing"]["sites"]:
        assert sum(site["share"]) == pytest.approx(2, abs=0.01)
    assert "22 examples, 2 held out" in said
    assert not (tmp_path / "out" / "checkpoint").exists()

    code, said = train(tmp_path, "--data", data, "--adapter", tmp_path / "out", "--steps", "1", out="more")
    assert code == 0, said
    assert tensors(tmp_path, "more") != tensors(tmp_path, "out")


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, data):
    options = ("--data", data, *CREATE, "--steps", "300", "--schedule", "cosine")
    code, said = train(tmp_path, *options, out="whole")
    assert code == 0, said
    log = tmp_path / "log.jsonl"
    process = train(tmp_path, *options, "--log", log, out="parts", wait=False)
    while not log.exists() or len(log.read_text().splitlines()) < 20:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "--resume" in said
    assert not (tmp_path / "parts" / "adapter_config.json").exists()
    code, said = train(tmp_path, *options, "--resume", out="parts")
    assert code == 0, said
    assert tensors(tmp_path, "parts") == tensors(tmp_path, "whole")


@pytest.mark.parametrize("options, message", [
    (CREATE, "--data FILE is required"),
    (("--data", "none.jsonl", *CREATE), "none.jsonl"),
    (("--data", "DATA"), "give --adapter PATH"),
    (("--data", "DATA", *CREATE, "--targets", "q_proj,x_proj"), "'x_proj' is none of"),
    (("--data", "DATA", *CREATE, "--top-k", "9"), "--top-k 9 is more than --experts 4"),
    (("--data", "DATA", *CREATE, "--learning-rate", "-1"), "learning_rate: must be a number from 0 to 10"),
    (("--data", "DATA", *CREATE, "--resume"), "checkpoint"),
    (("--data", "BAD", *CREATE), "line 17: not JSON"),
])
def test_mistakes_are_told(tmp_path, data, options, message):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n' * 16 + "{oops\n")
    named = {"DATA": data, "BAD": bad}
    code, said = train(tmp_path, *(named.get(option, option) for option in options))
    assert code == 1
    assert message in said
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def ask(server, *options):
    command = [BINARY, "train", "--server", server.url, *options]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_a_server_trains_its_own(start, tmp_path, data):
    server = start()
    code, out, said = ask(server, "--data", data, "--adapter", "mine", *CREATE, "--steps", "8", "--batch-tokens", "64",
                          "--learning-rate", "0.01")
    assert code == 0, said
    assert "held-out loss: " in said and "step 8/8" in said
    name, version = out.strip().split("@")
    assert name == "mine"
    adapter = server.call("GET", "/v1/adapters/mine").json()
    assert adapter["version"] == version
    assert adapter["versions"][0]["source"] == "train"

    code, out, said = ask(server, "--data", data, "--adapter", "mine", "--steps", "2", "--batch-tokens", "64",
                          "--publish", "manual")
    assert code == 0 and not out, said
    assert server.call("GET", "/v1/adapters/mine").json()["version"] == version


def test_a_data_folder_is_trained_without_a_server(start, tmp_path, data):
    folder = tmp_path / "data"

    def in_folder(*options, wait=True):
        command = [BINARY, "train", "--model", model_file("gqa_tied"), "--threads", "2", "--data-dir", folder,
                   "--adapter", "mine", *options]
        process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return process if not wait else (*process.communicate(timeout=300), process.returncode)

    out, said, code = in_folder("--data", data, *CREATE, "--steps", "3", "--batch-tokens", "64")
    assert code == 0, said
    name, version = out.strip().split("@")
    server = start(data=folder)
    assert server.call("GET", f"/v1/adapters/{name}").json()["version"] == version
    out, said, code = in_folder("--data", data, "--steps", "3")
    assert code == 1 and "another process" in said
    server.stop()

    def checkpoints():
        return {p.name for p in (folder / "training" / "jobs").glob("*/ckpt-*")}

    before = checkpoints()
    process = in_folder("--data", data, "--steps", "200000", "--batch-tokens", "64", "--checkpoint-steps", "5", wait=False)
    eventually(lambda: checkpoints() - before, "a checkpoint", 120)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "--resume" in said
    before = checkpoints()
    process = in_folder("--resume", wait=False)
    eventually(lambda: checkpoints() - before, "another checkpoint", 120)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) and process.returncode == 1
    server = start(data=folder)  # goes on with it
    [job] = [j for j in server.call("GET", "/v1/fine_tuning/jobs").json()["data"] if j["status"] in ("queued", "running", "validating_files")]
    assert server.call("POST", f"/v1/fine_tuning/jobs/{job['id']}/cancel").status == 200
    assert server.call("GET", f"/v1/adapters/{name}").json()["version"] == version


def test_a_server_s_refusals_are_told(start, tmp_path, data):
    server = start()
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n' * 16 + "{oops\n")
    code, _, said = ask(server, "--data", data, "--adapter", "nobody")
    assert code == 1 and "nobody" in said
    code, _, said = ask(server, "--data", bad, "--adapter", "mine", *CREATE)
    assert code == 1 and "line 17: not JSON" in said
    code, _, said = ask(server, "--data", data, "--adapter", "mine", "--steps", "-1")
    assert code == 1 and "steps: must be" in said
    code, _, said = ask(server, "--data", data, "--adapter", "mine", "--out", tmp_path)
    assert code == 1 and "not for --server" in said
    code, _, said = ask(server, "--data", tmp_path / "none", "--adapter", "mine")
    assert code == 1 and "none" in said


def test_a_result_is_not_written_over(tmp_path, data):
    options = ("--data", data, *CREATE, "--steps", "1")
    assert train(tmp_path, *options)[0] == 0
    code, said = train(tmp_path, *options)
    assert code == 1 and "--force replaces it" in said
    assert train(tmp_path, *options, "--force")[0] == 0
