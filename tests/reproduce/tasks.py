"""Six families of small reasoning tasks from the reasoning-gym package, as short prompts with short answers.

Three are arithmetic word problems, three of the common-sense kind. Sizes are chosen so that a model of 135M parameters
can get somewhere within some thousand examples. Fixed instructions that come with every question of a family
are cut away: they cost tokens and say nothing. No prompt of a test set is in a training set.
"""

import json

import reasoning_gym
from reasoning_gym.logic.aiw import TaskType

TEST_SEED = 1_000_003

# name: (reasoning-gym's dataset, its options, text cut from each question)
FAMILIES = {
    "sums": ("chain_sum", dict(min_terms=2, max_terms=3, min_digits=1, max_digits=1),
             ["State the final answer to the following arithmetic problem: "]),
    "legs": ("leg_counting", dict(min_animals=1, max_animals=2, min_instances=1, max_instances=4),
             ["Your task is to count how many legs there are in total when given a list of animals.\n\nNow, "]),
    "siblings": ("aiw", dict(task_types=[TaskType.SIBLINGS, TaskType.FRIENDS], task_type_weights=[0.5, 0.5]), []),
    "divisors": ("gcd", dict(min_numbers=2, max_numbers=2, min_value=2, max_value=60),
                 [" Give only the GCD as your final answer."]),
    "families": ("family_relationships", dict(min_family_size=3, max_family_size=5),
                 [" Provide the relationship in one word.", " Answer with a single word.",
                  " Respond only with the word that describes their relationship."]),
    "syllogisms": ("syllogism", dict(invalid_ratio=0.5), ["Consider these statements:\n", "Does it logically follow that:\n",
                                     "\n(Answer Yes or No)"]),
}


def examples_of(family, seed):
    """Endless {"family", "prompt", "completion"}, no prompt twice."""
    dataset, options, cuts = FAMILIES[family]
    seen = set()
    while True:
        for item in reasoning_gym.create_dataset(dataset, size=5000, seed=seed, **options):
            question = item["question"]
            for cut in cuts:
                question = question.replace(cut, "")
            prompt = f"{question.strip()}\nAnswer:"
            if prompt not in seen:
                seen.add(prompt)
                yield {"family": family, "prompt": prompt, "completion": f" {item['answer']}"}
        seed += 5001


def test_set(count):
    """The same for every run: `count` examples of each family."""
    examples = []
    for family in FAMILIES:
        source = examples_of(family, TEST_SEED)
        examples += [next(source) for _ in range(count)]
    return examples


def training_set(count, seed, test):
    """`count` examples of each family, by turns."""
    tested = {e["prompt"] for e in test}
    sources = [(e for e in examples_of(family, seed) if e["prompt"] not in tested) for family in FAMILIES]
    return [next(source) for _ in range(count) for source in sources]


def write_jsonl(path, examples):
    with open(path, "w", encoding="utf-8") as f:
        for e in examples:
            f.write(json.dumps({"prompt": e["prompt"], "completion": e["completion"]}) + "\n")
