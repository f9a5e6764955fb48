"""Megatron's side of the comparison, in a process of its own: writes its files, and reads ours.

python megatron_worker.py FOLDER: writes the documents of FOLDER/documents.json to FOLDER/theirs, and the content of the
shards in FOLDER/ours to FOLDER/read.json.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder


def main(folder: Path) -> None:
    """Write Megatron's shards, then read ours."""
    for name, case in json.loads((folder / "documents.json").read_text()).items():
        dtype, modes = getattr(np, case["dtype"]), case["modes"]
        prefix = folder / "theirs" / name
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=modes is not None)
        for number, document in enumerate(case["documents"]):
            # As preprocess_data.py does: a document without a sequence is ended without one.
            for index, sequence in enumerate(document):
                mode = {} if modes is None else {"mode": modes[number][index]}
                builder.add_item(torch.tensor(sequence, dtype=torch.int64), **mode)
            builder.end_document()
        builder.finalize(f"{prefix}.idx")
    read = {}
    for path in sorted((folder / "ours").glob("*.idx")):
        for mmap in (True, False):
            dataset = IndexedDataset(str(path.with_suffix("")), mmap=mmap)
            read[f"{path.stem} {mmap}"] = {
                "dtype": np.dtype(dataset.index.dtype).name,
                "sequences": [dataset[i].tolist() for i in range(len(dataset))],
                "lengths": dataset.sequence_lengths.tolist(),
                "pointers": dataset.index.sequence_pointers.tolist(),
                "documents": dataset.document_indices.tolist(),
            }
    (folder / "read.json").write_text(json.dumps(read))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
