"""`rdt train`: check the run, then train in this process or in workers that run launch/pretrain.py."""

from launch.interruption import keep_status
from launch.local_processes import PROCESSES_ON_CPU, run_processes
from launch.train_options import LaunchOptions, check_paths, parse_launch, select_worker_words
from megatron_rdt.config import RunConfig, check_config
from megatron_rdt.errors import ConfigError
from megatron_rdt.train.stop_request import StopBeforeTraining, StopRequest


def train(words: list[str]) -> int:
    """Pretrain a recurrent-depth transformer."""
    config, options = parse_launch(words)
    if options.nproc < 0:
        raise ConfigError(f"--nproc is {options.nproc}, it must be at least 1, or 0 for one per device.")
    known = options.nproc or _default_processes(config)
    check_config(config, known)
    check_paths(config)
    processes = known or _count_default_processes()  # imports torch, so only after the checks above
    check_config(config, processes)
    _check_parameter_names(config)
    if not config.parallel.engine_kind.many_processes:
        return _train_here(config, options)
    return keep_status(run_processes(select_worker_words(words), processes, options.master_port))


def _train_here(config: RunConfig, options: LaunchOptions) -> int:
    """Train in this process and return its exit status."""
    stop = StopRequest()  # first, so that a signal during the slow imports counts
    try:
        stop.begin_imports()
        from megatron_rdt.train.trainer import train as train_in_process

        return keep_status(train_in_process(config, options.resume, stop=stop, init=options.init))
    except StopBeforeTraining:
        return keep_status(stop.end_early())
    except Exception:
        if stop.explains_failure():
            return keep_status(stop.end_early())
        raise
    finally:
        stop.close()


def _check_parameter_names(config: RunConfig) -> None:
    """Raise ConfigError for patterns of optimizer.no_weight_decay that match no parameter, or all of them.

    Workers would each refuse them.
    """
    if config.optimizer.no_weight_decay:
        from megatron_rdt.parallel.optimizers import check_no_weight_decay

        check_no_weight_decay(config)


def _default_processes(config: RunConfig) -> int | None:
    """Return the number of processes without --nproc; None if it depends on this machine's GPUs."""
    if not config.parallel.engine_kind.many_processes:
        return 1
    return PROCESSES_ON_CPU if config.train.device == "cpu" else None


def _count_default_processes() -> int:
    """Return the number of GPUs of this machine; without a GPU, PROCESSES_ON_CPU."""
    import torch

    return torch.cuda.device_count() or PROCESSES_ON_CPU
