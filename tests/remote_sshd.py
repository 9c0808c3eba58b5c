"""A real SSH server on the loopback, with keys of its own, for the tests that go through one."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from fofa_deploy.remote.device import Place
from fofa_deploy.remote.transport import Ssh

SSHD = shutil.which("sshd") or shutil.which("/usr/sbin/sshd")


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[bytes]
    config: Path
    scratch: Path
    """TMPDIR of what runs there."""

    def place(self, host: str = "board", python: str = sys.executable) -> Place:
        return Place(Ssh(host, self.config), python)

    def children(self) -> list[int]:
        """Processes of the server's connections."""
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in found.split()]

    def left(self) -> list[str]:
        """What we left in the scratch folder of the device."""
        return sorted(path.name for path in self.scratch.glob("fofa-*"))


def start(folder: Path) -> Server:
    """An sshd of this user with its own port, host key and user key, and a configuration for ssh that knows them."""
    scratch = folder / "device"
    scratch.mkdir()
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized")
    port = _free_port()
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized\nStrictModes no\n"
        f"PidFile none\nUsePAM no\nPasswordAuthentication no\nSetEnv TMPDIR={scratch}\nPermitRootLogin yes\n"
    )
    host_key = " ".join((folder / "host_key.pub").read_text().split()[:2])
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}\n")
    (folder / "ssh_config").write_text(
        f"Host board dead\n  HostName 127.0.0.1\n  User {getpass.getuser()}\n  IdentityFile {folder}/user_key\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n  IdentitiesOnly yes\n"
        f"Host board\n  Port {port}\nHost dead\n  Port {_free_port()}\n"
    )
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # an sshd of root insists on it
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([str(SSHD), "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    _wait_for(port, process, folder / "log")
    return Server(process, folder / "ssh_config", scratch)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"sshd does not start: {log.read_text()}")
