"""Memory of `rdt convert --to hf`: one file of weights is held at a time, whatever the size of the model.

A random checkpoint is written and exported with several sizes of files. Each row is a process of its own; memory is anonymous
memory at its peak, sampled every 10 ms, above that of the process before. Weights are read, rounded, written, read back, and
logits computed at T = 1, 2 and 4, as in the command.

    python benchmarks/export_memory.py [--dim 1024] [--vocabulary 16384] [--out FILE.json]
"""

import sysconfig
import tempfile
from pathlib import Path

import torch
from tools.options import make_parser, write_numbers
from tools.processes import run_fresh
from tools.resident_memory import measure_anonymous_growth
from tools.tables import format_header, format_row

from data_prep.config import PrepConfig
from data_prep.stages.tokenizer.train_sentencepiece import train_tokenizer
from data_prep.stages.tokenizer.write_tokenizer import write_tokenizer
from megatron_rdt.config import DepthConfig, ModelConfig, RunConfig
from megatron_rdt.convert.hf import ExportOptions
from megatron_rdt.convert.hf_export import export_hf
from megatron_rdt.convert.native_writer import write_documents, write_weights
from megatron_rdt.model import RecurrentDepthTransformer

IDS = 512  # of the tokenizer; the embedding has more rows
HEADS, LAYERS = 8, 4  # layers each before, in and after the loop
FILES = (("float32", "5GB"), ("float32", "200MB"), ("bfloat16", "200MB"), ("float32", "50MB"))
MB = 1e6


def write_checkpoint(out: Path, dim: int, vocabulary: int) -> tuple[int, int]:
    """Write a checkpoint with random weights; return the bytes of all and of the largest, in float32."""
    layers = dict.fromkeys(("prelude_layers", "core_layers", "coda_layers"), LAYERS)
    sizes = {"dim": dim, "heads": HEADS, "kv_heads": HEADS, "ffn_dim": 4 * dim, "vocab_size": vocabulary}
    model = ModelConfig(**sizes, **layers, unused_ids=vocabulary - IDS)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in RecurrentDepthTransformer(model).state_dict().items()}
    written = write_weights(out, shapes, set(), lambda name: torch.randn(shapes[name]) * dim**-0.5, lambda _: None)
    library = Path(sysconfig.get_paths()["stdlib"]) / "json"
    texts = [path.read_text(encoding="utf-8") for path in sorted(library.glob("*.py"))]
    prep = PrepConfig(vocab_size=IDS, tokenizer_sample_bytes=100_000)
    write_tokenizer(train_tokenizer(texts, prep), out / "tokenizer", texts)
    write_documents(out, RunConfig(model=model, depth=DepthConfig(mean=4)), {"kind": "random"}, written, False)
    counts = [4 * shape.numel() for shape in shapes.values()]
    return sum(counts), max(counts)


def measure_export(checkpoint: Path, dtype: str, shard_size: str) -> int:
    """Return the bytes by which memory rises while the checkpoint is exported."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as folder:
        options = ExportOptions(dtype, shard_size)
        return measure_anonymous_growth(lambda: export_hf(checkpoint, Path(folder), options))


def main() -> None:
    """Print a row per size of files; as a child, the bytes of one."""
    parser = make_parser(__doc__, dim=1024, out=None)
    parser.add_argument("--vocabulary", type=int, default=16_384, help="rows of the embedding")
    parser.add_argument("--child", nargs=3, help="checkpoint, dtype and size of a file: measure this one only")
    options = parser.parse_args()
    if options.child:
        print(measure_export(Path(options.child[0]), *options.child[1:]))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        checkpoint.mkdir()
        total, largest = write_checkpoint(checkpoint, options.dim, options.vocabulary)
        print(f"weights {total / MB:,.0f} MB in float32, the largest {largest / MB:,.0f} MB")
        print(format_header(("dtype", "largest file", "peak MB"), left=2))
        for dtype, size in FILES:
            peak = run_fresh(__file__, "--child", str(checkpoint), dtype, size, return_freed_blocks=True)
            rows.append({"dtype": dtype, "shard_size": size, "peak": peak})
            print(format_row((dtype, size, f"{peak / MB:,.0f}")), flush=True)
    write_numbers(options, {"rows": rows})


if __name__ == "__main__":
    main()
