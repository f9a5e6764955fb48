"""AdamW whose moments are kept in bfloat16 (`optimizer.state_dtype`), rounded up or down at random by what is cut off.

Rounding to nearest would lose small changes: with beta2 = 0.999 the second moment changes by at most a thousandth of the
difference per step, and bfloat16 has steps of 1/256 to 1/128, so it would stand still. Rounded at random, it is right on
average. The random bits are a hash of the number's own float32 bits and of the step: no generator's history, no rank and no
sharding enters, and a run resumes exactly.
"""

from collections.abc import Iterable
from typing import Any

import torch

from megatron_rdt.parallel.dtensor_views import local_shard

STATE_DTYPE = torch.bfloat16
# Constants of the integer hash "lowbias32" by C. Wellons, as signed numbers, since torch multiplies those.
FIRST_FACTOR, SECOND_FACTOR = 0x7FEB352D, 0x846CA68B - (1 << 32)
STEP_FACTOR, SECOND_MOMENT_SALT = 0x9E3779B1 - (1 << 32), 0x5BD1E995
CUT_BITS = 0xFFFF  # of a float32, which bfloat16 does not have


def round_at_random(values: torch.Tensor, step: torch.Tensor, salt: int = 0) -> torch.Tensor:
    """Round float32 numbers to bfloat16, up with a probability of the part that is cut off.

    Args:
        values: finite.
        step: 0-dimensional, on the device; another one gives other random bits.
        salt: the same, for numbers that are rounded in the same step.
    """
    bits = values.contiguous().view(torch.int32)
    key = (step.to(torch.int32) + salt) * STEP_FACTOR
    noise = bits ^ key
    # The shifts of signed numbers copy the sign, so what comes in from the left is cleared.
    noise = (noise ^ ((noise >> 16) & 0xFFFF)) * FIRST_FACTOR
    noise = (noise ^ ((noise >> 15) & 0x1FFFF)) * SECOND_FACTOR
    noise = (noise ^ (noise >> 16)) & CUT_BITS
    # The magnitude grows if the sum carries into the bits that stay; the sign is the first of these.
    return ((bits + noise) & ~CUT_BITS).view(torch.float32).to(STATE_DTYPE)


def restore_state_dtype(optimizer: torch.optim.Optimizer, names: Iterable[str], dtype: torch.dtype) -> None:
    """Give the named state of every parameter its dtype again: torch loads all state in the dtype of the parameter."""
    for state in optimizer.state.values():
        for name in names:
            if name in state:
                state[name] = state[name].to(dtype)


def scaled_gradient(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a gradient, divided in place by the optimizer's attribute `grad_scale`, if it is set.

    Torch's fused optimizers do the same.
    """
    assert parameter.grad is not None
    gradient, scale = local_shard(parameter.grad), getattr(optimizer, "grad_scale", None)
    return gradient if scale is None else gradient.div_(scale)


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW as torch's, with the same names of state and options; both moments in bfloat16.

    The update uses the moments before they are rounded. A step divides gradients by the attribute `grad_scale`, and changes
    nothing if `found_inf` is not 0, where these are set; both are 0-dimensional and on the device.

    Args:
        params: parameters or groups, float32; a group's options override the ones here.
        lr: learning rate.
        betas: decays of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, or that of AdamW with float32 moments, which are rounded to the nearest."""
        super().load_state_dict(state_dict)
        restore_state_dtype(self, ("exp_avg", "exp_avg_sq"), STATE_DTYPE)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update each parameter with a gradient, unless `found_inf` is nonzero."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_parameter(parameter, group)

    def _step_parameter(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        """Update this rank's shard of a parameter and of its moments."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=STATE_DTYPE)
        shard, gradient = local_shard(parameter), scaled_gradient(self, parameter)
        first, second = local_shard(state["exp_avg"]), local_shard(state["exp_avg_sq"])
        (beta1, beta2), lr, step = group["betas"], group["lr"], state["step"] + 1
        new_first = first.float().lerp_(gradient, 1 - beta1)
        new_second = second.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        # Of the step count, which is on the device: the host does not wait for it.
        root = (new_second / (1 - beta2**step)).sqrt_().add_(group["eps"])
        update = (new_first / (1 - beta1**step)).div_(root)
        changes = (
            (state["step"], step),
            (shard, (shard * (1 - lr * group["weight_decay"])).sub_(update, alpha=lr)),
            (first, round_at_random(new_first, step)),
            (second, round_at_random(new_second, step, SECOND_MOMENT_SALT)),
        )
        found_inf = getattr(self, "found_inf", None)
        for old, new in changes:
            old.copy_(new if found_inf is None else torch.where(found_inf == 0, new, old))
