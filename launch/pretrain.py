"""The script that torchrun, deepspeed, srun and `rdt train` start on each process; same options as `rdt train`."""

import sys
from pathlib import Path

# Started as a script, Python puts launch/ first on the path; imports are decided by the repository's root instead.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from megatron_rdt.environment import export_for_torch, process_place, quiet_libraries
from megatron_rdt.errors import EXIT_FAILED, RdtError


def main(words: list[str]) -> int:
    """Train on this process; returns its exit status."""
    place = process_place()
    quiet_libraries(place.local_world_size)
    try:
        from launch.options import parse_training

        config, raw = parse_training("pretrain.py", words, place.world_size)
        if config.parallel.engine != "single":
            export_for_torch(place)
        from megatron_rdt.train.trainer import train

        return train(config, raw.resume)
    except RdtError as error:
        print(f"pretrain.py: error (rank {place.rank}): {error}", file=sys.stderr, flush=True)
        return error.exit_status
    except KeyboardInterrupt:
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
