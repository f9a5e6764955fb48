"""The training loop. It knows steps, batches and records; the engine knows sharding, the sampler knows depth."""

import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.config import RunConfig, dump_config
from megatron_rdt.data import Batch, BatchLoader, TokenCorpus, Tokenizer, fixed_windows
from megatron_rdt.depth import DepthSampler
from megatron_rdt.environment import process_place
from megatron_rdt.errors import EXIT_OK, EXIT_PREEMPTED, CheckpointError, ConfigError
from megatron_rdt.evaluate.loss import validation_losses
from megatron_rdt.files import write_text
from megatron_rdt.inference.generate import generate
from megatron_rdt.model import CoreMonitor, RecurrentDepthTransformer
from megatron_rdt.model.flops import training_flops
from megatron_rdt.parallel import MicroBatch, make_engine
from megatron_rdt.train.hardware import peak_flops, peak_memory_gb
from megatron_rdt.train.health import Guard
from megatron_rdt.train.metrics import Console, Recorder, forget_after
from megatron_rdt.train.schedule import learning_rate
from megatron_rdt.train.signals import StopRequest


def train(config: RunConfig, resume: str = "none") -> int:
    """Run training on this process, one of `WORLD_SIZE`.

    Args:
        config: a checked config.
        resume: "none" (refuse a run directory that has checkpoints), "auto" (newest complete checkpoint of the run,
            or a fresh start), or the path of a checkpoint or run.

    Returns:
        0 when all steps are done, 75 when stopped by a signal after a good save.
    """
    run_directory = Path(config.run.root) / config.run.name
    if resume == "none":
        refuse_to_overwrite(run_directory)
    device = join_world(config)
    source = find_start(run_directory, resume)
    trainer = Trainer(config, run_directory, device)
    try:
        status = trainer.run(source)
        # A rank that left while others still talk to it would end them with an abort.
        trainer.engine.barrier()
        return status
    finally:
        trainer.close()


def refuse_to_overwrite(run_directory: Path) -> None:
    """ConfigError where a fresh run would write over the checkpoints of another."""
    if checkpoints.complete_checkpoints(run_directory):
        raise ConfigError(
            f"{run_directory} already holds checkpoints. Continue it with --resume auto, or choose another --run.name."
        )


def find_start(run_directory: Path, resume: str) -> Path | None:
    """The checkpoint to start from, verified, or None for a fresh start; the same on every rank."""
    if resume == "none":
        return None
    if resume == "auto":
        return checkpoints.newest_checkpoint(run_directory, _verify_together)
    return checkpoints.resolve_checkpoint(resume, _verify_together)


def _verify_together(checkpoint: Path) -> None:
    """Each rank reads its share of the files; a damage that one finds is raised on all."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    found: str | None = None
    try:
        checkpoints.verify(checkpoint, share=(rank, world_size))
    except CheckpointError as error:
        found = str(error)
    all_found = [found] * world_size
    if world_size > 1:
        dist.all_gather_object(all_found, found)
    for message in all_found:
        if message is not None:
            raise CheckpointError(message)


def join_world(config: RunConfig) -> torch.device:
    """Pick this process's device and join the process group where the engine needs one."""
    device = _device(config.train.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if config.parallel.engine != "single":
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=config.parallel.timeout_s))
    return device


def _device(wanted: str) -> torch.device:
    """The CPU, or the GPU that belongs to this process."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    visible, place = torch.cuda.device_count(), process_place()
    if visible == 0:
        raise ConfigError("train.device is cuda, but PyTorch sees no GPU here. Use --train.device cpu.")
    if visible == 1 and place.launcher == "slurm":  # srun may show each process its own GPU only
        return torch.device("cuda", 0)
    if place.local_rank >= visible:
        raise ConfigError(
            f"there are {place.local_world_size} processes on this machine and {visible} GPU(s). Start one process per "
            "GPU, or use --train.device cpu."
        )
    return torch.device("cuda", place.local_rank)


class Trainer:
    """One run on one process."""

    def __init__(self, config: RunConfig, run_directory: Path, device: torch.device) -> None:
        self.config, self.run_directory, self.device = config, run_directory, device
        self.engine = make_engine(config, device)
        self.is_first = self.engine.rank == 0
        self.corpus = TokenCorpus(
            config.data.path, "train", config.train.sequence_length, config.run.seed, config.data.verify
        )
        if self.corpus.vocab_size != config.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size is {config.model.vocab_size}, but the tokenizer of {config.data.path} has "
                f"{self.corpus.vocab_size} pieces. Set --model.vocab_size {self.corpus.vocab_size}."
            )
        self.tokenizer = Tokenizer(self.corpus.tokenizer_directory)
        self.sampler = DepthSampler(config.depth, config.run.seed)
        self.guard = Guard(config.train.max_nonfinite_steps)
        self.step, self.consumed, self.run_id = 0, 0, uuid.uuid4().hex
        self.parent: str | None = None
        self.recorder: Recorder | None = None
        self.stop = StopRequest()

    def run(self, source: Path | None) -> int:
        """Train from `source` (or from scratch) to the last step; returns the exit status."""
        config = self.config
        with torch.device("meta"):
            model = RecurrentDepthTransformer(config.model)
        parameters = sum(p.numel() for p in model.parameters())
        self.engine.setup(model)
        if source is not None:
            self._restore(source)
        self._open_run_directory(parameters)
        loader = BatchLoader(
            self.corpus,
            config.train.global_batch,
            self.engine.rank,
            self.engine.world_size,
            consumed_samples=self.consumed,
            total_samples=self.consumed + (config.train.steps - self.step) * config.train.global_batch,
            max_epochs=config.data.max_epochs,
        )
        console, began = Console(config.train.steps, self.step), time.perf_counter()
        try:
            for batch in loader:
                record = self._train_step(batch, began)
                began = time.perf_counter()
                self._after_step(record, console)
                if self.stop.agreed(self.engine) and self.step < config.train.steps:
                    self._save()
                    self._say(f"stopped on {self.stop.name or 'request'} at step {self.step}, saved; use --resume auto")
                    return EXIT_PREEMPTED
        finally:
            loader.close()
        self._say(
            f"done: {self.step} steps, {self.consumed * config.train.sequence_length:,} tokens, {self.run_directory}"
        )
        return EXIT_OK

    def _train_step(self, batch: Batch, began: float) -> dict[str, Any]:
        """Forward, backward, clip, decide, step; returns the record for metrics.jsonl."""
        config, waited = self.config, time.perf_counter()
        size = config.train.micro_batch
        micro_batches = [
            MicroBatch(batch.tokens[i : i + size], self.sampler.plan(self.step, batch.samples[i : i + size]))
            for i in range(0, len(batch.samples), size)
        ]
        monitor, plan = CoreMonitor(), micro_batches[-1].plan
        loss = self.engine.forward_backward(micro_batches, monitor)
        grad_norm = self.engine.clip(config.optimizer.grad_clip)
        lr = learning_rate(config.schedule, config.optimizer.lr, self.step, config.train.steps)
        if self.guard.accept(self.step + 1, loss, grad_norm):
            self.engine.step(lr)
        else:
            self.engine.discard()
            self._say(f"step {self.step + 1}: loss {loss} or gradient norm {grad_norm} not finite, step skipped")
        self.step += 1
        self.consumed += config.train.global_batch
        step_s = time.perf_counter() - began
        tokens = config.train.global_batch * config.train.sequence_length
        flops = tokens * training_flops(config.model, config.train.sequence_length, plan.loops, plan.loops_with_grad)
        peak = peak_flops(self.device, config.train.precision)
        return {
            "step": self.step,
            "tokens": self.consumed * config.train.sequence_length,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_second": tokens / step_s,
            "mfu": flops / step_s / (peak * self.engine.world_size) if peak else None,
            "loops_mean": float(plan.loops),
            "loops_max": plan.loops,
            "loops_with_grad": plan.loops_with_grad,
            **_measured(monitor),
            "memory_gb": peak_memory_gb(self.device),
            "data_wait_s": waited - began,
            "step_s": step_s,
        }

    def _after_step(self, record: dict[str, Any], console: Console) -> None:
        """Record, evaluate, sample, save: whatever is due after this step."""
        config, last = self.config, self.step == self.config.train.steps
        if self.recorder is not None:
            self.recorder.step(record)
            if last or self.step % config.logging.every == 0:
                console.print(console.line(record))
        if config.eval.every and (last or self.step % config.eval.every == 0):
            self._evaluate()
        if config.sample.every and (last or self.step % config.sample.every == 0):
            self._sample()
        if last or (config.checkpoint.every and self.step % config.checkpoint.every == 0):
            self._save()

    def _evaluate(self) -> None:
        config = self.config
        corpus = TokenCorpus(config.data.path, "valid", config.train.sequence_length, config.run.seed)
        windows = fixed_windows(corpus, config.eval.sequences)
        # Every rank takes the same number of windows, since forward passes under sharding are collective.
        share = len(windows) // self.engine.world_size
        if share == 0:
            raise ConfigError(
                f"the validation split has {len(windows)} windows for {self.engine.world_size} ranks. "
                "Use fewer ranks, a larger validation split, or --eval.every 0."
            )
        mine = windows[self.engine.rank * share : (self.engine.rank + 1) * share]
        losses = validation_losses(
            self.engine.module,
            mine,
            config.eval.loops,
            config.train.micro_batch,
            self.device,
            reduce=self.engine.sum_over_ranks,
        )
        text = "  ".join(f"T={loops} {loss:.4f}" for loops, loss in losses.items())
        self._say(f"step {self.step}: validation loss  {text}")
        if self.recorder is not None:
            self.recorder.evaluation(
                {
                    "step": self.step,
                    "tokens": self.consumed * config.train.sequence_length,
                    "losses": {str(loops): loss for loops, loss in losses.items()},
                }
            )

    def _sample(self) -> None:
        settings = self.config.sample
        prompt = self.tokenizer.encode(settings.prompt, bos=False)
        for loops in settings.loops:
            tokens = generate(
                self.engine.module,
                torch.tensor([prompt], device=self.device),
                loops,
                settings.tokens,
                temperature=settings.temperature,
                top_k=settings.top_k,
                seed=self.config.run.seed,
                eos=self.tokenizer.eos,
            )
            text = self.tokenizer.decode(tokens[0, len(prompt) :].tolist())
            self._say(f"step {self.step}: sample at T={loops}: {(settings.prompt + text)!r}")
            if self.recorder is not None:
                self.recorder.sample({"step": self.step, "loops": loops, "prompt": settings.prompt, "text": text})

    def _save(self) -> None:
        state = {
            "step": self.step,
            "tokens": self.consumed * self.config.train.sequence_length,
            "data": {
                "version": 1,
                "consumed_samples": self.consumed,
                "data_fingerprint": self.corpus.fingerprint,
                "sequence_length": self.config.train.sequence_length,
                "seed": self.config.run.seed,
            },
            "skipped_steps": self.guard.skipped,
        }
        facts = {
            "run_id": self.run_id,
            "parent": self.parent,
            "tokens": state["tokens"],
            "engine": self.config.parallel.engine,
            "world_size": self.engine.world_size,
            "versions": {"torch": torch.__version__},
        }
        path = checkpoints.save_checkpoint(
            self.engine,
            self.run_directory,
            dump_config(self.config),
            state,
            facts,
            self.corpus.tokenizer_directory,
            self.config.checkpoint.keep,
        )
        self.parent = path.name
        self._say(f"step {self.step}: saved {path}")

    def _restore(self, source: Path) -> None:
        """Load engine state and position; refuse a checkpoint that does not belong to this model or data."""
        checkpoints.check_same_model(source, self.config.model)
        state = checkpoints.read_trainer_state(source)
        data = state["data"]
        for key, mine in (
            ("data_fingerprint", self.corpus.fingerprint),
            ("sequence_length", self.config.train.sequence_length),
            ("seed", self.config.run.seed),
        ):
            if data[key] != mine:
                raise CheckpointError(
                    f"{source} was trained with {key} {data[key]}, now it is {mine}: the order of the data would change. "
                    "Use the same shards, train.sequence_length and run.seed, or start a new --run.name."
                )
        self.engine.load(source)
        checkpoints.restore_rank_rng(source, self.engine.rank)
        self.step, self.consumed = state["step"], data["consumed_samples"]
        self.guard.skipped = state["skipped_steps"]
        manifest = checkpoints.read_manifest(source)
        self.run_id, self.parent = manifest["run_id"], source.name
        self._say(f"resumed from {source} (step {self.step})")

    def _open_run_directory(self, parameters: int) -> None:
        if not self.is_first:
            return
        self.run_directory.mkdir(parents=True, exist_ok=True)
        write_text(self.run_directory / "config.yaml", dump_config(self.config))
        forget_after(self.run_directory, self.step)
        self.recorder = Recorder(self.run_directory, self.config.logging.tensorboard, self.step)
        self._say(
            f"{self.run_directory}: {parameters / 1e6:.2f}M parameters, engine {self.config.parallel.engine} on "
            f"{self.engine.world_size} x {self.device.type}, E[T] = {self.sampler.expected_loops:.2f}, "
            f"steps {self.step} to {self.config.train.steps}"
        )

    def _say(self, text: str) -> None:
        if self.is_first:
            print(text, flush=True)

    def close(self) -> None:
        """Close files, restore signal handlers, leave the process group."""
        if self.recorder is not None:
            self.recorder.close()
        self.stop.close()
        self.engine.close()


def _measured(monitor: CoreMonitor) -> dict[str, float | None]:
    """The monitor's readings as numbers; one transfer for all."""
    names = ("spectral_radius", "state_norm", "state_residual", "token_correlation")
    values = {name: getattr(monitor, name) for name in names}
    return {name: float(value) if value is not None else None for name, value in values.items()}
