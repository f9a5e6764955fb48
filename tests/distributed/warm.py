"""Imported once by the process that ranks are forked from: what nearly every rank needs, so that a rank starts at once.

Nothing here may start a thread or compute: a fork takes only the thread that forks along.
"""

from megatron_rdt.environment import quiet_libraries

quiet_libraries()

import megatron_rdt.convert.training_state
import megatron_rdt.inference
import megatron_rdt.parallel.fsdp
import megatron_rdt.parallel.single
import megatron_rdt.parallel.zero
import megatron_rdt.train.trainer
import torch.distributed.checkpoint  # noqa: F401
