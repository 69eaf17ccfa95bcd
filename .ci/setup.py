# SPDX-License-Identifier: Apache-2.0
"""Make the project's environment with nothing but the Python that runs this file.

PyTorch goes in first. `pip install torch` on Linux downloads gigabytes of CUDA libraries; a CPU
build that is already installed satisfies our range and is kept. An extra index would not do:
pip takes the highest version over all indexes, and that is the CUDA build.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import venv
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def has_gpu() -> bool:
    """Whether an NVIDIA driver answers on this machine."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    return subprocess.run([program, "-L"], capture_output=True, check=False).returncode == 0


def install(python: Path, *arguments: str) -> bool:
    """Run pip in the new environment; False when it fails."""
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    print("+ pip install", *arguments, flush=True)
    return subprocess.run(command, check=False).returncode == 0


def install_torch(python: Path, spec: str, index: str) -> None:
    """Install PyTorch from the chosen place, before anything else can pull its CUDA build."""
    if index not in {"", "auto"}:
        attempts = [["--index-url", index, spec]]
    elif index == "" or has_gpu() or sys.platform != "linux":
        attempts = [[spec]]  # the platform's own build is the right one, or the person chose
    else:
        # A wheel in a local directory (pip's find-links) needs no download at all; then the CPU
        # index. Never pip's default index: on Linux that is the CUDA build.
        attempts = [["--no-index", "--no-deps", spec], ["--index-url", CPU_INDEX, spec]]
    for attempt in attempts:
        if install(python, "--quiet", *attempt):
            return
    sys.exit(
        f"allograft: error: cannot install {spec}\n"
        "allograft: hint: give TORCH_SPEC (a version or a wheel file) and TORCH_INDEX (an index "
        "URL, or empty for pip's own configuration); see README, PyTorch without CUDA"
    )


def main() -> None:
    """Create the environment and install the project with its development tools."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--torch-index", default="auto")
    parser.add_argument("--torch-spec", default="torch")
    options = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036  (this file runs before anything checks it)
        sys.exit(
            "allograft: error: Python 3.11 or newer is needed\n"
            "allograft: hint: make PYTHON=/path/to/python3.11 ..."
        )
    python = options.venv / "bin" / "python"
    if not python.exists():
        venv.create(options.venv, with_pip=True)
    install_torch(python, options.torch_spec, options.torch_index)
    if not install(python, "--quiet", "-e", ".[all,dev]"):
        sys.exit("allograft: error: installation failed; pip's message is above")


if __name__ == "__main__":
    main()
