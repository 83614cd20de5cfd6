"""sbatch, squeue and scancel that keep what they are told and answer as Slurm 22.05 does; they run nothing.

What a queue holds is a line a job, in the format that `slurm.queue` asks for.
"""

from __future__ import annotations

import os
from pathlib import Path

SBATCH = r"""#!/bin/sh
cd {folder}
id=$(($(ls sent | wc -l) + 1))
cp "$1" sent/$id.sh
about=$(sed -n "s/^#SBATCH --comment=//p" "$1" | tr -d "'")
name=$(sed -n "s/^#SBATCH --job-name=//p" "$1")
last=$(sed -n "s/^#SBATCH --array=0-\([0-9]*\).*/\1/p" "$1")
if [ -z "$last" ]; then elements=$id; else elements=$(seq -f "${{id}}_%g" 0 $last); fi
for job in $elements; do
  echo "$job|PENDING|Priority|1||0:00|1:00:00|N/A|$name|$about" >> queue
done
echo "Submitted batch job $id"
"""
SQUEUE = "#!/bin/sh\ncat {folder}/queue\n"
SCANCEL = r"""#!/bin/sh
for job; do
  echo $job >> {folder}/cancelled
  sed -i -e "/^$job|/d" -e "/^${{job}}_/d" {folder}/queue
done
"""


class FakeSlurm:
    """On PATH of this process, as a fixture makes it; its state is in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "bin").mkdir(parents=True)
        (folder / "sent").mkdir()
        (folder / "queue").touch()
        (folder / "cancelled").touch()
        for name, text in {"sbatch": SBATCH, "squeue": SQUEUE, "scancel": SCANCEL, "srun": "#!/bin/sh\n"}.items():
            (folder / "bin" / name).write_text(text.format(folder=folder))
            (folder / "bin" / name).chmod(0o755)
        self.path = f"{folder}/bin:{os.defpath}"

    def sent(self) -> list[str]:
        """Every script that sbatch was given; job N is the Nth."""
        return [file.read_text() for file in sorted(self._folder.glob("sent/*"), key=lambda file: int(file.stem))]

    def cancelled(self) -> list[str]:
        return (self._folder / "cancelled").read_text().split()

    def drop(self, *jobs: str) -> None:
        """They have left the queue."""
        lines = self._lines()
        self._write([line for line in lines if line.partition("|")[0] not in jobs])

    def run(self, *jobs: str) -> None:
        """They run."""
        self._replace(jobs, "|PENDING|Priority|1||", "|RUNNING|None|1|n1|")

    def strand(self, *jobs: str) -> None:
        """They wait for what has failed, on a site that leaves such jobs in the queue."""
        self._replace(jobs, "|Priority|", "|DependencyNeverSatisfied|")

    def _replace(self, jobs: tuple[str, ...], old: str, new: str) -> None:
        self._write([
            line.replace(old, new) if line.partition("|")[0] in jobs else line for line in self._lines()
        ])  # fmt: skip

    def _lines(self) -> list[str]:
        return (self._folder / "queue").read_text().splitlines()

    def _write(self, lines: list[str]) -> None:
        (self._folder / "queue").write_text("".join(f"{line}\n" for line in lines))
