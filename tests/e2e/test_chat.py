"""/v1/chat/completions by the official client."""

import openai
import pytest

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a fox?"}]


def chat(client, server, **more):
    more = {"model": server.name, "messages": MESSAGES, "max_completion_tokens": 16, "temperature": 0, **more}
    return client.chat.completions.create(**more)


def test_a_chat(client, server):
    answer = chat(client, server)
    assert answer.object == "chat.completion"
    [choice] = answer.choices
    assert choice.message.role == "assistant" and choice.message.content is not None
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_the_prompt_is_the_template(client, server):
    """The chat is the completion of the rendered template, its special tokens parsed."""
    rendered = ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is a fox?<|im_end|>\n"
                "<|im_start|>assistant\n")
    tokens = server.call("POST", "/tokenize", {"messages": MESSAGES}).json()["tokens"]
    parsed = server.call("POST", "/tokenize", {"content": rendered, "parse_special": True}).json()["tokens"]
    assert tokens == parsed
    plain = server.complete(prompt=tokens, max_tokens=16)
    assert chat(client, server).choices[0].message.content == plain["choices"][0]["text"]


def test_a_stream(client, server):
    whole = chat(client, server)
    chunks = list(chat(client, server, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c for c in chunks if c.choices][-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert all(c.object == "chat.completion.chunk" for c in chunks)


def test_text_parts(client, server):
    parts = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
             MESSAGES[1]]
    assert chat(client, server, messages=parts).choices[0].message == chat(client, server).choices[0].message


def test_logprobs(client, server):
    [choice] = chat(client, server, logprobs=True, top_logprobs=2, extra_body={"ignore_eos": True}).choices
    assert len(choice.logprobs.content) == 16
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 2
        assert entry.logprob == entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
        assert entry.token == entry.top_logprobs[0].token


def test_n(client, server):
    answer = chat(client, server, n=3, temperature=1, seed=5)
    assert [c.index for c in answer.choices] == [0, 1, 2]


@pytest.mark.parametrize("messages", [[], [{"role": "robot", "content": "x"}], [{"role": "user"}], "hello"])
def test_bad_messages(client, server, messages):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, server, messages=messages)
    assert caught.value.param and caught.value.param.startswith("messages")
