"""The schema of `model`: the parts of a recurrent-depth transformer and their sizes.

Each part is chosen by one field whose choices are names of classes below `megatron_rdt/model`. The help of a field that
only one choice reads begins with that choice. The export for transformers carries this file, so it imports nothing of the project but
`config/ranges.py`, which the export carries too.
"""

from dataclasses import dataclass, field
from typing import Literal

from megatron_rdt.config.ranges import option

# Fields that only training reads. The weights of a checkpoint mean the same for all their values, so a run may change them.
TRAINING_FIELDS = ("balance_rate", "halting_weight")

FFN_MULTIPLE, EXPERT_MULTIPLE = 64, 16
RELU2_WIDENING = 4

# jsonargparse reads the string below each field as that field's help.


@dataclass(frozen=True)
class ModelConfig:
    """The recurrent-depth transformer."""

    vocab_size: int = option(4096, at_least=1)
    """Number of token ids; must equal the vocabulary of the tokenizer that made the shards, and `unused_ids` more."""
    unused_ids: int = option(0, at_least=0)
    """Largest ids that the tokenizer does not have: rows by which the embedding of many published models is padded."""
    dim: int = option(256, at_least=1)
    """Width of the residual stream and of the recurrent state, in channels."""
    prelude_layers: int = option(1, at_least=0)
    """Layers before the loop, run once."""
    core_layers: int = option(2, at_least=1)
    """Layers of the recurrent core, one set of weights run T times."""
    coda_layers: int = option(1, at_least=0)
    """Layers after the loop, run once."""
    heads: int = option(4, at_least=1)
    """Query heads; must divide `dim`, or `attention_dim` if that is set."""
    kv_heads: int = option(2, at_least=1)
    """Key and value heads (grouped-query attention); must divide `heads`."""
    attention_dim: int = option(0, at_least=0)
    """gqa: channels of all query heads together; 0: `dim`. Qwen3's small models have more."""
    attention: Literal["gqa", "mla"] = "gqa"
    """Kind of attention: grouped-query, or multi-head latent, whose cache holds one compressed vector per token."""
    kv_rank: int = option(64, at_least=1, only_if=("attention", "mla"))
    """mla: width of the compressed keys and values, which the cache holds."""
    query_rank: int = option(0, at_least=0)
    """mla: width of the compressed queries; 0 projects queries directly."""
    nope_dim: int = option(32, at_least=1, only_if=("attention", "mla"))
    """mla: channels per head of queries and keys without rotary position."""
    rope_dim: int = option(16, at_least=1, only_if=("attention", "mla"))
    """mla: channels per head of queries, and of the one key that all heads share, with rotary position; even."""
    value_dim: int = option(32, at_least=1, only_if=("attention", "mla"))
    """mla: channels per head of the values."""
    qk_norm: Literal["none", "plain", "learned", "joint"] = "none"
    """gqa: RMSNorm of queries and keys. none; plain, learned: over each head, without or with learned gains (Qwen3); joint: over all heads together, with learned gains (OLMo 2)."""
    qk_bias: bool = False
    """gqa: add a learned bias to queries and keys before rotation, as in Huginn."""
    value_bias: bool = False
    """gqa: add a learned bias to values; with `qk_bias` as in Qwen2."""
    window: int = option(0, at_least=0)
    """Sliding window: a query attends to this many latest positions, itself included; 0: to all."""
    positions: Literal["rope", "none"] = "rope"
    """Positions of tokens in attention. rope: rotary; none: no position at all, only the causal order of what a token sees."""
    rope_base: float = option(10000.0, above=0)
    """Base of the rotary position frequencies."""
    rope_scaling: Literal["none", "llama3"] = "none"
    """Change of the rotary frequencies for longer contexts. llama3: slow ones are divided by `rope_factor`, fast ones stay (Llama 3.1)."""
    rope_factor: float = option(8.0, above=0)
    """llama3: divisor of the slow frequencies."""
    rope_slow_turns: float = option(1.0, above=0)
    """llama3: a frequency is slow that turns less often than this within `rope_original_length` tokens."""
    rope_fast_turns: float = option(4.0, above=0)
    """llama3: a frequency is fast that turns more often than this; those between slow and fast are interpolated."""
    rope_original_length: int = option(8192, at_least=1)
    """llama3: context length, in tokens, before it was extended."""
    rope_pairing: Literal["half", "adjacent"] = "half"
    """Channels that rotate together. half: i and i + half (Llama); adjacent: 2i and 2i + 1 (Huginn, OpenMythos)."""
    value_embeddings: Literal["none", "gated"] = "none"
    """gqa: add a gated embedding of the token to the values in every second layer, each with a table of its own, as in Parcae."""
    ffn: Literal["swiglu", "relu2"] = "swiglu"
    """Feed-forward part of dense layers: gated SiLU, or squared ReLU."""
    ffn_dim: int = option(0, at_least=0)
    """Inner width of the dense feed-forward part; 0: 8/3 of `dim` rounded up to a multiple of 64 (relu2: 4 dim)."""
    core_ffn: Literal["dense", "moe"] = "dense"
    """Feed-forward part of the core's layers. dense: as in `ffn`; moe: a mixture of SwiGLU experts."""
    experts: int = 8
    """moe: number of routed experts."""
    experts_per_token: int = 2
    """moe: number of routed experts that each token is sent to."""
    expert_dim: int = option(0, at_least=0)
    """moe: inner width of a routed expert; 0: the dense width divided by `experts_per_token`, rounded up to a multiple of 16."""
    shared_experts: int = option(1, at_least=0)
    """moe: number of shared experts, which every token is sent to."""
    shared_expert_dim: int = option(0, at_least=0)
    """moe: inner width of a shared expert; 0: that of a routed expert."""
    balance_rate: float = option(1e-3, at_least=0)
    """moe: step by which an expert's selection bias moves after each optimizer step, towards an even load."""
    norm_placement: Literal["pre", "post", "sandwich", "peri"] = "pre"
    """Norms of a layer. pre: before each part; post: over its output only (OLMo 2); sandwich: before it and over its sum with the residual (Huginn); peri: before it and over its output (Ouro)."""
    norm_eps: float = option(1e-6, at_least=0)
    """Epsilon of every RMSNorm."""
    core_norm: Literal["none", "iteration", "last", "last_shared"] = "none"
    """Norm of the state: none, after each iteration, after the last, or after the last with the weights of the final norm (Huginn)."""
    final_norm: bool = True
    """Normalise the features before the output matrix; false for a core whose `core_norm: iteration` is the last norm (Ouro)."""
    encoded_norm: bool = True
    """Normalise the encoded input before it is injected."""
    injection: Literal["diagonal", "residual", "linear", "add", "gate", "hyper", "none"] = "diagonal"
    """Injection of the encoded input into each iteration. none: the input is the initial state and nothing else (Ouro); diagonal: spectral radius below 1 for every weight value; residual: the same decay around the layers (OpenMythos); linear: concatenate and project (Huginn); add: sum; gate: a learned mixture; hyper: several lanes of state (hyper-connections)."""
    discretization: Literal["zoh", "euler"] = "zoh"
    """diagonal, residual, hyper: discretization of the recurrence, zero-order hold or bounded forward Euler."""
    lanes: int = option(4, at_least=1, only_if=("injection", "hyper"))
    """hyper: number of parallel copies of the state."""
    input_matrix: bool = False
    """Apply a learned matrix, the identity at first, to the encoded input before it is injected, as in Parcae."""
    output_matrix: bool = False
    """Apply a learned matrix, the identity at first, to the last state before the coda, as in Parcae."""
    state_init: Literal["zero", "normal", "embedding", "encoded", "learned"] = "zero"
    """State before the first iteration: zeros, truncated normal noise keyed by sample, the token embedding, the encoded input, or a learned vector."""
    state_std: float = option(0.6325, above=0)
    """Standard deviation of the `normal` initial state; sqrt(2/5) as in Huginn."""
    signals: list[Literal["sinusoidal", "lora", "adaln"]] = field(default_factory=list)
    """Signals of the iteration index to the core, any of. sinusoidal: a loop index added to the state; lora: a low-rank adapter that depends on the iteration; adaln: norms modulated by (t, T)."""
    signal_rank: int = option(8, at_least=1, only_if=("signals", "lora"))
    """lora: rank of the adapter."""
    halting: Literal["none", "act", "gate"] = "none"
    """Trained halting: none, ACT with a ponder cost (Graves), or an exit gate with the entropy-regularised objective (Ouro)."""
    halting_weight: float = option(0.01, at_least=0)
    """act: weight of the ponder cost per token; gate: weight of the entropy of the exit distribution."""
    halting_threshold: float = option(0.99, above=0, at_most=1)
    """act: cumulative halting probability at which a token stops."""
    scale_embedding: bool = False
    """Multiply token embeddings by sqrt(dim), as in Huginn."""
    tie_embeddings: bool = True
    """Use the token embedding as the output projection."""
    logit_softcap: float = option(0.0, at_least=0)
    """Bound of the logits, by tanh; 0: none."""

    @property
    def head_dim(self) -> int:
        """Channels per head of grouped-query attention."""
        return (self.attention_dim or self.dim) // self.heads

    @property
    def ffn_width(self) -> int:
        """Inner width of a dense feed-forward part: `ffn_dim`, or its default if that is 0."""
        if self.ffn_dim:
            return self.ffn_dim
        if self.ffn == "relu2":
            return RELU2_WIDENING * self.dim
        return -(-self.dim * 8 // (3 * FFN_MULTIPLE)) * FFN_MULTIPLE

    @property
    def expert_width(self) -> int:
        """Inner width of a routed expert: `expert_dim`, or its default if that is 0."""
        if self.expert_dim:
            return self.expert_dim
        return -(-self.ffn_width // (self.experts_per_token * EXPERT_MULTIPLE)) * EXPERT_MULTIPLE

    @property
    def shared_width(self) -> int:
        """Inner width of all shared experts together."""
        return self.shared_experts * (self.shared_expert_dim or self.expert_width)

    @property
    def bounds_state(self) -> bool:
        """True if a norm bounds the state after every iteration, whatever the injection does."""
        return self.core_norm == "iteration" or self.norm_placement == "sandwich"

    @property
    def rotary_dim(self) -> int:
        """Channels per head that carry rotary position."""
        return self.rope_dim if self.attention == "mla" else self.head_dim
