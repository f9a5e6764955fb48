"""The whole model as a textbook would write it, to be read from top to bottom.

    embedding     x = E[tokens]
    prelude       e = layers(x)                                            once
    core          h_(t+1) = layers(inject(h_t, norm(e)))                   t = 0 ... T - 1, one set of weights
    coda          x = layers(h_T)                                          once
    head          logits = W norm(x)

One sequence, one head and one iteration at a time, in float64, with matrices as in the formulas. It shares
with `megatron_rdt.model` the parameters, by their names in `model.named_parameters()`, and the random initial state, and
no other code. Tests compare the logits and the gradient of every parameter of the two.

The default model comes first, the section "Variants" has the other choices of `ModelConfig`. Branches on `config` that the
default does not take may be skipped at first reading; `expand` and `collapse` then return their argument. Three things have
references of their own next to their tests: experts (test_moe.py); query-key norms and biases, value embeddings and
documents (test_attention.py); trained halting (test_halting.py).
"""

import math
from collections.abc import Callable

import torch

from megatron_rdt.depth import DepthPlan
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.model.initial_state import normal_state


def rotate(
    x: torch.Tensor, base: float, pairing: str = "half", scale: Callable[[float], float] = lambda f: f
) -> torch.Tensor:
    """Rotary positions: turn pair i of the n channels at position p by the angle p * base^(-2 i / n).

    A dot product of two vectors turned like this depends on the distance of their positions only. `scale` changes the
    frequency base^(-2 i / n). Channel i is paired
    with channel i + n / 2 ("half"), or channel 2 i with 2 i + 1 ("adjacent").
    """
    length, n = x.shape
    angles = [[p * scale(base ** (-2 * i / n)) for i in range(n // 2)] for p in range(length)]
    cos, sin = torch.tensor(angles, dtype=x.dtype).cos(), torch.tensor(angles, dtype=x.dtype).sin()
    first, second = (x[:, : n // 2], x[:, n // 2 :]) if pairing == "half" else (x[:, 0::2], x[:, 1::2])
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.cat(turned, -1) if pairing == "half" else torch.stack(turned, -1).flatten(-2)


def visible(length: int, window: int = 0) -> torch.Tensor:
    """The causal mask: position q sees position k if k <= q, and with a window only the latest `window` of them."""
    return torch.tensor([[k <= q and (not window or q - k < window) for k in range(length)] for q in range(length)])


class Reference:
    """The same function as a `RecurrentDepthTransformer`, with its weights; tensors are (sequence, channels)."""

    def __init__(self, model: RecurrentDepthTransformer) -> None:
        self.w, self.config = dict(model.named_parameters()), model.config

    # The model, from tokens to logits

    def logits(self, tokens: torch.Tensor, plan: DepthPlan) -> torch.Tensor:
        """Return (batch, sequence, vocabulary): each sequence alone, with its own T and seed."""
        seeds = plan.state_seeds or (0,) * len(tokens)
        return torch.stack(
            [
                self.read_out(self.states(row, loops, plan.backprop, seed)[-1])
                for row, loops, seed in zip(tokens, plan.iterations, seeds)
            ]
        )

    def states(
        self, tokens: torch.Tensor, loops: int, backprop: int | None = None, seed: int = 0
    ) -> list[torch.Tensor]:
        """Embedding, prelude and core: return the states h_1 ... h_T of one sequence.

        With backprop = k the gradient flows through the last k iterations only; earlier states are constants.
        """
        embedded = self.embed(tokens)

        x = embedded
        for i in range(self.config.prelude_layers):
            x = self.layer(x, f"prelude.{i}")
        e = self.encoded_input(x)

        h = self.expand(self.initial_state(embedded, x, seed))
        first_with_grad = loops - min(backprop or loops, loops)
        states = []
        for t in range(loops):
            with torch.set_grad_enabled(t >= first_with_grad):
                h = self.iterate(h, e, t, loops)
                states.append(self.collapse(h))
        return states

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """One row of the table per token, (sequence, dim)."""
        x = self.w["embedding.weight"][tokens]
        return x * math.sqrt(self.config.dim) if self.config.scale_embedding else x

    def encoded_input(self, x: torch.Tensor) -> torch.Tensor:
        """The prelude's output as it is injected at every iteration: normalised, so that its size is bounded."""
        e = self.norm(x, "core.encoded_norm") if self.config.encoded_norm else x
        return e @ self.w["core.input_matrix.weight"].T if self.config.input_matrix else e

    def iterate(self, h: torch.Tensor, e: torch.Tensor, t: int, loops: int) -> torch.Tensor:
        """One iteration of the core; with the default injection h_(t+1) = layers(decay * h_t + gain * e).

        The other injections are in `iterate_variant`. With |decay| < 1 in every channel the state cannot grow without
        bound through the injection.
        """
        if self.config.injection != "diagonal":
            return self.iterate_variant(h, e, t, loops)
        decay, gain = self.decay_and_gain()
        return self.core_layers(decay * h + gain * e, t, loops)

    def decay_and_gain(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Discretise dh/dt = a h + b e over a step dt, channel by channel, with a < 0.

        zoh, exact for a constant e: h' = exp(dt a) h + ((exp(dt a) - 1) / a) b e.
        a and dt are bounded functions of free parameters, so that the decay reaches neither 0 nor 1.
        """
        name = "core.injection.diagonal"  # of the injections diagonal, residual and hyper
        a = -between(self.w[f"{name}.rate"], 0.1, 10.0)
        dt = between(self.w[f"{name}.step"], 0.05, 5.0)
        b = self.w[f"{name}.gain"]
        if self.config.discretization == "zoh":
            return (dt * a).exp(), ((dt * a).exp() - 1) / a * b
        # euler: h' = (1 + dt a) h + dt b e. With z = |dt a| before, it is 1.99 z / (z + 1.99) < 1.99 after this line.
        dt = dt / (1 - dt * a / 1.99)
        return 1 + dt * a, dt * b

    def core_layers(self, x: torch.Tensor, t: int, loops: int) -> torch.Tensor:
        """The layers that every iteration runs, with the same weights; signals may tell them t and T."""
        offset, modulations = self.signals(t, loops)
        x = x + offset
        for i in range(self.config.core_layers):
            x = self.layer(x, f"core.layers.{i}", None if modulations is None else modulations[i])
        if "lora" in self.config.signals:
            x = x + self.adapter(x, t)
        return self.norm(x, "core.iteration_norm") if self.config.core_norm == "iteration" else x

    def read_out(self, state: torch.Tensor) -> torch.Tensor:
        """Coda and head: logits (sequence, vocabulary) from the last state."""
        config, w = self.config, self.w
        x = self.norm(state, "core.last_norm") if config.core_norm == "last" else state
        x = x @ w["core.output_matrix.weight"].T if config.output_matrix else x
        x = self.norm(x, "final_norm") if config.core_norm == "last_shared" else x
        for i in range(config.coda_layers):
            x = self.layer(x, f"coda.{i}")
        matrix = w["embedding.weight" if config.tie_embeddings else "head.weight"]
        logits = (self.norm(x, "final_norm") if config.final_norm else x) @ matrix.T
        cap = config.logit_softcap
        return cap * (logits / cap).tanh() if cap else logits

    # One layer: x = x + attention(norm(x)), then x = x + feedforward(norm(x))

    def layer(self, x: torch.Tensor, name: str, modulation: torch.Tensor | None = None) -> torch.Tensor:
        """Run the layer `name`; `modulation` is (2 norms, scale or shift, dim)."""
        attention = self.latent_attention if self.config.attention == "mla" else self.grouped_attention
        for number, (part, function) in enumerate((("attention", attention), ("feedforward", self.feedforward))):
            y = x if self.config.norm_placement == "post" else self.norm(x, f"{name}.{part}_norm")
            if modulation is not None:
                y = y * (1 + modulation[number, 0]) + modulation[number, 1]
            y = function(y, f"{name}.{part}")
            if self.config.norm_placement == "pre":
                x = x + y
            elif self.config.norm_placement == "sandwich":
                x = self.norm(x + y, f"{name}.{part}_outer_norm")
            else:
                x = x + self.norm(y, f"{name}.{part}_outer_norm")
        return x

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """RMS norm: x / sqrt(mean(x^2) + eps) * weight."""
        return x / (x.square().mean(-1, keepdim=True) + self.config.norm_eps).sqrt() * self.w[f"{name}.weight"]

    def place(self, x: torch.Tensor) -> torch.Tensor:
        """Give queries or keys (length, channels) their positions; without any, only the causal order tells tokens apart."""
        if self.config.positions == "none":
            return x
        return rotate(x, self.config.rope_base, self.config.rope_pairing, self.scale_frequency)

    def scale_frequency(self, frequency: float) -> float:
        """With `rope_scaling: llama3`, a frequency by how often it turns within the original context."""
        config = self.config
        if config.rope_scaling == "none":
            return frequency
        turns = frequency * config.rope_original_length / (2 * math.pi)
        if turns < config.rope_slow_turns:
            return frequency / config.rope_factor
        if turns > config.rope_fast_turns:
            return frequency
        kept = (turns - config.rope_slow_turns) / (config.rope_fast_turns - config.rope_slow_turns)
        return (1 - kept) * frequency / config.rope_factor + kept * frequency

    def grouped_attention(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Grouped-query attention: consecutive query heads share one head of keys and values."""
        config, size = self.config, self.config.head_dim
        q, k, v = (x @ self.w[f"{name}.{part}.weight"].T for part in ("query", "key", "value"))
        outputs = []
        for head in range(config.heads):
            shared = head // (config.heads // config.kv_heads)
            own, theirs = slice(head * size, (head + 1) * size), slice(shared * size, (shared + 1) * size)
            outputs.append(self.attend(self.place(q[:, own]), self.place(k[:, theirs]), v[:, theirs]))
        return torch.cat(outputs, -1) @ self.w[f"{name}.output.weight"].T

    def latent_attention(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Multi-head latent attention: keys and values of all heads are linear maps of one small latent per token.

        A cache holds only the latent and one rotary key; both are shared by all heads. Position enters through that
        separate part of queries and keys, because a rotation in between would keep W_uk from being absorbed.
        """
        config, w = self.config, self.w
        latent, key_rope = (x @ w[f"{name}.latent_down.weight"].T).split((config.kv_rank, config.rope_dim), -1)
        key_rope = self.place(key_rope)
        up = self.norm(latent, f"{name}.latent_norm") @ w[f"{name}.latent_up.weight"].T
        down = x
        if config.query_rank:  # queries may be compressed in the same way, which saves parameters
            down = self.norm(x @ w[f"{name}.query_down.weight"].T, f"{name}.query_norm")
        queries = down @ w[f"{name}.query_up.weight"].T
        outputs = []
        for head in range(config.heads):
            size = config.nope_dim + config.rope_dim
            query, query_rope = queries[:, head * size : (head + 1) * size].split(
                (config.nope_dim, config.rope_dim), -1
            )
            query_rope = self.place(query_rope)
            size = config.nope_dim + config.value_dim
            key, value = up[:, head * size : (head + 1) * size].split((config.nope_dim, config.value_dim), -1)
            # The scores are the sum of both parts' dot products, which is the dot product of the concatenations.
            outputs.append(self.attend(torch.cat((query, query_rope), -1), torch.cat((key, key_rope), -1), value))
        return torch.cat(outputs, -1) @ w[f"{name}.output.weight"].T

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """One head: softmax(q k^T / sqrt(channels)) v over the positions that each query sees."""
        scores = query @ key.T / math.sqrt(query.shape[-1])
        return scores.masked_fill(~visible(len(query), self.config.window), -math.inf).softmax(-1) @ value

    def feedforward(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """SwiGLU: W_down (silu(W_gate x) * (W_up x)), silu(y) = y sigmoid(y); or W_down relu(W_up x)^2."""
        up = x @ self.w[f"{name}.up.weight"].T
        if self.config.ffn == "relu2":
            return up.relu().square() @ self.w[f"{name}.down.weight"].T
        gate = x @ self.w[f"{name}.gate.weight"].T
        return (gate * gate.sigmoid() * up) @ self.w[f"{name}.down.weight"].T

    # Variants: initial states, injections, lanes, signals

    def initial_state(self, embedded: torch.Tensor, encoded: torch.Tensor, seed: int) -> torch.Tensor:
        """h_0: by default zero."""
        config = self.config
        if config.state_init == "normal":  # truncated at 3 standard deviations, a function of (seed, position)
            noise = normal_state((seed,), torch.arange(len(embedded)), config.dim, config.state_std)
            return noise[0].to(embedded.dtype)
        zero = torch.zeros_like(embedded)
        states = {
            "zero": zero,
            "embedding": embedded,
            "encoded": encoded,
            "learned": zero + self.w.get("core.initial", 0),
        }
        return states[config.state_init]

    def iterate_variant(self, h: torch.Tensor, e: torch.Tensor, t: int, loops: int) -> torch.Tensor:
        """One iteration with another injection than the diagonal one."""
        name, w, kind = "core.injection", self.w, self.config.injection
        if kind == "none":
            return self.core_layers(h, t, loops)
        if kind == "add":
            return self.core_layers(h + e, t, loops)
        if kind == "linear":  # one matrix for the concatenation of state and input
            return self.core_layers(torch.cat((h, e), -1) @ w[f"{name}.weight"].T, t, loops)
        if kind == "gate":  # a mixture of state and input, whose weights depend on the input
            gate = 0.995 * (e @ w[f"{name}.weight"].T + w[f"{name}.bias"]).sigmoid()
            return self.core_layers(gate * h + (1 - gate) * e, t, loops)
        decay, gain = self.decay_and_gain()
        if kind == "residual":  # the decayed state bypasses the layers; a signal is added before the norm
            offset, _ = self.signals(t, loops)
            inner = self.norm(h + e + offset, f"{name}.norm") - offset  # core_layers adds it again
            return decay * h + gain * e + self.core_layers(inner, t, loops)
        # hyper: the lanes of the state are mixed, read by weights that sum to 1, and each is changed by its own weight.
        lanes = range(self.config.lanes)
        mix, write = self.softmax_of("mix"), w[f"{name}.write_weights"]
        mixed = torch.stack([decay * sum(mix[n, m] * h[m] for m in lanes) + gain * e for n in lanes])
        x = self.collapse(mixed)
        change = self.core_layers(x, t, loops) - x
        return torch.stack([mixed[n] + write[n] * change for n in lanes])

    def expand(self, state: torch.Tensor) -> torch.Tensor:
        """The state of the loop: with hyper-connections one copy per lane, (lanes, sequence, dim)."""
        return torch.stack([state] * self.config.lanes) if self.config.injection == "hyper" else state

    def collapse(self, h: torch.Tensor) -> torch.Tensor:
        """One state for the coda: the weighted mean of the lanes."""
        if self.config.injection != "hyper":
            return h
        return sum(weight * lane for weight, lane in zip(self.softmax_of("read_weights"), h))  # type: ignore[return-value]

    def softmax_of(self, name: str) -> torch.Tensor:
        """exp(x) / sum exp(x) over the last dimension of a parameter of the injection."""
        x = self.w[f"core.injection.{name}"].exp()
        return x / x.sum(-1, keepdim=True)

    def signals(self, t: int, loops: int) -> tuple[torch.Tensor | float, torch.Tensor | None]:
        """Return the term to add before the layers, and modulations (layer, norm, scale or shift, dim)."""
        config, offset, modulations = self.config, 0.0, None
        if "sinusoidal" in config.signals:
            channels = max(config.dim // 8, 2)
            index = self.w["core.signals.sinusoidal.size"] * sinusoids(t, channels)
            offset = torch.cat((index, torch.zeros(config.dim - channels, dtype=torch.float64)))
        if "adaln" in config.signals:
            features = torch.cat((loop_features(t), loop_features(loops)))
            modulations = (self.w["core.signals.adaln.weights"] @ features).view(config.core_layers, 2, 2, config.dim)
        return offset, modulations

    def adapter(self, x: torch.Tensor, t: int) -> torch.Tensor:
        """A low-rank term whose scale per rank depends on t: B (r(t) * (A x))."""
        name = "core.signals.lora"
        scale = self.w[f"{name}.weights"] @ loop_features(t) + self.w[f"{name}.bias"]
        return (x @ self.w[f"{name}.down.weight"].T * scale) @ self.w[f"{name}.up"].T


def between(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Map any number to low ... high; 0 goes to the geometric mean."""
    return low * (high / low) ** (0.5 + 0.5 * x / (1 + x.abs()))


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
