"""Compiler launcher of the CUDA sources: runs the command, keeps what ptxas says of each kernel as <object>.report."""

import subprocess
import sys
from pathlib import Path

command = sys.argv[1:]
run = subprocess.run(command, capture_output=True, text=True)
report = [line for line in run.stderr.splitlines() if line.strip()]
if run.returncode == 0 and "-o" in command and "-c" in command:
    Path(command[command.index("-o") + 1] + ".report").write_text("\n".join(report) + "\n")
elif run.returncode:
    sys.stderr.write(run.stderr)
sys.stdout.write(run.stdout)
sys.exit(run.returncode)
