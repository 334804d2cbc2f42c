#!/usr/bin/env python3
"""Does a mixture of small experts, taught to share work and to differ, beat one LoRA of the same size?

Trains every variant on the same mixture of six task families with `medley train`, once a seed, and measures it on
held-out tests by greedy completions of `medley serve`. A run's result is appended to --results as it ends; what is there
already is not run again, and an interrupted run goes on from its checkpoint. Then the tables are printed,
and written between the markers of --document.

usage: reproduce.py [--seeds 0,1,2] [--only TEXT] [--tables] [--dry-run] ...
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests" / "e2e"))

from server import BINARY, SMOLLM2, Server  # noqa: E402

# A LoRA of rank 36 has 10,990,080 parameters here, 8 experts of rank 4 with their routers 10,967,040.
COMMON = {"batch-tokens": 512, "schedule": "cosine", "warmup-steps": 10, "epochs": 1}
LORA = {"experts": 1, "rank": 36, "learning-rate": 1e-3}
# Gates sum to one and each expert sees a share of the tokens: it wants a higher rate (see the rates explored).
MOE = {"experts": 8, "rank": 4, "top-k": 2, "learning-rate": 2e-3}
BOTH = {"balance": 1e-2, "contrast": 1e-2}
# Those that the claim is about come first.
VARIANTS = {
    "LoRA": LORA,
    "MoELoRA, balance + contrast": MOE | BOTH,
    "MoELoRA, balance": MOE | {"balance": 1e-2, "contrast": 0},
}
# What else was tried, the first seed alone unless more are asked for: --explore.
EXPLORED = {
    "MoELoRA, neither": MOE | {"balance": 0, "contrast": 0},
    "LoRA, rate 5e-4": LORA | {"learning-rate": 5e-4},
    "LoRA, rate 2e-3": LORA | {"learning-rate": 2e-3},
    "MoELoRA, balance 1e-3": MOE | BOTH | {"balance": 1e-3},
    "MoELoRA, balance 1e-3, rate 1e-3": MOE | BOTH | {"learning-rate": 1e-3, "balance": 1e-3},
    "MoELoRA, balance 1e-3, rate 4e-3": MOE | BOTH | {"learning-rate": 4e-3, "balance": 1e-3},
    "MoELoRA, contrast 0.1": MOE | BOTH | {"contrast": 0.1},
    "MoELoRA, top 4": MOE | BOTH | {"top-k": 4},
    "MoELoRA, dense": MOE | BOTH | {"gate": "dense"},
    "MoELoRA, 4 experts of rank 8": MOE | BOTH | {"experts": 4, "rank": 8},
    "MoELoRA, 2 experts of rank 16, top 1": MOE | BOTH | {"experts": 2, "rank": 16, "top-k": 1, "gate": "topk_raw"},
}
ANSWER_TOKENS = 10
CLIENTS = 32


def run(command, **options):
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stderr[-4000:]}")
    return done.stderr


# ---- training


def settings_of(options, variant, seed):
    chosen = COMMON | (VARIANTS | EXPLORED)[variant]
    return chosen | {"seed": seed, "examples": options.examples, "tests": options.tests}


def key_of(settings):
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def train(options, settings, folder):
    """What `medley train` said: its summary, and the lines of its log."""
    shape = {k: settings[k] for k in ("experts", "rank", "top-k", "gate") if k in settings}
    rest = {k: v for k, v in settings.items() if k not in shape and k not in ("examples", "tests")}
    summary = folder / "summary.txt"  # there once the training is done: what may remain is the testing
    command = [BINARY, "train", "--model", options.model, "--data", options.work / f"train-{settings['seed']}.jsonl",
               "--held-out-data", options.work / "test.jsonl", "--out", folder, "--log", folder / "log.jsonl",
               "--threads", str(options.threads), "--create"]
    for name, value in (shape | rest).items():
        command += [f"--{name}", str(value)]
    if (folder / "checkpoint").exists():
        command.append("--resume")
    elif not summary.exists():
        (folder / "log.jsonl").unlink(missing_ok=True)
    if not summary.exists():
        summary.write_text(run(command), encoding="utf-8")
    return summary.read_text(encoding="utf-8"), [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def mean(values):
    return statistics.fmean(values) if values else None


def largest_share(routing):
    """How much more than its fair share the busiest expert of a site gets, on average over sites."""
    return mean([max(s["share"]) * len(s["share"]) / sum(s["share"]) for s in routing["sites"]])


def facts_of_training(said, log):
    steps = {line["step"]: line for line in log if "cross_entropy" in line}
    steps = [steps[n] for n in sorted(steps)]  # steps since a checkpoint come twice
    ends = [line["evaluation"] for line in log if "evaluation" in line]
    routing = next((line["routing"] for line in log if "routing" in line), None)
    facts = {
        "parameters": int(re.search(r"(\d+) parameters", said)[1]), "steps": len(steps),
        "tokens": sum(s["tokens"] for s in steps), "seconds": round(sum(s["seconds"] for s in steps), 1),
        "train_loss": mean([s["cross_entropy"] for s in steps[-20:]]),
        "test_loss_before": ends[0]["loss"], "test_loss": ends[-1]["loss"],
    }
    if routing and routing["sites"]:
        facts |= {"similarity": ends[-1]["similarity"], "cohesion": ends[-1]["cohesion"],
                  "contrast": mean([s["contrast"] for s in steps[-20:] if "contrast" in s]), "balance": mean([s["balance"] for s in steps[-20:]]),
                  "largest_share": largest_share(routing)}
    return facts


# ---- testing


def ask(server, model, example):
    reply = server.complete(model=model, prompt=example["prompt"], max_tokens=ANSWER_TOKENS)
    return reply["choices"][0]["text"].strip() == example["completion"].strip()


def accuracy(options, folder, tests):
    """{family: share of right answers}; folder None: the bare model."""
    with tempfile.TemporaryDirectory() as data, Server(options.model, Path(data) / "data", "--max-batch", "64",
                                                       "--kv-bytes", "256M") as server:
        model = server.name
        if folder:
            model = "trained"
            files = {name: (folder / name).read_bytes()
                     for name in ("adapter_config.json", "adapter_model.safetensors")}
            reply = server.upload(model, files)
            assert reply.status < 300, reply.body
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            right = list(pool.map(lambda e: ask(server, model, e), tests))
    by_family = {}
    for example, r in zip(tests, right, strict=True):
        by_family.setdefault(example["family"], []).append(r)
    return {family: mean(values) for family, values in by_family.items()}


# ---- results


def results(options):
    if not options.results.exists():
        return []
    return [json.loads(line) for line in options.results.read_text().splitlines()]


def commit():
    done = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=10"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def append(options, result):
    with open(options.results, "a", encoding="utf-8") as f:
        f.write(json.dumps(result) + "\n")
        f.flush()
        os.fsync(f.fileno())


def run_one(options, variant, seed, tests):
    settings = settings_of(options, variant, seed)
    key = key_of(settings)
    if any(r["key"] == key for r in results(options)):
        return
    print(f"{time.strftime('%H:%M:%S')} {variant}, seed {seed}", flush=True)
    folder = options.work / key
    folder.mkdir(exist_ok=True)
    facts = facts_of_training(*train(options, settings, folder))
    right = accuracy(options, folder, tests)
    append(options, {"key": key, "variant": variant, "seed": seed, "accuracy": right, "mean": mean(right.values()),
                     **facts, "commit": commit(), "settings": settings})
    print(f"    accuracy {mean(right.values()):.3f}, test loss {facts['test_loss']:.3f}, "
          f"{facts['tokens'] / facts['seconds']:.0f} tokens/s", flush=True)


def run_base(options, tests):
    key = f"base-{options.tests}"
    if any(r["key"] == key for r in results(options)):
        return
    right = accuracy(options, None, tests)
    append(options, {"key": key, "variant": "no adapter", "seed": None, "accuracy": right,
                     "mean": mean(right.values()), "commit": commit()})


def run_all(options):
    import tasks  # needs reasoning-gym, which the tables do not

    options.work.mkdir(parents=True, exist_ok=True)
    tests = tasks.test_set(options.tests)
    tasks.write_jsonl(options.work / "test.jsonl", tests)
    run_base(options, tests)
    plan = [(v, seed) for seed in options.seeds for v in VARIANTS]
    if options.explore:
        plan += [(v, options.seeds[0]) for v in EXPLORED]
    for variant, seed in plan:
        if not re.search(options.only, variant):
            continue
        path = options.work / f"train-{seed}.jsonl"
        if not path.exists():
            tasks.write_jsonl(path, tasks.training_set(options.examples, seed, tests))
        run_one(options, variant, seed, tests)


# ---- tables


def spread(values, scale=1.0, digits=1):
    values = [v * scale for v in values if v is not None]
    if not values:
        return ""
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def row(cells):
    return "| " + " | ".join(map(str, cells)) + " |"


def tables(options):
    groups, all_results = {}, results(options)
    for r in all_results:
        groups.setdefault(r["variant"], []).append(r)
    order = [v for v in ["no adapter", *VARIANTS, *EXPLORED] if v in groups]
    families = list(all_results[0]["accuracy"])
    yield row(["accuracy, %", "seeds", "mean of families", *families])
    yield row(["---"] * (3 + len(families)))
    for v in order:
        g = groups[v]
        yield row([v, len(g), spread([r["mean"] for r in g], 100),
                   *(spread([r["accuracy"][f] for r in g], 100) for f in families)])
    yield ""
    yield row(["training", "parameters", "tokens", "test loss", "cosine of different experts", "of one expert",
               "busiest expert's share, 1 is fair", "balance loss", "tokens/s"])
    yield row(["---"] * 9)
    for v in order:
        g = [r for r in groups[v] if "parameters" in r]
        if g:
            yield row([v, g[0]["parameters"], g[0]["tokens"], spread([r["test_loss"] for r in g], 1, 3),
                       *(spread([r.get(key) for r in g], 1, 3) for key in ("similarity", "cohesion", "largest_share", "balance")),
                       spread([r["tokens"] / r["seconds"] for r in g], 1, 0)])


BEGIN, END = "<!-- reproduce: begin -->", "<!-- reproduce: end -->"


def write_tables(options):
    text = "\n".join(tables(options))
    print(text)
    if not options.document:
        return
    path = Path(options.document)
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seeds", default="0,1,2", type=lambda s: [int(n) for n in s.split(",")])
    parser.add_argument("--examples", type=int, default=400, help="of each family, to train on")
    parser.add_argument("--tests", type=int, default=100, help="of each family, to measure by")
    parser.add_argument("--only", default="", help="only variants whose name matches this expression")
    parser.add_argument("--explore", action="store_true", help="afterwards also the settings tried beside, one seed each")
    parser.add_argument("--tables", action="store_true", help="no runs: the tables of what is there")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "reproduce", help="data sets and adapters")
    parser.add_argument("--document", help="a file whose tables are replaced, for instance docs/moelora.md")
    options = parser.parse_args()
    if not options.tables:
        run_all(options)
    write_tables(options)


if __name__ == "__main__":
    main()
