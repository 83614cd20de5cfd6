"""Is any hour lost? Real runs on 2 or 3 ranks, disturbed once each, taken up again by the same command, and compared.

    python -m benchmarks.faults [--runs 200] [--seed 0] [--kinds kill …] [--backends ddp …] [--json PATH]

A run draws from (seed, its number) what strikes it and when: SIGKILL of a rank or the launcher, also in the middle of
a save; SIGTERM, SIGUSR1 or SIGUSR2; a full disk; a torn or flipped checkpoint; a NaN under each policy; a shard cut
short; a rank that hangs. Afterwards weights, optimizer and objectives must be bit for bit those of the undisturbed run
(or of the run that the policy states), the exit codes those that are documented, and nothing that was saved lost.
Verdicts are kept under --work: what is done is not repeated, of what failed everything stays there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import report
from benchmarks.faults.settings import KINDS, plan
from pretrain.backend_names import BACKENDS


def main() -> int:
    args = arguments().parse_args()
    sys.argv[0] = "faults"  # what the JSON calls the command
    from benchmarks.faults.campaign import Campaign

    campaign, verdicts = Campaign(args.work, args.seed), []
    for number in range(args.runs):
        drawn = plan(args.seed, number)
        if drawn.kind not in args.kinds or drawn.backend not in args.backends:
            continue
        verdict = campaign.verdict(number)
        if verdict is None or (args.again and not verdict["whole"]):
            verdict = campaign.carry_out(drawn)
            print(_line(verdict), flush=True)
        verdicts.append(verdict)
    failed = [v for v in verdicts if not v["whole"]]
    if verdicts:
        report("runs disturbed once, and taken up again", rows(verdicts), args)
    for verdict in failed:
        print(f"{_line(verdict)}; {campaign.work}", file=sys.stderr)
    return 1 if failed else 0


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m benchmarks.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--runs", type=int, default=200)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="only runs that drew one of these")
    p.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS, help="only runs that drew one of these")
    p.add_argument("--again", action="store_true", help="repeat those that failed")
    p.add_argument("--work", type=Path, default=Path("runs/faults"), help="data, runs and verdicts are kept here")
    p.add_argument("--json", type=Path, help="write the figures, versions and command here")
    return p


def rows(verdicts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a kind: runs, how many were struck before their end, how many came out whole; by backend, and in all."""
    found = []
    for kind in [*KINDS, "all"]:
        of_kind = [v for v in verdicts if kind in (v["kind"], "all")]
        if of_kind:
            counted = {"runs": len(of_kind)} | {name: sum(v[name] for v in of_kind) for name in ("hit", "whole")}
            by_backend = {b: sum(v["backend"] == b for v in of_kind) for b in BACKENDS}
            failed = " ".join(str(v["number"]) for v in of_kind if not v["whole"]) or "-"
            found.append({"kind": kind, **counted, **by_backend, "failed": failed})
    return found


def _line(verdict: dict[str, Any]) -> str:
    shown = "whole" if verdict["whole"] else f"FAILED: {verdict['why']}"
    what = " ".join(str(verdict[key]) for key in ("kind", "backend", "world", "tower", "codes", "seconds"))
    return f"run {verdict['number']} of seed {verdict['seed']}: {what}{'' if verdict['hit'] else ' (not hit)'}: {shown}"


if __name__ == "__main__":
    sys.exit(main())
