"""Speed from text to shards and from shards to batches, compared with SentencePiece, datasets and megatron-core.

Preparing: the Python sources of this environment as one JSONL file, one tokenizer for all. "sentencepiece" is its own
batch encoder over texts that are in memory, with as many threads as there are cores, and writes nothing; the others read
the file and write files that a trainer reads. Reading: windows of random tokens in random order, as batches; cold means
that the pages were dropped from the cache before. Wall time; the rounds are interleaved and the best of each counts.

    python benchmarks/data.py [--megabytes 60] [--gigabytes 2] [--only prep|read] [--out FILE.json]

megatron-core is measured where it is installed (`pip install --no-deps megatron-core==0.16.1`).
"""

import argparse
import importlib.util
import json
import os
import random
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tools.options import make_parser, write_numbers
from tools.tables import format_header, format_row
from tools.timing import measure_in_turn, measure_seconds

from megatron_rdt.config.batch_schedule import BatchSchedule
from megatron_rdt.data import BatchLoader
from megatron_rdt.data.corpus import TokenCorpus
from megatron_rdt.data.shard_files.corpus_manifest import CorpusManifest
from megatron_rdt.data.shard_files.indexed import IndexedWriter

VOCABULARY, TOKENS_PER_DOCUMENT = 32000, 1000
SHARD_TOKENS = 1 << 28


def find_python_sources(megabytes: int) -> Iterator[str]:
    """Yield the texts of this environment's Python files, standard library first, up to so many megabytes."""
    left = megabytes * 1_000_000
    for root in (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"]):
        for path in sorted(Path(root).rglob("*.py")):
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if text.strip():
                yield text
                left -= len(text.encode())
            if left <= 0:
                return


def measure_wall(run: Callable[[], Any]) -> float:
    """Wall seconds of a call."""
    return measure_seconds(run, time.perf_counter)


def measure_prep(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Write texts and train a tokenizer in `folder`; return MB/s from text to tokens by name of the program."""
    import datasets
    import sentencepiece

    from data_prep.config import PrepConfig
    from data_prep.pipeline import prepare
    from data_prep.stages.tokenizer.train_sentencepiece import train_tokenizer

    datasets.disable_progress_bars()
    texts = list(dict.fromkeys(find_python_sources(options.megabytes)))
    size = sum(len(text.encode()) for text in texts) / 1e6
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    sample = random.Random(0).sample(texts, len(texts))
    sizes = {"vocab_size": options.vocabulary, "tokenizer_sample_bytes": 4_000_000}
    model = train_tokenizer(sample, PrepConfig(tokenizer_type=options.tokenizer, **sizes))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.model").write_bytes(model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    def bare() -> None:
        processor.encode(texts, num_threads=options.workers, return_type="numpy")

    def ours(**changes: Any) -> None:
        out = folder / "ours"
        given = {"sources": [str(source)], "out": str(out), "tokenizer": str(folder / "tokenizer"), **changes}
        prepare(PrepConfig(workers=options.workers, **given))
        shutil.rmtree(out)

    def hugging_face() -> None:
        def encode(batch: dict[str, list[str]]) -> dict[str, list[np.ndarray]]:
            return {"ids": processor.encode(batch["text"], num_threads=1, return_type="numpy")}

        loaded = datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=str(folder / "cache"))
        mapped = loaded.map(encode, batched=True, batch_size=64, num_proc=options.workers, remove_columns=["text"])
        mapped.save_to_disk(str(folder / "arrow"), num_proc=options.workers)
        for name in ("cache", "arrow"):
            shutil.rmtree(folder / name)

    cleaning = {"dedup": "near", "normalize": "NFC", "max_repeated_lines": 0.9, "max_repeated_ngrams": 0.9}
    kinds = {
        "sentencepiece, nothing read or written": bare,
        "rdt prep": ours,
        "rdt prep, near-duplicates and filters too": partial(ours, **cleaning),
        "datasets: load, map, save": hugging_face,
    }
    times = measure_in_turn(kinds, options.rounds, time.perf_counter)
    return {kind: size / min(seconds) for kind, seconds in times.items()}


def write_random_corpus(folder: Path, gigabytes: float) -> CorpusManifest:
    """Write shards of random ids; return their manifest, which has no tokenizer."""
    generator, left, shards = np.random.default_rng(0), int(gigabytes * 5e8), []
    (folder / "train").mkdir(parents=True)
    while left > 0:
        count = min(left, SHARD_TOKENS)
        name = f"shard-{len(shards):05d}"
        with IndexedWriter(folder / "train" / name, VOCABULARY) as writer:
            block = generator.integers(4, VOCABULARY, (count // TOKENS_PER_DOCUMENT, TOKENS_PER_DOCUMENT), np.uint16)
            for document in block:
                writer.add_document(document)
        shards.append({"name": name, "tokens": writer.tokens, "documents": writer.documents})
        shards[-1] |= {"bin_bytes": 2 * writer.tokens, "bin_sha256": "", "idx_sha256": "", "max_id": writer.max_id}
        left -= count
    splits = {"train": {"tokens": sum(shard["tokens"] for shard in shards), "shards": shards}}
    kind = {"vocab_size": VOCABULARY, "dtype": "uint16", "tokenizer": {"fingerprint": ""}}
    return CorpusManifest(folder, {**kind, "splits": splits})


def drop_pages(folder: Path) -> None:
    """Drop the files of a folder from the kernel's page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


Reader = Callable[[np.ndarray], Any]


def our_readers(manifest: CorpusManifest, options: argparse.Namespace) -> dict[str, Reader]:
    """Return this project's readers, functions of sample numbers: tokens alone, and documents and positions too."""

    def reader(**wanted: bool) -> Reader:
        corpus = TokenCorpus(manifest, "train", options.length, 0, **wanted)
        return lambda samples: corpus.read_samples(samples).tokens.sum()

    return {"ours": reader(), "ours, documents and positions too": reader(documents=True, positions=True)}


def measure_loader(manifest: CorpusManifest, options: argparse.Namespace) -> float:
    """Windows per second of the whole loader: order, reading, a thread, a queue."""
    loader = BatchLoader(TokenCorpus(manifest, "train", options.length, 0), BatchSchedule.constant(options.batch), 0, 1)
    batches, count = iter(loader), options.windows // options.batch
    next(batches)
    seconds = measure_wall(lambda: [next(batches) for _ in range(count)])
    loader.close()
    return count * options.batch / seconds


def hugging_face_readers(manifest: CorpusManifest, options: argparse.Namespace) -> dict[str, Reader]:
    """Write the first shard as an Arrow table of windows; return readers of it by `datasets`, by name."""
    import datasets
    import pyarrow

    width, file = options.length + 1, manifest.directory / "windows.arrow"
    tokens = np.fromfile(manifest.shard_prefixes("train")[0].with_suffix(".bin"), np.uint16)
    tokens = tokens[: len(tokens) // width * width]
    rows = pyarrow.ListArray.from_arrays(np.arange(0, len(tokens) + 1, width, dtype=np.int32), pyarrow.array(tokens))
    table = pyarrow.table({"ids": rows})
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    dataset = datasets.Dataset.from_file(str(file)).with_format("numpy")
    order = np.random.default_rng(0).permutation(len(dataset))
    return {
        "datasets, one by one": lambda samples: [dataset[int(i)]["ids"].sum() for i in order[samples % len(order)]],
        "datasets, a batch at once": lambda samples: dataset[order[samples % len(order)]]["ids"].sum(),
    }


class MegatronTokenizer:
    """The attributes of a tokenizer that megatron-core's datasets read."""

    eod, pad, vocab_size, unique_identifiers = 2, 3, VOCABULARY, {"name": "random"}


def megatron_readers(manifest: CorpusManifest, options: argparse.Namespace) -> dict[str, Reader]:
    """A reader of megatron-core's GPTDataset over the first shard; none if megatron-core is not installed."""
    if importlib.util.find_spec("megatron") is None:
        return {}
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    off = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss", "create_attention_mask")
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=options.length,
        blend=([str(manifest.shard_prefixes("train")[0])], None),
        split="1,0,0",
        path_to_cache=str(manifest.directory / "cache"),
        tokenizer=MegatronTokenizer(),
        mid_level_dataset_surplus=0.005,
        **dict.fromkeys(off, False),
    )
    dataset = BlendedMegatronDatasetBuilder(GPTDataset, [1000, 0, 0], lambda: True, config).build()[0]
    name = "megatron-core GPTDataset"
    return {name: lambda samples: [dataset[int(i)]["tokens"].sum() for i in samples % len(dataset)]}


def measure_reading(folder: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Write a random corpus; return [cold, best warm] windows/s by reader, the whole loader's among them."""
    manifest, readers = write_random_corpus(folder, options.gigabytes), {}
    for make_readers in (our_readers, hugging_face_readers, megatron_readers):
        readers |= make_readers(manifest, options)
    samples = np.arange(options.windows // options.batch * options.batch).reshape(-1, options.batch)
    speeds: dict[str, list[float]] = {}
    for name, read in readers.items():
        read(samples[0])
        drop_pages(folder)
        cold, *warm = (measure_wall(lambda: [read(batch) for batch in samples]) for _ in range(1 + options.rounds))  # noqa: B023
        speeds[name] = [samples.size / seconds for seconds in (cold, min(warm))]
    drop_pages(folder)
    speeds["ours, the whole loader"] = [measure_loader(manifest, options) for _ in range(2)]
    return speeds


def main() -> None:
    """Print a table for preparing and one for reading."""
    parser = make_parser(__doc__, rounds=2, out=None)
    parser.add_argument("--megabytes", type=int, default=60, help="text to prepare")
    parser.add_argument("--gigabytes", type=float, default=2, help="tokens to read from")
    parser.add_argument("--vocabulary", type=int, default=8192, help="size of the tokenizer")
    parser.add_argument("--tokenizer", choices=("bpe", "unigram"), default="bpe")
    parser.add_argument("--length", type=int, default=2048, help="L; a window has one token more")
    parser.add_argument("--batch", type=int, default=32, help="windows at once")
    parser.add_argument("--windows", type=int, default=20000, help="windows per round")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, and threads of sentencepiece")
    parser.add_argument("--only", choices=("prep", "read"), help="omit the other part")
    parser.add_argument("--folder", type=Path, help="folder in which a temporary one is made for the files")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.only != "read":
            found["prep"] = measure_prep(Path(folder), options)
            bare = next(iter(found["prep"].values()))
            print(f"\n{format_header(['Text to tokens', 'MB/s', 'of sentencepiece'], left=1)}")
            for kind, speed in found["prep"].items():
                print(format_row([kind, f"{speed:.2f}", f"{speed / bare:.2f}"]))
        if options.only != "prep":
            found["read"] = measure_reading(Path(folder) / "random", options)
            print(f"\n{format_header(['Windows per second', 'cold', 'warm'], left=1)}")
            for kind, (cold, warm) in found["read"].items():
                print(format_row([kind, f"{cold:,.0f}", f"{warm:,.0f}"]))
    write_numbers(options, found)


if __name__ == "__main__":
    main()
