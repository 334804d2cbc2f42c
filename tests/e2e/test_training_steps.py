"""Training step by step."""

import math

import pytest

EXAMPLES = [{"prompt": "The dog", "completion": " ran to the house"}, {"text": "The cat sat"}]


def create(server, name, **body):
    reply = server.call("POST", "/v1/adapters", {"name": name, "r": 4, **body})
    assert reply.status == 201, reply.body
    return reply.json()["version"]


def call(server, name, what, **body):
    reply = server.call("POST", f"/v1/adapters/{name}/{what}", body)
    assert reply.status == 200, reply.body
    return reply.json()


def test_a_loop_of_ones_own_learns(server):
    before = create(server, "loop")
    losses = []
    for step in range(12):
        result = call(server, "loop", "forward_backward", examples=EXAMPLES)
        assert result["opened"] == (step == 0) and result["optim_steps"] == step and result["version_before"] == before
        losses.append(result["loss"])
        update = call(server, "loop", "optim_step", learning_rate=0.02)
        assert update["grad_norm"] > 0 and update["learning_rate"] == 0.02
    assert losses[-1] < losses[0] / 2, losses
    assert len(server.call("GET", "/v1/adapters/loop").json()["versions"]) == 1, "nothing is published unasked"
    assert call(server, "loop", "forward_backward", examples=EXAMPLES, forward_only=True)["loss"] < losses[0]

    reply = server.call("POST", "/v1/adapters/loop/publish", {"expected_version": "0" * 16})
    assert reply.status == 409
    published = call(server, "loop", "publish", expected_version=before)
    info = server.call("GET", "/v1/adapters/loop").json()
    assert info["version"] == published["version"] and info["versions"][0]["source"] == "train"
    assert server.call("DELETE", "/v1/adapters/loop/session").status == 200
    assert server.call("DELETE", "/v1/adapters/loop/session").status == 404


def test_log_probabilities_are_those_of_serving(server):
    create(server, "logprobs")
    tokens = server.call("POST", "/tokenize", {"prompt": "The dog ran to the house"}).json()["tokens"]
    result = call(server, "logprobs", "forward_backward", examples=[{"tokens": tokens}], forward_only=True)
    served = server.complete(prompt=[tokens], max_tokens=0, echo=True, logprobs=0)["choices"][0]["logprobs"]["token_logprobs"]
    assert result["logprobs"][0] == pytest.approx(served[1:], abs=0.02)
    assert result["loss"] == pytest.approx(-sum(served[1:]) / (len(tokens) - 1), abs=0.02)


def test_policy_losses(server):
    create(server, "policy")
    tokens = server.call("POST", "/tokenize", {"prompt": "The dog ran to the house"}).json()["tokens"]
    forward = call(server, "policy", "forward_backward", examples=[{"tokens": tokens}], forward_only=True)
    old = [0.0, *forward["logprobs"][0]]
    example = {"tokens": tokens, "logprobs": old, "advantages": [1.0] * len(tokens)}
    for loss in ("importance_sampling", "ppo"):
        result = call(server, "policy", "forward_backward", examples=[example], loss=loss)
        assert result["objective"] == pytest.approx(-1, abs=1e-3), "the ratio is 1 at first"
    assert result["clipped"] == 0
    assert call(server, "policy", "optim_step")["grad_norm"] > 0
    pairs = [{"prompt": "The dog", "chosen": " ran", "rejected": " sat"}]
    dpo = call(server, "policy", "forward_backward", examples=pairs, loss="dpo")
    assert math.isfinite(dpo["objective"]) and len(dpo["logprobs"]) == 2


def test_refusals(server):
    create(server, "steps-refused")
    for what, body, param in [("forward_backward", {}, "examples"), ("forward_backward", {"examples": [{"text": 1}]}, "examples"),
                              ("forward_backward", {"examples": EXAMPLES, "learning_rate": 1}, "learning_rate"),
                              ("forward_backward", {"examples": EXAMPLES, "loss": "x"}, "loss"),
                              ("optim_step", {"steps": 3}, "steps"), ("optim_step", {"learning_rate": -1}, "learning_rate"),
                              ("publish", {"name": "x"}, "name")]:
        reply = server.call("POST", f"/v1/adapters/steps-refused/{what}", body)
        assert (reply.status, reply.error["param"]) == (400, param), (what, body, reply.body)
    for what, body in [("forward_backward", {"examples": EXAMPLES}), ("optim_step", {}), ("publish", {})]:
        assert server.call("POST", f"/v1/adapters/nobody/{what}", body).status == 404
