"""Files that each rank of a start opens, and bytes that it reads: the corpus in each kind of data, and a checkpoint.

Two gloo ranks on this machine share a corpus of --shards training shards, made for this. Opens are counted by Python's audit
events, so those of a library's own code in C are missing; reads and bytes are the kernel's (/proc/self/io), of everything that
a rank does meanwhile, messages to the other rank included. Imports are done before.

    python benchmarks/file_requests.py [--shards 100 400] [--out FILE.json]
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tools.options import make_parser, write_numbers
from tools.processes import ROOT, run_ranks
from tools.tables import format_header, format_row

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from megatron_rdt.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig, load_config
from megatron_rdt.config.layout import Layout
from megatron_rdt.environment import leave_process, quiet_libraries
from megatron_rdt.object_collectives import gather_objects
from megatron_rdt.parallel import build_engine
from megatron_rdt.train.data import open_training_data

RANKS = 2
SMOKE = ROOT / "configs" / "smoke.yaml"
LENGTH = 512
WORDS_PER_DOCUMENT = 40
KINDS = {
    "chunks": ["data.pack=chunk"],
    "packed, plans to be made": ["data.pack=bestfit"],
    "packed, plans there": ["data.pack=bestfit"],
    "single examples": ["data.pack=example"],
}


class Requests:
    """Counts the files that this process opens below a folder."""

    def __init__(self) -> None:
        self._folder = ""
        self.opens: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Note an audit event."""
        if self._folder and event == "open" and str(arguments[0]).startswith(self._folder):
            self.opens.append(str(arguments[0]))

    def count(self, folder: Path, act: Callable[[], object]) -> dict[str, int]:
        """Return the opens below the folder, and all reads and bytes read, while acting."""
        dist.barrier()
        self.opens, self._folder, before = [], str(folder), _read_counters()
        act()
        self._folder, after = "", _read_counters()
        return {
            "opens": len(self.opens),
            "files": len(set(self.opens)),
            "reads": after["syscr"] - before["syscr"],
            "bytes": after["rchar"] - before["rchar"],
        }


def _read_counters() -> dict[str, int]:
    """Return this process's counters of input and output."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def write_corpus(folder: Path, shards: int) -> tuple[Path, Path]:
    """Prepare a corpus of about so many training shards, two documents each; return it, and its folder of rows."""
    draw, rows = random.Random(0), folder / "rows"
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(400)]
    rows.mkdir()
    texts = [" ".join(draw.choices(words, k=WORDS_PER_DOCUMENT)) for _ in range(2 * shards + 400)]
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (rows / "train.jsonl").write_text(content, encoding="utf-8")
    out, size = str(folder / "corpus"), len(content) // shards
    config = PrepConfig([str(rows)], out=out, vocab_size=512, valid_fraction=0.1, workers=1, shard_bytes=size)
    return prepare(config), rows


def count_data(requests: Requests, corpus: Path, rows: Path) -> dict[str, dict[str, int]]:
    """Count what opening each kind of data asks for on this rank."""
    rank, found = dist.get_rank(), {}
    common = [f"train.sequence_length={LENGTH}", "train.global_batch=2", "train.micro_batch=1", "eval.sequences=4"]
    common += ["model.vocab_size=512", "parallel.engine=ddp", "data.max_epochs=1000", "train.device=cpu"]
    cases = {name: (corpus, [f"data.path={corpus}", *words]) for name, words in KINDS.items()}
    cases["streamed"] = rows, [f"data.path=hf:{rows}", f"data.tokenizer={corpus / 'tokenizer'}"]
    for name, (folder, words) in cases.items():
        config = load_config(SMOKE, [*common, *words])
        layout = Layout.of(config.parallel, RANKS)
        found[name] = requests.count(folder, lambda: open_training_data(config, layout, rank, rank))  # noqa: B023
    return found


def count_resume(requests: Requests, folder: Path) -> dict[str, int]:
    """Count what loading a sharded checkpoint asks for on this rank."""
    model = ModelConfig(vocab_size=512, dim=64, heads=4, kv_heads=2)
    train = TrainConfig(global_batch=2, micro_batch=1, device="cpu")
    config = RunConfig(model=model, train=train, parallel=ParallelConfig(engine="fsdp"))
    build_engine(config, torch.device("cpu")).save(folder)
    engine = build_engine(config, torch.device("cpu"))
    return requests.count(folder, lambda: engine.load(folder))


def run_worker(options: argparse.Namespace) -> None:
    """Count as one of the ranks; rank 0 writes the numbers of all."""
    quiet_libraries()
    dist.init_process_group("gloo")
    requests, folder = Requests(), Path(options.folder)
    corpora = [json.loads(text) for text in options.corpora]
    found = {str(shards): count_data(requests, Path(corpus), Path(rows)) for shards, corpus, rows in corpora}
    found["checkpoint"] = {"resume": count_resume(requests, folder / "checkpoint")}
    ranks = gather_objects(found)
    if dist.get_rank() == 0:
        options.worker.write_text(json.dumps(ranks), encoding="utf-8")
    dist.barrier()
    leave_process(0)


def main() -> None:
    """Count on two ranks and print a table."""
    parser = make_parser(__doc__, out=None)
    parser.add_argument("--shards", type=int, nargs="+", default=[100, 400], help="training shards of a corpus")
    parser.add_argument("--worker", type=Path, help="run as one of the processes and write here")
    parser.add_argument("--folder", help="of the worker's files")
    parser.add_argument("--corpora", nargs="+", help="of the worker: shards, corpus and rows of each as JSON")
    options = parser.parse_args()
    if options.worker:
        run_worker(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        corpora = []
        for shards in options.shards:
            below = Path(folder) / str(shards)
            below.mkdir()
            corpus, rows = write_corpus(below, shards)
            number = len(list((corpus / "train").glob("*.bin")))
            corpora.append(json.dumps([number, str(corpus), str(rows)]))
        ranks = run_ranks(__file__, RANKS, "--folder", folder, "--corpora", *corpora)
    print(format_header(["Data", "shards", "rank", "opens", "files", "reads", "kB read"], left=1))
    for shards, kinds in ranks[0].items():
        for name in kinds:
            for rank, of_rank in enumerate(ranks):
                row = of_rank[shards][name]
                cells = [row["opens"], row["files"], row["reads"], row["bytes"] // 1000]
                print(format_row([name, shards, rank, *(f"{cell:,}" for cell in cells)]))
    write_numbers(options, {"ranks": ranks})


if __name__ == "__main__":
    main()
