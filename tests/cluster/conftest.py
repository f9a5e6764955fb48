"""A Slurm cluster of four nodes on this machine: its own munged, slurmctld and slurmds, stopped at the end."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

# Debian installs the daemons outside the PATH of ordinary users.
SEARCH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")
NODES = ("n1", "n2", "n3", "n4")
COMMAND_TIMEOUT_S = 60
START_TIMEOUT_S = 90
STOP_TIMEOUT_S = 60
LOG_TAIL = 1500

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
FirstJobId={first_job}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket,cred_expire={requeue_delay_s}
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=30
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=3,batch_sched_delay=1
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
{nodes}
PartitionName=debug Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    """Return loopback ports on which nothing listens."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class Cluster:
    """The running daemons of the cluster, and Slurm's commands against them.

    Attributes:
        directory: configuration, state and logs.
        environment: environment variables of a user of this cluster.
        requeue_delay_s: how long Slurm holds a requeued job before it may start again.
    """

    requeue_delay_s = 20

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        ours = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        self.environment = {
            **ours,
            "PATH": SEARCH,
            "SLURM_CONF": str(directory / "slurm.conf"),
            # All nodes are this machine: they meet on the loopback interface.
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start the daemons; returns when all nodes are idle."""
        for name in ("munge", "state"):
            (self.directory / name).mkdir()
        host, ports = socket.gethostname().split(".")[0], free_ports(1 + len(NODES))
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=2000"
            for name, port in zip(NODES, ports[1:], strict=True)
        ]
        text = CONFIGURATION.format(
            host=host,
            controller_port=ports[0],
            # A run's port follows from its job's number: no two clusters of this machine may give the same.
            first_job=1 + ports[0] % 9000,
            user=psutil.Process().username(),
            directory=self.directory,
            requeue_delay_s=self.requeue_delay_s,
            nodes="\n".join(nodes),
            names=",".join(NODES),
        )
        (self.directory / "slurm.conf").write_text(text)
        self._start_munge()
        self._start("slurmctld", "-D", "-c")
        for name in NODES:
            self.start_node(name)
        self.wait(lambda: self.run("sinfo", "-h", "-o", "%D %t") == f"{len(NODES)} idle", START_TIMEOUT_S, "idle nodes")

    def start_node(self, name: str) -> None:
        """Start the daemon of a node."""
        self._start("slurmd", "-D", "-N", name, log=f"slurmd-{name}")

    def kill_node(self, name: str) -> None:
        """Kill everything that runs on a node at once, as a loss of power does: its daemon, and its parts of jobs."""
        slurmd = self._daemons.pop(f"slurmd-{name}")
        slurmd.kill()
        slurmd.wait()
        on_node = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if environment.get("SLURM_CONF") == self.environment["SLURM_CONF"] and (
                    environment.get("SLURMD_NODENAME") == name
                ):
                    keepers = [parent for parent in process.parents() if parent.name().startswith("slurmstepd")]
                    on_node += [*keepers, process]
        for process in on_node:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _start_munge(self) -> None:
        """Start a separate munged with its own key and socket; the machine may run another one."""
        folder = self.directory / "munge"
        key = folder / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key-file": key, "socket": folder / "socket", "pid-file": folder / "pid", "seed-file": folder / "seed"}
        self._start("munged", "--foreground", *(f"--{name}={path}" for name, path in files.items()))
        self.wait((folder / "socket").exists, START_TIMEOUT_S, "munged's socket")

    def _start(self, program: str, *words: str, log: str = "") -> None:
        """Start a daemon, its output in a log file of the cluster's directory."""
        name = log or program
        with open(self.directory / f"{name}.log", "wb") as output:
            self._daemons[name] = subprocess.Popen(
                [shutil.which(program, path=SEARCH) or program, *words],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self) -> None:
        """Cancel every job, then end exactly the daemons that `start` started."""
        with contextlib.suppress(pytest.fail.Exception, subprocess.TimeoutExpired):
            if "slurmctld" in self._daemons:
                self.run("scancel", "--user", psutil.Process().username())
                self.wait(lambda: not self.run("squeue", "-h"), STOP_TIMEOUT_S, "an empty queue")
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        # Job steps outlive their slurmd; the path of the configuration, which is unique, identifies them.
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    process.kill()

    def logs(self) -> str:
        """Return the last lines of every daemon's log."""
        parts = [
            f"--- {path.name}\n{path.read_text(errors='replace')[-LOG_TAIL:]}"
            for path in sorted(self.directory.glob("*.log"))
        ]
        return "\n".join(parts)

    def wait(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait until `condition` holds; on a timeout or a dead daemon, fail the test with the ends of the logs."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            dead = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > deadline:
                reason = f"{', '.join(dead)} died" if dead else f"not after {timeout_s:.0f} s"
                pytest.fail(f"waiting for {what}: {reason}\n{self.logs()}", pytrace=False)
            time.sleep(0.3)

    def run(self, *command: str) -> str:
        """Run one of Slurm's commands and return its output; empty if the controller does not answer yet."""
        result = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
        return result.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """Return the fields that `scontrol show job` prints."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", number, "-o")))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four idle nodes for the whole test session."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]
    if missing:
        pytest.fail(
            f"{', '.join(missing)} not on this machine. Run `make test-cluster`, which installs them, "
            "or: apt-get install slurm-wlm munge",
            pytrace=False,
        )
    # Not below pytest's own folder, since munged requires a path that everybody may search.
    directory = Path(tempfile.mkdtemp(prefix="slurm-"))
    directory.chmod(0o755)
    result = Cluster(directory)
    try:
        result.start()
        yield result
    finally:
        result.stop()
        shutil.rmtree(directory, ignore_errors=True)
