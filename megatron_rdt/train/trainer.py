"""The training loop. It knows steps, batches and records; the engine knows sharding, the sampler knows depth."""

from contextlib import nullcontext
from pathlib import Path

import torch

from megatron_rdt import checkpoint as checkpoints
from megatron_rdt.checkpoint import Start
from megatron_rdt.config import RunConfig, check_config, dump_config
from megatron_rdt.data import Batch, BatchLoader
from megatron_rdt.depth import DepthSampler
from megatron_rdt.environment import ProcessInfo, read_process_info
from megatron_rdt.errors import EXIT_OK, EXIT_PREEMPTED
from megatron_rdt.locks import check_locks
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.model.flops import forward_flops, training_flops
from megatron_rdt.model.moe import rebalance
from megatron_rdt.object_collectives import broadcast_object
from megatron_rdt.parallel import Engine, MicroBatch, make_engine
from megatron_rdt.parallel.optimizers import check_no_weight_decay
from megatron_rdt.parallel.process_group import join_process_group
from megatron_rdt.run_directory import run_directory_of
from megatron_rdt.terminal import Printer
from megatron_rdt.train.alarms import Rollback
from megatron_rdt.train.alarms.rollbacks import find_reaction
from megatron_rdt.train.data import open_training_data
from megatron_rdt.train.displays import check_displays, find_displays
from megatron_rdt.train.garbage_collection import ScheduledGarbageCollection
from megatron_rdt.train.hardware import peak_flops, peak_memory_gb
from megatron_rdt.train.inspections import InspectionFailed, Inspections
from megatron_rdt.train.metrics import Console, Recorder, describe_gaps, drop_records_after, read_recorded_steps
from megatron_rdt.train.monitoring import MonitorSchedule, count_loops
from megatron_rdt.train.nonfinite_guard import is_step_accepted
from megatron_rdt.train.resume_checks import lock_run_directory, replace_config
from megatron_rdt.train.run_checkpoints import RunCheckpoints, choose_start
from megatron_rdt.train.schedule import learning_rate
from megatron_rdt.train.step_record import StepClock, StepRecord
from megatron_rdt.train.step_review import StepReview
from megatron_rdt.train.step_traces import StepTraces
from megatron_rdt.train.stop_request import StopAgreed, StopBeforeTraining, StopRequest
from megatron_rdt.train.watchdog import Watchdog


def train(
    config: RunConfig,
    resume: str = "none",
    process: ProcessInfo | None = None,
    stop: StopRequest | None = None,
    init: str = "none",
) -> int:
    """Train as one of `WORLD_SIZE` processes, and write the run directory; return the exit status, 0 or 75.

    A process that joined others (every engine but `single`) should then end with `leave_process`.

    Args:
        config: a checked config.
        resume: "none" (refuse a run directory that holds anything of a run), "auto" (the run's newest healthy
            checkpoint, its origin, or a fresh start), or the path of a checkpoint or run.
        process: rank and launcher of this process; read from the environment if None. An engine for one process
            refuses to be one of several.
        stop: listens for stop signals; made here if None.
        init: the checkpoint, run or export from which a new run takes its weights, or "none" for random ones.

    Returns:
        0 when all steps are done, 75 when stopped after a good save, or before the first step.
    """
    process = process or read_process_info()
    check_config(config, process.world_size)
    check_displays(config.logging)
    check_no_weight_decay(config)
    if not config.parallel.engine_kind.many_processes:
        process = ProcessInfo()  # whatever the variables of a launcher say: this process locks, verifies and writes
    listener, run_directory = stop or StopRequest(), run_directory_of(config)
    try:
        listener.begin_start()
        with lock_run_directory(run_directory, resume, init) if process.rank == 0 else nullcontext():
            listener.watch_job(0.0 if process.rank else config.checkpoint.before_job_end_s)
            device = join_process_group(config, process)
            trainer = Trainer(config, run_directory, device, listener, process.local_rank)
            try:
                status = trainer.run(choose_start(run_directory, resume, init, trainer._print_on_rank_0))
                trainer.engine.close()
            finally:
                trainer.close()
            _FINISHED_ENGINES.append(trainer.engine)
            return status
    except StopBeforeTraining:
        return listener.end_early()
    finally:
        if stop is None:
            listener.close()


# An engine holds the process group, which must not be freed before the process ends, see `leave_process`.
_FINISHED_ENGINES: list[Engine] = []


class Trainer:
    """One run on one rank.

    Args:
        config: a checked config.
        run_directory: `runs/<name>`.
        device: where this rank computes.
        stop: listens for stop signals.
        local_rank: number of this process on its node.

    Attributes:
        step: optimizer steps done.
        unread: records of steps since the last logging step, still on the device.
    """

    def __init__(
        self, config: RunConfig, run_directory: Path, device: torch.device, stop: StopRequest, local_rank: int = 0
    ) -> None:
        self.config, self.run_directory, self.device, self.stop = config, run_directory, device, stop
        self.engine = make_engine(config, device)
        self.is_rank_0 = self.engine.rank == 0
        self.data_rank = self.engine.layout.data_rank(self.engine.rank)
        self.data = open_training_data(config, self.engine.layout, self.engine.rank, local_rank)
        self.checkpoints = RunCheckpoints(config, run_directory, self.engine, self.data, self._print_on_rank_0)
        self.printer = Printer("training")
        self.inspections = Inspections(config, self.engine, self.data, stop, self._print_on_rank_0)
        self.sampler = DepthSampler(config.depth, config.run.seed)
        self.flops = forward_flops(config.model, config.train.sequence_length)
        self.review = StepReview(config, self.checkpoints, self._print_on_rank_0)
        self.monitoring = MonitorSchedule(config.logging)
        self.traces = StepTraces(config.train, run_directory, device, self.engine.rank)
        self.step = self.first_step = 0
        self.unread: list[StepRecord] = []
        self.was_interrupted = False  # an evaluation or samples were abandoned for a stop request
        self.recorder: Recorder | None = None  # on rank 0, while the run is under way
        self.console: Console | None = None

    @property
    def consumed(self) -> int:
        """Number of samples trained on, by all ranks together."""
        return self.data.batches.samples_after(self.step)

    def _tokens_after(self, steps: int) -> int:
        """Return how many tokens the first `steps` steps train on."""
        return self.data.batches.samples_after(steps) * self.config.train.sequence_length

    def run(self, start: Start | None) -> int:
        """Train from a checkpoint, or from its weights, or from scratch, to the last step; return the exit status."""
        with torch.device("meta"):
            model = RecurrentDepthTransformer(self.config.model)
        parameters = sum(p.numel() for p in model.parameters())
        position, lines = self.checkpoints.set_up(model, start)
        while True:
            self.step = self.first_step = position.step
            self.review.restore(position)
            self.monitoring.drawn.clear()
            for line in lines:
                self._print_on_rank_0(line)
            try:
                status = self._run_from(start, parameters)
                break
            except Rollback as rollback:
                start = Start(rollback.source)
                self._print_on_rank_0(f"step {self.step}: rolling back to {start.source}")
                position, lines = self.checkpoints.restore(start.source, rollback.rollbacks)
        self.checkpoints.finish_save(required=True)
        if status == EXIT_OK:
            self.review.report_end(self.step, self.step - self.first_step, self._tokens_after(self.step))
        return status

    def _run_from(self, start: Start | None, parameters: int) -> int:
        """Run all steps that are left; return the exit status.

        Args:
            start: where the position and the weights are from.
            parameters: of the model.

        Raises:
            Rollback: the run is to continue from an earlier checkpoint, in the same way.
        """
        config, batches = self.config, self.data.batches
        total = batches.samples_after(config.train.steps)
        loader = self.data.loader(self.consumed, total, self.data_rank, self.device)
        try:
            self._open_run_directory(parameters, start)
            for line in [*batches.describe(self.step, config.train.steps), *self.data.describe(total)]:
                self._print_on_rank_0(line)
            loader.wait()
            watchdog = Watchdog(self.run_directory, lambda: self.engine.timeout_s, self._print_on_rank_0)
            with watchdog, ScheduledGarbageCollection(config.train.gc_every) as collection:
                is_same_run = start is not None and checkpoints.belongs_to_run(start.source, self.run_directory)
                return self._run_steps(loader, collection, is_same_run)
        finally:
            loader.close()

    def _open_run_directory(self, parameters: int, start: Start | None) -> None:
        """On rank 0, write the config, drop the records of steps that will be done again, and open the recorder."""
        if not self.is_rank_0:
            return
        self.run_directory.mkdir(parents=True, exist_ok=True)
        self.close()  # files that a rollback left open are rewritten below
        if start is not None:
            # Before records are dropped, or a kill between the two would leave the abandoned branch the newest.
            self.checkpoints.record_start(start)
        said = replace_config(self.run_directory, dump_config(self.config))
        said += drop_records_after(self.run_directory, self.step)
        if start is not None and checkpoints.belongs_to_run(start.source, self.run_directory):
            said += describe_gaps(self.run_directory, self.step)
        for line in said:
            self._print_on_rank_0(f"warning: {line}")
        others = find_displays(self.config, self.run_directory, self.checkpoints.run_id)
        self.recorder = Recorder(self.run_directory, self.config.logging.tensorboard, self.step, others)
        self._print_on_rank_0(
            f"{self.run_directory}: {parameters / 1e6:.2f}M parameters, engine {self.config.parallel.engine} on "
            f"{self.engine.world_size} x {self.device.type}, {self.sampler.describe()}, "
            f"steps {self.step} to {self.config.train.steps}"
        )

    def _run_steps(self, loader: BatchLoader, collection: ScheduledGarbageCollection, is_same_run: bool) -> int:
        """Run every step that is left, or until a stop request; return the exit status.

        Args:
            loader: of the batches.
            collection: collects garbage between steps.
            is_same_run: this run continues from a checkpoint of its own.
        """
        self.console = Console(self.config.train.steps, self.step, self.data.batches)
        batches = iter(loader)
        self.stop.agree_now(self.engine)
        if is_same_run:
            self._make_up_for_inspections()
        while self.step < self.config.train.steps:
            self.checkpoints.finish_save_if_ended()
            if self.stop.is_agreed():
                return self._stop_early()
            self.traces.begin_step(self.step + 1)
            clock = StepClock(self.device)  # evaluations and saves after the last step are not part of this one
            batch = next(batches)
            clock.mark_data_arrival()
            self.unread.append(self._train_step(batch, clock))
            self.traces.end_step()
            if self.step == self.first_step + 1:
                self.engine.end_start()
            check_locks()
            self._run_due_actions()
            collection.collect_if_due(self.step)
        return self._stop_early() if self.was_interrupted else EXIT_OK

    def _stop_early(self) -> int:
        """Save unless this step is saved already, say so, and return the exit status of a stop request."""
        reason = f"stopped on {self.stop.reason} at step {self.step}"
        if self.step == self.first_step:
            self._print_on_rank_0(f"{reason}, with nothing new to save; use --resume auto")
            return EXIT_PREEMPTED
        try:
            self._record_unread_steps()
        except Rollback as rollback:
            self._print_on_rank_0(f"{reason}; --resume auto rolls back to {rollback.source}")
            return EXIT_PREEMPTED
        self.checkpoints.finish_save()
        if self.checkpoints.saved_step != self.step:
            self._save_checkpoint(required=True)
            self.checkpoints.finish_save(required=True)
        self._print_on_rank_0(f"{reason}, saved; use --resume auto")
        return EXIT_PREEMPTED

    def _train_step(self, batch: Batch, clock: StepClock) -> StepRecord:
        """Forward, backward, clip, step; return the record. The host only queues this work: it reads no tensor."""
        config = self.config
        size = config.train.micro_batch
        micro_batches = [
            self._make_micro_batch(batch.rows(i, i + size), len(batch)) for i in range(0, len(batch), size)
        ]
        plans = [micro.plan for micro in micro_batches]
        monitor = self.monitoring.make_monitor(self.step + 1)
        clock.start_forward(self.engine.model.core, plans)
        losses = self.engine.forward_backward(
            micro_batches, monitor, self.stop.flags(self.engine) | self.checkpoints.flags()
        )
        self.stop.take_counts(losses)
        self.checkpoints.take_count(losses)
        grad_norm = self.engine.clip(config.optimizer.grad_clip)
        lr = learning_rate(config.schedule, config.optimizer.lr, self.step, config.train.steps)
        lr *= self.review.rollbacks.lr_factor
        counts = count_loops(plans, self.sampler, self.step, self.data.batches, self.engine)
        depth = self.monitoring.describe_loops(counts, self.sampler.backprop_at(self.step))
        # A step that is skipped runs through, with a flag on the device by which the optimizer changes nothing.
        accepted = is_step_accepted(losses, grad_norm, self.review.largest_loss(depth["loops_mean"]))
        self.engine.step(lr, accepted)
        balance_rate = config.model.balance_rate * accepted.double()
        experts = rebalance(self.engine.model, balance_rate, self.engine.sum_over_ranks)
        tokens_before = self._tokens_after(self.step)
        self.step += 1
        clock.stop()
        tokens = self._tokens_after(self.step) - tokens_before
        flops = tokens * training_flops(config.model, self.flops, depth["loops_mean"], depth["loops_with_grad"])
        peak = peak_flops(self.device, config.train.precision)
        return StepRecord(
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
            loop_shares=self.monitoring.take_loop_shares(monitor),
            memory_gb=peak_memory_gb(self.device),
            data=self.data.progress(self.consumed) if self.is_rank_0 else {},
        )

    def _make_micro_batch(self, rows: Batch, share: int) -> MicroBatch:
        """Pair a part of this rank's `share` rows of the global batch with its depth plan."""
        peers: list[list[int]] = []
        if self.engine.layout.ring > 1:  # every rank has as many rows, the ones after those of the rank before it
            shifts = [(peer - self.data_rank) * share for peer in self.engine.layout.ring_data_ranks(self.data_rank)]
            peers = [[row + shift for row in rows.batch_rows] for shift in shifts]
        accumulation = share // len(rows)
        plan = self.sampler.plan(self.step, rows.samples, rows.batch_rows, rows.difficulties, accumulation, peers)
        return MicroBatch(rows, plan)

    def _run_due_actions(self) -> None:
        """Record, save, evaluate and sample, whichever is due after this step."""
        config = self.config
        evaluate, sample, save = (self._is_due(each.every) for each in (config.eval, config.sample, config.checkpoint))
        save = save or self.step == config.train.steps
        if evaluate or sample or save or self._is_due(config.logging.every):
            self._record_unread_steps()
        if save:  # first: nothing that is only to look at may cost a checkpoint
            self._save_checkpoint(required=self.step == config.train.steps)
        self._inspect(evaluate, sample)

    def _inspect(self, evaluate: bool, sample: bool) -> None:
        """Evaluate and sample; a stop request ends both, without a record.

        Raises:
            Exception: the evaluation failed; this step is saved.
        """
        cause: Exception | None = None
        try:
            if evaluate:
                self.inspections.evaluate(self.step, self._tokens_after(self.step), self.recorder)
            if sample:
                self.inspections.generate_samples(self.step, self.recorder)
        except StopAgreed:
            self.was_interrupted = True
            self._print_on_rank_0(f"step {self.step}: evaluation or samples cut off; --resume auto makes up for them")
        except InspectionFailed as failure:
            cause = failure.cause
        if cause is not None:
            if self.step not in (self.first_step, self.checkpoints.saved_step):
                self._save_checkpoint()
            self.checkpoints.finish_save()
            self.engine.close()  # rank 0 has the store in which the others look for the end of the save
            raise cause

    def _make_up_for_inspections(self) -> None:
        """Evaluate and sample where that was due after the last step of the checkpoint and has no record."""
        config = self.config
        due = [
            self._is_due(section.every) and self.step not in read_recorded_steps(self.run_directory, file)
            for section, file in ((config.eval, "eval.jsonl"), (config.sample, "samples.jsonl"))
        ]
        self._inspect(*broadcast_object(due))  # rank 0 has the files

    def _is_due(self, every: int) -> bool:
        """Return True if this step is a multiple of `every`, or the last one; False if `every` is 0."""
        return bool(every) and (self.step == self.config.train.steps or self.step % every == 0)

    def _record_unread_steps(self) -> None:
        """Write the records of the steps since the last call, in order; this waits for the device.

        Raises:
            TrainingError: too many of them in a row were skipped, or an alarm is to stop the run.
            Rollback: an alarm is to take the run back; on all ranks, and durably.
        """
        records, self.unread = self.unread, []
        alarms = self.review.review(records, self.recorder, self.console)
        reaction = find_reaction(self.config.train, alarms)
        if reaction is not None:
            self.checkpoints.finish_save()  # it may be the one to go back to
            raise self.review.react(*reaction)

    def _save_checkpoint(self, required: bool = False) -> None:
        """Save a checkpoint at the current position; all steps must have been recorded; see `RunCheckpoints.save`."""
        self.checkpoints.save(self.review.position(self.step), required)

    def _print_on_rank_0(self, text: str) -> None:
        """Print a line at once; the other ranks print nothing."""
        if self.is_rank_0:
            self.printer.print_line(text)

    def close(self) -> None:
        """Close the records, and write the trace under way; leave a save under way some time to end."""
        self.checkpoints.leave_save()
        self.traces.write()
        if self.recorder is not None:
            self.recorder.close()
            self.recorder = None
