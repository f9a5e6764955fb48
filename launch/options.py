"""Options of `rdt train` and launch/pretrain.py, parsed and checked before anything starts."""

from collections.abc import Sequence

import jsonargparse

from megatron_rdt.config import RunConfig, check_config
from megatron_rdt.config.load import make_parser, parse


def train_parser(program: str) -> jsonargparse.ArgumentParser:
    """--config, every field of RunConfig, and --resume."""
    parser = make_parser(RunConfig, program, "Pretrain a recurrent-depth transformer.")
    parser.add_argument(
        "--resume", default="none", help="none: a fresh run; auto: newest complete checkpoint of the run; or a path"
    )
    parser.add_argument("--local_rank", type=int, default=0, help="given by the DeepSpeed launcher; ignored")
    return parser


def parse_training(
    program: str, words: Sequence[str], world_size: int | None = None
) -> tuple[RunConfig, jsonargparse.Namespace]:
    """The checked config and the raw options."""
    config, raw = parse(train_parser(program), RunConfig, words)
    check_config(config, world_size)
    return config, raw
