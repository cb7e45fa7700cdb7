"""Several machines on this one, by Linux namespaces: each has its own address, disk, process ids, host name, shared
memory and home, and shares one folder with the others.

A machine reads this machine's disk (the installed software); only it sees what it writes. Its name resolves to
127.0.1.1, as on Debian. Needs root, `ip` (iproute2), bridges, veth and overlayfs.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

BRIDGE = "lp"
"""Prefix of network interfaces' names, which may have 15 characters."""
HOME = "/home/node"
SHARED = "/shared"
WRITTEN = "/srv"
"""Files that a machine has written to its disk, except `/tmp`."""

# Runs as process 1 of a machine: the disk, then it waits for orphans, as an init does, until it is killed.
INIT = """
set -eu
mount --make-rprivate /
mount -t tmpfs -o size=2g none "$OWN/layer"
mkdir "$OWN/layer/written" "$OWN/layer/work" "$OWN/layer/root"
root="$OWN/layer/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$OWN/layer/written,workdir=$OWN/layer/work" "$root"
mkdir -p "$root$SHARED" "$root$NODE_HOME"
mount --bind "$COMMON" "$root$SHARED"
mount --bind "$OWN/tmp" "$root/tmp"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o "size=$SHM" none "$root/dev/shm"
mount --rbind /sys "$root/sys"
mount -t proc proc "$root/proc"
mount --bind "$OWN/layer/written" "$root$WRITTEN"
cp "$OWN/hosts" "$root/etc/hosts"
rm "$root/etc/resolv.conf"
touch "$root/etc/resolv.conf"
hostname "$NODE"
cd "$root"
pivot_root . mnt
umount -l /mnt
echo ready
exec python3 -c '
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while True:
    try:
        os.wait()
    except ChildProcessError:
        time.sleep(0.2)
'
"""


_networks = itertools.count()


class Machine:
    """One running machine."""

    def __init__(self, name: str, address: str, own: Path, init: subprocess.Popen[str], cable: str) -> None:
        self.name = name
        self.address = address
        self.own = own
        self.cable = cable
        """This machine's end of the link to it."""
        self._unshare = init
        [child] = psutil.Process(init.pid).children()
        self.init = child.pid
        self._space = _pid_space(self.init)
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, command: str | Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Begin a command there; its output goes to `log`."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                self._inside(command),
                env=self._environment(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._started.append(process)
        return process

    def run(
        self, command: str | Sequence[str], environment: Mapping[str, str], timeout: float = 180
    ) -> tuple[int, str]:
        """Run a command there; returns its exit status and what it printed."""
        done = subprocess.run(
            self._inside(command),
            env=self._environment(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        return done.returncode, done.stdout

    def _inside(self, command: str | Sequence[str]) -> list[str]:
        words = shlex.split(command) if isinstance(command, str) else list(command)
        spaces = ["--net", "--mount", "--pid", "--uts", "--ipc", "--root", f"--wdns={HOME}"]
        return ["nsenter", f"--target={self.init}", *spaces, "--", *words]

    def _environment(self, given: Mapping[str, str]) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        return {"PATH": path, "HOME": HOME, "LANG": "C.UTF-8", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **given}

    @property
    def log(self) -> Path:
        return self.own / "log"

    @property
    def tmp(self) -> Path:
        """Its `/tmp`, by this machine's path."""
        return self.own / "tmp"

    def processes(self) -> dict[int, str]:
        """Its processes: command line by pid on this machine."""
        found = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if _pid_space(process.pid) == self._space and process.pid != self.init:
                    found[process.pid] = " ".join(process.cmdline()).strip()
        return found

    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received since its start."""
        counters = Path("/sys/class/net") / self.cable / "statistics"
        return int((counters / "rx_bytes").read_text()), int((counters / "tx_bytes").read_text())

    def unplug(self) -> None:
        """Cut it off from the network; its processes continue."""
        _ip("link", "set", self.cable, "down")

    def plug_in(self) -> None:
        """Connect it again."""
        _ip("link", "set", self.cable, "up")

    def switch_off(self) -> None:
        """End it with all of its processes, like a power failure."""
        with suppress(ProcessLookupError):
            os.kill(self.init, signal.SIGKILL)  # the kernel ends every process of its namespace
        for process in self._started:
            process.wait(60)
        self._unshare.wait(60)


@contextmanager
def machines(names: Sequence[str], folder: Path, shm: str = "2g") -> Iterator[dict[str, Machine]]:
    """Run machines while the block runs; this machine is also on their network.

    Args:
        folder: for their disks; all see `folder / "shared"` as `SHARED`.
        shm: size of their shared memory.
    """
    _remove_abandoned()
    count = next(_networks)
    bridge, own = f"{BRIDGE}{os.getpid()}.{count}", (os.getpid() + 1000 * count) % 2**14
    network = f"10.{192 + own // 256}.{own % 256}"
    common = folder / "shared"
    common.mkdir(parents=True, exist_ok=True)
    addresses = {name: f"{network}.{10 + index}" for index, name in enumerate(names)}
    with ExitStack() as stack:
        _ip("link", "add", bridge, "type", "bridge")
        stack.callback(_ip, "link", "del", bridge)
        _ip("address", "add", f"{network}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        found = {}
        for index, (name, address) in enumerate(addresses.items()):
            machine = _switch_on(name, address, folder / name, common, addresses, f"{bridge}.{index}", shm)
            stack.callback(machine.switch_off)
            _ip("link", "set", machine.cable, "master", bridge, "up")
            inside = ["nsenter", f"--target={machine.init}", "--net", "ip"]
            for words in (
                ("link", "set", "lo", "up"),
                ("address", "add", f"{address}/24", "dev", "eth0"),
                ("link", "set", "eth0", "up"),
                ("route", "add", "default", "via", f"{network}.1"),
            ):
                subprocess.run([*inside, *words], check=True)
            found[name] = machine
        yield found


def why_not() -> str:
    """Why this machine cannot run such machines; empty if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    for tool in ("ip", "unshare", "nsenter", "pivot_root"):
        if shutil.which(tool) is None:
            return f"`{tool}` is missing (packages iproute2 and util-linux)"
    attempt = f"unshare --net --mount --pid --uts --ipc --fork sh -c {shlex.quote(TRY)}"
    tried = subprocess.run(attempt, shell=True, capture_output=True, text=True)
    return tried.stderr.strip().replace("\n", "; ")[-200:] if tried.returncode else ""


TRY = """
set -e
ip link add lorapar-a type veth peer name lorapar-b
ip link add lorapar-c type bridge
mount --make-rprivate /
mount -t tmpfs none /mnt
mkdir /mnt/written /mnt/work /mnt/root
mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/written,workdir=/mnt/work /mnt/root
"""


def _switch_on(
    name: str, address: str, own: Path, common: Path, addresses: Mapping[str, str], cable: str, shm: str
) -> Machine:
    for part in ("layer", "tmp"):
        (own / part).mkdir(parents=True)
    (own / "tmp").chmod(0o1777)
    node = f"node-{name}"
    others = "".join(f"{place}\t{each}\n" for each, place in addresses.items())
    (own / "hosts").write_text(f"127.0.0.1\tlocalhost\n127.0.1.1\t{node}\n{others}")
    given = {
        "OWN": str(own),
        "COMMON": str(common),
        "SHARED": SHARED,
        "WRITTEN": WRITTEN,
        "NODE_HOME": HOME,
        "NODE": node,
        "SHM": shm,
    }
    init = subprocess.Popen(
        ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child=KILL", "sh", "-c", INIT],
        env={**os.environ, **given},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_end_with_the_parent,
    )
    assert init.stdout is not None and init.stderr is not None
    if init.stdout.readline() != "ready\n":
        raise RuntimeError(f"machine '{name}' did not start: {init.stderr.read()}")
    machine = Machine(name, address, own, init, cable)
    _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(machine.init))
    return machine


def _end_with_the_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _remove_abandoned() -> None:
    """Remove bridges of killed tests; everything else has ended with these tests."""
    for link in Path("/sys/class/net").glob(f"{BRIDGE}[0-9]*.*"):
        owner = link.name.removeprefix(BRIDGE).partition(".")[0]
        if (link / "bridge").is_dir() and owner.isdecimal() and not psutil.pid_exists(int(owner)):
            _ip("link", "del", link.name)


def _pid_space(pid: int) -> str:
    return str(Path(f"/proc/{pid}/ns/pid").readlink())


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
