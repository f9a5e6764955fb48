"""Parameter groups: the optimizer, the learning rate scale and the weight decay of every parameter.

With `optimizer.name` muon, Muon steps every matrix that maps channels: those of the layers, the injection and the signals,
experts included. AdamW steps the rest: embeddings and the output matrix, tables of value embeddings, mixing logits, and
all vectors. With adamw, AdamW steps everything.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_rdt.config import OptimizerConfig, RunConfig
from megatron_rdt.errors import ConfigError
from megatron_rdt.model import RecurrentDepthTransformer
from megatron_rdt.parallel.muon import Muon
from megatron_rdt.parallel.rounded_adamw import RoundedAdamW

# Applied in every iteration of the loop, so the effect of one optimizer step is applied T times.
REUSED = ("core.layers.", "core.injection.", "core.signals.")
# The linear part of the recurrence and the matrices around it; weight decay would pull them away from the identity.
UNDECAYED = ("core.injection.", "core.input_matrix.", "core.output_matrix.")
# Two-dimensional, but tables of vectors or logits, so Muon does not apply.
NOT_MAPS = ("embedding.weight", "head.weight", "token_values.weight", "injection.mix")
EXAMPLE_NAMES = 4  # parameter names in the message about a pattern that matches none

STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Groups = list[dict[str, Any]]


def count_dimensions(parameter: torch.Tensor) -> int:
    """Count the dimensions of the whole parameter, also if ZeRO-3 flattened it and left its shape in `ds_shape`."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def has_weight_decay(name: str, parameter: torch.Tensor, config: OptimizerConfig) -> bool:
    """Return True for matrices, except the injection's, those around the loop, and matches of `no_weight_decay`."""
    is_exempt = name.startswith(UNDECAYED) or any(fnmatchcase(name, pattern) for pattern in config.no_weight_decay)
    return count_dimensions(parameter) >= 2 and not is_exempt


def list_decayed_parameters(config: RunConfig) -> set[str]:
    """Return the names of the parameters that weight decay applies to in a run of this config."""
    with torch.device("meta"):
        model = RecurrentDepthTransformer(config.model)
    return {name for name, parameter in model.named_parameters() if has_weight_decay(name, parameter, config.optimizer)}


def check_no_weight_decay(config: RunConfig) -> None:
    """Raise ConfigError if a pattern of `no_weight_decay` matches no parameter, or if none keeps weight decay."""
    patterns = config.optimizer.no_weight_decay
    if not patterns:
        return
    with torch.device("meta"):
        names = [name for name, _ in RecurrentDepthTransformer(config.model).named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            examples = ", ".join(names[:: -(-len(names) // EXAMPLE_NAMES)])
            raise ConfigError(
                f"optimizer.no_weight_decay has the pattern {pattern!r}, which matches no parameter of this model. "
                f"Change it; names are such as {examples}."
            )
    if not list_decayed_parameters(config):
        raise ConfigError(
            f"optimizer.no_weight_decay {patterns} leaves no parameter with weight decay. "
            "Set --optimizer.weight_decay 0 instead."
        )


def is_stepped_by_muon(name: str, parameter: torch.Tensor, config: OptimizerConfig) -> bool:
    """Return True if the config uses Muon and the parameter is a matrix, or a stack of them, that maps channels."""
    return config.name == "muon" and count_dimensions(parameter) >= 2 and not name.endswith(NOT_MAPS)


def group_by_mesh(parameters: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Group parameters by the mesh that they are sharded on: one operation cannot take tensors of several meshes."""
    meshes: dict[Any, list[torch.Tensor]] = {}
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        meshes.setdefault(mesh, []).append(parameter)
    return list(meshes.values())


def adamw_groups(model: nn.Module, config: OptimizerConfig) -> Groups:
    """Return AdamW's groups, of all that Muon does not step: with weight decay, then without; no group is empty."""
    options = {"betas": (config.beta1, config.beta2), "eps": config.eps}
    groups: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if not is_stepped_by_muon(name, parameter, config):
            groups[has_weight_decay(name, parameter, config)].append(parameter)
    decays = {True: config.weight_decay, False: 0.0}
    return [{"params": group, "weight_decay": decays[decayed], **options} for decayed, group in groups.items() if group]


def split_groups_by_mesh(groups: Groups) -> Groups:
    """Split each group into one per mesh, with the same options."""
    return [{**group, "params": part} for group in groups for part in group_by_mesh(group["params"])]


def parameter_names(model: nn.Module, groups: Groups) -> list[list[str]]:
    """Return the names of the parameters of each group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[names[parameter] for parameter in group["params"]] for group in groups]


def regroup(groups: Groups, wanted: list[list[str]]) -> Groups:
    """Return a group for each list of `wanted`, with the options of the first of its names that `groups` has, if any."""
    options = {name: group for group in groups for name in group["params"]}
    known = [next((options[name] for name in names if name in options), None) for names in wanted]
    return [{**group, "params": names} for group, names in zip(known, wanted) if group is not None]


def muon_groups(model: nn.Module, config: OptimizerConfig) -> Groups:
    """Return Muon's groups, by reuse in the loop ("lr_scale") and weight decay; an empty list without Muon."""
    options = {"momentum": config.momentum, "nesterov": config.nesterov, "ns_steps": config.ns_steps}
    groups: dict[tuple[bool, bool], list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if is_stepped_by_muon(name, parameter, config):
            key = name.startswith(REUSED), has_weight_decay(name, parameter, config)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr_scale": config.core_lr_scale if reused else 1.0,
            "weight_decay": config.weight_decay if decayed else 0.0,
            **options,
        }
        for (reused, decayed), parameters in groups.items()
    ]


def make_adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Create AdamW over the groups of `adamw_groups`: torch's fused one, or that with moments in bfloat16."""
    if config.state_dtype == "bfloat16":
        return RoundedAdamW(split_groups_by_mesh(adamw_groups(model, config)), lr=config.lr)
    return torch.optim.AdamW(split_groups_by_mesh(adamw_groups(model, config)), lr=config.lr, fused=True)


def make_optimizers(model: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Create AdamW, and Muon if the config asks for it, over the (possibly sharded) parameters."""
    optimizers: list[torch.optim.Optimizer] = [make_adamw(model, config)]
    if groups := muon_groups(model, config):
        optimizers.append(Muon(groups, lr=config.lr, state_dtype=STATE_DTYPES[config.state_dtype]))
    return optimizers


def set_learning_rate(groups: Groups, lr: float) -> None:
    """Set the learning rate of every group to `lr` times the group's scale."""
    for group in groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def apply_configured_options(groups: Groups, configured: Groups) -> None:
    """Overwrite the options of groups, such as those a loaded state brought, with those of `configured`, in order."""
    for group, fresh in zip(groups, configured):
        group.update({key: value for key, value in fresh.items() if key != "params"})
