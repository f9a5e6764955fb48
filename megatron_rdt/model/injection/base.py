"""Injection: how the encoded input enters the recurrent state at every iteration.

One iteration of the core is

    x, carry = inject(h_t, precompute(e), offset)
    h_(t+1)  = update(carry, layers(x))

where h is the state, e the encoded input and `offset` the sum of the iteration signals. Work that is the same at every
iteration belongs in `precompute`, which runs once. `expand` turns the initial state into the state of the loop, `collapse`
turns it back. These three are the identity unless a choice overrides them.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Injection(nn.Module):
    """A choice of `model.injection`. A subclass in a file of this folder registers itself under `name`.

    Attributes:
        choices: all injections by name.
        PRECOMPUTED_SHARE: share of its matrices' weights that `precompute` multiplies with; `inject` uses the rest.
        READS_CARRY: True if `update` reads the carry.
        READS_ENCODED: False if iterations do not read the encoded input, which is then the initial state only.
    """

    choices: ClassVar[dict[str, type["Injection"]]] = {}
    PRECOMPUTED_SHARE: ClassVar[float] = 0.0
    READS_CARRY: ClassVar[bool] = False
    READS_ENCODED: ClassVar[bool] = True

    def __init_subclass__(cls, name: str = "", **kwargs: object) -> None:
        """Add the subclass to `choices` under `name`; one without a name is only a base of others."""
        super().__init_subclass__(**kwargs)
        if name:
            Injection.choices[name] = cls

    def forward(self, method: str, *args: Any) -> Any:
        """Call a method below by its name, inside this module's call: tools that move weights hook that.

        The loop does so for every method, since each may read the injection's own parameters.
        """
        return getattr(self, method)(*args)

    def expand(self, state: Tensor) -> Tensor:
        """Return the state of the loop, (batch, sequence, ...), for the initial state (batch, sequence, dim)."""
        return state

    def precompute(self, encoded: Tensor) -> Tensor:
        """Return what `inject` reads of the encoded input (batch, sequence, dim), as (batch, sequence, ..., dim)."""
        return encoded

    def inject(self, state: Tensor, precomputed: Tensor, offset: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return the layers' input, (batch, sequence, dim), and the carry for `update`; float32 or wider."""
        raise NotImplementedError

    def update(self, carry: Tensor, output: Tensor) -> Tensor:
        """Return the next state: the layers' output (batch, sequence, dim), unless a choice uses the carry too."""
        return output

    def collapse(self, state: Tensor) -> Tensor:
        """Return (batch, sequence, dim) for the coda, the halting unit and the monitor."""
        return state

    @torch.no_grad()
    def input_term(self, precomputed: Tensor) -> Tensor:
        """Return the term that the encoded input adds to the state in an iteration (`b e`), (batch, sequence, dim)."""
        zeros = precomputed.new_zeros(*precomputed.shape[:2], precomputed.shape[-1])
        return self.inject(self.expand(zeros), precomputed, 0.0)[0]

    def spectral_radius(self) -> Tensor:
        """Return the radius of the recurrence's linear part as the forward pass uses it, 0-dimensional, without gradient.

        The linear part maps h_t to the layers' input and on to h_(t+1), with the layers taken out.
        """
        raise NotImplementedError


def add_offset(x: Tensor, offset: Tensor | float) -> Tensor:
    """Return x + offset; x itself where no signal adds anything."""
    return x + offset if isinstance(offset, Tensor) or offset else x
