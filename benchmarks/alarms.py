"""Alarms of runs that were trained before: today's rules applied to their records, and the largest values of what they look at.

Every run below the given folders is a row. Runs whose loss ended above its first steps are left out: an alarm is no false
one there.

    python benchmarks/alarms.py runs
"""

import argparse
from pathlib import Path
from typing import Any

from tools.tables import format_header, format_row

from megatron_rdt.compare.results import find_divergence
from megatron_rdt.config import load_config
from megatron_rdt.evaluate.report import METRICS, read_records
from megatron_rdt.train.alarms import AlarmWatch

FIELDS = ("norm_growth", "late_residual", "token_correlation")  # those of the conditions that every model has


def replay_alarms(run: Path, records: list[dict[str, Any]]) -> list[str]:
    """Return the alarms that the records of a run raise, as "name step"."""
    watch = AlarmWatch(load_config(run / "config.yaml"))
    finite = [{**record, "loss": float("nan") if record["loss"] is None else record["loss"]} for record in records]
    return [f"{alarm.name} {alarm.step}" for record in finite for alarm in watch.observe(record)]


def find_reason_to_leave_out(records: list[dict[str, Any]]) -> str:
    """Return why a run says nothing about false alarms; empty if it does."""
    if not any("token_correlation" in record for record in records):
        return "no records of the loop"
    return find_divergence([record["loss"] for record in records])


def main() -> None:
    """Print the table and the totals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("runs")], help="folders with run directories")
    print(format_header(("run", "alarms", "steps", "last loss", *(f"largest {field}" for field in FIELDS)), left=2))
    counts: list[int] = []
    alarmed, left_out = 0, []
    files = [file for folder in parser.parse_args().folders for file in sorted(folder.rglob("metrics.jsonl"))]
    for run in (file.parent for file in files):
        records = read_records(run / "metrics.jsonl", METRICS)
        reason = find_reason_to_leave_out(records)
        if reason:
            left_out.append(f"{run}: {reason}")
            continue
        alarms = replay_alarms(run, records)
        values = ([record[field] for record in records if record.get(field) is not None] for field in FIELDS)
        largest = (f"{max(known):.3f}" if known else "" for known in values)
        loss = f"{records[-1]['loss']:.3f}"
        print(format_row((run, ", ".join(alarms) or "none", len(records), loss, *largest)))
        counts.append(len(records))
        alarmed += bool(alarms)
    print(f"\n{len(counts)} runs, {sum(counts):,} steps, alarms in {alarmed}. Left out: {len(left_out)}")
    print("\n".join(left_out))


if __name__ == "__main__":
    main()
