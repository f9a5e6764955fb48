"""A plain reference of the model: one sequence, one head, one iteration, one lane at a time; it shares the parameters only."""

import math

import torch

from megatron_rdt.depth import DepthPlan
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.model.initial_state import normal_state


def sinusoids(t: int, channels: int) -> torch.Tensor:
    """sin(t f_i) for all i, then cos(t f_i), f_i = 10000^(-2 i / channels), cut to `channels`."""
    frequencies = [10000.0 ** (-2 * i / channels) for i in range((channels + 1) // 2)]
    values = [math.sin(t * f) for f in frequencies] + [math.cos(t * f) for f in frequencies]
    return torch.tensor(values[:channels], dtype=torch.float64)


def loop_features(t: int) -> torch.Tensor:
    """sin(t f), then cos(t f), of 16 frequencies pi j / 16.5 and 16 more, (pi / 16.5) 10000^(-j / 16)."""
    numbers = range(1, 17)
    frequencies = [math.pi * j / 16.5 for j in numbers] + [math.pi / 16.5 * 10000.0 ** (-j / 16) for j in numbers]
    values = [math.sin(t * f) for f in frequencies] + [math.cos(t * f) for f in frequencies]
    return torch.tensor(values, dtype=torch.float64)


def between(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """The bounded map of the diagonal injection."""
    return low * (high / low) ** (0.5 + 0.5 * x / (1 + x.abs()))


class Plain:
    """What a model computes for one sequence; tensors are (length, dim)."""

    def __init__(self, model: RecurrentDepthTransformer) -> None:
        self.w, self.config = dict(model.named_parameters()), model.config

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        eps = self.config.norm_eps
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * self.w[f"{name}.weight"]

    def attention(self, x: torch.Tensor, name: str) -> torch.Tensor:
        config, size, half = self.config, self.config.head_dim, self.config.head_dim // 2
        q, k, v = (x @ self.w[f"{name}.{part}.weight"].T for part in ("query", "key", "value"))
        angles = [[p * config.rope_base ** (-2 * i / size) for i in range(half)] for p in range(len(x))]
        cos, sin = torch.tensor(angles, dtype=x.dtype).cos(), torch.tensor(angles, dtype=x.dtype).sin()

        def rotate(y):
            return torch.cat((y[:, :half] * cos - y[:, half:] * sin, y[:, half:] * cos + y[:, :half] * sin), -1)

        heads = []
        for head in range(config.heads):
            own = slice(head * size, (head + 1) * size)
            shared = head // (config.heads // config.kv_heads)
            theirs = slice(shared * size, (shared + 1) * size)
            scores = rotate(q[:, own]) @ rotate(k[:, theirs]).T / math.sqrt(size)
            future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[:, theirs])
        return torch.cat(heads, -1) @ self.w[f"{name}.output.weight"].T

    def feedforward(self, x: torch.Tensor, name: str) -> torch.Tensor:
        gate = x @ self.w[f"{name}.gate.weight"].T
        return (gate * gate.sigmoid() * (x @ self.w[f"{name}.up.weight"].T)) @ self.w[f"{name}.down.weight"].T

    def layer(self, x: torch.Tensor, name: str, modulation: torch.Tensor | None = None) -> torch.Tensor:
        """`modulation` is (norm, scale or shift, dim)."""
        for which, (part, f) in enumerate((("attention", self.attention), ("feedforward", self.feedforward))):
            y = self.norm(x, f"{name}.{part}_norm")
            if modulation is not None:
                y = y * (1 + modulation[which, 0]) + modulation[which, 1]
            y = f(y, f"{name}.{part}")
            if self.config.norm_placement == "sandwich":
                x = self.norm(x + y, f"{name}.{part}_outer_norm")
            elif self.config.norm_placement == "peri":
                x = x + self.norm(y, f"{name}.{part}_outer_norm")
            else:
                x = x + y
        return x

    def decay(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the diagonal injection: what multiplies the state, what multiplies the input."""
        name = "core.injection.diagonal"
        a = -between(self.w[f"{name}.rate"], 0.1, 10.0)
        dt, b = between(self.w[f"{name}.step"], 0.05, 5.0), self.w[f"{name}.gain"]
        if self.config.discretization == "zoh":
            return (dt * a).exp(), ((dt * a).exp() - 1) / a * b
        dt = dt / (1 - dt * a / 1.99)
        return 1 + dt * a, dt * b

    def lane_weights(self, name: str) -> torch.Tensor:
        """exp(x) / sum exp(x) over the last dimension."""
        x = self.w[f"core.injection.{name}"].exp()
        return x / x.sum(-1, keepdim=True)

    def signal(self, t: int, loops: int) -> tuple[torch.Tensor | float, torch.Tensor | None]:
        """What is added before the layers; (layer, norm, scale or shift, dim)."""
        config, offset, modulations = self.config, 0.0, None
        if "sinusoidal" in config.signals:
            channels = max(config.dim // 8, 2)
            index = self.w["core.signals.sinusoidal.size"] * sinusoids(t, channels)
            offset = torch.cat((index, torch.zeros(config.dim - channels, dtype=torch.float64)))
        if "adaln" in config.signals:
            features = torch.cat((loop_features(t), loop_features(loops)))
            modulations = (self.w["core.signals.adaln.weights"] @ features).view(config.core_layers, 2, 2, config.dim)
        return offset, modulations

    def layers(self, x: torch.Tensor, t: int, loops: int) -> torch.Tensor:
        """Everything between reading and writing the state."""
        offset, modulations = self.signal(t, loops)
        x = x + offset
        for i in range(self.config.core_layers):
            x = self.layer(x, f"core.layers.{i}", None if modulations is None else modulations[i])
        if "lora" in self.config.signals:
            name = "core.signals.lora"
            scale = self.w[f"{name}.weights"] @ loop_features(t) + self.w[f"{name}.bias"]
            x = x + (x @ self.w[f"{name}.down.weight"].T * scale) @ self.w[f"{name}.up"].T
        return self.norm(x, "core.iteration_norm") if self.config.core_norm == "iteration" else x

    def iterate(self, h: list[torch.Tensor], e: torch.Tensor, t: int, loops: int) -> list[torch.Tensor]:
        """The next lanes from the lanes; all injections but `hyper` have one."""
        name, w, kind = "core.injection", self.w, self.config.injection
        if kind == "diagonal":
            decay, gain = self.decay()
            return [self.layers(decay * h[0] + gain * e, t, loops)]
        if kind == "linear":
            return [self.layers(torch.cat((h[0], e), -1) @ w[f"{name}.weight"].T, t, loops)]
        if kind == "add":
            return [self.layers(h[0] + e, t, loops)]
        if kind == "gate":
            gate = 0.995 * (e @ w[f"{name}.weight"].T + w[f"{name}.bias"]).sigmoid()
            return [self.layers(gate * h[0] + (1 - gate) * e, t, loops)]
        decay, gain = self.decay()
        if kind == "residual":  # the signal is part of what is normalised
            offset, _ = self.signal(t, loops)
            inner = self.norm(h[0] + e + offset, f"{name}.norm") - offset
            return [decay * h[0] + gain * e + self.layers(inner, t, loops)]
        mix, read, lanes = self.lane_weights("mix"), self.lane_weights("read_weights"), range(self.config.lanes)
        mixed = [decay * sum(mix[n, m] * h[m] for m in lanes) + gain * e for n in lanes]
        x = sum(read[n] * mixed[n] for n in lanes)
        change = self.layers(x, t, loops) - x
        return [mixed[n] + w[f"{name}.write_weights"][n] * change for n in lanes]

    def close(self, h: list[torch.Tensor]) -> torch.Tensor:
        """One state from the lanes."""
        return h[0] if len(h) == 1 else sum(r * lane for r, lane in zip(self.lane_weights("read_weights"), h))

    def states(self, tokens: torch.Tensor, loops: int, backprop: int | None, seed: int) -> list[torch.Tensor]:
        """The states after 1 ... T iterations; those before the last k are constants."""
        config, w = self.config, self.w
        embedded = w["embedding.weight"][tokens] * (math.sqrt(config.dim) if config.scale_embedding else 1)
        x = embedded
        for i in range(config.prelude_layers):
            x = self.layer(x, f"prelude.{i}")
        e = self.norm(x, "core.encoded_norm") if config.encoded_norm else x
        e = e @ w["core.input_matrix.weight"].T if config.input_matrix else e
        state = {
            "zero": torch.zeros_like(x),
            "embedding": embedded,
            "encoded": x,
            "normal": normal_state((seed,), torch.arange(len(tokens)), config.dim, config.state_std)[0].to(x.dtype),
            "learned": torch.zeros_like(x) + w.get("core.initial", 0),
        }[config.state_init]
        h = [state] * (config.lanes if config.injection == "hyper" else 1)
        cut, states = loops - min(backprop or loops, loops), []
        for t in range(loops):
            with torch.set_grad_enabled(t >= cut):
                h = self.iterate(h, e, t, loops)
                states.append(self.close(h))
        return states

    def read_out(self, state: torch.Tensor) -> torch.Tensor:
        """Logits from the state that the core hands on."""
        config, w = self.config, self.w
        x = self.norm(state, "core.last_norm") if config.core_norm == "last" else state
        x = x @ w["core.output_matrix.weight"].T if config.output_matrix else x
        x = self.norm(x, "final_norm") if config.core_norm == "last_shared" else x
        for i in range(config.coda_layers):
            x = self.layer(x, f"coda.{i}")
        logits = self.norm(x, "final_norm") @ w["embedding.weight" if config.tie_embeddings else "head.weight"].T
        cap = config.logit_softcap
        return cap * (logits / cap).tanh() if cap else logits

    def logits(self, tokens: torch.Tensor, plan: DepthPlan) -> torch.Tensor:
        """(batch, length, vocabulary) for a model without halting."""
        seeds = plan.state_seeds or (0,) * len(tokens)
        return torch.stack(
            [
                self.read_out(self.states(row, loops, plan.backprop, seed)[-1])
                for row, loops, seed in zip(tokens, plan.iterations, seeds)
            ]
        )
