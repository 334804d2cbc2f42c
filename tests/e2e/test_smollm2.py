"""The real model end to end: text in, text out."""

import concurrent.futures

import oracle
from server import SMOLLM2


def test_tokens_are_hugging_face_s(smollm2):
    for prompt in oracle.smollm2():
        reply = smollm2.call("POST", "/tokenize", {"content": prompt["text"], "parse_special": True})
        assert reply.json()["tokens"] == prompt["tokens"], prompt["text"]


def greedy(server, prompt, tokens):
    return server.complete(prompt=prompt["tokens"], max_tokens=tokens, ignore_eos=True,
                           return_token_ids=True)["choices"][0]["token_ids"]


def test_greedy_texts(smollm2):
    """All prompts in one batch, by the fast ops: a text leaves transformers' only where the two best tokens were
    nearly tied, by the bound of tests/unit/test_smollm2.c."""
    prompts, gaps = oracle.smollm2(), oracle.rows("smollm2", "gaps")
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda p: greedy(smollm2, p, 64), prompts))
    for prompt, answer, gap in zip(prompts, answers, gaps):
        left = next((i for i, (a, b) in enumerate(zip(answer, prompt["greedy"])) if a != b), None)
        assert left is None or gap[left] < 0.6, prompt["text"]
    for i in (0, 7, 23):  # and each is what it is alone
        assert greedy(smollm2, prompts[i], 64) == answers[i]


def test_greedy_texts_of_the_plain_ops(start):
    server = start("--cpu-level", "reference", "--kv-type", "f32", model=SMOLLM2)
    for prompt in oracle.smollm2()[::6]:
        assert greedy(server, prompt, 16) == prompt["greedy"][:16]


def test_it_answers_a_question(smollm2):
    reply = smollm2.call("POST", "/v1/chat/completions", {
        "temperature": 0, "max_tokens": 40,
        "messages": [{"role": "user", "content": "What is the largest planet of the solar system?"}]})
    assert "Jupiter" in reply.json()["choices"][0]["message"]["content"]
