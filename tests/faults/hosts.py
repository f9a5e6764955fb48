"""Two hosts on this machine: network namespaces with a cable between them, which can be pulled."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

INTERFACE = "rdt0"  # of each host, on the cable


@dataclass(frozen=True)
class Host:
    """A network namespace.

    Attributes:
        name: of the namespace.
        address: on the cable.
    """

    name: str
    address: str

    @property
    def prefix(self) -> list[str]:
        """Words before a command that is to run on this host."""
        return ["ip", "netns", "exec", self.name]


def run_ip(*words: str) -> None:
    """Run `ip`; raise OSError with its message if it fails."""
    result = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if result.returncode:
        raise OSError(f"ip {' '.join(words)}: {result.stderr.strip()}")


def find_obstacle() -> str | None:
    """Return why this machine cannot have network namespaces; None if it can."""
    if shutil.which("ip") is None:
        return "there is no `ip` command (iproute2)"
    name = f"rdt-probe-{os.getpid()}"
    try:
        run_ip("netns", "add", name)
        run_ip("netns", "delete", name)
    except OSError as error:
        return f"network namespaces are not allowed here: {error}"
    return None


@contextlib.contextmanager
def make_hosts() -> Iterator[tuple[Host, Host]]:
    """Make two hosts for the length of a block."""
    hosts = tuple(Host(f"rdt-{os.getpid()}-{number}", f"10.213.7.{number}") for number in (1, 2))
    try:
        for host in hosts:
            run_ip("netns", "add", host.name)
            run_ip("-n", host.name, "link", "set", "lo", "up")
        names = [host.name for host in hosts]
        run_ip("-n", names[0], *f"link add {INTERFACE} type veth peer name {INTERFACE} netns {names[1]}".split())
        for host in hosts:
            run_ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
        set_cable(hosts[1], "up")
        set_cable(hosts[0], "up")
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            with contextlib.suppress(OSError):
                run_ip("netns", "delete", host.name)


def set_cable(host: Host, state: str) -> None:
    """Plug the cable into a host ("up"), or pull it ("down"): what is sent then is lost, and nobody is told."""
    run_ip("-n", host.name, "link", "set", INTERFACE, state)
