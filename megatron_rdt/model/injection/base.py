"""Injection: how the encoded input enters the recurrent state at every iteration.

One iteration of the core is

    x, carry = read(h_t, prepare(e), offset)
    h_(t+1)  = write(carry, layers(x))

where h is the state, e the encoded input, `offset` what the signals add. What is the same at every iteration belongs into
`prepare`, which runs once. `open` makes the state of the loop from the initial one, `close` turns it back. All three are
the identity unless a choice needs otherwise.
"""

from typing import ClassVar

import torch
from torch import nn


class Injection(nn.Module):
    """A choice of `model.injection`. A subclass in a file of this folder registers itself under `name`.

    Attributes:
        choices: all of them, by name.
        PREPARED_SHARE: of the weights of its matrices, those that `prepare` multiplies with; the rest is for `read`.
    """

    choices: ClassVar[dict[str, type["Injection"]]] = {}
    PREPARED_SHARE: ClassVar[float] = 0.0

    def __init_subclass__(cls, name: str = "", **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if name:
            Injection.choices[name] = cls

    def open(self, state: torch.Tensor) -> torch.Tensor:
        """The state of the loop, (batch, sequence, ...), from the initial one, (batch, sequence, dim)."""
        return state

    def prepare(self, encoded: torch.Tensor) -> torch.Tensor:
        """What `read` takes of the encoded input (batch, sequence, dim): (batch, sequence, ..., dim)."""
        return encoded

    def read(
        self, state: torch.Tensor, prepared: torch.Tensor, offset: torch.Tensor | float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layers get, (batch, sequence, dim), and what `write` needs of the state; float32 or wider."""
        raise NotImplementedError

    def write(self, carry: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The next state from the layers' output, (batch, sequence, dim)."""
        return output

    def close(self, state: torch.Tensor) -> torch.Tensor:
        """(batch, sequence, dim) for the coda, the halting unit and the monitor."""
        return state

    @torch.no_grad()
    def injected(self, prepared: torch.Tensor) -> torch.Tensor:
        """What an iteration adds to a state of zeros because of the encoded input (`b e`), (batch, sequence, dim)."""
        zeros = prepared.new_zeros(*prepared.shape[:2], prepared.shape[-1])
        return self.read(self.open(zeros), prepared, 0.0)[0]

    def spectral_radius(self) -> torch.Tensor:
        """Radius of the linear part of the recurrence as the forward pass uses it, 0-dimensional, without gradient.

        The linear part is what maps h_t to the layers' input and on, with the layers taken out.
        """
        raise NotImplementedError


def shifted(x: torch.Tensor, offset: torch.Tensor | float) -> torch.Tensor:
    """x + offset, and x itself where no signal adds anything."""
    return x + offset if isinstance(offset, torch.Tensor) or offset else x
