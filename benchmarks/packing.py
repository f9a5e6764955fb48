"""Packing against cutting: padding, documents cut, documents planned and samples read per second.

    python benchmarks/packing.py [--corpus DIR] [--lengths 256,2048] [--documents 1000000]

Without a corpus, documents have generated lengths: log-normal, as those of web pages, a few of them very long. Seconds are
CPU seconds of one thread.
"""

import time
from pathlib import Path

import numpy as np
from tools.options import make_parser

from megatron_rdt.config import DataConfig
from megatron_rdt.data import IndexedDataset, load_manifest, open_corpus
from megatron_rdt.data.packing_plan import make_plans, pack_shard

LOG_MEAN, LOG_DEVIATION = 6.0, 1.1  # of the logarithm of a document's tokens: median 403, mean 739
BATCH, READ_SECONDS = 32, 3.0


def share_cut_by_windows(starts: np.ndarray, lengths: np.ndarray, length: int) -> float:
    """Share of the documents that are cut where windows are taken from one stream of tokens."""
    # A window has length + 1 tokens and shares its last one with the next.
    return float((starts + lengths > starts // length * length + length + 1).mean())


def print_packing(name: str, starts: np.ndarray, lengths: np.ndarray, length: int) -> None:
    """Print one line: documents cut by windows, documents cut and padding by packing, and its speed."""
    began = time.process_time()
    _, _, counts = pack_shard(starts, int(lengths.sum()), length)
    seconds = time.process_time() - began
    padding = counts.padding / (counts.rows * (length + 1))
    what = f"{name:<10} L {length:>5}  {len(lengths):>9,} documents, mean {lengths.mean():,.0f} tokens"
    chunk = f"{share_cut_by_windows(starts, lengths, length):6.1%} cut"
    packed = (
        f"{counts.cut / counts.documents:6.1%} cut, {padding:.3%} padding, {len(lengths) / seconds:,.0f} documents/s"
    )
    print(f"{what}   chunk: {chunk}   bestfit: {packed}")


def print_reading_speed(corpus: Path, length: int) -> None:
    """Write missing packing plans; print samples/s read, cut and packed, without and with document masks."""
    manifest = load_manifest(corpus)
    make_plans(manifest, "train", length)
    for pack_as in ("chunk", "bestfit"):
        for masks in (False, True):
            options = DataConfig(pack=pack_as, document_mask=masks, document_positions=masks)
            split = open_corpus(manifest, "train", length, 1, options)
            locations = split.locate(np.arange(1024 * BATCH)).reshape(-1, BATCH)
            split.read(locations[0])
            began, read = time.process_time(), 0
            while time.process_time() - began < READ_SECONDS:
                split.read(locations[read % len(locations)])
                read += 1
            speed = read * BATCH / (time.process_time() - began)
            print(f"L {length:>5}  {pack_as:<8} {'documents, positions' if masks else '':<21} {speed:,.0f} samples/s")
            split.close()


def main() -> None:
    """Print the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--corpus", help="directory that rdt prep wrote")
    parser.add_argument("--lengths", default="256,2048", help="tokens per window, separated by commas")
    parser.add_argument("--documents", type=int, default=1_000_000, help="documents of generated lengths")
    options = parser.parse_args()
    lengths = [int(length) for length in options.lengths.split(",")]
    draw = np.random.default_rng(0)
    sizes = np.maximum(draw.lognormal(LOG_MEAN, LOG_DEVIATION, options.documents), 2).astype(np.int64)
    for length in lengths:
        print_packing("generated", np.cumsum(sizes) - sizes, sizes, length)
    if options.corpus is None:
        return
    shards = [IndexedDataset(prefix) for prefix in load_manifest(options.corpus).shard_prefixes("train")]
    sizes = np.concatenate([np.diff(shard.document_starts, append=shard.tokens) for shard in shards])
    for length in lengths:
        print_packing("corpus", np.cumsum(sizes) - sizes, sizes, length)
    for length in lengths:
        print_reading_speed(Path(options.corpus), length)


if __name__ == "__main__":
    main()
