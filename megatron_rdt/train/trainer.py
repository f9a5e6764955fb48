"""The training loop. It knows steps, batches and records; the engine knows sharding, the sampler knows depth."""

import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.config import RunConfig, dump_config, load_config
from megatron_rdt.data import Batch, BatchLoader, Tokenizer
from megatron_rdt.depth import DepthPlan, DepthSampler
from megatron_rdt.environment import ProcessInfo, read_process_info
from megatron_rdt.errors import EXIT_OK, EXIT_PREEMPTED, TrainingError
from megatron_rdt.evaluate.loss import mixture_losses
from megatron_rdt.files import hold_lock, write_text
from megatron_rdt.inference.generate import generate
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.model.flops import forward_flops, training_flops
from megatron_rdt.model.moe import rebalance
from megatron_rdt.parallel import Engine, MicroBatch, make_engine
from megatron_rdt.parallel.process_group import join_process_group
from megatron_rdt.run_directory import run_directory_of
from megatron_rdt.train.data import open_training_data
from megatron_rdt.train.garbage_collection import ScheduledCollection
from megatron_rdt.train.hardware import peak_flops, peak_memory_gb
from megatron_rdt.train.metrics import Console, Recorder, evaluation_lines, evaluation_record, forget_after
from megatron_rdt.train.monitoring import Monitoring
from megatron_rdt.train.nonfinite_guard import Guard, is_finite
from megatron_rdt.train.resume_checks import check_resumable, describe_changed_settings, refuse_to_overwrite
from megatron_rdt.train.schedule import learning_rate
from megatron_rdt.train.step_record import StepClock, TakenStep
from megatron_rdt.train.stop_request import StopRequest

# How long to wait for a process of the same run that was killed and has not quite ended.
LOCK_PATIENCE_S = 10.0


def train(
    config: RunConfig, resume: str = "none", process: ProcessInfo | None = None, stop: StopRequest | None = None
) -> int:
    """Run training on this process, one of `WORLD_SIZE`.

    A process that joined others (every engine but `single`) should then end with `leave_process`.

    Args:
        config: a checked config.
        resume: "none" (refuse a run directory that has checkpoints), "auto" (newest complete checkpoint of the run,
            or a fresh start), or the path of a checkpoint or run.
        process: where this process stands among all; read from the environment where not given.
        stop: listens for stop signals; made here where not given.

    Returns:
        0 when all steps are done, 75 when stopped by a signal after a good save, or before the first step.
    """
    process, listener = process or read_process_info(), stop or StopRequest()
    run_directory = run_directory_of(config)
    try:
        with _only_writer(run_directory, resume) if process.rank == 0 else nullcontext():
            device = join_process_group(config, process)
            trainer = Trainer(config, run_directory, device, listener, process.local_rank)
            try:
                status = trainer.run(checkpoints.find_start(run_directory, resume))
                trainer.engine.close()
            finally:
                trainer.close()
            _KEPT.append(trainer.engine)
            return status
    finally:
        if stop is None:
            listener.close()


# What holds a process group must not be let go of before the process ends, see `leave_process`.
_KEPT: list[Engine] = []


@contextmanager
def _only_writer(run_directory: Path, resume: str) -> Iterator[None]:
    """Hold a lock on the run directory, which must not hold another run; for the first rank."""
    run_directory.mkdir(parents=True, exist_ok=True)
    message = f"another process is writing {run_directory}. Wait for it, end it, or choose another --run.name."
    try:
        with hold_lock(run_directory / ".lock", message, LOCK_PATIENCE_S):
            refuse_to_overwrite(run_directory, resume)
            yield
    finally:
        with suppress(OSError):  # a run that was refused leaves no empty directory
            run_directory.rmdir()


class Trainer:
    """One run on one process."""

    def __init__(
        self, config: RunConfig, run_directory: Path, device: torch.device, stop: StopRequest, local_rank: int = 0
    ) -> None:
        self.config, self.run_directory, self.device, self.stop = config, run_directory, device, stop
        self.engine = make_engine(config, device)
        self.is_first = self.engine.rank == 0
        self.data = open_training_data(config, self.engine.layout, self.engine.rank, local_rank)
        self.tokenizer = Tokenizer(self.data.tokenizer_directory)
        self.sampler = DepthSampler(config.depth, config.run.seed)
        self.flops = forward_flops(config.model, config.train.sequence_length)
        self.guard = Guard(min(config.train.max_nonfinite_steps, config.train.steps))
        self.step, self.consumed, self.run_id = 0, 0, uuid.uuid4().hex
        self.parent: str | None = None
        self.first_step = 0
        self.saved_at: int | None = None
        self.recorder: Recorder | None = None
        self.monitoring = Monitoring(config.logging)
        self.console: Console | None = None
        self.unread: list[TakenStep] = []

    def run(self, source: Path | None) -> int:
        """Train from `source` (or from scratch) to the last step; returns the exit status."""
        config = self.config
        with torch.device("meta"):
            model = RecurrentDepthTransformer(config.model)
        parameters = sum(p.numel() for p in model.parameters())
        self.engine.setup(model)
        if source is not None:
            self._restore(source)
        total = self.consumed + (config.train.steps - self.step) * config.train.global_batch
        data_rank = self.engine.layout.data_rank(self.engine.rank)
        loader = self.data.loader(self.consumed, total, data_rank, self.device)
        try:
            self._open_run_directory(parameters, source)
            for line in self.data.describe(total):
                self._say(line)
            loader.wait()
            with ScheduledCollection(config.train.gc_every) as collection:
                status = self._steps(loader, collection)
        finally:
            loader.close()
        if status == EXIT_OK:
            tokens = self.consumed * config.train.sequence_length
            self._say(f"done: {self.step} steps, {tokens:,} tokens, {self.run_directory}")
        if status == EXIT_OK and self.guard.skipped:
            raise TrainingError(
                f"the last {self.guard.skipped} steps of {self.run_directory} were skipped: the loss or gradient was not "
                "finite. Resume from an earlier checkpoint with a lower --optimizer.lr."
            )
        return status

    def _steps(self, loader: BatchLoader, collection: ScheduledCollection) -> int:
        """Every step that is left; the exit status."""
        self.console, batches = Console(self.config.train.steps, self.step), iter(loader)
        self.stop.ask(self.engine)
        while self.step < self.config.train.steps:
            if self.stop.agreed():
                return self._stopped()
            clock = StepClock(self.device)  # what was due after the last step is not part of this one
            batch = next(batches)
            clock.data_arrived()
            self.unread.append(self._train_step(batch, clock))
            self._after_step()
            collection.after_step(self.step)
        self.stop.agreed()  # no rank leaves a reduction that it began
        return EXIT_OK

    def _stopped(self) -> int:
        """Save, unless this step is saved; where there is nothing to save, say so."""
        reason = f"stopped on {self.stop.name}"
        if self.step == self.first_step:
            self._say(f"{reason} before step {self.step + 1}, with nothing new to save; use --resume auto")
            return EXIT_PREEMPTED
        self._read_steps()
        if self.saved_at != self.step:
            self._save()
        self._say(f"{reason} at step {self.step}, saved; use --resume auto")
        return EXIT_PREEMPTED

    def _train_step(self, batch: Batch, clock: StepClock) -> TakenStep:
        """Forward, backward, clip, decide, step. All on the device: the host does not wait for it."""
        config = self.config
        size = config.train.micro_batch
        micro_batches = [self._micro_batch(batch.rows(i, i + size)) for i in range(0, len(batch), size)]
        monitor = self.monitoring.monitor(self.step + 1)
        losses = self.engine.forward_backward(micro_batches, monitor)
        self.stop.ask(self.engine)  # answered before the next step
        grad_norm = self.engine.clip(config.optimizer.grad_clip)
        lr = learning_rate(config.schedule, config.optimizer.lr, self.step, config.train.steps)
        finite = is_finite(losses["objective"], grad_norm)
        self.engine.step(lr, finite)
        balance_rate = config.model.balance_rate * finite.double()
        experts = rebalance(self.engine.model, balance_rate, self.engine.sum_over_ranks)
        depth = self._depth_record()
        tokens_before = self.consumed * config.train.sequence_length
        self.step += 1
        self.consumed += config.train.global_batch
        clock.stop()
        tokens = config.train.global_batch * config.train.sequence_length
        flops = tokens * training_flops(config.model, self.flops, depth["loops_mean"], depth["loops_with_grad"])
        peak = peak_flops(self.device, config.train.precision)
        return TakenStep(
            step=self.step,
            lr=lr,
            losses=losses,
            grad_norm=grad_norm,
            monitor=monitor,
            experts=experts,
            clock=clock,
            tokens=tokens,
            tokens_before=tokens_before,
            flops_share=flops / (peak * self.engine.world_size) if peak else None,
            depth=depth,
            loop_shares=self.monitoring.loop_shares(monitor),
            memory_gb=peak_memory_gb(self.device),
            data=self.data.progress(self.consumed) if self.is_first else {},
        )

    def _micro_batch(self, rows: Batch) -> MicroBatch:
        """Pair some rows of a batch with their depth plan."""
        return MicroBatch(rows, self.sampler.plan(self.step, rows.samples, rows.batch_rows))

    def _depth_record(self) -> dict[str, Any]:
        """Loop counts of the step, over the sequences of all ranks."""
        train = self.config.train
        plan = DepthPlan(
            self.sampler.draw_loops(self.step, range(train.global_batch), train.micro_batch),
            self.sampler.backprop_at(self.step),
        )
        counts = Counter(plan.iterations)
        self.monitoring.drawn += counts
        return {
            "loops_mean": plan.total_loops / train.global_batch,
            "loops_max": plan.max_loops,
            "loops_with_grad": plan.total_loops_with_grad / train.global_batch,
            **({} if plan.is_uniform else {"loops_counts": {str(t): counts[t] for t in sorted(counts)}}),
        }

    def _after_step(self) -> None:
        """Read, evaluate, sample, save: whatever is due after this step."""
        config = self.config
        sections = config.eval, config.sample, config.checkpoint
        evaluate, sample, save = (self._due(section.every) for section in sections)
        save = save or self.step == config.train.steps
        if evaluate or sample or save or self._due(config.logging.every):
            self._read_steps()
        self.engine.model.eval()  # what is done here is no training: experts do not count these tokens
        if evaluate:
            self._evaluate()
        if sample:
            self._sample()
        self.engine.model.train()
        if save:
            self._save()

    def _due(self, every: int) -> bool:
        """Whether this step is one of every so many, or the last; never where that is 0."""
        return bool(every) and (self.step == self.config.train.steps or self.step % every == 0)

    def _read_steps(self) -> None:
        """Record the steps since the last call, in order; this waits for the device.

        Raises:
            TrainingError: too many of them in a row were skipped.
        """
        steps, self.unread = self.unread, []
        for taken in steps:
            record, objective = taken.read()
            if not self.guard.accept(taken.step, objective, record["grad_norm"]):
                loss, norm = record["loss"], record["grad_norm"]
                self._say(f"step {taken.step}: loss {loss} or gradient norm {norm} not finite, step skipped")
            if self.recorder is not None and self.console is not None:
                self.recorder.step(record)
                if taken.step % self.config.logging.every == 0 or taken.step == self.config.train.steps:
                    self.console.print(self.console.line(record))

    def _evaluate(self) -> None:
        config, layout = self.config, self.engine.layout
        data_rank = layout.data_rank(self.engine.rank)
        mine = {name: windows.rank_rows(data_rank, layout.data) for name, windows in self.data.validation.items()}
        losses, of_each = mixture_losses(
            self.engine.module,
            mine,
            self.data.shares,
            config.eval.loops,
            config.train.micro_batch,
            self.device,
            reduce=self.engine.sum_over_ranks,
        )
        for line in evaluation_lines(losses, of_each):
            self._say(f"step {self.step}: {line}")
        if self.recorder is not None:
            tokens = self.consumed * config.train.sequence_length
            self.recorder.evaluation(evaluation_record(self.step, tokens, losses, of_each))

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
                agree=self.engine.broadcast,
            )
            text = self.tokenizer.decode(tokens[0, len(prompt) :].tolist())
            self._say(f"step {self.step}: sample at T={loops}: {(settings.prompt + text)!r}")
            if self.recorder is not None:
                self.recorder.sample({"step": self.step, "loops": loops, "prompt": settings.prompt, "text": text})

    def _save(self) -> None:
        state = {
            "step": self.step,
            "tokens": self.consumed * self.config.train.sequence_length,
            "data": self.data.state(self.consumed),
            "skipped_steps": self.guard.skipped,
        }
        facts = {
            "run_id": self.run_id,
            "parent": self.parent,
            "tokens": state["tokens"],
            "engine": self.config.parallel.engine,
            "world_size": self.engine.world_size,
        }
        path = checkpoints.save_checkpoint(
            self.engine,
            self.run_directory,
            dump_config(self.config),
            state,
            facts,
            self.data.tokenizer_directory,
            self.config.checkpoint.keep,
            self.data.rank_state(self.consumed),
        )
        self.parent, self.saved_at = path.name, self.step
        self._say(f"step {self.step}: saved {path}")

    def _restore(self, source: Path) -> None:
        """Load engine state and position; refuse a checkpoint that does not belong to this run."""
        state = checkpoints.read_trainer_state(source)
        check_resumable(source, state, self.config)
        changed_data = self.data.resume(source, state["data"])
        changed = describe_changed_settings(load_config(source / "config.yaml"), self.config)
        checkpoints.restore_engine(self.engine, source)
        self.step, self.consumed = state["step"], state["data"]["consumed_samples"]
        self.guard.skipped = state["skipped_steps"]
        # A run that starts from another one's checkpoint is a run of its own.
        if checkpoints.belongs_to_run(source, self.run_directory):
            self.run_id, self.parent = checkpoints.read_manifest(source)["run_id"], source.name
        self.first_step = self.step
        self._say(f"resumed from {source} (step {self.step})")
        if changed:
            self._say(f"changed since it was saved: {', '.join(changed)}")
        for line in changed_data:
            self._say(line)

    def _open_run_directory(self, parameters: int, source: Path | None) -> None:
        if not self.is_first:
            return
        self.run_directory.mkdir(parents=True, exist_ok=True)
        if source is not None:
            checkpoints.record_start(self.run_directory, source)
        write_text(self.run_directory / "config.yaml", dump_config(self.config))
        forget_after(self.run_directory, self.step)
        self.recorder = Recorder(self.run_directory, self.config.logging.tensorboard, self.step)
        self._say(
            f"{self.run_directory}: {parameters / 1e6:.2f}M parameters, engine {self.config.parallel.engine} on "
            f"{self.engine.world_size} x {self.device.type}, {self.sampler.describe()}, "
            f"steps {self.step} to {self.config.train.steps}"
        )

    def _say(self, text: str) -> None:
        if self.is_first:
            print(text, flush=True)

    def close(self) -> None:
        """Close the records."""
        if self.recorder is not None:
            self.recorder.close()
