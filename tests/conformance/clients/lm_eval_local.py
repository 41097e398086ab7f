"""lm-eval's `local-completions` on two small tasks of our own: likelihoods of choices, and a text gone on with.

It needs the backbone's tokenizer to know where a context ends among the tokens; that one is read from the cache.
"""

import json
import os
from pathlib import Path

import lm_eval
import yaml
from lm_eval.tasks import TaskManager
from probe import feature, holds, run, same

ROWS = Path(__file__).with_name("capitals.jsonl")
DATA = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(ROWS)}}, "test_split": "test"}
CHOICES = {
    **DATA,
    "task": "capitals",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
WRITTEN = {
    **DATA,
    "task": "capitals_written",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[answer]}}",
    "target_delimiter": "",
    "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 8, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def measured(url: str, task: dict, **more: object) -> dict:
    """The results of one task; everything it needs is on this machine."""
    folder = Path(os.environ["CONFORMANCE_OUT"]).parent / "lm-eval-tasks"
    folder.mkdir(exist_ok=True)
    (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    arguments = {
        "base_url": f"{url}/completions",
        "model": "hhh@16-0-0-0:lenient",
        "tokenizer_backend": "huggingface",
        "tokenizer": os.environ["CONFORMANCE_TOKENIZER"],
        "num_concurrent": 2,
        "max_retries": 1,
        **more,
    }
    done = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=arguments,
        tasks=[task["task"]],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    print(json.dumps(done["results"]))
    return done["results"][task["task"]]


@feature("completions")
def likelihoods(url: str) -> None:
    by_ids, by_text = (measured(url, CHOICES, tokenized_requests=t)["acc,none"] for t in (True, False))
    same(by_text, by_ids)


@feature("own checks")
def accuracy(url: str) -> str:
    chosen = measured(url, CHOICES)["acc,none"]
    written = measured(url, WRITTEN)["exact_match,none"]
    holds(chosen > 0.5, f"accuracy {chosen} on questions that the bare backbone knows")
    return f"bare backbone on 8 sentences of our own: accuracy {chosen:.3f} of two choices, {written:.3f} written out"


run("lm-eval")
