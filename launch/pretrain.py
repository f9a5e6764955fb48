"""The script that torchrun, deepspeed, srun and `rdt train` start on each process; same options as `rdt train`."""

import contextlib
import logging
import sys
import time
import traceback
from pathlib import Path

# Started as a script, Python puts launch/ first on the path; imports are decided by the repository's root instead.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch.failures import EXIT_INTERRUPTED, explain, leave
from megatron_rdt.environment import ProcessInfo, error_file, leave_process, quiet_libraries, read_process_info
from megatron_rdt.errors import EXIT_FAILED, RdtError
from megatron_rdt.train.stop_request import StopRequest

PROGRAM = "pretrain.py"
SPEAKERS_START_S = 3.0


def tell(error: RdtError, process: ProcessInfo) -> None:
    """Leave the error to `rdt train`, which prints it once for all ranks; where there is none, print it."""
    file = error_file()
    if file is not None:
        with contextlib.suppress(OSError):  # a full disk must not hide the error
            leave(file, error)
            return
    print(f"{PROGRAM}: error (rank {process.rank}): {error}", file=sys.stderr, flush=True)


def main(words: list[str]) -> int:
    """Train on this process; returns its exit status."""
    stop = StopRequest()  # before anything that takes long
    process, started = ProcessInfo(), False
    try:
        process = read_process_info()
        quiet_libraries(process.local_world_size)
        if process.rank:  # what all ranks find, the first one says
            logging.getLogger("megatron_rdt").setLevel(logging.ERROR)
        from launch.train_options import check_paths, parse_worker

        config, options = parse_worker(PROGRAM, words, process.world_size)
        check_paths(config)
        started = True
        from megatron_rdt.train.trainer import train

        return train(config, options.resume, process, stop)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:
        explained = explain(error)
        if explained is None:
            traceback.print_exc()
            return EXIT_FAILED
        if started or error_file() or process.local_rank == 0:
            tell(explained, process)
        else:
            # Every rank of a node fails for the same reason and one says it. torchrun ends all when the first is gone.
            time.sleep(SPEAKERS_START_S)
        return explained.exit_status


if __name__ == "__main__":
    leave_process(main(sys.argv[1:]))
