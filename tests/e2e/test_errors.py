"""What goes wrong is said in one shape, by a stable code, and disturbs nobody."""

import openai
import pytest

from server import Reply

GOOD = {"prompt": "Hello", "max_tokens": 2}


def expect(reply, status, code=None, param=None):
    assert reply.status == status, (reply.status, reply.body)
    assert reply.headers["Content-Type"].startswith("application/json")
    error = reply.error
    if code:
        assert error["code"] == code, error
    if param:
        assert error["param"] == param, error
    return error


@pytest.mark.parametrize("change, param", [
    ({"temperature": -1}, "temperature"), ({"temperature": "hot"}, "temperature"), ({"top_p": 1.5}, "top_p"),
    ({"max_tokens": -1}, "max_tokens"), ({"max_tokens": 1.5}, "max_tokens"), ({"n": 0}, "n"),
    ({"n": 100000}, "n"), ({"logprobs": 99}, "logprobs"), ({"stop": [""]}, "stop"),
    ({"stop": 5}, "stop"), ({"logit_bias": {"x": 1}}, "logit_bias"), ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"stream": "yes"}, "stream"), ({"prompt": None}, "prompt"), ({"prompt": []}, "prompt"),
    ({"prompt": [-1]}, "prompt"), ({"prompt": {"a": 1}}, "prompt"), ({"prompt": [["a"]]}, "prompt"),
    ({"suffix": "end"}, "suffix"), ({"seed": "abc"}, "seed"), ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"adapters": "a"}, "adapters"), ({"adapters": [{"weight": 1}]}, "adapters"),
    ({"adapters": [{"name": "a"}, {"name": "a"}]}, "adapters"),
    ({"adapters": [{"name": "a", "weight": "heavy"}]}, None),
    ({"model": "a", "adapter_id": "b"}, None),
])
def test_a_bad_parameter_is_named(server, change, param):
    expect(server.call("POST", "/v1/completions", {**GOOD, **change}), 400, param=param)


@pytest.mark.parametrize("change, says", [
    ({"prompt": [1, 99999]}, "99999"), ({"logit_bias": {"99999": 1}}, "99999"), ({"stop_token_ids": [99999]}, "99999")])
def test_a_token_that_the_model_has_not(server, change, says):
    assert says in expect(server.call("POST", "/v1/completions", {**GOOD, **change}), 400)["message"]


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b"\"text\"", b"{\"prompt\": \"a\"} x", b"{\"prompt\": \"a\", \"prompt\": \"b\"}",
    b"{\"prompt\": \"\xff\"}", b"{\"prompt\": \"a\\u0000b\"}", b"{\"prompt\": \"a\", \"temperature\": 1e999}",
    b"[" * 10000, b"{\"a\":" * 10000])
def test_bad_json(server, body):
    expect(server.call("POST", "/v1/completions", body, {"Content-Type": "application/json"}), 400)


def test_a_prompt_that_cannot_fit(server):
    error = expect(server.call("POST", "/v1/completions", {**GOOD, "prompt": [5] * 5000}), 400)
    assert "512" in error["message"]  # says how much there is room for


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_an_unknown_model(server, path):
    body = {**GOOD, "model": "nobody"} if "chat" not in path else {
        "messages": [{"role": "user", "content": "x"}], "model": "nobody"}
    error = expect(server.call("POST", path, body), 404, "model_not_found", "model")
    assert "nobody" in error["message"]


@pytest.mark.parametrize("change, param", [
    ({"adapters": [{"name": "nobody"}]}, "adapters"), ({"adapter_id": "nobody"}, "adapter_id")])
def test_an_unknown_adapter(server, change, param):
    expect(server.call("POST", "/v1/completions", {**GOOD, **change}), 404, param=param)


def test_an_unknown_path_and_method(server):
    expect(server.call("GET", "/v2/nothing"), 404)
    reply = server.call("DELETE", "/v1/completions")
    expect(reply, 405)
    assert reply.headers["Allow"] == "POST"


def test_another_content_type(server):
    expect(server.call("POST", "/v1/completions", b"prompt=a", {"Content-Type": "text/plain"}), 415)
    expect(server.call("PUT", "/v1/adapters/a", b"x", {"Content-Type": "text/plain"}), 415)


def test_too_large(server):
    """Said by its length alone, before the body to a client who waits, after it to one who does not."""
    expect(server.call("POST", "/v1/completions", {**GOOD, "prompt": "a" * (33 << 20)}), 413)
    connection = server.connect()
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(33 << 20))
    connection.putheader("Expect", "100-continue")
    connection.endheaders()
    response = connection.getresponse()
    expect(Reply(response.status, response.headers, response.read()), 413)
    connection.close()


def test_the_client_library_sees_the_error(client, server):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="nobody", prompt="a")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_keys(start):
    guarded = start(env={"MEDLEY_API_KEY": "secret"})
    assert guarded.call("POST", "/v1/completions", GOOD).status == 200
    for headers in ({"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"Authorization": ""}):
        expect(guarded.call("POST", "/v1/completions", GOOD, headers), 401, "invalid_api_key")
        expect(guarded.call("GET", "/v1/adapters", headers=headers), 401)
    assert guarded.call("GET", "/health", headers={"Authorization": ""}).status == 200
    assert "secret" not in guarded.log


def test_a_refused_request_does_not_disturb_others(server):
    alone = server.complete(prompt="abc", max_tokens=200, ignore_eos=True)["choices"][0]["text"]
    events = server.stream("/v1/completions", prompt="abc", max_tokens=200, ignore_eos=True)
    text = next(events)["choices"][0]["text"]
    for _ in range(20):
        expect(server.call("POST", "/v1/completions", {**GOOD, "temperature": 9}), 400)
    text += "".join(e["choices"][0]["text"] for e in events)
    assert text == alone
