"""The real model end to end: text in, text out."""

import concurrent.futures

import oracle


def test_tokens_are_hugging_face_s(smollm2):
    for prompt in oracle.smollm2():
        reply = smollm2.call("POST", "/tokenize", {"content": prompt["text"], "parse_special": True})
        assert reply.json()["tokens"] == prompt["tokens"], prompt["text"]


def common_prefix(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def test_greedy_texts(smollm2):
    """All prompts in one batch. The fast ops may turn near-ties (tests/unit/test_smollm2.c looks at each), after
    which a text goes its own way; most of the texts must be transformers' to the end, and none leave at once."""
    def ask(prompt):
        return smollm2.complete(prompt=prompt["tokens"], max_tokens=len(prompt["greedy"]), ignore_eos=True,
                                return_token_ids=True)["choices"][0]["token_ids"]

    prompts = oracle.smollm2()
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(ask, prompts))
    shared = [common_prefix(a, p["greedy"]) for a, p in zip(answers, prompts)]
    print(shared)
    assert sum(shared) > 0.5 * sum(len(p["greedy"]) for p in prompts)
    assert min(shared) > 0
    # and each is what it is alone
    for i in (0, 7, 23):
        assert ask(prompts[i]) == answers[i]


def test_it_answers_a_question(smollm2):
    reply = smollm2.call("POST", "/v1/chat/completions", {
        "temperature": 0, "max_tokens": 40,
        "messages": [{"role": "user", "content": "What is the largest planet of the solar system?"}]})
    assert "Jupiter" in reply.json()["choices"][0]["message"]["content"]
