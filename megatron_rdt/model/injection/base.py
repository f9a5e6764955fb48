"""Injection: how the encoded input enters the recurrent state at every iteration.

One iteration of the core is

    x, carry = inject(h_t, precompute(e), offset)
    h_(t+1)  = update(carry, layers(x))

where h is the state, e the encoded input and `offset` the sum of the iteration signals. Work that is the same at every
iteration belongs in `precompute`, which runs once. `expand` turns the initial state into the state of the loop, `collapse`
turns it back. These three are the identity unless a choice overrides them.
"""

from typing import ClassVar

import torch
from torch import nn


class Injection(nn.Module):
    """A choice of `model.injection`. A subclass in a file of this folder registers itself under `name`.

    Attributes:
        choices: all of them, by name.
        PRECOMPUTED_SHARE: of the weights of its matrices, those that `precompute` multiplies with; the rest is for `inject`.
    """

    choices: ClassVar[dict[str, type["Injection"]]] = {}
    PRECOMPUTED_SHARE: ClassVar[float] = 0.0

    def __init_subclass__(cls, name: str = "", **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if name:
            Injection.choices[name] = cls

    def expand(self, state: torch.Tensor) -> torch.Tensor:
        """The state of the loop, (batch, sequence, ...), from the initial one, (batch, sequence, dim)."""
        return state

    def precompute(self, encoded: torch.Tensor) -> torch.Tensor:
        """What `inject` takes of the encoded input (batch, sequence, dim): (batch, sequence, ..., dim)."""
        return encoded

    def inject(
        self, state: torch.Tensor, precomputed: torch.Tensor, offset: torch.Tensor | float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layers get, (batch, sequence, dim), and what `update` needs of the state; float32 or wider."""
        raise NotImplementedError

    def update(self, carry: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The next state from the layers' output, (batch, sequence, dim)."""
        return output

    def collapse(self, state: torch.Tensor) -> torch.Tensor:
        """(batch, sequence, dim) for the coda, the halting unit and the monitor."""
        return state

    @torch.no_grad()
    def input_term(self, precomputed: torch.Tensor) -> torch.Tensor:
        """What an iteration adds to a state of zeros because of the encoded input (`b e`), (batch, sequence, dim)."""
        zeros = precomputed.new_zeros(*precomputed.shape[:2], precomputed.shape[-1])
        return self.inject(self.expand(zeros), precomputed, 0.0)[0]

    def spectral_radius(self) -> torch.Tensor:
        """Radius of the linear part of the recurrence as the forward pass uses it, 0-dimensional, without gradient.

        The linear part is what maps h_t to the layers' input and on, with the layers taken out.
        """
        raise NotImplementedError


def add_offset(x: torch.Tensor, offset: torch.Tensor | float) -> torch.Tensor:
    """x + offset, and x itself where no signal adds anything."""
    return x + offset if isinstance(offset, torch.Tensor) or offset else x
