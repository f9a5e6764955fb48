"""Gain of sorting tokens by expert: training steps with sorted pieces against loops over experts with masks.

All have the same weights, routing and result; 8 and 64 experts have the same active width.

    python benchmarks/experts.py
"""

from functools import partial

import torch
from tools.options import make_parser
from tools.steps import VOCABULARY, draw_tokens, take_step
from tools.tables import format_header, format_row
from tools.timing import make_clock, measure_in_turn
from torch.nn import functional

from megatron_rdt.config import ModelConfig, RunConfig
from megatron_rdt.depth import DepthPlan
from megatron_rdt.model.linear import linear
from megatron_rdt.model.moe import MixtureOfExperts
from megatron_rdt.parallel import Engine, build_engine

CASES = {8: (2, 512), 64: (4, 256)}
"""Experts: (experts per token, width of each)."""


class ExpertLoop(MixtureOfExperts):
    """The same mixture as a loop over experts, each of which picks its tokens with a mask and adds its output."""

    per_choice = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of the chosen experts' outputs, plus the shared one's, in the shape of x."""
        flat = x.flatten(0, -2)
        logits = linear(flat, self.router)
        indices = (logits.detach() + self.selection_bias).topk(self.experts_per_token, dim=-1).indices
        weights = logits.softmax(-1).gather(-1, indices)
        weights = weights / weights.sum(-1, keepdim=True)
        mixed, together = torch.zeros_like(flat), 1 if self.per_choice else self.experts_per_token
        # Indexing would allocate a gradient of all experts for each of them, which would be compared too; unbind does not.
        matrices = list(zip(self.gate.unbind(), self.up.unbind(), self.down.unbind()))
        for choices, shares in zip(indices.split(together, -1), weights.split(together, -1)):
            for expert, (gate, up, down) in enumerate(matrices):
                mask = choices == expert
                tokens = mask.any(-1)
                if not tokens.any():
                    continue
                rows = flat[tokens]
                hidden = functional.silu(linear(rows, gate)) * linear(rows, up)
                mixed[tokens] += linear(hidden, down) * (shares * mask).sum(-1, keepdim=True)[tokens]
        if self.shared is not None:
            mixed = mixed + self.shared(flat)
        return mixed.view(x.shape)


class ChoiceLoop(ExpertLoop):
    """The same loop, once for every token's first expert, once for the second, ..., as in OpenMythos."""

    per_choice = True


KINDS = (MixtureOfExperts, ExpertLoop, ChoiceLoop)


def build_expert_engine(experts: int, kind: type[MixtureOfExperts], dim: int) -> Engine:
    """Build a single-process engine on the CPU whose mixtures of experts are computed as `kind` does."""
    chosen, width = CASES[experts]
    mixture = {"core_ffn": "moe", "experts": experts, "experts_per_token": chosen, "expert_dim": width}
    layers = {"prelude_layers": 2, "core_layers": 1, "coda_layers": 2}
    model = ModelConfig(vocab_size=VOCABULARY, dim=dim, **layers, **mixture)
    engine = build_engine(RunConfig(model=model), torch.device("cpu"))
    for layer in engine.model.core.layers:
        layer.feedforward.__class__ = kind
    return engine


def main() -> None:
    """Print tokens/s of the three kinds, a line per number of experts; SystemExit if their losses differ."""
    parser = make_parser(__doc__, dim=256, batch=4, sequence=256, rounds=4, threads=1)
    parser.add_argument("--loops", type=int, default=4, help="T")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokens = draw_tokens(options.batch, options.sequence)
    plan = DepthPlan.constant(options.loops, options.batch)
    clock = make_clock(torch.device("cpu"), options.threads)
    columns = ["of them per token, width", "parameters", "sorted pieces", "mask per expert", "mask per slot and expert"]
    print(format_header(["Experts", *columns]))
    for experts, (chosen, width) in CASES.items():
        engines = {kind: build_expert_engine(experts, kind, options.dim) for kind in KINDS}
        # The first step warms up and shows that all compute the same.
        losses = {kind: float(take_step(engine, tokens, plan)["objective"]) for kind, engine in engines.items()}
        if max(losses.values()) - min(losses.values()) > 1e-4:
            raise SystemExit(f"the losses differ: {losses}")
        steps = {kind: partial(take_step, engine, tokens, plan) for kind, engine in engines.items()}
        times = measure_in_turn(steps, options.rounds, clock)
        count = sum(p.numel() for p in engines[MixtureOfExperts].model.parameters())
        speeds = [f"{options.batch * options.sequence / min(seconds):.0f}" for seconds in times.values()]
        print(format_row([experts, f"{chosen} x {width}", f"{count / 1e6:.1f}M", *speeds]), flush=True)


if __name__ == "__main__":
    main()
