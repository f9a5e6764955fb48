"""Started by torchrun: trains a model with experts on one engine after the other, resumes each; writes a verdict."""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rdt.checkpoint import BUFFERS
from megatron_rdt.config import load_config
from megatron_rdt.environment import leave_process
from tests.distributed.parts_worker import losses, run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    parser.add_argument("--engines", nargs="+")
    parser.add_argument("--resume", type=Path, help="only go on from this checkpoint")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    verdict = {}
    for engine in options.engines:
        name, changed = engine, {"parallel.engine": engine}
        if options.resume is not None:
            there = run(load_config(options.config, {**changed, "run.name": f"{name}-converted"}), options.resume)
            verdict[engine] = losses(there)
            continue
        straight = run(load_config(options.config, {**changed, "run.name": name}), None)
        source = straight / "checkpoints" / "step-00000003"
        resumed = run(load_config(options.config, {**changed, "run.name": f"{name}-resumed"}), source)
        files = [there / "checkpoints" / "step-00000006" / BUFFERS for there in (straight, resumed)]
        buffers = [torch.load(file, weights_only=True) for file in files]
        assert all(torch.equal(buffers[0][key], buffers[1][key]) for key in buffers[0])
        verdict[engine] = losses(straight)
        assert losses(resumed) == {step: verdict[engine][step] for step in (4, 5, 6)}, engine
    if dist.get_rank() == 0:
        options.out.write_text(json.dumps(verdict))
    dist.barrier()


if __name__ == "__main__":
    main()
    leave_process(0)
