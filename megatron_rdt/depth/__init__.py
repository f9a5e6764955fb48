"""Depth as data: how many iterations the core runs, and through how many the gradient flows."""

from megatron_rdt.depth.distributions import loop_probabilities
from megatron_rdt.depth.plan import DepthPlan
from megatron_rdt.depth.sampler import DepthSampler

__all__ = ["DepthPlan", "DepthSampler", "loop_probabilities"]
