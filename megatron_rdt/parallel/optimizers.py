"""Which optimizer steps which parameter, at which share of the learning rate, and with which weight decay.

With `optimizer.name` muon, Muon has every matrix that maps channels: of the layers, the injection and the signals,
experts included. AdamW has the rest: embeddings and the output matrix, tables of value embeddings, mixing logits, and all
vectors. With adamw, AdamW has everything.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_rdt.config import OptimizerConfig
from megatron_rdt.parallel.muon import Muon

# Applied in every iteration of the loop: one step changes them T times over.
REUSED = ("core.layers.", "core.injection.", "core.signals.")
# The linear part of the recurrence and what stands at its two ends; decay would pull them off the identity.
UNDECAYED = ("core.injection.", "core.input_matrix.", "core.output_matrix.")
# Two-dimensional, but tables of vectors, or logits.
NOT_MAPS = ("embedding.weight", "head.weight", "token_values.weight", "injection.mix")

Groups = list[dict[str, Any]]


def dimensions(parameter: torch.Tensor) -> int:
    """Dimensions of the whole; a parameter that ZeRO-3 has sharded is flat and keeps its shape in `ds_shape`."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether the parameter gets weight decay: matrices do; vectors (norms, gains, biases) and the injection do not."""
    return dimensions(parameter) >= 2 and not name.startswith(UNDECAYED)


def by_muon(name: str, parameter: torch.Tensor, config: OptimizerConfig) -> bool:
    """Whether Muon steps the parameter."""
    return config.name == "muon" and dimensions(parameter) >= 2 and not name.endswith(NOT_MAPS)


def by_mesh(parameters: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Parameters that are sharded over the same processes, together: one operation cannot take others at once."""
    meshes: dict[Any, list[torch.Tensor]] = {}
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        meshes.setdefault(mesh, []).append(parameter)
    return list(meshes.values())


def adamw_groups(model: nn.Module, config: OptimizerConfig) -> Groups:
    """AdamW's two groups, the parameters with weight decay and those without, and their options."""
    options = {"betas": (config.beta1, config.beta2), "eps": config.eps}
    mine = [(n, p) for n, p in model.named_parameters() if not by_muon(n, p, config)]
    return [
        {"params": [p for n, p in mine if decays(n, p)], "weight_decay": config.weight_decay, **options},
        {"params": [p for n, p in mine if not decays(n, p)], "weight_decay": 0.0, **options},
    ]


def split_by_mesh(groups: Groups) -> Groups:
    """The same groups, each in one part per mesh that its parameters are on."""
    return [{**group, "params": part} for group in groups for part in by_mesh(group["params"]) or [[]]]


def names_of(model: nn.Module, groups: Groups) -> list[list[str]]:
    """The names of the parameters of each group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[names[parameter] for parameter in group["params"]] for group in groups]


def regrouped(groups: Groups, wanted: list[list[str]]) -> Groups:
    """Groups of the wanted names, each with the options that its names have in `groups`, whose params are names."""
    options = {name: group for group in groups for name in group["params"]}
    return [{**options[names[0]], "params": names} for names in wanted if names]


def muon_groups(model: nn.Module, config: OptimizerConfig) -> Groups:
    """Muon's groups and their options: reused by the loop or not, with weight decay or without."""
    options = {"momentum": config.momentum, "nesterov": config.nesterov, "ns_steps": config.ns_steps}
    groups: dict[tuple[bool, bool], list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if by_muon(name, parameter, config):
            groups.setdefault((name.startswith(REUSED), decays(name, parameter)), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr_scale": config.core_lr_scale if reused else 1.0,
            "weight_decay": config.weight_decay if decayed else 0.0,
            **options,
        }
        for (reused, decayed), parameters in groups.items()
    ]


def adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW, fused, over the groups of `adamw_groups`."""
    return torch.optim.AdamW(split_by_mesh(adamw_groups(model, config)), lr=config.lr, fused=True)


def make_optimizers(model: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon where the config asks for it, over the (possibly sharded) parameters."""
    optimizers: list[torch.optim.Optimizer] = [adamw(model, config)]
    if groups := muon_groups(model, config):
        optimizers.append(Muon(groups, lr=config.lr))
    return optimizers


def set_learning_rate(groups: Groups, lr: float) -> None:
    """Give every group its share of this step's learning rate."""
    for group in groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def apply_options(groups: Groups, configured: Groups) -> None:
    """Give groups the options of `adamw_groups` or `muon_groups`: a loaded state brings those it was saved with."""
    for group, fresh in zip(groups, configured):
        group.update({key: value for key, value in fresh.items() if key != "params"})
