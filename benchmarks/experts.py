"""What sorting tokens by expert is worth: training steps with sorted pieces against loops over experts with masks.

All have the same weights, routing and result; 8 and 64 experts have the same active width.

    python benchmarks/experts.py
"""

import argparse
import time

import torch
from torch.nn import functional

from megatron_rdt.config import ModelConfig, RunConfig
from megatron_rdt.data import Batch
from megatron_rdt.depth import DepthPlan
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.model.linear import linear
from megatron_rdt.model.moe import MixtureOfExperts
from megatron_rdt.parallel import Engine, MicroBatch, make_engine

CASES = {8: (2, 512), 64: (4, 256)}
"""Experts: (experts per token, width of each)."""
VOCABULARY = 4096


class ExpertLoop(MixtureOfExperts):
    """The same mixture as a loop over experts, each of which picks its tokens with a mask and adds its output."""

    per_slot = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, sequence, dim) -> the same."""
        flat = x.flatten(0, -2)
        logits = linear(flat, self.router)
        indices = (logits.detach() + self.selection_bias).topk(self.chosen, dim=-1).indices
        weights = logits.softmax(-1).gather(-1, indices)
        weights = weights / weights.sum(-1, keepdim=True)
        mixed, together = torch.zeros_like(flat), 1 if self.per_slot else self.chosen
        # unbind: indexing would make a gradient of all experts for each of them, which is not what is compared here.
        matrices = list(zip(self.gate.unbind(), self.up.unbind(), self.down.unbind()))
        for slots, shares in zip(indices.split(together, -1), weights.split(together, -1)):
            for expert, (gate, up, down) in enumerate(matrices):
                mask = slots == expert
                tokens = mask.any(-1)
                if not tokens.any():
                    continue
                rows = flat[tokens]
                hidden = functional.silu(linear(rows, gate)) * linear(rows, up)
                mixed[tokens] += linear(hidden, down) * (shares * mask).sum(-1, keepdim=True)[tokens]
        if self.shared is not None:
            mixed = mixed + self.shared(flat)
        return mixed.view(x.shape)


class SlotLoop(ExpertLoop):
    """A loop over each token's first, second, ... expert around it, as in OpenMythos."""

    per_slot = True


KINDS = (MixtureOfExperts, ExpertLoop, SlotLoop)


def engine_for(experts: int, kind: type[MixtureOfExperts], dim: int) -> Engine:
    """A single-process engine with the dispatch `kind`."""
    chosen, width = CASES[experts]
    model = ModelConfig(
        vocab_size=VOCABULARY,
        dim=dim,
        prelude_layers=2,
        core_layers=1,
        coda_layers=2,
        core_ffn="moe",
        experts=experts,
        experts_per_token=chosen,
        expert_dim=width,
    )
    engine = make_engine(RunConfig(model=model), torch.device("cpu"))
    with torch.device("meta"):
        built = RecurrentDepthTransformer(model)
    engine.setup(built)
    for layer in engine.model.core.layers:
        layer.feedforward.__class__ = kind
    return engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256, help="width of the model")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step")
    parser.add_argument("--sequence", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--loops", type=int, default=4, help="T")
    parser.add_argument("--rounds", type=int, default=4, help="interleaved; the fastest counts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokens = torch.randint(0, VOCABULARY, (options.batch, options.sequence + 1))
    batch = [MicroBatch(Batch(tokens), DepthPlan.constant(options.loops, options.batch))]
    print(
        "| Experts | of them per token, width | parameters | sorted pieces | mask per expert | mask per slot and expert |"
    )
    print("|---:|---:|---:|---:|---:|---:|")
    for experts, (chosen, width) in CASES.items():
        engines = {kind: engine_for(experts, kind, options.dim) for kind in KINDS}
        losses, times = {}, {kind: [] for kind in engines}
        for round_number in range(options.rounds + 1):
            for kind, engine in engines.items():
                began = time.process_time()
                loss = float(engine.forward_backward(batch)["objective"])
                engine.clip(1.0)
                engine.step(1e-4)
                times[kind].append(time.process_time() - began)
                if round_number == 0:
                    losses[kind] = loss
        if max(losses.values()) - min(losses.values()) > 1e-4:
            raise SystemExit(f"they do not agree: {losses}")
        count = sum(p.numel() for p in engine.model.parameters())
        speeds = [options.batch * options.sequence / min(values[1:]) for values in times.values()]
        cells = " | ".join(f"{speed:.0f}" for speed in speeds)
        print(f"| {experts} | {chosen} x {width} | {count / 1e6:.1f}M | {cells} |", flush=True)


if __name__ == "__main__":
    main()
