"""lm-eval's multiple choice over HTTP, against its `hf` backend on the same checkpoint; writes results/lm_eval.json.

    pip install 'lm_eval[api,hf]'                                   # in an environment of its own, if you like
    python benchmarks/loglikelihood.py --python .venv/bin/python    # whose `manyheads serve` is asked

The task is like HellaSwag: 100 made-up items, each a context with four endings, of which the likeliest is the answer.
`local-completions` sends prompts of tokens with `echo`, `logprobs` and `max_tokens: 1`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import BUILTIN, ROOT, machine, save, server, table
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

TASK = "made_endings"
CLOSE = 1e-4
SCENES = (
    ("Cooking", "She puts the pot on the stove and", "waits until the water boils."),
    ("Fishing", "The old man throws his line into the lake and", "waits for a fish to bite."),
    ("Painting a wall", "He opens the can, dips the brush into it and", "paints the wall blue."),
    ("Playing football", "The girl runs towards the goal and", "kicks the ball."),
    ("Going to bed", "The child puts on his pyjamas, brushes his teeth and", "goes to sleep."),
    ("Baking bread", "After an hour in the oven", "the bread is brown and smells good."),
    ("Washing a dog", "The dog jumps out of the tub and", "shakes the water from its fur."),
    ("Planting a tree", "They dig a deep hole in the ground and", "put the young tree into it."),
    ("Reading", "He sits down in his chair, opens the book and", "begins to read."),
    ("Travelling by train", "The train stops at the station and", "the passengers get off."),
    ("Walking in the rain", "It starts to rain, so she", "opens her umbrella."),
    ("Making tea", "The tea is too hot, so he", "lets it cool for a while."),
    ("Singing", "The singer steps on the stage, takes the microphone and", "sings a song."),
    ("Climbing", "When they have reached the top of the mountain, they", "enjoy the view."),
    ("At school", "The teacher asks a question and", "a student raises her hand."),
    ("Cutting hair", "The customer sits down, and the barber", "cuts his hair."),
    ("Building a house", "The workers lay one brick on another until", "the wall is finished."),
    ("Skating", "The boy slips on the ice and", "falls down."),
    ("Feeding birds", "She throws crumbs on the grass, and the birds", "eat them."),
    ("Writing a letter", "He signs the letter, puts it into an envelope and", "sends it to his friend."),
)


def items(count: int) -> list[dict[str, Any]]:
    """Each with the right ending of its scene and three of others."""
    dice = random.Random(0)
    found = []
    for number in range(count):
        label, context, ending = SCENES[number % len(SCENES)]
        endings = [ending, *dice.sample([other for _, _, other in SCENES if other != ending], 3)]
        dice.shuffle(endings)
        found.append({"query": f"{label}: {context}", "endings": endings, "label": endings.index(ending)})
    return found


def write_task(folder: Path, count: int) -> None:
    """The items and what lm-eval needs to know of them."""
    lines = "\n".join(map(json.dumps, items(count)))
    (folder / "items.jsonl").write_text(lines + "\n")
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(folder / "items.jsonl")}},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{endings}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": name, "aggregation": "mean"} for name in ("acc", "acc_norm")],
    }
    (folder / f"{TASK}.yaml").write_text(json.dumps(task, indent=1))  # JSON is YAML


def evaluate(backend: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Accuracies, and of each item and ending the log-likelihood and whether it is what greedy decoding writes."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(backend, settings, tasks=[TASK], task_manager=manager, batch_size=4, log_samples=True)
    samples = sorted(found["samples"][TASK], key=lambda sample: sample["doc_id"])
    answers = [(float(value), bool(greedy)) for sample in samples for ((value, greedy),) in sample["resps"]]
    scores = found["results"][TASK]
    return {
        "accuracy": scores["acc,none"],
        "accuracy_by_length": scores["acc_norm,none"],
        "loglikelihoods": [round(value, 6) for value, _ in answers],
        "is_greedy": [greedy for _, greedy in answers],
    }


def main() -> None:
    """Evaluate twice, compare, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="with manyheads, to serve the model")
    parser.add_argument("--model", type=Path, default=BUILTIN, help="the folder that is served, with its tokenizer")
    parser.add_argument("--port", type=int, default=8017)
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--concurrent", type=int, default=8, help="requests at once")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/lm_eval.json")
    args = parser.parse_args()
    url = f"http://127.0.0.1:{args.port}"
    backends: dict[str, dict[str, Any]] = {
        "hf": {"pretrained": str(args.model), "dtype": "float32", "device": "cpu"},
        "local-completions": {
            "model": args.model.name,
            "base_url": f"{url}/v1/completions",
            "tokenizer": str(args.model),
            "tokenizer_backend": "huggingface",
            "num_concurrent": args.concurrent,
        },
    }
    serve = [args.python, "-m", "manyheads", "serve", str(args.model), "--port", str(args.port), "--dtype", "float32"]
    with tempfile.TemporaryDirectory() as name, server([*serve, "--served-model-name", args.model.name], url):
        write_task(Path(name), args.items)
        found = {backend: evaluate(backend, settings, Path(name)) for backend, settings in backends.items()}
    ours, theirs = found["local-completions"], found["hf"]
    apart = [abs(a - b) for a, b in zip(ours["loglikelihoods"], theirs["loglikelihoods"], strict=True)]
    rows = [[name, each["accuracy"], each["accuracy_by_length"]] for name, each in found.items()]
    table(["backend", "acc", "acc_norm"], rows)
    print(f"{args.items} items, {len(apart)} endings: log-likelihoods at most {max(apart):.1e} apart")
    same = all(ours[key] == theirs[key] for key in ("accuracy", "accuracy_by_length", "is_greedy"))
    for each in found.values():
        del each["is_greedy"]
    result = {
        "machine": machine(),
        "lm_eval": importlib.metadata.version("lm_eval"),
        "items": args.items,
        "furthest_apart": round(max(apart), 8),
        **found,
    }
    save(args.out, args.model.name, result)
    if not same or max(apart) >= CLOSE:
        raise SystemExit("the two do not agree")


if __name__ == "__main__":
    main()
