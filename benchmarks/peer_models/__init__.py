"""The peers of `benchmarks/peers.py`: one file each, which imports the peer's code only when it is built."""

from peer_models.base import Peer, Work
from peer_models.huginn import Huginn
from peer_models.open_mythos import OpenMythos
from peer_models.parcae import Parcae
from peer_models.plain import Plain

PEERS: dict[str, Peer] = {peer.name: peer for peer in (Plain(), Huginn(), Parcae(), OpenMythos())}

__all__ = ["PEERS", "Peer", "Work"]
