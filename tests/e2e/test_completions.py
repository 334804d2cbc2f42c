"""/v1/completions by the official client, on a small random model."""

import threading

import openai
import pytest

PROMPT = "Once upon a time"


def greedy(client, server, **more):
    more = {"model": server.name, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, **more}
    return client.completions.create(**more)


def test_a_completion(client, server):
    answer = greedy(client, server, extra_body={"ignore_eos": True})
    assert answer.object == "text_completion" and answer.model == server.name and answer.id
    [choice] = answer.choices
    assert choice.text and choice.finish_reason == "length" and choice.index == 0
    tokens = server.call("POST", "/tokenize", {"content": PROMPT}).json()["tokens"]
    assert answer.usage.prompt_tokens == len(tokens)
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == len(tokens) + 24


def test_a_stream_has_the_same_text(client, server):
    whole = greedy(client, server, extra_body={"ignore_eos": True})
    chunks = list(greedy(client, server, stream=True, stream_options={"include_usage": True},
                         extra_body={"ignore_eos": True}))
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "length"
    assert all(c.usage is None for c in chunks[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1


def test_no_usage_chunk_unless_asked(server):
    events = list(server.stream("/v1/completions", prompt=PROMPT, max_tokens=4))
    assert all(len(e["choices"]) == 1 and "usage" not in e for e in events)


@pytest.mark.parametrize("prompt, prompts", [
    ("The quick", 1), (["The quick", "brown fox"], 2), ([5, 6, 7], 1), ([[5, 6, 7], [8]], 2)])
def test_prompts_of_every_shape(client, server, prompt, prompts):
    answer = client.completions.create(model=server.name, prompt=prompt, max_tokens=3, n=2, seed=1)
    assert [c.index for c in answer.choices] == list(range(2 * prompts))


def test_token_ids_and_text_are_the_same_prompt(client, server):
    tokens = server.call("POST", "/tokenize", {"content": PROMPT}).json()["tokens"]
    assert greedy(client, server, prompt=tokens).choices[0].text == greedy(client, server).choices[0].text


def test_echo(client, server):
    plain, echoed = greedy(client, server), greedy(client, server, echo=True)
    assert echoed.choices[0].text == PROMPT + plain.choices[0].text
    only = greedy(client, server, echo=True, max_tokens=0, logprobs=0)
    assert only.choices[0].text == PROMPT
    assert only.choices[0].logprobs.token_logprobs[0] is None
    assert "".join(only.choices[0].logprobs.tokens) == PROMPT


def test_logprobs(client, server):
    [choice] = greedy(client, server, logprobs=3, max_tokens=8, extra_body={"ignore_eos": True}).choices
    probs = choice.logprobs
    assert len(probs.tokens) == len(probs.token_logprobs) == len(probs.top_logprobs) == len(probs.text_offset) == 8
    for own, top in zip(probs.token_logprobs, probs.top_logprobs):
        assert own <= 0 and own == max(top.values())
        assert len(top) <= 4  # tokens of the same text share an entry


def test_logprobs_in_a_stream_are_the_same(client, server):
    whole = greedy(client, server, logprobs=2, max_tokens=8).choices[0].logprobs
    parts = [c.choices[0].logprobs for c in greedy(client, server, logprobs=2, max_tokens=8, stream=True)]
    parts = [p for p in parts if p]
    assert [t for p in parts for t in p.tokens] == whole.tokens
    assert [t for p in parts for t in p.token_logprobs] == whole.token_logprobs
    assert [t for p in parts for t in p.text_offset] == whole.text_offset


def printable_part(text, length=3):
    """Some `length` characters inside text that are ASCII, so that a stop string can be made of them."""
    for at in range(4, len(text) - length):
        part = text[at:at + length]
        if part.isascii() and part.isprintable():
            return part
    raise AssertionError(f"nothing to stop at in {text!r}")


def test_stop(client, server):
    text = greedy(client, server, max_tokens=100, extra_body={"ignore_eos": True}).choices[0].text
    stop = printable_part(text)
    expected = text[:text.index(stop)]
    for given in (stop, ["never there, this", stop]):
        [choice] = greedy(client, server, max_tokens=100, stop=given, extra_body={"ignore_eos": True}).choices
        assert choice.text == expected and choice.finish_reason == "stop"
    streamed = greedy(client, server, max_tokens=100, stop=stop, stream=True, extra_body={"ignore_eos": True})
    assert "".join(c.choices[0].text for c in streamed) == expected
    kept = greedy(client, server, max_tokens=100, stop=stop,
                  extra_body={"ignore_eos": True, "include_stop_str_in_output": True})
    assert kept.choices[0].text == expected + stop


def test_stop_token_ids(server):
    ids = server.complete(prompt=PROMPT, max_tokens=12, ignore_eos=True, return_token_ids=True)
    tokens = ids["choices"][0]["token_ids"]
    assert len(tokens) == 12
    stop = tokens[6]
    stopped = server.complete(prompt=PROMPT, max_tokens=12, ignore_eos=True, return_token_ids=True,
                              stop_token_ids=[stop])["choices"][0]
    assert stopped["finish_reason"] == "stop"
    first = tokens.index(stop)
    assert stopped["token_ids"] in (tokens[:first], tokens[:first + 1])


def test_logit_bias_forces_and_forbids(server):
    first = server.complete(prompt=PROMPT, max_tokens=1, return_token_ids=True)["choices"][0]["token_ids"][0]
    forced = server.complete(prompt=PROMPT, max_tokens=3, return_token_ids=True, logit_bias={"77": 100})
    assert forced["choices"][0]["token_ids"] == [77, 77, 77]
    other = server.complete(prompt=PROMPT, max_tokens=1, return_token_ids=True, logit_bias={str(first): -100})
    assert other["choices"][0]["token_ids"] != [first]


def test_choices_differ_and_a_seed_repeats_them(client, server):
    def sample(seed):
        answer = greedy(client, server, temperature=1, n=4, seed=seed, max_tokens=16)
        return [c.text for c in answer.choices]

    assert sample(7) == sample(7)
    assert len(set(sample(7))) > 1
    assert sample(7) != sample(8)


def test_a_large_seed_is_not_rounded(client, server):
    def sample(seed):
        return greedy(client, server, temperature=1, seed=seed, max_tokens=16).choices[0].text

    assert sample(2 ** 62) != sample(2 ** 62 + 1)


def test_a_seed_gives_the_same_text_under_load(client, server):
    def sample():
        return greedy(client, server, temperature=0.9, top_p=0.95, seed=123, max_tokens=60).choices[0].text

    alone = sample()
    stop = threading.Event()

    def disturb(i):
        while not stop.is_set():
            greedy(client, server, prompt=f"{'noise ' * (i * 7 + 1)}", temperature=1, max_tokens=20 + i)

    threads = [threading.Thread(target=disturb, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    try:
        assert [sample() for _ in range(5)] == [alone] * 5
    finally:
        stop.set()
        for t in threads:
            t.join()


def test_best_of_returns_the_likelier(client, server):
    answer = client.completions.create(model=server.name, prompt=PROMPT, max_tokens=6, n=1, best_of=4, seed=3)
    assert len(answer.choices) == 1


def test_min_tokens(server):
    eos = 2
    short = server.complete(prompt=PROMPT, max_tokens=20, logit_bias={str(eos): 100})
    assert short["choices"][0]["finish_reason"] == "stop"
    assert short["usage"]["completion_tokens"] <= 1
    longer = server.complete(prompt=PROMPT, max_tokens=20, min_tokens=5, logit_bias={str(eos): 100})
    assert 5 <= longer["usage"]["completion_tokens"] <= 6


def test_models(client, server):
    models = list(client.models.list())
    assert models[0].id == server.name
    assert client.models.retrieve(server.name).id == server.name
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


@pytest.mark.parametrize("text", ["plain words", "  spaces \n\n tabs\t", "naïve 漢字 🙂", "<|im_start|>", ""])
def test_tokenize_and_back(server, text):
    tokens = server.call("POST", "/tokenize", {"content": text}).json()["tokens"]
    back = server.call("POST", "/detokenize", {"tokens": tokens}).json()
    assert back["content"] == back["prompt"] == text
