"""Training script of one process, started by torchrun, deepspeed, srun or `rdt train`, with the options of `rdt train`."""

import sys
from pathlib import Path

# For a script, Python puts its directory first on the path; the repository's root replaces it, so that launch is a package.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch.interruption import BEFORE_TRAINING, leave_at_once

PROGRAM = "pretrain.py"
if __name__ == "__main__":
    leave_at_once(PROGRAM, BEFORE_TRAINING)

from megatron_rdt.environment import is_first_rank

if __name__ == "__main__":  # all ranks are signalled, and one line is enough
    leave_at_once(PROGRAM, BEFORE_TRAINING, is_silent=not is_first_rank())

import contextlib
import logging
import time
import traceback

from launch.failures import explain, write_failure
from megatron_rdt.environment import ProcessInfo, error_file, leave_process, quiet_libraries, read_process_info
from megatron_rdt.errors import EXIT_FAILED, LaunchError, RdtError
from megatron_rdt.files import escape_controls
from megatron_rdt.terminal import escape_unencodable, show_line
from megatron_rdt.train.stop_request import StopBeforeTraining, StopRequest

SPEAKER_HEAD_START_S = 3.0


def report_error(error: RdtError, process: ProcessInfo) -> None:
    """Write the error to a file for `rdt train`, which prints it once for all ranks; under other launchers, print it."""
    file = error_file()
    if file is not None:
        with contextlib.suppress(OSError):  # a full disk must not hide the error
            write_failure(file, error)
            return
    show_line(escape_controls(f"{PROGRAM}: error (rank {process.rank}): {error}"))


def main(words: list[str]) -> int:
    """Train in this process and return its exit status."""
    stop = StopRequest()  # first, so that a signal during the slow imports counts
    escape_unencodable()
    process, started = ProcessInfo(), False
    try:
        stop.begin_imports()
        process = read_process_info()
        stop.is_rank_0 = process.rank == 0
        quiet_libraries(process.local_world_size)
        if process.rank:  # all ranks warn about the same; rank 0 is enough
            logging.getLogger("megatron_rdt").setLevel(logging.ERROR)
        from launch.train_options import check_paths, parse_worker

        config, options = parse_worker(PROGRAM, words, process.world_size)
        check_paths(config)
        started = True
        from megatron_rdt.train.trainer import train

        return train(config, options.resume, process, stop, options.init)
    except StopBeforeTraining:
        return stop.end_early()
    except Exception as error:
        explained = explain(error)
        if stop.explains_failure() or (isinstance(explained, LaunchError) and stop.explains_lost_peer()):
            return stop.end_early()
        if explained is None:
            show_line(traceback.format_exc().rstrip())
            return EXIT_FAILED
        if started or error_file() or process.local_rank == 0:
            report_error(explained, process)
        else:
            # Before training all ranks of a node fail for the same reason, and local rank 0 prints it. It gets a head
            # start, since torchrun ends all ranks when the first one exits.
            time.sleep(SPEAKER_HEAD_START_S)
        return explained.exit_status


if __name__ == "__main__":
    leave_process(main(sys.argv[1:]))
