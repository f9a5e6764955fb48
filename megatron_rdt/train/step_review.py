"""Review of recent steps: their records are read from the device, written down, and searched for skipped steps and alarms."""

import math
from collections.abc import Callable, Sequence

from megatron_rdt.config import RunConfig
from megatron_rdt.errors import TrainingError
from megatron_rdt.evaluate.alarms import Alarm
from megatron_rdt.train.alarms import AlarmWatch, Rollback
from megatron_rdt.train.alarms.rollbacks import react
from megatron_rdt.train.alarms.watch import NONFINITE
from megatron_rdt.train.metrics import Console, Recorder
from megatron_rdt.train.nonfinite_guard import NonfiniteGuard, TargetGuard
from megatron_rdt.train.run_checkpoints import Position, RunCheckpoints
from megatron_rdt.train.step_record import StepRecord
from megatron_rdt.train.stragglers import StragglerWatch


class StepReview:
    """Reviews the steps of one run, on every rank.

    Args:
        config: the run's config.
        checkpoints: know where a run that diverged can continue.
        print_line: prints a line on rank 0.

    Attributes:
        guard, target_guard: count the steps that were skipped.
        watch: finds alarms.
        stragglers: finds the slowest rank.
        rollbacks: of the run so far; they lower the learning rate.
    """

    def __init__(self, config: RunConfig, checkpoints: RunCheckpoints, print_line: Callable[[str], None]) -> None:
        self.config, self.checkpoints, self.print_line = config, checkpoints, print_line
        self.stragglers = StragglerWatch(config.logging, checkpoints.engine, print_line)
        self.restore(Position())

    def restore(self, position: Position) -> None:
        """Continue from the counts of a checkpoint."""
        train = self.config.train
        self.guard = NonfiniteGuard(min(train.max_nonfinite_steps, train.steps), position.skipped_steps)
        self.target_guard = TargetGuard(min(train.max_steps_without_target, train.steps))
        self.target_guard.in_a_row = position.steps_without_target
        self.watch = AlarmWatch(self.config)
        self.watch.restore(position.alarms)
        self.rollbacks = position.rollbacks

    def position(self, step: int) -> Position:
        """Return the position to save after `step` steps, all of them reviewed."""
        return Position(step, self.guard.skipped, self.target_guard.in_a_row, self.watch.state(), self.rollbacks)

    def largest_loss(self, loops: float) -> float:
        """Return the loss above which a step of this mean T is to be skipped; infinity if none is for its loss."""
        return self.watch.spikes.bound(loops) if self.config.train.on_spike == "skip" else math.inf

    def review(self, records: Sequence[StepRecord], recorder: Recorder | None, console: Console | None) -> list[Alarm]:
        """Read the records of steps in order, print and write them; return the alarms that begin; on every rank.

        This waits for the device.

        Raises:
            TrainingError: too many steps in a row were skipped.
        """
        alarms: list[Alarm] = []
        slowest = self.stragglers.compare(records)
        for record in records:
            metrics, objective = record.read_metrics()
            begun = self._count_skipped(metrics, objective)
            if metrics["loss"] > self.largest_loss(metrics["loops_mean"]):
                metrics["skipped"] = True
                self.print_line(f"step {record.step}: loss {metrics['loss']:.4f} is a spike, step skipped")
            begun += self.watch.observe(metrics)
            if begun:
                metrics["alarms"] = {alarm.name: {"value": alarm.value, "bound": alarm.bound} for alarm in begun}
                alarms += begun
            if slowest is not None and record is records[-1]:
                metrics["slowest_rank"] = slowest.as_record()
            if recorder is not None and console is not None:
                recorder.record_step(metrics)
                if record.step % self.config.logging.every == 0 or record.step == self.config.train.steps:
                    self.print_line(console.format_line(metrics))
            for alarm in begun:
                self.print_line(f"step {alarm.step}: {alarm}")
        return alarms

    def react(self, action: str, alarm: Alarm) -> Rollback:
        """Prepare the rollback that an alarm asks for, or stop the run, see `rollbacks.react`; on every rank."""
        train, saved = self.config.train, self.checkpoints
        skipped = saved.data.list_order_steps(alarm.since, alarm.step) if train.rollback_skip else []
        on_failure = self.config.checkpoint.on_failure
        return react(action, alarm, self.rollbacks, train, saved.run_directory, skipped, on_failure)

    def report_end(self, step: int, steps_here: int, tokens: int) -> None:
        """Print what a run that reached its last step did; raise TrainingError if it skipped the last ones as not finite.

        Args:
            step: the last one.
            steps_here: those of this process.
            tokens: of the whole run.
        """
        run_directory = self.checkpoints.run_directory
        self.print_line(f"done: {step} steps, {tokens:,} tokens, {run_directory}")
        without_target, skipped = self.target_guard.total, self.guard.skipped
        if without_target:
            self.print_line(
                f"warning: in {without_target} of the last {steps_here} steps no target counted, so they changed nothing"
            )
        if skipped:
            raise TrainingError(
                f"the last {skipped} steps of {run_directory} were skipped: the loss or gradient was not finite. "
                f"Lower --optimizer.lr. {self.checkpoints.find_way_back(step - skipped)}"
            )

    def _count_skipped(self, metrics: dict, objective: float) -> list[Alarm]:
        """Count a step that was not finite or had no target, and say so; return the alarm that it raises, if any.

        Raises:
            TrainingError: too many of them in a row; it names the checkpoint to go back to.
        """
        step, loss, norm = metrics["step"], metrics["loss"], metrics["grad_norm"]
        if not self.target_guard.accept(step, metrics.get("targets")):
            self.print_line(f"step {step}: no target counts, step skipped")
            return []
        try:
            is_accepted = self.guard.accept(step, objective, norm)
        except TrainingError as error:
            skipped, limit = self.guard.skipped, self.guard.limit
            if self.config.train.on_nonfinite == "rollback":
                return [Alarm(NONFINITE, step, skipped, limit, since=step - skipped + 1)] if skipped == limit else []
            raise TrainingError(f"{error} {self.checkpoints.find_way_back(step - self.guard.skipped)}") from None
        if not is_accepted:
            self.print_line(f"step {step}: loss {loss} or gradient norm {norm} not finite, step skipped")
        return []
