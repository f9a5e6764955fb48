"""A corpus of .bin and .idx files that other tools wrote in Megatron's format: checked, linked, described; not rewritten."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep.stages.write_manifest import make_split_record, make_tokenizer_record, print_splits
from megatron_rdt.data.shard_files.block_hashes import SUFFIXES, hash_file, write_block_hashes
from megatron_rdt.data.shard_files.corpus_manifest import FORMAT, MANIFEST, VERSION
from megatron_rdt.data.shard_files.indexed import REBUILD, IndexedDataset, prefix_path
from megatron_rdt.data.tokenizer.base import BYTES_FILE, Tokenizer
from megatron_rdt.data.tokenizer.hugging_face_backend import JSON_FILE
from megatron_rdt.data.tokenizer.sentencepiece_backend import MODEL_FILE
from megatron_rdt.errors import ConfigError, DataError
from megatron_rdt.files import fsync_directory, fsync_file, hold_lock, write_text

# Files of a tokenizer's folder that are taken along.
TOKENIZER_FILES = (
    MODEL_FILE,
    JSON_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    BYTES_FILE,
)
# Why a file may have no second name: another file system, one without links, no right to, too many names.
NO_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP}


@dataclass(frozen=True)
class Imported:
    """One pair of files that was looked through.

    Attributes:
        record: of the manifest.
        dtype: of the tokens.
        ended: documents that end with EOS, of those that are not empty.
        documents: that are not empty.
    """

    record: dict[str, Any]
    dtype: np.dtype
    ended: int
    documents: int


def import_corpus(prefixes: Sequence[str], tokenizer: str, out: str, valid_prefixes: Sequence[str] = ()) -> Path:
    """Make a corpus of existing files; each prefix becomes one shard, in the order given.

    Files are linked where the file system can (one content under two names), else copied; the originals stay.

    Args:
        prefixes: of the training split's files, without .bin and .idx.
        tokenizer: a folder or model file of the tokenizer that made them.
        out: the corpus to write; must not exist.
        valid_prefixes: of the validation split's files.

    Raises:
        ConfigError: a path is wrong.
        DataError: a file is damaged, not of this tokenizer, or of another type than the others.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{out} exists. Choose another --out.")
    for prefix in (*prefixes, *valid_prefixes):
        for suffix in (".bin", ".idx"):
            if not prefix_path(prefix, suffix).is_file():
                raise ConfigError(f"{prefix}{suffix} does not exist. Name prefixes: paths without .bin and .idx.")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.import")
    message = f"another `rdt prep import` is writing {out}. Wait for it, or choose another --out."
    with hold_lock(target.with_name(f".{target.name}.lock"), message):
        shutil.rmtree(work, ignore_errors=True)
        try:
            _import_into(work, {"train": prefixes, "valid": valid_prefixes}, tokenizer)
            for folder in (*work.iterdir(), work):
                if folder.is_dir():
                    fsync_directory(folder)
            work.rename(target)
            fsync_directory(target.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def _import_into(work: Path, splits: dict[str, Sequence[str]], tokenizer_path: str) -> None:
    (work / "tokenizer").mkdir(parents=True)
    tokenizer = _take_tokenizer(Path(tokenizer_path), work / "tokenizer")
    sizes = tokenizer.token_bytes()
    imported: dict[str, list[Imported]] = {}
    total = sum(path.stat().st_size for names in splits.values() for prefix in names for path in _files(prefix))
    with tqdm(total=total, unit="B", unit_scale=True, desc="import") as bar:
        for split, names in splits.items():
            (work / split).mkdir()
            imported[split] = []
            for number, prefix in enumerate(names):
                place = work / split / f"shard-{number:05d}"
                for path in _files(prefix):
                    _link(path, prefix_path(place, path.suffix))
                imported[split].append(_look_through(place, prefix, tokenizer, sizes, bar.update))
    every = [one for found in imported.values() for one in found]
    dtypes = {one.dtype.name: one.record["source"] for one in every}
    if len(dtypes) > 1:
        (first, one), (second, two) = list(dtypes.items())[:2]
        raise DataError(f"{one} has tokens as {first}, {two} as {second}. Import them as corpora of their own.")
    for split, found in imported.items():
        if len({"mask_sha256" in one.record for one in found}) > 1:
            raise DataError(f"some files of the split {split} have masks and others none. Leave out the .mask files.")
    ended, documents = sum(one.ended for one in every), sum(one.documents for one in every)
    document = _manifest(tokenizer, every[0].dtype, imported, ended == documents)
    write_text(work / MANIFEST, json.dumps(document, indent=1) + "\n")
    print_splits(document)
    if ended < documents:
        print(
            f"EOS (id {tokenizer.eos}) ends {ended:,} of {documents:,} documents ({ended / max(1, documents):.1%}): "
            "in the others nothing tells the model that a document ends"
        )


def _files(prefix: str | Path) -> list[Path]:
    return [path for suffix in SUFFIXES if (path := prefix_path(prefix, suffix)).is_file()]


def _take_tokenizer(source: Path, target: Path) -> Tokenizer:
    """Copy a tokenizer's files, and write how many bytes each id stands for."""
    known = Tokenizer(source)
    if known.eos < 0:
        raise ConfigError(f"the tokenizer {source} has no EOS. Name the tokenizer that made these files.")
    if source.is_dir():
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
    else:
        shutil.copyfile(source, target / (JSON_FILE if known.file.suffix == ".json" else MODEL_FILE))
    known.write_token_bytes(target)
    for file in target.iterdir():
        fsync_file(file)
    return Tokenizer(target)


def _link(source: Path, target: Path) -> None:
    """Give the content of `source` a second name, or copy it where that cannot be."""
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        shutil.copyfile(source, target)
        fsync_file(target)


def _look_through(
    place: Path, source: str, tokenizer: Tokenizer, sizes: np.ndarray, advance: Callable[[int], object]
) -> Imported:
    """Read one pair of files, each byte once."""
    shard, starts = _opened(source)
    lasts = np.append(starts[1:], shard.tokens) - 1
    state = {"max_id": -1, "text_bytes": 0, "ended": 0}
    width = shard.dtype.itemsize

    def see(offset: int, block: bytes) -> None:
        tokens, begin = np.frombuffer(block, shard.dtype), offset // width
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= tokenizer.vocab_size:
            at = int(np.argmax((tokens < 0) | (tokens >= tokenizer.vocab_size)))
            raise DataError(
                f"{source}.bin: bytes {offset + at * width:,} to {offset + at * width + width - 1:,} hold id {tokens[at]}, "
                f"but the tokenizer has {tokenizer.vocab_size:,} pieces. Name the tokenizer that made these files."
            )
        state["max_id"] = max(state["max_id"], high)
        state["text_bytes"] += int(sizes[tokens].sum(dtype=np.int64))
        first, end = np.searchsorted(lasts, (begin, begin + len(tokens)))
        state["ended"] += int((tokens[lasts[first:end] - begin] == tokenizer.eos).sum())
        advance(len(block))

    def see_mask(offset: int, block: bytes) -> None:
        shard.read_mask(offset, len(block))
        advance(len(block))

    contents = {"bin": hash_file(prefix_path(place, ".bin"), see), "idx": hash_file(prefix_path(place, ".idx"))}
    advance(contents["idx"].size)
    if shard.has_mask:
        contents["mask"] = hash_file(prefix_path(place, ".mask"), see_mask)
    shard.close()
    write_block_hashes(place, contents)
    record = {
        "name": place.name,
        "source": source,
        "tokens": shard.tokens,
        "documents": shard.document_count,
        "sequences": len(shard),
        "text_bytes": state["text_bytes"],
        "max_id": state["max_id"],
        "bin_bytes": contents["bin"].size,
        **{f"{name}_sha256": content.sha256 for name, content in contents.items()},
    }
    return Imported(record, shard.dtype, state["ended"], len(lasts))


def _opened(source: str) -> tuple[IndexedDataset, np.ndarray]:
    """A pair of files, and the first tokens of its documents."""
    try:
        shard = IndexedDataset(source)
        starts = shard.document_starts
    except DataError as error:
        raise DataError(f"{str(error).removesuffix(REBUILD)}Write it again with the tool that made it.") from None
    if not len(starts):
        raise DataError(f"{source} has no documents. Leave it out.")
    return shard, starts


def _manifest(
    tokenizer: Tokenizer, dtype: np.dtype, imported: dict[str, list[Imported]], ended: bool
) -> dict[str, Any]:
    splits = {split: make_split_record([one.record for one in found]) for split, found in imported.items()}
    sources = [one.record["source"] for found in imported.values() for one in found]
    return {
        "format": FORMAT,
        "version": VERSION,
        "dtype": dtype.name,
        **make_tokenizer_record(tokenizer),
        "prep": {
            "options_sha256": hashlib.sha256("\n".join(["import", *sources]).encode()).hexdigest(),
            "options": {},
            "imported": sources,
            "append_eos": ended,
        },
        "inputs": [],
        "splits": splits,
        "dropped": {},
    }
