"""Worker of `rdt plan --measure`: takes steps of a config's model and writes their peak memory and collectives."""

import argparse
import dataclasses
import json
import sys
import traceback
from pathlib import Path

# For a script, Python puts its directory first on the path; the repository's root replaces it, so that launch is a package.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch.failures import explain, write_failure
from megatron_rdt.environment import error_file, leave_process, quiet_libraries, read_process_info
from megatron_rdt.errors import EXIT_FAILED, EXIT_OK
from megatron_rdt.files import write_text
from megatron_rdt.terminal import escape_unencodable, show_line


def write_measurements(options: argparse.Namespace) -> None:
    """Measure a step at every T; rank 0 writes {"loops", "peak" over all ranks, its own "sent"} of each as JSON."""
    import torch

    from megatron_rdt.config import load_config
    from megatron_rdt.parallel.process_group import join_process_group
    from megatron_rdt.planner.measure import measure_steps

    config, process = load_config(options.config), read_process_info()
    device = join_process_group(config, process)
    measured = measure_steps(config, device, options.loops)
    peaks = torch.tensor([each.peak for each in measured], device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(peaks, torch.distributed.ReduceOp.MAX)
    if process.rank == 0:
        rows = [dataclasses.asdict(each) | {"peak": peak} for each, peak in zip(measured, peaks.tolist())]
        write_text(options.out, json.dumps(rows))


def main() -> int:
    """Measure in this process and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="YAML of the run")
    parser.add_argument("--loops", type=int, nargs="+", required=True, help="values of T")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    escape_unencodable()
    quiet_libraries(read_process_info().local_world_size)
    try:
        write_measurements(options)
        return EXIT_OK
    except Exception as error:
        explained, file = explain(error), error_file()
        if explained is None or file is None:
            show_line(traceback.format_exc().rstrip())
            return EXIT_FAILED
        write_failure(file, explained)
        return explained.exit_status


if __name__ == "__main__":
    leave_process(main())
