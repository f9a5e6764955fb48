"""The dataclasses that are the schema of every run's YAML: one tree, `RunConfig`.

The string below each field is its help, with its unit. Lengths are in tokens, sizes in elements, rates per optimizer
step, unless said otherwise. A number's range stands in its `option(...)`; checks that need two fields are in
`megatron_rdt.config.checks`. The section `model` is in `megatron_rdt.config.model`.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron_rdt.config.batch_schedule import BatchSchedule
from megatron_rdt.config.engines import ENGINES, ONE_PROCESS, EngineKind, EngineName, describe_engines
from megatron_rdt.config.model import ModelConfig
from megatron_rdt.config.option_types import HELP
from megatron_rdt.config.ranges import option
from megatron_rdt.files import PathText

WSD_DECAY_FRACTION = 0.2

# jsonargparse reads the string below each field as that field's help.


@dataclass(frozen=True)
class RunSection:
    """Name, directory and seed of the run."""

    name: str = "run"
    """Name of the run; its directory is `root/name`."""
    root: PathText = "runs"
    """Directory that holds all runs."""
    seed: int = 1234
    """Seed of everything that is random: initial weights, data order, loop counts, initial states."""


@dataclass(frozen=True)
class DepthConfig:
    """Loop counts T of training, and the iterations that the gradient flows through."""

    scheme: Literal["fixed", "uniform", "geometric", "poisson", "lognormal_poisson", "difficulty"] = "lognormal_poisson"
    """Distribution of T. fixed: always `mean`; uniform: 1 to 2 mean - 1; geometric: stops after each iteration with probability 1 / mean; poisson: max(Poisson(mean), 1); lognormal_poisson: Poisson(LogNormal) + 1 (Huginn). difficulty: not drawn, but a n + b for an example of difficulty n (`data.pack` example, `per` sequence)."""
    mean: float = 4.0
    """Mean of the distribution, in iterations (lognormal_poisson: mean of the Poisson rate, so E[T] is this plus 1; difficulty: the mean that plans assume, since only the data knows it)."""
    difficulty_slope: float = option(1.0, above=0)
    """difficulty: a, iterations for each unit of difficulty; a n + b is rounded and moved to `min` or `max` if outside."""
    difficulty_offset: float = option(0.0, at_least=0)
    """difficulty: b, iterations for difficulty 0."""
    min: int = 1
    """Smallest T."""
    max: int = 32
    """Largest T. It limits the cost of a step; no weight depends on it."""
    bounds: Literal["clamp", "truncate"] = "clamp"
    """Treatment of draws outside min to max: clamp: move them to the nearer limit; truncate: leave them out of the distribution."""
    sigma: float = option(0.5, above=0, at_most=3)
    """Standard deviation of the logarithm of the rate (lognormal_poisson only)."""
    backprop: int | Literal["all"] = "all"
    """k: the last k iterations carry gradient, those before run without; `all`: full backpropagation."""
    per: Literal["step", "accumulation_step", "micro_batch", "sequence"] = "step"
    """Sequences that share one draw of T: all of an optimizer step; those of the n-th forward pass on every rank; those of one forward pass of one rank; or each its own."""
    curriculum: Literal["none", "linear", "one_minus_sqrt"] = "none"
    """Growth of the depth over the first `curriculum_steps`: none; linear; one_minus_sqrt: slow at first, as 1 - sqrt(1 - fraction)."""
    curriculum_steps: int = 1000
    """Optimizer steps until the curriculum has reached the full depth."""
    curriculum_of: Literal["mean", "backprop", "both"] = "mean"
    """Quantity that grows: the mean of T, from `min`; k (backprop), from 1; or both."""
    checkpoint: int | Literal["none", "per_iteration", "per_layer", "selective"] = "none"
    """Activation checkpointing of the loop. none: keep all activations; per_iteration: keep the state between iterations; a number n: keep the state after every n-th iteration; selective: keep the state and the results of matrix products and attention; per_layer: keep the input of every layer, of prelude and coda too. The rest is recomputed in the backward pass."""


@dataclass(frozen=True)
class TrainConfig:
    """Size and length of the training run."""

    steps: int = option(1000, at_least=1)
    """Optimizer steps in the whole run."""
    global_batch: int = option(32, at_least=1)
    """Sequences per optimizer step, over all processes; must be a multiple of data-parallel ranks x micro_batch."""
    batch_schedule: list[str] = field(default_factory=list)
    """Other global batches before, as STEP:GLOBAL_BATCH: 0:64,1000:128,4000:256 is 64 at first, 128 after 1000 steps, and after 4000 steps 256, which must be `global_batch`. Empty: always `global_batch`."""
    micro_batch: int = option(8, at_least=1)
    """Sequences per data-parallel rank and forward pass; gradients are accumulated over the rest of the batch."""
    sequence_length: int = option(256, at_least=1)
    """Tokens per sequence."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Dtype of matrix products. Weights, recurrent state, accumulated gradients and reductions stay float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; `auto`: a GPU if there is one."""
    deterministic: bool = True
    """On a GPU, compute the same result every time: deterministic kernels or an error, no cuDNN attention, fixed algorithms of cuBLAS and NCCL; slower. false gives that up: the same command gives other digits, and a resumed run equals the uninterrupted one up to rounding only."""
    compile: Literal["none", "layers"] = "none"
    """layers: compile the layers and an iteration of the core as a whole, not the loop, so that any T runs the same code (single, ddp, fsdp); the first steps take some minutes."""
    float8: Literal["none", "matrix_products"] = "none"
    """matrix_products: in training, multiply the layers' inputs and gradients by their matrices in float8, on GPUs that can; needs compiled layers."""
    gc_every: int = option(50, at_least=0)
    """Steps between runs of Python's garbage collector, which all processes then run at the same step; 0 leaves it to Python."""
    z_loss: float = option(0.0, at_least=0)
    """Weight of the squared log-partition function in the loss (PaLM's z-loss); 0 means none."""
    max_nonfinite_steps: int = option(10, at_least=1)
    """Consecutive steps with a non-finite gradient, all of which are skipped, that stop the run with an error (see `on_nonfinite`); they are counted every `logging.every` steps."""
    max_steps_without_target: int = option(10, at_least=1)
    """Consecutive steps in which, by the data's loss masks, no target counts, all of which are skipped, that stop the run with an error; counted likewise."""
    on_alarm: Literal["warn", "rollback", "stop"] = "warn"
    """Reaction to an alarm of the loop's monitors (docs/monitors.md): print and record it; also go back to the newest healthy checkpoint and continue at a lower rate; or also stop with an error."""
    on_spike: Literal["warn", "skip", "rollback", "stop"] = "warn"
    """Reaction to a loss spike: as for `on_alarm`; skip: leave weights and moments as they are in every step whose loss is above the bound."""
    on_nonfinite: Literal["stop", "rollback"] = "stop"
    """Reaction to `max_nonfinite_steps` in a row: stop with an error, or rollback, as for `on_alarm`."""
    spike_deviations: float = option(8.0, at_least=0)
    """A loss spike is a loss above the median of comparable recent steps by this many standard deviations, as estimated from the median absolute deviation; 0: there are no spikes."""
    rollback_lr: float = option(0.5, above=0, at_most=1)
    """Factor of the learning rate after a rollback, from then on; further rollbacks multiply it again."""
    rollback_skip: bool = False
    """Leave out, after a rollback, the data of the steps that led to it, as `data.skip_steps` would."""
    max_rollbacks: int = option(3, at_least=1)
    """Rollbacks of a run; at the next alarm that asks for one it stops with an error."""

    profile: list[int | str] = field(default_factory=list)
    """Steps to trace with torch.profiler, such as 100-102,5000-5002, into `traces/` of the run; a timeline of each range and rank."""
    profile_every: int = option(0, at_least=0)
    """Trace the ranges of `profile` again after every so many steps; 0: once."""
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that trace."""
    profile_memory: bool = False
    """On a GPU, also write a memory snapshot: every allocation of the traced steps, for pytorch.org/memory_viz."""

    @property
    def batches(self) -> BatchSchedule:
        """The global batch of every step; ValueError if `batch_schedule` is wrong, which `check_config` refuses."""
        return BatchSchedule.parse(self.batch_schedule, self.global_batch)


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and its hyperparameters."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw; or muon: Muon for the matrices of layers, injection and signals, AdamW for the rest at the same learning rate."""
    lr: float = option(1e-3, above=0)
    """Peak learning rate."""
    beta1: float = option(0.9, at_least=0, below=1)
    """Decay of the first moment."""
    beta2: float = option(0.95, at_least=0, below=1)
    """Decay of the second moment."""
    eps: float = option(1e-8, above=0)
    """Added to the root of the second moment."""
    weight_decay: float = option(0.1, at_least=0)
    """Decoupled weight decay on matrices; norms, gains, biases, the injection and `no_weight_decay` get none."""
    no_weight_decay: list[str] = field(default_factory=list)
    """Patterns of parameter names that get no weight decay either, such as 'embedding.*,coda.*' (wildcards as in a shell)."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the optimizer's moments between steps: bfloat16 halves them (single, ddp, fsdp). Weights and the update itself stay float32."""
    ema: float = option(0.0, at_least=0, below=1)
    """Decay of an exponential moving average of the weights, which checkpoints hold beside them (single, ddp, fsdp); 0: none."""
    grad_clip: float = option(1.0, at_least=0)
    """Largest global gradient norm; larger gradients are scaled down to it. 0 means no clipping."""
    momentum: float = option(0.95, at_least=0, below=1)
    """muon: decay of the running mean of gradients."""
    nesterov: bool = True
    """muon: Nesterov momentum, as if this step's gradient came once more."""
    ns_steps: int = option(5, at_least=1)
    """muon: Newton-Schulz steps that make an update orthogonal."""
    core_lr_scale: float = option(0.5, above=0)
    """muon: learning rate of the matrices that every iteration reuses, as a multiple of `lr`."""

    @property
    def state_bytes(self) -> int:
        """Largest number of bytes that a checkpoint holds per parameter: float32 weight, two moments, average."""
        return 4 + 2 * (2 if self.state_dtype == "bfloat16" else 4) + (4 if self.ema else 0)


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over steps: linear warm-up, then the shape `name`."""

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine: falls to `final` of the peak; wsd (trapezoid): flat, then falls linearly over `decay_steps`; constant: flat."""
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
    """Distribution of the work over processes."""

    engine: EngineName = field(default=ONE_PROCESS, metadata={HELP: describe_engines()})
    """Arrangement of the model's state over processes."""
    replicate: int = option(1, at_least=1)
    """fsdp: groups of processes that each hold the whole state (HSDP), sharded within the group; gradients are reduced within groups, then between them."""
    context: int = option(1, at_least=1)
    """fsdp: processes that split the tokens of each sequence (context parallelism)."""
    tensor: int = option(1, at_least=1)
    """fsdp: processes that split the heads and inner channels of each layer, and the vocabulary (tensor parallelism)."""
    expert: int = option(1, at_least=1)
    """fsdp: processes that split the experts of each mixture (expert parallelism)."""
    core_gather: Literal["once", "per_iteration", "per_layer"] = "once"
    """fsdp: gather the core's weights once per forward and once per backward pass, for any T; once per iteration; or layer by layer in every iteration, so that one layer is held at a time."""
    core_ring: int = option(1, at_least=1)
    """fsdp: stages among which the core's layers are split; the states of sequences travel from stage to stage, one lap per iteration, and no weight of the core is gathered beyond its stage (docs/loop_ring.md). 1: every process runs the whole core."""
    reduce: Literal["per_step", "per_micro_batch"] = "per_step"
    """ddp, fsdp: reduce gradients once per optimizer step, or after every micro-batch (fsdp: then no unsharded gradient is kept between micro-batches)."""
    reshard_after_forward: bool = True
    """fsdp: free the gathered weights between forward and backward (less memory, one more gather)."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """zero1, zero2, zero3: keep the optimizer's float32 weights and moments in CPU memory, and step them there; `parameters` (zero3 only): each process's shard of the parameters too."""
    deepspeed: dict[str, Any] | PathText | None = None
    """zero1, zero2, zero3: further keys of DeepSpeed's config, a mapping or the path of a YAML or JSON file that holds one; the file is read once and its content kept in the run's config."""
    start_timeout_s: int = option(1800, at_least=1)
    """Seconds that a collective may take before the run ends with an error, up to the end of the first step: ranks load, compile and connect at different speeds."""
    timeout_s: int = option(600, at_least=1)
    """The same from the second step on, where ranks keep pace: a shorter one ends a run with a hanging rank sooner."""

    @property
    def engine_kind(self) -> EngineKind:
        """Properties of `engine`."""
        return ENGINES[self.engine]


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and resuming."""

    every: int = option(200, at_least=0)
    """Steps between checkpoints; the last step is always saved. 0: save only the last."""
    keep: int = option(3, at_least=0)
    """Number of newest checkpoints to keep, beside the newest healthy one; others are deleted once a newer one is complete. 0 keeps all."""
    milestones: int = option(0, at_least=0)
    """Keep the healthy checkpoint of every n-th step for good, beside those of `keep`; a multiple of `every`. 0: none."""
    asynchronous: bool = False
    """Copy the state into host memory and train on while it is written; a failed save is noticed within two steps."""
    on_failure: Literal["stop", "continue"] = "stop"
    """Reaction to a checkpoint, or to the record of a rollback, that cannot be written, because the disk is full, for example. stop: end the run; continue: warn, train on, and try again when the next one is due. The checkpoint of the last step, or of a run that is asked to stop, has to be written in either case."""
    before_job_end_s: float = option(120.0, at_least=0)
    """Seconds before the end of its Slurm job at which a run saves and stops, as on a signal, but at most a quarter of the time that the job has left when the run starts. Longer than two steps and a save. 0: only signals stop it."""


@dataclass(frozen=True)
class CorpusConfig:
    """One corpus of a mixture."""

    path: PathText
    """Directory that `rdt prep` wrote."""
    weight: float
    """Share of the samples, on any scale: weights are divided by their sum."""
    name: str = ""
    """Name of the corpus in records and checkpoints; default: the last part of its path."""
    max_epochs: float | None = None
    """Largest number of passes over it; default: `data.max_epochs`."""
    max_tokens: int = 0
    """Use only this many tokens of its training split, the first ones; 0: all."""


@dataclass(frozen=True)
class DataConfig:
    """Token shards and their order."""

    path: PathText = "data/corpus"
    """Directory that `rdt prep` wrote (it holds manifest.json), or `hf:NAME` or `hf:NAME:CONFIG`: a Hugging Face dataset, on the hub or a local path, streamed without preparation; docs/streaming.md lists the limits."""
    tokenizer: PathText = ""
    """hf: tokenizer folder that `rdt prep` wrote."""
    text_field: str = "text"
    """hf: field of a row that holds the text."""
    hf_split: str = "train"
    """hf: split of the dataset."""
    shuffle_buffer: int = option(0, at_least=0, only_if=("streamed", True))
    """hf: size of the buffer that the next row is drawn from; rows in it are lost when a run resumes. 0: rows in the dataset's order."""
    mixture: list[CorpusConfig] = field(default_factory=list)
    """Several corpora instead of `path`, each a mapping of path, weight and, optionally, name, max_epochs, max_tokens. A change on resume applies from that step on."""
    max_epochs: float = option(4.0, above=0)
    """Largest number of passes over the training split of a corpus; a longer run is refused before it starts."""
    verify: Literal["size", "full"] = "size"
    """Check of the shards at the start. size: sizes and headers; full: the SHA-256 of every byte, read by one process for all that share the files, while the others wait."""
    retry_s: float = option(60.0, at_least=0)
    """Seconds for which a shard that a disk or network refuses to read is tried again, at most half of `parallel.timeout_s`, while the other processes wait."""
    on_unreadable: Literal["stop", "skip"] = "stop"
    """Reaction to a shard that cannot be read after that, or was replaced. stop: end the run, which resumes when the shard is back; skip: train on without the targets of what cannot be read."""
    skip_steps: list[int | str] = field(default_factory=list)
    """Steps whose data is left out, such as those around a spike of the loss: 1200-1250,1300. Every later step takes the data after it. Numbers are of the data's order, `data_step` in metrics.jsonl, and those of steps as long as nothing is left out."""
    pack: Literal["chunk", "bestfit", "example"] = "chunk"
    """Arrangement of documents in sequences. chunk: concatenate all documents and cut every `train.sequence_length` tokens; bestfit: keep documents that fit whole, each in the fullest sequence that has room for it, and pad the rest; example: one document per sequence, padded, none longer than it."""
    document_mask: bool = False
    """Mask attention between documents of a sequence, in training and in validation."""
    document_positions: bool = False
    """Restart positions at 0 for each document of a sequence; needs `document_mask`."""
    loss: Literal["all", "answers"] = "answers"
    """Targets that count for the loss. answers: those that the shards' masks mark (every token if shards have no masks), with the shards' labels in place of the next tokens; all: every next token."""

    @property
    def streamed(self) -> bool:
        """True if the data is a Hugging Face dataset, streamed without preparation."""
        return not self.mixture and self.path.startswith("hf:")

    def corpora(self) -> list[CorpusConfig]:
        """Return the mixture, or `path` as a mixture of one, with every default filled in."""
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
    """Validation inside the run."""

    every: int = option(200, at_least=0)
    """Steps between evaluations; the last step is always evaluated. 0: never evaluate."""
    loops: list[int] = field(default_factory=lambda: [1, 4, 8])
    """Loop counts T to evaluate at."""
    sequences: int = option(64, at_least=1)
    """Validation sequences per evaluation, over all processes, rounded down to a multiple of the data-parallel ranks; spread evenly over the split, the same ones every time."""
    tasks: bool = False
    """Also score the answers to the validation split's examples of tasks: exact match by difficulty and T."""
    examples: int = option(50, at_least=1)
    """tasks: largest number of examples of each task and difficulty, per corpus."""


@dataclass(frozen=True)
class SampleConfig:
    """Text generated inside the run."""

    every: int = option(0, at_least=0)
    """Steps between samples; the last step always has one. 0: never generate."""
    prompt: str = "def "
    """Text to continue."""
    tokens: int = option(48, at_least=0)
    """New tokens per sample."""
    loops: list[int] = field(default_factory=lambda: [1, 8])
    """Loop counts T to generate at, one sample each."""
    temperature: float = option(0.8, at_least=0)
    """Sampling temperature; 0: the most likely token."""
    top_k: int = option(50, at_least=0)
    """Sample among the k most likely tokens; 0: among all."""


@dataclass(frozen=True)
class LoggingConfig:
    """Console, records and monitors."""

    every: int = option(10, at_least=1)
    """Steps between console lines, for which the records are read from the device; metrics.jsonl gets one object for each step."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: str = ""
    """Project of Weights & Biases to log to as well, under the run's name; empty: none. Needs the package wandb and a login, or WANDB_MODE=offline."""
    straggler_factor: float = option(1.5, at_least=0)
    """A rank is a straggler if its own work, which waits for no other rank, takes more than this multiple of the median's; 0: no warning."""
    straggler_intervals: int = option(3, at_least=1)
    """Logging intervals in a row in which a rank has to be a straggler for a warning."""
    monitor_every: int = option(0, at_least=0)
    """Steps between records of the state's norm, residual, token correlation and gradient at every iteration; 0: never."""
    jacobian_every: int = option(0, at_least=0)
    """Steps between records of the largest singular value of the last iteration's Jacobian, which costs about six more iterations; 0: never."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a training run."""

    run: RunSection = field(default_factory=RunSection)
    """Name, directory and seed."""
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
    """Engine and sharding."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and resuming."""
    data: DataConfig = field(default_factory=DataConfig)
    """Corpora and their order."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Validation."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """Generated text."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Console, metrics.jsonl, TensorBoard."""
