"""Imports that nearly every rank needs, done once by the process that ranks are forked from.

Nothing here may start a thread or compute: a fork has only the thread that forks.
"""
# ruff: noqa: E402, F401

import gc

import torch._dynamo  # PyTorch imports it at the first step of an optimizer
import torch.distributed.checkpoint

import launch.pretrain
import megatron_rdt.convert.training_state
import megatron_rdt.inference
import megatron_rdt.parallel.fsdp
import megatron_rdt.parallel.replicated
import megatron_rdt.train.trainer
from megatron_rdt.parallel.zero import import_deepspeed

import_deepspeed()
import deepspeed.runtime.zero.muon.muon_optimizer  # deepspeed.initialize imports it, and it the whole compiler

gc.collect()
gc.freeze()  # so that no rank searches all this for garbage, which would copy its pages
