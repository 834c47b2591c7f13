"""Two processes of one script, started by accelerate."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# --multi_gpu starts the processes, whether there are GPUs or not; with --cpu accelerate starts
# one alone
OPTIONS = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
WITHOUT_GPUS = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(script: Path, folder: Path) -> subprocess.CompletedProcess:
    """Run a script with this folder as its argument, as processes 0 and 1 of 2."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", *OPTIONS.split()]
    return subprocess.run(
        [*command, "--main_process_port", str(port), script, folder],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | WITHOUT_GPUS,
    )
