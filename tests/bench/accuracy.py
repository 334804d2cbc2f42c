"""How far quantised arithmetic is from exact: log-probabilities of a text's tokens, ours and llama.cpp's, beside those
that Medley's plain C computes in fp32 from the same file (which the tests hold against Hugging Face's)."""

import math
import re
from pathlib import Path

import models

TEXT = Path(__file__).resolve().parents[2] / "docs/architecture.md"
TOKENS = 256
HEAD = ["| model | mean error of log p, Medley | llama.cpp | largest, Medley | llama.cpp | perplexity in fp32 | Medley | "
        "llama.cpp |", "|---|---|---|---|---|---|---|---|"]


def prose():
    """Paragraphs of a document of this project's, without its markup."""
    parts = [part.replace("\n", " ") for part in TEXT.read_text().split("\n\n") if part[:1].isalpha()]
    return re.sub(r"[*`]", "", " ".join(parts))


def perplexity(values):
    return math.exp(-sum(values) / len(values))


def errors(values, exact):
    apart = [abs(a - b) for a, b in zip(values, exact)]
    return sum(apart) / len(apart), max(apart)


def row(fleet, kind):
    path = models.smollm2(kind)
    tokens = fleet.peer(path).tokenize(prose())[:TOKENS]
    exact = fleet.engine(path, "reference").logprobs(tokens)
    own, peer = fleet.engine(path).logprobs(tokens), fleet.peer(path).logprobs(tokens)
    if not len(exact) == len(own) == len(peer) == len(tokens) - 1:
        raise RuntimeError("the log-probabilities are not as many as the text's tokens")
    (own_mean, own_most), (peer_mean, peer_most) = errors(own, exact), errors(peer, exact)
    cells = [f"{v:.4f}" for v in (own_mean, peer_mean)] + [f"{v:.3f}" for v in (own_most, peer_most)]
    cells += [f"{perplexity(v):.3f}" for v in (exact, own, peer)]
    return f"| {kind} | {' | '.join(cells)} |"
