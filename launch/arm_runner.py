"""The runs of a comparison on this machine: written configs, processes, measurements, the table at the end."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from launch.run_pool import Job, RunPool, is_failure, read_last_line
from launch.train_options import check_paths
from megatron_rdt.compare.arms import SWEEP, Arm, ComparedRun, build_runs, build_sweep, own_loops
from megatron_rdt.compare.estimate import estimate_cost
from megatron_rdt.compare.intervals import mean_loss
from megatron_rdt.compare.measure import find_final_checkpoint, measure_run, read_measurement, windows_at
from megatron_rdt.compare.page import (
    EXPLANATION,
    HEADER,
    describe_accuracies,
    describe_equivalence,
    describe_left_out,
    describe_rate_edges,
    format_cells,
    format_table,
    write_page,
)
from megatron_rdt.compare.rates import describe_rates
from megatron_rdt.compare.results import OUTCOME, RunResult, read_result
from megatron_rdt.compare.table import make_table
from megatron_rdt.config import RunConfig, check_config, dump_config, load_config
from megatron_rdt.environment import count_threads, usable_cores
from megatron_rdt.errors import EXIT_OK, ConfigError, DataError, LaunchError
from megatron_rdt.files import sha256_of, write_text
from megatron_rdt.locks import hold_lock
from megatron_rdt.run_directory import JOBS
from megatron_rdt.terminal import Printer, format_count, format_duration
from megatron_rdt.train.resume_checks import describe_changed_settings
from megatron_rdt.untrusted_files import read_json

CONFIGS, LOG, MEASURE_LOG, CORPORA = "configs", "train.log", "measure.log", "corpora.json"
COMPARISON = "comparison.yaml"  # the config that all arms are made from


@dataclass(frozen=True)
class ArmRunner:
    """Trains and measures the runs of a comparison; everything it needs to go on is in the folder of the comparison.

    Args:
        config: the comparison's config.
        arms: overrides to it.
        directory: folder of the comparison.
        seeds: number of replicates.
        sequences: validation windows to measure on.
        processes: of each run.
        rates: learning rates of the sweep; empty without one.
        sweep_steps: length of the sweep's runs.
        examples: largest number of each task and difficulty to measure on.
    """

    config: RunConfig
    arms: Sequence[Arm]
    directory: Path
    seeds: int
    sequences: int
    processes: int = 1
    rates: Sequence[float] = ()
    sweep_steps: int = 1
    examples: int = 200

    @cached_property
    def printer(self) -> Printer:
        """Prints lines as long as somebody reads them."""
        return Printer("the comparison")

    def sweep_runs(self) -> list[ComparedRun]:
        """Return the short runs that choose learning rates."""
        return build_sweep(self.config, self.arms, self.rates, self.sweep_steps, self.directory)

    def main_runs(self, rates: Mapping[str, float] | None = None) -> list[ComparedRun]:
        """Return the runs that are compared, with learning rates by arm that a sweep chose."""
        return build_runs(self.config, self.arms, self.seeds, self.directory, rates)

    def all_runs(self) -> list[ComparedRun]:
        """Return every run, those of the sweep first."""
        return [*self.sweep_runs(), *self.main_runs()]

    def has_trained(self) -> bool:
        """Return True if a run that is compared is finished or has failed."""
        runs = self.main_runs()
        return any(find_final_checkpoint(run) is not None or (run.directory / OUTCOME).is_file() for run in runs)

    def print_plan(self, notes: Sequence[str], at_once: int, only: Sequence[str] = ()) -> None:
        """Print arms, weights, operations and time, without training anything; of all arms, or of those in `only`."""
        runs = [run for run in self.all_runs() if not only or run.arm in only]
        at_once, _ = self._choose_places(at_once)
        threads = count_threads(at_once * self.processes)
        # Replicates of an arm cost the same, so one of each is tried out.
        kinds = [(run.arm, run, self.seeds) for run in self.main_runs()[: len(self.arms)]]
        kinds += [(f"{SWEEP}/{run.name}", run, 1) for run in self.sweep_runs()]
        rows, seconds = [], []
        for name, run, count in kinds:
            if only and run.arm not in only:
                continue
            cost = estimate_cost(run, self.processes, threads)
            seconds += [cost.seconds or 0.0] * count
            time = "unknown" if cost.seconds is None else format_duration(cost.seconds)
            rows.append(
                (name, format_count(cost.weights), f"{cost.loops:.2f}", format_count(cost.flops), time, str(count))
            )
        self.printer.print_line(format_table(("arm", "weights", "mean T", "FLOPs a run", "time a run", "runs"), rows))
        for note in notes:
            self.printer.print_line(note)
        finished = sum(find_final_checkpoint(run) is not None for run in runs)
        self.printer.print_line(
            f"{self.directory}: {len(runs)} runs, {finished} of them finished; {at_once} at once on this machine, "
            f"about {format_duration(max(sum(seconds) / at_once, *seconds))} of training in all, measured on a step of each"
        )

    def check_configs(self) -> None:
        """Raise ConfigError or DataError if a run cannot be trained."""
        for run in self.all_runs():
            check_config(run.config, self.processes)
            check_paths(run.config)

    def check_settings(self) -> None:
        """Refuse to go on with other settings, or other data, than the runs that have begun; write what is new.

        Raises:
            ConfigError: a run has begun with other settings.
            DataError: a corpus was made again since.
        """
        hashes = {path: sha256_of(Path(path) / "manifest.json") for path in self._list_corpora()}
        file = self.directory / CORPORA
        before = _read_object(file)
        changed = sorted(path for path in before.keys() & hashes.keys() if before[path] != hashes[path])
        if changed:
            raise DataError(
                f"{changed[0]} was made again after {self.directory} began, so its runs would differ in their data. Choose "
                "another --run.name, or put the corpus back."
            )
        for run in self.all_runs() if not self.rates else self.sweep_runs():
            self._check_run_settings(run)
        (self.directory / CONFIGS).mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({**before, **hashes}, indent=1) + "\n")
        write_text(self.directory / COMPARISON, dump_config(self.config))

    def _list_corpora(self) -> list[str]:
        """Return the folders of all corpora that some run reads."""
        data = [run.config.data for run in self.all_runs() if not run.config.data.streamed]
        return sorted({corpus.path for each in data for corpus in each.corpora()})

    def _config_file(self, run: ComparedRun) -> Path:
        """Return the file of a run's config."""
        return self.directory / CONFIGS / f"{'sweep-' * (run.directory.parent != self.directory)}{run.name}.yaml"

    def _check_run_settings(self, run: ComparedRun) -> None:
        """Raise ConfigError if a run has begun with another config."""
        file = self._config_file(run)
        has_begun = run.directory.exists() and [path.name for path in run.directory.iterdir()] != [JOBS]
        if not file.is_file() or not has_begun:
            return
        before = load_config(file)
        changes = describe_changed_settings(before, run.config)
        if before.data.mixture != run.config.data.mixture:
            changes.append("data.mixture")
        if changes:
            changes = self._describe_cause(before, run) or changes
            raise ConfigError(
                f"{run.directory} was begun with other settings: {'; '.join(changes)}. Give them as they were, or choose "
                "another --run.name for a new comparison."
            )

    def _describe_cause(self, before: RunConfig, run: ComparedRun) -> list[str]:
        """List the options from which changed settings of a run follow, since many of them are derived; [] if none."""
        file = self.directory / COMPARISON
        changes = describe_changed_settings(load_config(file), self.config) if file.is_file() else []
        if not changes and run.directory.parent != self.directory and before.train.steps != run.config.train.steps:
            changes = [f"--sweep_steps {before.train.steps} -> {run.config.train.steps}"]
        return changes

    @contextlib.contextmanager
    def lock(self, arms: Sequence[str]) -> Iterator[None]:
        """Hold the lock of every named arm; LaunchError if another process trains one of them."""
        with contextlib.ExitStack() as stack:
            for name in sorted(arms):
                message = f"another process trains arm {name} of {self.directory}. Wait for it, or end it."
                stack.enter_context(hold_lock(self.directory / CONFIGS / f".{name}.lock", message))
            yield

    def train(self, arms: Sequence[str], at_once: int, retry: bool) -> bool:
        """Train what is left of these arms, a sweep first; return False if a stop was asked for.

        Args:
            arms: names.
            at_once: runs at the same time; 0 for one per core or GPU.
            retry: train failed runs again.
        """
        pool = self._make_pool(at_once)
        if self.rates:
            self._train_runs(pool, [run for run in self.sweep_runs() if run.arm in arms], retry)
            if pool.was_stopped:
                return False
            if not self._measure_runs([run for run in self.sweep_runs() if run.arm in arms], at_once):
                return False
        chosen = self.choose_rates()
        runs = [run for run in self.main_runs(chosen) if run.arm in arms and (not self.rates or run.arm in chosen)]
        for run in runs:
            self._check_run_settings(run)
        self._train_runs(pool, runs, retry)
        return not pool.was_stopped

    def choose_rates(self) -> dict[str, float]:
        """Return the learning rate of the sweep's best run of each arm, judged by validation loss; {} without a sweep."""
        best: dict[str, tuple[float, float]] = {}
        for run in self.sweep_runs():
            measurement = read_measurement(run, self.sequences, self.examples)
            if measurement is not None:
                loss = mean_loss(windows_at(measurement, own_loops(run.config)))
                if loss < best.get(run.arm, (float("inf"), 0.0))[0]:
                    best[run.arm] = loss, run.config.optimizer.lr
        return {name: rate for name, (_, rate) in best.items()}

    def _choose_places(self, at_once: int) -> tuple[int, list[list[int]]]:
        """Return how many runs go at once, and the GPUs of each; no GPUs for runs on CPU."""
        gpus = 0
        if self.config.train.device != "cpu":
            import torch

            gpus = torch.cuda.device_count()
        units = gpus or usable_cores()
        at_once = at_once or max(units // self.processes, 1)
        share = max(min(gpus // at_once, self.processes), 1)
        return at_once, [[(i * share + j) % gpus for j in range(share)] for i in range(at_once)] if gpus else []

    def _make_pool(self, at_once: int) -> RunPool:
        """Return the pool of processes."""
        at_once, gpus = self._choose_places(at_once)
        return RunPool(at_once, count_threads(at_once * self.processes), gpus)

    def _train_runs(self, pool: RunPool, runs: Sequence[ComparedRun], retry: bool) -> None:
        """Train the runs that are not finished; note the outcome of those that fail, which does not end the others."""
        left = {}
        for run in runs:
            outcome = run.directory / OUTCOME
            if retry:
                outcome.unlink(missing_ok=True)
            if find_final_checkpoint(run) is None and not outcome.is_file():
                write_text(self._config_file(run), dump_config(run.config))
                words = (
                    "train",
                    "--config",
                    str(self._config_file(run)),
                    "--resume",
                    "auto",
                    "--nproc",
                    str(self.processes),
                )
                left[run.name] = run, Job(run.name, words, run.directory / LOG)
        self.printer.print_line(
            f"{len(runs) - len(left)} of {len(runs)} runs are finished or have failed, {len(left)} to train"
        )

        def end(job: Job, status: int) -> None:
            run, state = left[job.name][0], "done"
            if is_failure(status) and not pool.was_stopped and find_final_checkpoint(run) is None:
                message = read_last_line(job.log) if status > 0 else f"killed by signal {-status}"
                write_text(run.directory / OUTCOME, json.dumps({"status": status, "message": message}) + "\n")
                state = f"failed: {message}"
            elif find_final_checkpoint(run) is None:
                state = "stopped"
            self.printer.print_line(f"{job.name}: {state}")

        pool.run(
            [job for _, job in left.values()],
            lambda job: self.printer.print_line(f"{job.name}: started, {job.log}"),
            end,
        )

    def _measure_runs(self, runs: Sequence[ComparedRun], at_once: int) -> bool:
        """Measure the finished runs that have not been measured with these settings; return False after a stop signal.

        Raises:
            LaunchError: a run could not be measured.
        """
        left = {}
        for run in runs:
            checkpoint = find_final_checkpoint(run)
            if checkpoint is not None and read_measurement(run, self.sequences, self.examples) is None:
                left[run.name] = run, checkpoint
        pool = self._make_pool(min(at_once or self._choose_places(0)[0], max(len(left), 1)))
        if pool.at_once == 1:  # a process of its own would begin with importing PyTorch
            for run, checkpoint in left.values():
                self.printer.print_line(f"{run.name}: measured on {self.sequences} validation sequences")
                measure_run(run, checkpoint, self.sequences, self.examples)
            return True
        failures = []

        def end(job: Job, status: int) -> None:
            if status == EXIT_OK:
                self.printer.print_line(f"{job.name}: measured on {self.sequences} validation sequences")
            elif not pool.was_stopped:
                message = read_last_line(job.log) if status > 0 else f"killed by signal {-status}"
                failures.append(f"{job.name} could not be measured: {message} ({job.log})")

        jobs = []
        for run, _ in left.values():
            words = str(self._config_file(run)), str(self.sequences), str(self.examples)
            jobs.append(Job(run.name, words, run.directory / MEASURE_LOG, "launch.measure_worker"))
        pool.run(jobs, lambda job: None, end)
        if failures:
            raise LaunchError(failures[0])
        return not pool.was_stopped

    def measure(self, arms: Sequence[str], at_once: int = 0) -> bool:
        """Measure the finished runs of these arms, as many at a time as they are trained; False after a stop signal."""
        return self._measure_runs([run for run in self.main_runs(self.choose_rates()) if run.arm in arms], at_once)

    def read_results(self) -> list[RunResult]:
        """Read the results of all runs that are compared."""
        results = []
        for run in self.main_runs(self.choose_rates()):
            file = run.directory / OUTCOME
            outcome = {"status": None, "message": "", **_read_object(file)} if file.is_file() else None
            results.append(read_result(run, outcome, read_measurement(run, self.sequences, self.examples)))
        return results

    def write_table(self, notes: Sequence[str]) -> bool:
        """Write compare.json and the page, print the table; return True if a run failed."""
        results, rates = self.read_results(), self.choose_rates()
        notes = [*notes]
        if self.rates:
            chosen = ", ".join(
                f"{arm.name} {rates[arm.name]:g}" if arm.name in rates else f"{arm.name} none" for arm in self.arms
            )
            tried = ", ".join(f"{rate:g}" for rate in self.rates)
            notes.append(f"learning rates {tried} were tried for {self.sweep_steps} steps; chosen: {chosen}")
        table = make_table(self.arms, results, rates, self.rates)
        notes += [*describe_rate_edges(table["rows"]), *describe_left_out(table["rows"])]
        document = {"name": self.config.run.name, **table, "notes": notes}
        by_arm = {arm.name: [r for r in results if r.run.arm == arm.name] for arm in self.arms}
        page = write_page(self.directory, document, by_arm)
        print_line = self.printer.print_line
        print_line(format_table(HEADER, [format_cells(row) for row in document["rows"]]))
        for line in (
            *describe_accuracies(document),
            *(describe_rates(document["rates"]) if document["rates"] else ()),
            *notes,
            *map(describe_equivalence, document["equivalences"]),
            EXPLANATION,
            f"written: {page}",
        ):
            print_line(line)
        failed = [name for row in document["rows"] for name in row["failed"]]
        if failed:
            print_line(
                f"failed: {', '.join(failed)}; their logs are {LOG} in their directories, --retry trains them again"
            )
        return bool(failed)


def _read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object that a comparison wrote into a file; {} without the file.

    Raises:
        DataError: the file holds something else.
    """
    if not file.is_file():
        return {}
    try:
        return dict(read_json(file))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{file} is damaged ({error}). Remove it and give the same command again.") from None
