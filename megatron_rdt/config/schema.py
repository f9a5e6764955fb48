"""The dataclasses that are the schema of every run's YAML.

One tree, `RunConfig`. Every field has a docstring line with its unit; `--help` prints these lines.
Lengths are in tokens, sizes in elements, rates per optimizer step, unless said otherwise.
`model` is in `megatron_rdt.config.model`. Checks that need two fields are in `megatron_rdt.config.checks`.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron_rdt.config.engines import ENGINES, ONE_PROCESS, EngineKind, EngineName
from megatron_rdt.config.model import ModelConfig
from megatron_rdt.config.ranges import option

WSD_DECAY_FRACTION = 0.2

# jsonargparse reads the string below each field as that field's help.


@dataclass(frozen=True)
class RunSection:
    """What this run is called and where it is kept."""

    name: str = "run"
    """Name of the run; its directory is `root/name`."""
    root: str = "runs"
    """Directory that holds all runs."""
    seed: int = 1234
    """Seed of everything that is drawn: initial weights, data order, loop counts, initial states."""


@dataclass(frozen=True)
class DepthConfig:
    """How many iterations T the core runs, and through how many of them the gradient flows."""

    scheme: Literal["fixed", "uniform", "geometric", "poisson", "lognormal_poisson"] = "lognormal_poisson"
    """Distribution of T. fixed: `mean`; uniform: 1 to 2 mean - 1; geometric: stops after each iteration with chance 1 / mean; poisson: max(Poisson(mean), 1); lognormal_poisson: Poisson(LogNormal) + 1 (Huginn)."""
    mean: float = 4.0
    """Mean of the distribution, in iterations (lognormal_poisson: mean of the Poisson rate, so E[T] is this plus 1)."""
    min: int = 1
    """Smallest T."""
    max: int = 32
    """Largest T. A limit on cost only: no weight depends on it."""
    bounds: Literal["clamp", "truncate"] = "clamp"
    """What a draw outside min to max becomes: the nearest of the two, or it is not drawn at all."""
    sigma: float = option(0.5, above=0, at_most=3)
    """Standard deviation of the logarithm of the rate (lognormal_poisson only)."""
    backprop: int | Literal["all"] = "all"
    """k: the last k iterations carry gradient, the ones before run without; `all` is full backpropagation."""
    per: Literal["step", "micro_batch", "sequence"] = "step"
    """What one draw of T covers: all sequences of an optimizer step, those of one forward pass, or one sequence."""
    curriculum: Literal["none", "linear", "one_minus_sqrt"] = "none"
    """How the depth grows over the first `curriculum_steps`: not, evenly, or slowly first as 1 - sqrt(1 - share)."""
    curriculum_steps: int = 1000
    """Optimizer steps after which the curriculum has ended."""
    curriculum_of: Literal["mean", "backprop", "both"] = "mean"
    """What grows: the mean of T from `min`, k from 1, or both."""
    checkpoint: int | Literal["none", "per_iteration", "per_layer", "selective"] = "none"
    """What is kept for the backward pass: none: everything; per_iteration: the state between iterations; a number n: the state after every n-th; selective: the state and what matrix products and attention gave; per_layer: the input of every layer. The rest is computed again."""


@dataclass(frozen=True)
class TrainConfig:
    """Size and length of the training run."""

    steps: int = option(1000, at_least=1)
    """Optimizer steps in the whole run."""
    global_batch: int = option(32, at_least=1)
    """Sequences per optimizer step, over all processes; must be a multiple of processes x micro_batch."""
    micro_batch: int = option(8, at_least=1)
    """Sequences per process and forward pass; the rest of the batch is accumulated."""
    sequence_length: int = option(256, at_least=1)
    """Tokens per sequence."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Dtype of matrix products. Weights, recurrent state, gradients' sums and reductions stay float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; `auto` takes a GPU where there is one."""
    deterministic: bool = True
    """On a GPU, take kernels that give the same digits every time, some of them slower; exact resume needs it."""
    compile: Literal["none", "layers"] = "none"
    """layers: compile each layer, not the loop, so that any T runs the same code (single, ddp, fsdp); takes some minutes at the first steps."""
    gc_every: int = option(50, at_least=0)
    """Look for garbage in Python's memory after every this many steps, on all processes at the same one, and not in between; 0 leaves it to Python."""
    z_loss: float = option(0.0, at_least=0)
    """Weight of the squared log-partition function in the loss (PaLM's z-loss); 0 means none."""
    max_nonfinite_steps: int = option(10, at_least=1)
    """Steps in a row with a non-finite gradient (each is skipped) after which the run stops with an error, when they are read (`logging.every`)."""


@dataclass(frozen=True)
class OptimizerConfig:
    """What turns gradients into steps."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw; or muon: Muon for the matrices of layers, injection and signals, AdamW for the rest at the same rate."""
    lr: float = option(1e-3, above=0)
    """Peak learning rate."""
    beta1: float = option(0.9, at_least=0, below=1)
    """Decay of the first moment."""
    beta2: float = option(0.95, at_least=0, below=1)
    """Decay of the second moment."""
    eps: float = option(1e-8, above=0)
    """Added to the root of the second moment."""
    weight_decay: float = option(0.1, at_least=0)
    """Decoupled weight decay on matrices; norms, gains, biases and the injection get none."""
    grad_clip: float = option(1.0, at_least=0)
    """Largest global gradient norm; larger gradients are scaled down to it. 0 means no clipping."""
    momentum: float = option(0.95, at_least=0, below=1)
    """muon: decay of the running mean of gradients."""
    nesterov: bool = True
    """muon: step along the momentum as it would be after this gradient once more."""
    ns_steps: int = option(5, at_least=1)
    """muon: Newton-Schulz steps that make an update orthogonal."""
    core_lr_scale: float = option(0.5, above=0)
    """muon: learning rate of the matrices that every iteration reuses, as a multiple of `lr`."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over steps: linear warm-up, then the named shape."""

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine: down to `final` of the peak; wsd (trapezoid): flat, then linear down over `decay_steps`; constant."""
    warmup_steps: int = option(100, at_least=0)
    """Steps of linear warm-up from 0."""
    decay_steps: int = option(0, at_least=0)
    """Steps of the final linear decay (wsd only); 0 means a fifth of the run."""
    final: float = option(0.1, at_least=0, at_most=1)
    """Learning rate at the end, as a fraction of the peak."""

    def wsd_decay_steps(self, steps: int) -> int:
        """Return how many steps the final decay of `wsd` takes in a run of `steps` steps."""
        return self.decay_steps or max(round(WSD_DECAY_FRACTION * steps), 1)


@dataclass(frozen=True)
class ParallelConfig:
    """How the work is spread over processes."""

    engine: EngineName = ONE_PROCESS
    """single: one process; ddp: replicated; fsdp: sharded with FSDP2; zero1, zero2, zero3: DeepSpeed."""
    replicate: int = option(1, at_least=1)
    """fsdp: groups of processes that each hold the whole state (HSDP); it is sharded within a group, gradients are reduced within and then between groups."""
    context: int = option(1, at_least=1)
    """fsdp: processes that share out the tokens of each sequence (context parallelism)."""
    tensor: int = option(1, at_least=1)
    """fsdp: processes that share out the heads and inner channels of each layer, and the vocabulary (tensor parallelism)."""
    expert: int = option(1, at_least=1)
    """fsdp: processes that share out the experts of each mixture (expert parallelism)."""
    core_gather: Literal["once", "per_iteration", "per_layer"] = "once"
    """fsdp: gather the core's weights once per forward and backward pass whatever T is; once per iteration; or each layer's once per iteration, so that one layer is held at a time."""
    reduce: Literal["per_step", "per_micro_batch"] = "per_step"
    """ddp, fsdp: reduce gradients once per optimizer step, or after every micro-batch (fsdp: no unsharded gradient is kept between them)."""
    reshard_after_forward: bool = True
    """fsdp: free the gathered weights between forward and backward (less memory, one more gather)."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """zero1, zero2, zero3: keep the float32 weights and moments that the optimizer steps in the CPU's memory, and step them there; zero3: each process's share of the parameters too."""
    deepspeed: dict[str, Any] | str | None = None
    """zero1, zero2, zero3: further keys for DeepSpeed's config, a mapping or the path of a YAML or JSON file that holds one (read at the start, kept in the run's config)."""
    timeout_s: int = option(600, at_least=1)
    """Seconds after which a collective that does not complete ends the run."""

    @property
    def engine_kind(self) -> EngineKind:
        """Properties of `engine`."""
        return ENGINES[self.engine]


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and resuming."""

    every: int = option(200, at_least=0)
    """Save every this many steps; the last step is always saved. 0 means only the last."""
    keep: int = option(3, at_least=0)
    """Newest checkpoints to keep; older ones are deleted after a newer one is complete. 0 keeps all."""


@dataclass(frozen=True)
class CorpusConfig:
    """One corpus of a mixture."""

    path: str
    """Directory that `rdt prep` wrote."""
    weight: float
    """Share of the samples, of any scale: weights are divided by their sum."""
    name: str = ""
    """What the corpus is called in records and checkpoints; default: the last part of its path."""
    max_epochs: float | None = None
    """Most passes over it; default: `data.max_epochs`."""
    max_tokens: int = 0
    """Take only so many tokens of its training split, the first ones; 0 takes all."""


@dataclass(frozen=True)
class DataConfig:
    """Token shards and their order."""

    path: str = "data/corpus"
    """Directory that `rdt prep` wrote (it holds manifest.json), or `hf:NAME` or `hf:NAME:CONFIG`: a Hugging Face dataset, on the hub or a local path, read as it comes; for a quick look, docs/streaming.md has what it lacks."""
    tokenizer: str = ""
    """hf: tokenizer, a folder that `rdt prep` wrote."""
    text_field: str = "text"
    """hf: field of a row that holds the text."""
    hf_split: str = "train"
    """hf: split of the dataset."""
    shuffle_buffer: int = option(0, at_least=0, only_if=("streamed", True))
    """hf: rows among which the next one is drawn; what waits there is lost when a run resumes. 0 takes rows in the dataset's order."""
    mixture: list[CorpusConfig] = field(default_factory=list)
    """Several corpora in the place of `path`, each a mapping: path, weight, and where wanted name, max_epochs, max_tokens. Changed on resume, it holds from there on."""
    max_epochs: float = option(4.0, above=0)
    """Most passes over the training split of a corpus; a longer run is refused before it starts."""
    verify: Literal["size", "full"] = "size"
    """Check of the shards at the start: sizes and headers, or the SHA-256 of every byte, read once per node; the others wait, at most `parallel.timeout_s`."""
    pack: Literal["chunk", "bestfit"] = "chunk"
    """How documents become sequences. chunk: all documents behind one another, cut every `train.sequence_length` tokens; bestfit: documents stay whole where they fit, each in the fullest sequence that has room for it, and the rest is padding."""
    document_mask: bool = False
    """Let no token look at another document in its sequence, in training and in validation."""
    document_positions: bool = False
    """Let positions start again at 0 at each document in a sequence; needs `document_mask`."""
    loss: Literal["all", "answers"] = "answers"
    """Targets that count. answers: those that the shards' masks mark (all where shards have none); all: every token."""

    @property
    def streamed(self) -> bool:
        """Whether the data is a Hugging Face dataset that is read as it comes."""
        return not self.mixture and self.path.startswith("hf:")

    def corpora(self) -> list[CorpusConfig]:
        """The mixture, or `path` as a mixture of one, with every default filled in."""
        return [
            replace(
                corpus,
                name=corpus.name or Path(corpus.path).name or "corpus",
                max_epochs=self.max_epochs if corpus.max_epochs is None else corpus.max_epochs,
            )
            for corpus in self.mixture or [CorpusConfig(self.path, 1.0)]
        ]


@dataclass(frozen=True)
class EvalConfig:
    """Validation loss inside the run."""

    every: int = option(200, at_least=0)
    """Evaluate every this many steps, and after the last. 0 means never."""
    loops: list[int] = field(default_factory=lambda: [1, 4, 8])
    """Loop counts T to evaluate at."""
    sequences: int = option(64, at_least=1)
    """Validation sequences per evaluation, over all processes, rounded down to a multiple of those with samples of their own; spread evenly over the split, the same ones every time."""


@dataclass(frozen=True)
class SampleConfig:
    """Text generated inside the run."""

    every: int = option(0, at_least=0)
    """Generate every this many steps, and after the last. 0 means never."""
    prompt: str = "def "
    """Text to continue."""
    tokens: int = option(48, at_least=0)
    """New tokens per sample."""
    loops: list[int] = field(default_factory=lambda: [1, 8])
    """Loop counts T to generate at, one sample each."""
    temperature: float = option(0.8, at_least=0)
    """Sampling temperature; 0 takes the likeliest token."""
    top_k: int = option(50, at_least=0)
    """Sample among the k likeliest tokens; 0 means all."""


@dataclass(frozen=True)
class LoggingConfig:
    """What is printed and recorded."""

    every: int = option(10, at_least=1)
    """Steps after which the records are read from the device and a console line is printed; metrics.jsonl gets one object for each step."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    monitor_every: int = option(0, at_least=0)
    """Record norm, residual, token correlation and gradient of the state for every iteration, every this many steps; 0 means never."""
    jacobian_every: int = option(0, at_least=0)
    """Record the largest singular value of the last iteration's Jacobian every this many steps, for about six more iterations; 0 means never."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a training run."""

    run: RunSection = field(default_factory=RunSection)
    """Name, place and seed."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    depth: DepthConfig = field(default_factory=DepthConfig)
    """Loop counts."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Batch, length, precision."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate over steps."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Engine."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving."""
    data: DataConfig = field(default_factory=DataConfig)
    """Token shards."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Validation."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """Generated text."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Console, metrics.jsonl, TensorBoard."""
