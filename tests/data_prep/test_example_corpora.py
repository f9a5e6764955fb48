"""From `rdt prep tasks` to shards: tokens, targets and examples as the files say, for any division of the work."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_prep.config import PrepConfig, check_prep
from data_prep.pipeline import prepare
from data_prep.show_corpus import Style, format_documents
from launch.commands.prep_tasks import tasks
from megatron_rdt.config import DataConfig
from megatron_rdt.data import IndexedDataset, Tokenizer, load_manifest, open_corpus, read_example_groups
from megatron_rdt.data.shard_files.verify import verify_corpus
from megatron_rdt.errors import ConfigError, DataError

WORDS = {"task": "product:S3,hops:5,modular", "difficulty": "1-3", "count": 300, "test_count": 30, "format": "symbols"}


def join_words(*flags: str, **changes: object) -> list[str]:
    """WORDS as options, with changes, which replace them, and flags."""
    return [*flags, *(f"--{name}={value}" for name, value in (WORDS | changes).items())]


def make_files(out: Path, *flags: str, **changes: object) -> PrepConfig:
    """Write examples and return the options of their prep.yaml."""
    assert tasks(join_words(*flags, "--duplicates", out=out, **changes)) == 0
    return PrepConfig(**yaml.safe_load((out / "prep.yaml").read_text()), workers=1)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[PrepConfig, Path]:
    """Files with labels of two tasks, and the corpus made of them."""
    config = make_files(tmp_path_factory.mktemp("labelled") / "s", "--labels", task="product:S3,hops:5")
    return config, prepare(config)


def read_lines(config: PrepConfig, split: str) -> list[dict]:
    sources = config.sources if split == "train" else config.valid_sources
    return [json.loads(line) for line in Path(sources[0]).read_text().splitlines()]


def read_documents(corpus: Path, split: str) -> list[dict]:
    """The documents of a split as text: what the model reads, its targets, task, difficulty and answer."""
    manifest, tokenizer = load_manifest(corpus), Tokenizer(corpus / "tokenizer")
    names = {
        index: name
        for name, index in json.loads((corpus / "tokenizer/tokenizer.json").read_text())["model"]["vocab"].items()
    }
    found = []
    for prefix in manifest.shard_prefixes(split):
        shard = IndexedDataset(prefix)
        for number, (start, end) in enumerate(zip(shard.document_bounds, shard.document_bounds[1:])):
            tokens, mask = shard.read(start, end - start), shard.read_mask(start, end - start)
            labels = (
                shard.read_labels(start, end - start) if manifest.document["prep"]["options"]["label_field"] else tokens
            )
            example = shard.read_examples(number, 1)[0]
            assert (tokens[0], tokens[-1]) == (tokenizer.bos, tokenizer.eos)
            assert np.array_equal(labels[mask == 0], tokens[mask == 0])
            targets = [names[int(i)] if counts else "_" for i, counts in zip(labels, mask)]
            found.append({
                "tokens": " ".join(names[int(i)] for i in tokens[1:-1]), "targets": targets, "answer": int(example["answer"]),
                "task": manifest.tasks[example["task"]], "difficulty": int(example["difficulty"]),
            })  # fmt: skip
    return sorted(found, key=str)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_labels_are_in_the_column_after_their_token(labelled: tuple[PrepConfig, Path], split: str) -> None:
    config, corpus = labelled
    lines = read_lines(config, split)
    expected = [
        {
            "tokens": line["prompt"], "targets": ["_", "_", *line["labels"].split()], "answer": 1,
            "task": line["task"], "difficulty": line["difficulty"],
        }
        for line in lines
    ]  # fmt: skip
    assert read_documents(corpus, split) == sorted(expected, key=str), "every example, repeated ones too"
    assert not {line["text"] for line in lines} & {word for line in lines for word in line["prompt"].split()}
    assert load_manifest(corpus).tasks == ["hops:5", "product:S3"]
    assert not verify_corpus(corpus)


def test_answers_without_labels(tmp_path: Path) -> None:
    config = make_files(tmp_path / "s")
    corpus = prepare(config)
    expected = [
        {
            "tokens": f"{line['prompt']} {line['text']}",
            "targets": ["_"] * (1 + len(line["prompt"].split())) + [*line["text"].split(), "_"],
            "answer": len(line["text"].split()), "task": line["task"], "difficulty": line["difficulty"],
        }
        for line in read_lines(config, "train")
    ]  # fmt: skip
    assert read_documents(corpus, "train") == sorted(expected, key=str)
    shard = IndexedDataset(load_manifest(corpus).shard_prefixes("train")[0])
    assert [kind.name for kind in shard.side_paths] == ["mask", "examples"]


def test_scores_read_what_the_files_say(labelled: tuple[PrepConfig, Path]) -> None:
    config, corpus = labelled
    lines, tokenizer = read_lines(config, "valid"), Tokenizer(corpus / "tokenizer")
    groups = read_example_groups(corpus)
    assert sum(len(group.batch) for group in groups) == len(lines) == 30
    for group in groups:
        inputs, named = group.batch.inputs()
        own = [line for line in lines if (line["task"], line["difficulty"]) == (group.task, group.difficulty)]
        answers = {line["prompt"]: line["text"] for line in own}
        assert group.trained
        for row in range(len(inputs)):
            prompt = tokenizer.decode([i for i in inputs[row].tolist() if i not in (tokenizer.bos, tokenizer.eos)])
            (target,) = named["targets"][row][named["loss_mask"][row]].tolist()
            assert tokenizer.decode([target]) == answers[prompt]


def test_small_parts_make_the_same_corpus(labelled: tuple[PrepConfig, Path], tmp_path: Path) -> None:
    """In small parts and several shards, there are the same documents, and the same names of tasks."""
    config = dataclasses.replace(labelled[0], out=str(tmp_path / "parts"), part_bytes=4000, shard_bytes=2000)
    parts = prepare(config)
    assert len(load_manifest(parts).shard_prefixes("train")) > 2
    assert load_manifest(parts).tasks == load_manifest(labelled[1]).tasks
    assert read_documents(parts, "train") == read_documents(labelled[1], "train")
    corpus = open_corpus(load_manifest(parts), "train", 12, 0, DataConfig(pack="example"))
    batch = corpus.read_samples(range(300))
    assert batch.difficulties is not None
    assert sorted(batch.difficulties) == sorted(line["difficulty"] for line in read_lines(config, "train"))


def test_show_prints_targets(labelled: tuple[PrepConfig, Path]) -> None:
    (document, *_) = [one for one in read_documents(labelled[1], "valid")]
    shown = list(format_documents(labelled[1], "valid", range(30), Style()))
    targets = " ".join(target for target in document["targets"] if target != "_")
    assert f"targets {targets}" in shown
    assert any(f", {document['task']} of difficulty {document['difficulty']}" in line for line in shown)


def test_the_tokenizer_loads_in_transformers(labelled: tuple[PrepConfig, Path]) -> None:
    from transformers import AutoTokenizer

    line = read_lines(labelled[0], "train")[0]
    ours, theirs = Tokenizer(labelled[1] / "tokenizer"), AutoTokenizer.from_pretrained(labelled[1] / "tokenizer")
    for text in (line["prompt"], line["labels"].replace("_ ", "")):
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.eos) == (0, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dedup": "exact"}, "dedup is exact, which would drop or change examples of tasks. Set --dedup none."),
        ({"normalize": "NFC"}, "normalize is NFC, which would drop or change examples"),
        ({"min_chars": 5}, "min_chars is 5"),
        ({"filters": ["a:b"]}, "filters is ['a:b'], which would drop or change examples of tasks. Set --filters []."),
        ({"difficulty_field": ""}, "difficulty_field is empty, examples need it. Set --difficulty_field"),
        ({"task_field": ""}, "task_field is empty"),
        ({"label_field": "text"}, "'text' is named as two fields of a record."),
        ({"sources": ["hf:name"]}, "hf:name has no examples of tasks: they are read from files."),
    ],
)
def test_options_that_do_not_fit_examples(
    labelled: tuple[PrepConfig, Path], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_prep(dataclasses.replace(labelled[0], **changes))  # type: ignore[arg-type]
    assert message in str(caught.value)


GOOD = {"prompt": "product:S3 231 312", "text": "=123", "labels": "_ =231 =123", "task": "product:S3", "difficulty": 1}
BAD = [
    ({"task": None}, 'bad.jsonl:2: field "task" is no name of a task: None'),
    ({"difficulty": "2"}, "field \"difficulty\" is no whole number from 0 to 4294967295: '2'"),
    ({"labels": 3}, 'field "labels" is neither text nor null: 3'),
    ({"labels": "=231 =123"}, "the prompt has 3 tokens, its row of labels 2 entries of 2 tokens"),
    ({"labels": "_ =231 =132"}, "the last labels are not the answer '=123'"),
    ({"prompt": "product:S3 999 312"}, "the example has a symbol that the tokenizer does not know"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_examples_are_named(
    labelled: tuple[PrepConfig, Path], tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    source = tmp_path / "bad.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in (GOOD, GOOD | changes)))
    config = dataclasses.replace(labelled[0], sources=[str(source)], valid_sources=[], out=str(tmp_path / "out"))
    with pytest.raises(DataError) as caught:
        prepare(dataclasses.replace(config, valid_fraction=0.0))
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_refused_requests_of_symbols(tmp_path: Path) -> None:
    for flags, changes, message in (
        (["--labels"], {"format": "text"}, "labels need one token for each element. Set --format symbols"),
        (["--labels"], {}, "modular has no answer at every position. Omit --labels."),
        (
            ["--labels"],
            {"task": "prefixes:S3"},
            "writes every answer before the next one. Take product:S3 with --labels",
        ),
        ([], {"task": "systematic", "difficulty": 2}, "systematic has no training examples. Name it in --test_task"),
        (
            [],
            {"task": "composition:20", "test_task": "systematic:30", "difficulty": 2},
            "systematic:30 asks for facts of a graph that no training task has. Name composition:30 in --task.",
        ),
        ([], {"weights": "1,2"}, "weights are 1,2, but difficulty has 1 entries"),
        ([], {"test_difficulty": 99}, "hops:5 has difficulties up to 4, not 99. Set --test_difficulty to at most that"),
    ):
        with pytest.raises(ConfigError) as caught:
            tasks(join_words(*flags, out=tmp_path, **changes))
        assert message in str(caught.value)
    assert not list(tmp_path.iterdir())
