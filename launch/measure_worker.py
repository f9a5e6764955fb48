"""Worker of `rdt compare` and `rdt scale`: measures one finished run, whose directory then holds the result."""

import sys
from pathlib import Path

from launch.failures import explain
from megatron_rdt.environment import quiet_libraries
from megatron_rdt.errors import EXIT_OK


def main() -> int:
    """Measure the run of a config file on so many validation sequences and examples; return the exit status."""
    file, *counts = sys.argv[1:]
    quiet_libraries()
    from megatron_rdt.compare.arms import ComparedRun
    from megatron_rdt.compare.measure import find_final_checkpoint, measure_run
    from megatron_rdt.config import load_config

    try:
        config = load_config(Path(file))
        run = ComparedRun(config.run.name, config.run.seed, config)
        checkpoint = find_final_checkpoint(run)
        if checkpoint is not None:
            measure_run(run, checkpoint, *map(int, counts))
        return EXIT_OK
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        print(explained)
        return explained.exit_status


if __name__ == "__main__":
    sys.exit(main())
