"""An environment of its own for every peer that the project does not depend on itself.

It sees the packages of the environment that runs the benchmark, so that PyTorch lies on disk once; what pip installs on top wins.
The runtimes and PyTorch are held at the versions that are there: all artifacts are timed by the same ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HELD = ("torch", "torchvision", "onnxruntime", "openvino", "nncf", "onnx", "numpy")
REQUIREMENTS = {
    "olive": ("olive-ai==0.13.0", "requests"),
    "optimum-onnx": ("optimum-onnx[onnxruntime]==0.1.0", "datasets"),
    "optimum-intel": ("optimum-intel[openvino,nncf]==2.2.0", "datasets"),
    "torchao": ("torchao==0.18.0",),
}


class NotInstalledError(Exception):
    """A peer's environment could not be made; the message is pip's own last line."""


def python(name: str, work: Path) -> Path:
    """The interpreter of a peer's environment, made where it is missing.

    Raises:
        NotInstalledError: pip refused.
    """
    folder = work / name
    interpreter = folder / "bin" / "python"
    if (folder / "installed").is_file():
        return interpreter
    venv.create(folder, with_pip=True, clear=True)
    _site(folder).joinpath("base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    held = folder / "held.txt"
    held.write_text("".join(f"{package}=={found}\n" for package in HELD if (found := _version(package))))
    command = [interpreter, "-m", "pip", "install", "--quiet", "--constraint", held, *REQUIREMENTS[name]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    if done.returncode:
        raise NotInstalledError(last_line(done.stderr))
    (folder / "installed").touch()
    return interpreter


def environment() -> dict[str, str]:
    """Variables for a peer's process: nothing of this project's path, one thread."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "NNCF_CI": "1"}


def last_line(text: str) -> str:
    """Of an error's output, what says why."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("[notice]")]
    return lines[-1][:300] if lines else "it said nothing"


def site(name: str, work: Path) -> Path:
    """Where a peer's own packages lie."""
    return _site(work / name)


def _site(folder: Path) -> Path:
    return folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
