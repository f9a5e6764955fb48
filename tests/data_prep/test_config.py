"""Options of prep: sizes have a range, and no source is named twice, under whatever path."""

import dataclasses
import re
from pathlib import Path

import pytest

from data_prep import pipeline
from data_prep.config import PrepConfig, check_prep
from data_prep.pipeline import prepare
from data_prep.stages import publish
from megatron_rdt.errors import ConfigError
from tests.data_prep.small_corpora import RECORDS, make_config, write_lines


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("part_bytes", 1, "part_bytes is 1 bytes, it must be at least 100, or 0 to choose it from the input."),
        ("part_bytes", 99, "part_bytes is 99 bytes, it must be at least 100"),
        ("part_bytes", -1, "part_bytes is -1 bytes, it must be at least 100"),
        ("shard_bytes", 0, "shard_bytes is 0 bytes, it must be at least 100."),
        ("shard_bytes", 99, "shard_bytes is 99 bytes, it must be at least 100."),
        ("tokenizer_sample_bytes", 9999, "tokenizer_sample_bytes is 9999 bytes, it must be at least 10,000."),
        ("max_documents", -1, "max_documents is -1, it must be at least 0."),
        ("workers", -1, "workers is -1, it must be from 0 to 1,024."),
        ("workers", 1025, "workers is 1025, it must be from 0 to 1,024."),
        ("vocab_size", 263, "vocab_size is 263, it must be from 264 to 2,147,483,647."),
        ("vocab_size", 2**31, "vocab_size is 2147483648, it must be from 264 to 2,147,483,647."),
    ],
)
def test_sizes_out_of_range(name: str, value: int, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{re.escape(message)}.*Set --{name}\.$"):
        check_prep(dataclasses.replace(PrepConfig(), **{name: value}))


@pytest.mark.parametrize(
    "changes",
    [
        {"part_bytes": 0},
        {"part_bytes": 100},
        {"shard_bytes": 100},
        {"tokenizer_sample_bytes": 10_000},
        {"workers": 1024},
        {"vocab_size": 264},
        {"vocab_size": 263, "special_tokens": ["<a>"]},
        {"vocab_size": 1, "tokenizer": "given"},
    ],
)
def test_sizes_at_the_ends_of_their_range(changes: dict) -> None:
    check_prep(dataclasses.replace(PrepConfig(), **changes))


@pytest.mark.parametrize(("name", "things"), [("part_bytes", "parts"), ("shard_bytes", "shards")])
def test_sizes_that_are_too_small_for_the_input(
    name: str, things: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before the first of a million small files is written."""
    source = write_lines(tmp_path / "a.jsonl", list(RECORDS))
    monkeypatch.setattr(publish, "MOST_FILES", 10)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "scan_part", lambda *_: pytest.fail("began to work"))
        with pytest.raises(ConfigError, match=rf"{name} is 100: the input would become about \d+ {things}") as caught:
            prepare(make_config(source, tmp_path / "out", **{name: 100}))
    least = re.search(rf"Set --{name} to ([\d,]+) or more\.$", str(caught.value))
    assert least is not None
    prepare(make_config(source, tmp_path / "out", **{name: int(least[1].replace(",", ""))}))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a folder of two files, a link to it, and a link to one of them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d" / "e").mkdir(parents=True)
    write_lines(tmp_path / "d" / "a.jsonl", list(RECORDS))
    write_lines(tmp_path / "d" / "e" / "b.jsonl", list(RECORDS[:20]))
    (tmp_path / "link").symlink_to("d")
    (tmp_path / "a.jsonl").symlink_to("d/a.jsonl")
    return tmp_path


@pytest.mark.parametrize(
    ("sources", "valid_sources", "message"),
    [
        (["d"], ["d"], "d is in sources and in valid_sources. Keep it in one of them."),
        (["d"], ["./d/"], "d, the same as ./d/, is in sources and in valid_sources."),
        (["d"], ["link"], "d, the same as link, is in sources and in valid_sources."),
        (["d/a.jsonl"], ["a.jsonl"], "d/a.jsonl, the same as a.jsonl, is in sources and in valid_sources."),
        (["d"], ["hf:d"], "d, the same as hf:d, is in sources and in valid_sources."),
        (["hf:some/name"], ["hf:some/name"], "hf:some/name is in sources and in valid_sources."),
        (["stdlib"], ["stdlib"], "stdlib is in sources and in valid_sources."),
        (["d/a.jsonl"], ["d"], "d/a.jsonl in sources is below d in valid_sources: nothing of it would be left"),
        (["a.jsonl"], ["link"], "a.jsonl in sources is below link in valid_sources"),
        (["d", "d"], [], "d is given twice in sources. Give it once in --sources."),
        (["d/a.jsonl", "a.jsonl"], [], "d/a.jsonl, the same as a.jsonl, is given twice in sources."),
        (["d/a.jsonl"], ["d/e", "link/e"], "d/e, the same as link/e, is given twice in valid_sources."),
    ],
)
def test_sources_that_are_the_same(
    sources: list[str], valid_sources: list[str], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(folder / "d", folder / "out", sources=sources, valid_sources=valid_sources)
    with pytest.raises(ConfigError, match=re.escape(message)):
        prepare(config)
    assert not [path for path in folder.iterdir() if "out" in path.name]


@pytest.mark.parametrize(
    ("sources", "valid_sources"),
    [(["d/a.jsonl"], ["d/e"]), (["d"], ["d/e"]), (["hf:a/b"], ["hf:a"]), (["stdlib"], ["d"])],
)
def test_sources_that_are_not_the_same(sources: list[str], valid_sources: list[str], folder: Path) -> None:
    check_prep(make_config(folder, folder / "out", sources=sources, valid_sources=valid_sources))
