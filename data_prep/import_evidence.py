"""Evidence beside imported shards of how they were made: their .sum files, and the corpus that they are in."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_rdt.data.shard_files.block_hashes import SUM_SUFFIX, FileHashes, read_block_hashes
from megatron_rdt.data.shard_files.corpus_manifest import load_manifest
from megatron_rdt.data.tokenizer.base import Tokenizer
from megatron_rdt.errors import ConfigError, DataError


def check_made_with(tokenizer: Tokenizer, prefixes: Sequence[str]) -> None:
    """Raise ConfigError if a shard lies in a corpus of `rdt prep` whose tokenizer gives its ids another meaning.

    A tokenizer with further tokens behind those of the corpus's is accepted.
    """
    known = {tokenizer.fingerprint}
    for prefix in prefixes:
        path = Path(prefix).absolute()
        try:
            manifest = load_manifest(path.parent.parent)
            other = Tokenizer(manifest.directory / "tokenizer")
        except (DataError, OSError):  # no corpus of ours, or a damaged one: the files are taken as they are
            continue
        if other.fingerprint in known or path.name not in {record["name"] for _, record in manifest.shard_records()}:
            continue
        known.add(other.fingerprint)
        ids = range(min(other.vocab_size, tokenizer.vocab_size))
        wrong = next((i for i in ids if other.decode([i]) != tokenizer.decode([i])), None)
        if other.eos != tokenizer.eos or wrong is not None:
            what = "EOS is another" if wrong is None else f"id {wrong} is {other.decode([wrong])!r} there"
            raise ConfigError(
                f"{prefix} was made with another tokenizer, {other.file.parent}: {what}. Name that in --tokenizer, or prepare "
                "the text again."
            )


def check_against_sums(source: str, contents: Mapping[str, FileHashes]) -> None:
    """Raise DataError if the original shard has a .sum file, and a file is missing or is not as it was written."""
    for name, (_, blocks) in (read_block_hashes(source) or {}).items():
        if name not in contents:
            raise DataError(f"{source}.{name} is missing: {source}{SUM_SUFFIX} lists it. Put it back from a copy.")
        if contents[name].blocks != blocks:
            raise DataError(
                f"{source}.{name} is not as it was written: {source}{SUM_SUFFIX} has other hashes. Put the file back from a "
                f"copy, or remove the {SUM_SUFFIX} file if it was changed on purpose."
            )
