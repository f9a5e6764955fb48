"""The prep job: read, remove duplicates, train the tokenizer, encode, split, write, describe.

The directory appears under its name only when everything in it is complete. A killed prep leaves nothing but a
hidden working directory, which the next one removes; the result is the same bytes for every number of workers.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep import encode
from data_prep.config import PrepConfig, check_prep
from data_prep.sources import Document, Progress, documents, input_files
from data_prep.tokenizer import copy_tokenizer, train_tokenizer, write_tokenizer
from megatron_rdt.data.manifest import FORMAT, MANIFEST, VERSION, load_manifest
from megatron_rdt.data.tokenizer import Tokenizer
from megatron_rdt.errors import ConfigError, DataError
from megatron_rdt.files import exclusive, is_disk_full, sha256_of, write_text

EXPORT_CHECK_DOCUMENTS = 200
WRITTEN = {MANIFEST, "tokenizer", "train", "valid"}
VERSIONED = ("megatron-rdt", "sentencepiece", "datasets")
NOT_IN_RESULT = ("out", "workers", "restart")  # options that do not change what is written


def options_hash(config: PrepConfig) -> str:
    """Hash of the options that decide the result."""
    options = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_IN_RESULT}
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()


def prepare(config: PrepConfig) -> Path:
    """Prepare `config.sources` into `config.out`; returns that directory. Nothing is done when it is there already."""
    check_prep(config)
    out = Path(config.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out.parent} cannot be made: {error.strerror}. Choose another --out.") from None
    message = f"another `rdt prep` is writing {out}. Wait for it, or choose another --out."
    with exclusive(out.with_name(f".{out.name}.lock"), message):
        _mend(out)
        if _already_there(out, config):
            print(f"{out} is complete and was made with these options from these files: nothing to do")
            return out
        _replace(out, config)
    return out


def _mend(out: Path) -> None:
    """Undo what a process that was killed while it replaced `out` left: the old one is hidden, the new one is not there."""
    replaced = _replaced(out)
    if replaced.exists() and not out.exists():
        replaced.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)


def _replaced(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")


def _replace(out: Path, config: PrepConfig) -> None:
    """Prepare beside `out`, then take its place."""
    work = out.with_name(f".{out.name}.prep")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        _prepare_into(work, config)
        if out.exists():
            out.rename(_replaced(out))
        work.rename(out)
        shutil.rmtree(_replaced(out), ignore_errors=True)
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise DataError(
            f"the disk is full while writing {out}; nothing was left behind. Free space or set --out to another disk."
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _already_there(out: Path, config: PrepConfig) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / MANIFEST).is_file():
        raise ConfigError(f"{out} exists and was not written by `rdt prep`. Choose another --out.")
    if config.restart:
        foreign = sorted({path.name for path in out.iterdir()} - WRITTEN)
        if foreign:
            raise ConfigError(
                f"{out} holds {foreign[0]}, which `rdt prep` did not write and --restart would delete. Move it away."
            )
        return False
    manifest = load_manifest(out)
    before = manifest.document["prep"]
    if before["options_sha256"] != options_hash(config):
        now = dataclasses.asdict(config)
        changed = [
            f"{key}={value}, now {now[key]}"
            for key, value in before["options"].items()
            if key not in NOT_IN_RESULT and now.get(key) != value
        ]
        raise ConfigError(
            f"{out} was prepared with {'; '.join(changed)}. Use a new --out, or --restart true to replace it."
        )
    difference = _changed_input(manifest.document["inputs"], config)
    if difference is not None:
        raise ConfigError(
            f"the text has changed since {out} was prepared: {difference}. Use a new --out, or --restart true to "
            "replace it."
        )
    manifest.verify()
    return True


def _input_records(config: PrepConfig) -> list[dict]:
    """What the manifest says of each file; what comes from the hub cannot be compared later and is not in it."""
    return [
        {"path": name, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256_of(path)}
        for name, path in input_files(config)
        for stat in [path.stat()]
    ]


def _changed_input(before: list[dict], config: PrepConfig) -> str | None:
    """The first file that differs from the manifest's; one that was only touched does not."""
    now, recorded = dict(input_files(config)), {record["path"]: record for record in before}
    for name in sorted(now.keys() ^ recorded.keys()):
        return f"{name} was {'added' if name in now else 'removed'}"
    for name, path in now.items():
        record, stat = recorded[name], path.stat()
        if stat.st_size == record["bytes"] and stat.st_mtime_ns == record["mtime_ns"]:
            continue
        if stat.st_size != record["bytes"] or sha256_of(path) != record["sha256"]:
            return f"{name} has other content"
    return None


def _prepare_into(work: Path, config: PrepConfig) -> None:
    progress = Progress(advance=lambda _: None)
    unique = list(_unique(config, progress))
    progress.check_share(config.max_bad)
    if not unique:
        raise DataError(f"no document with text in {config.sources}. Check the sources and --text_field.")
    texts = [document.text for document, _ in unique]
    tokenizer = _tokenizer(config, work, texts)
    spill = encode.Spill(work / "spill.bin", tokenizer.vocab_size)
    size = sum(len(text) for text in texts)
    with tqdm(total=size, unit="B", unit_scale=True, desc="encode") as bar:
        encoded = encode.encode_documents(texts, work / "tokenizer", config.workers)
        for text, tokens in zip(texts, encoded):
            spill.add(tokens)
            bar.update(len(text))
    spill.finish()

    order: dict[str, list[int]] = {"train": [], "valid": []}
    for index, (_, digest) in enumerate(unique):
        order["valid" if encode.is_valid(digest, config.valid_fraction) else "train"].append(index)
    for split, indices in order.items():
        if not indices and (split == "train" or config.valid_fraction > 0):
            raise DataError(
                f"the {split} split would be empty with {len(unique)} documents. Add documents or change --valid_fraction."
            )
        indices.sort(key=lambda i: encode.order_key(config.seed, unique[i][0].place))
    splits = {}
    with tqdm(total=len(unique), unit="doc", desc="write") as bar:
        for split, indices in order.items():
            records = encode.write_split(work / split, spill, indices, config, tokenizer.vocab_size, bar.update)
            splits[split] = {
                "tokens": sum(r["tokens"] for r in records),
                "documents": len(indices),
                "text_bytes": sum(len(texts[i].encode("utf-8")) for i in indices),
                "shards": records,
            }
    (work / "spill.bin").unlink()
    _write_manifest(work, config, tokenizer, splits, progress, texts)


def _unique(config: PrepConfig, progress: Progress) -> Iterator[tuple[Document, bytes]]:
    """Documents without exact repeats, each with the hash of its content."""
    seen: set[bytes] = set()
    total = sum(path.stat().st_size for _, path in input_files(config)) or None
    with tqdm(total=total, unit="B", unit_scale=True, desc="read") as bar:
        progress.advance = bar.update
        for document in documents(config, progress):
            digest = encode.content_hash(document.text)
            if digest in seen:
                progress.dropped["duplicate"] += 1
                continue
            seen.add(digest)
            yield document, digest


def _tokenizer(config: PrepConfig, work: Path, texts: list[str]) -> Tokenizer:
    sample = texts[:EXPORT_CHECK_DOCUMENTS]
    if config.tokenizer:
        return copy_tokenizer(config.tokenizer, work / "tokenizer", sample)
    # A fixed, spread-out sample: every document in the order of its content's hash.
    shuffled = sorted(texts, key=encode.content_hash)
    with tqdm(total=len(shuffled), unit="doc", desc="tokenizer") as bar:
        model = train_tokenizer((text for text in shuffled if not bar.update(1) or True), config)
        bar.update(bar.total - bar.n)
    return write_tokenizer(model, work / "tokenizer", sample)


def _write_manifest(
    work: Path, config: PrepConfig, tokenizer: Tokenizer, splits: dict, progress: Progress, texts: list[str]
) -> None:
    document = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": np.dtype(encode.token_dtype(tokenizer.vocab_size)).name,
        "vocab_size": tokenizer.vocab_size,
        "bos": tokenizer.bos,
        "eos": tokenizer.eos,
        "pad": tokenizer.pad,
        "tokenizer": {
            "kind": tokenizer.kind,
            "fingerprint": tokenizer.fingerprint,
            "file_sha256": sha256_of(tokenizer.file),
        },
        "prep": {"options_sha256": options_hash(config), "options": dataclasses.asdict(config), "append_eos": True},
        "versions": {name: importlib.metadata.version(name) for name in VERSIONED}
        | {"python": platform.python_version()},
        "inputs": _input_records(config),
        "splits": splits,
        "dropped": dict(progress.dropped),
        "replaced": progress.replaced,
        "bad": progress.bad,
        "contains_u2581": sum("\u2581" in text for text in texts),
    }
    write_text(work / MANIFEST, json.dumps(document, indent=1) + "\n")
    for split, content in splits.items():
        print(f"{split}: {content['tokens']:,} tokens, {content['documents']:,} documents")
    if progress.replaced:
        print(f"invalid UTF-8 replaced in {progress.replaced:,} records")
    if progress.dropped:
        print("dropped: " + ", ".join(f"{count} {reason}" for reason, count in sorted(progress.dropped.items())))
