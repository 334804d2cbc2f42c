"""Pages of the KV cache shared between requests: found again within one set and salt, never across."""

import pytest

from server import Server, adapter_files, model_file

PROMPT = [1 + i * 37 % 500 for i in range(100)]
CACHED = 96  # whole pages of 16; the last token is always computed


def ask(server, **body):
    """(cached tokens, tokens generated)"""
    answer = server.complete(prompt=PROMPT, max_tokens=16, temperature=0, ignore_eos=True, return_token_ids=True, **body)
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(PROMPT)
    return usage["prompt_tokens_details"]["cached_tokens"], answer["choices"][0]["token_ids"]


@pytest.fixture(scope="module")
def uncached(tmp_path_factory):
    """By fixture, the answer of a server that shares nothing; None: the bare base."""
    with Server(model_file("gqa_tied"), tmp_path_factory.mktemp("uncached") / "data",
                "--kv-type", "f32", "--no-prefix-cache") as server:
        answers = {}
        for fixture in ("lora_gqa_tied", "moe_topk"):
            server.upload("a", adapter_files(fixture))
            ask(server, model="a")
            cached, answers[fixture] = ask(server, model="a")
            assert cached == 0
        _, answers[None] = ask(server)
        yield answers


def test_found_again(server, uncached):
    assert ask(server) == (0, uncached[None])
    assert ask(server) == (CACHED, uncached[None])


def test_a_successor_of_the_same_name_finds_nothing(server, uncached):
    for fixture in ("lora_gqa_tied", "moe_topk"):
        server.upload("swapped", adapter_files(fixture))
        assert ask(server, model="swapped") == (0, uncached[fixture])
        assert ask(server, model="swapped") == (CACHED, uncached[fixture])
    # The first one's bytes again are the first one's version again.
    server.upload("swapped", adapter_files("lora_gqa_tied"))
    assert ask(server, model="swapped") == (CACHED, uncached["lora_gqa_tied"])
    # Gone and back: the content is the same.
    assert server.call("DELETE", "/v1/adapters/swapped").status == 200
    server.upload("swapped", adapter_files("moe_topk"))
    assert ask(server, model="swapped") == (CACHED, uncached["moe_topk"])


def test_weights_tell_sets_apart(server):
    server.upload("one", adapter_files("lora_gqa_tied"))
    server.upload("two", adapter_files("moe_topk"))
    seen = []
    for weights in ((1, 1), (1, 0.5), (0.5, 1), (1, 0)):
        names = [{"name": n, "weight": w} for n, w in zip(("one", "two"), weights)]
        cached, tokens = ask(server, adapters=names)
        assert cached == 0
        assert ask(server, adapters=names[::-1]) == (CACHED, tokens), "the order of naming does not matter"
        seen.append(tuple(tokens))
    assert ask(server, adapters=[{"name": "one"}])[0] == CACHED, "weight 0 is no member"
    assert len(set(seen)) > 1


def test_salts_part_requests(server, uncached):
    for salt in ("s", "t"):
        assert ask(server, cache_salt=salt) == (0, uncached[None])
        assert ask(server, cache_salt=salt) == (CACHED, uncached[None])
    bad = server.call("POST", "/v1/completions", {"prompt": "a", "cache_salt": 7})
    assert bad.status == 400 and bad.error["param"] == "cache_salt"


def test_scored_prompts_are_computed(server):
    ask(server)
    answer = server.complete(prompt=PROMPT, max_tokens=1, prompt_logprobs=0)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert len(answer["choices"][0]["prompt_logprobs"]) == len(PROMPT)
