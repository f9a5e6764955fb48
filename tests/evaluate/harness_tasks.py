"""Small tasks of lm-evaluation-harness, one for each type of request, with their data in a local file."""

import json
from pathlib import Path

# What each task has beside its name and data.
TASKS = {
    "lines_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{begin}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "lines_end": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{begin}}",
        "doc_to_target": " {{end}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    "lines_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
    },
    "lines_more": {
        "output_type": "generate_until",
        "doc_to_text": "{{begin}}",
        "doc_to_target": "{{end}}",
        "generation_kwargs": {"until": ["\n", ")"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}
GROUP = {
    "group": "lines",
    "task": ["lines_choice", "lines_end"],
    "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
}


def write_harness_tasks(folder: Path, lines: list[str]) -> Path:
    """Write a YAML file per task, and a group of two, whose examples are lines without their last words; return it."""
    folder.mkdir(parents=True)
    cut = [(" ".join(words[:-2]), " ".join(words[-2:])) for words in map(str.split, lines)]
    rows = [
        {
            "begin": begin,
            "end": end,
            "choices": [other for _, other in (cut[(row + step) % len(cut)] for step in range(3))],
            "answer": 0,
            "text": "\n".join(lines[row : row + 1 + row % 5]),
        }
        for row, (begin, end) in enumerate(cut)
    ]
    (folder / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "lines.jsonl")}}}
    for name, parts in TASKS.items():
        task = {"task": name, **data, "test_split": "test", **parts}
        (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    (folder / "lines.yaml").write_text(json.dumps(GROUP), encoding="utf-8")
    return folder
