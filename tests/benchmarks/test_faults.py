"""Six runs of the fault campaign, one a kind, as `python -m benchmarks.faults` carries out hundreds."""

from __future__ import annotations

import random

from benchmarks.faults.__main__ import rows
from benchmarks.faults.campaign import Campaign
from benchmarks.faults.runs import Run, differences, step_of
from benchmarks.faults.settings import KINDS, SAVE_EVERY, STEPS, Plan, plan

STRUCK = {
    "kill": {"rank": 1, "saving": True},
    "preempt": {"rank": None, "saving": False},
    "disk": {},
    "damage": {},
    "reader": {},
    "hang": {"rank": 1, "saving": False},
}


def drawn(number: int, kind: str, rank: int | None = 0, saving: bool = False) -> Plan:
    return Plan(number, kind, "ddp", 2, "vit", 5, 0.0, saving, rank, random.Random(number))


def test_six_faults_and_the_same_command_gives_the_undisturbed_run(tmp_path):
    campaign = Campaign(tmp_path, seed=0)
    verdicts = [campaign.carry_out(drawn(i, kind, **how)) for i, (kind, how) in enumerate(STRUCK.items())]
    assert [(v["kind"], v["hit"], v["why"]) for v in verdicts] == [(kind, True, "") for kind in STRUCK]
    assert [v["codes"][0] for v in verdicts] == [137, 75, -9, -9, 2, 86]
    assert [campaign.verdict(i) for i in range(len(STRUCK))] == verdicts
    assert rows(verdicts)[-1] == {
        "kind": "all", "runs": 6, "hit": 6, "whole": 6,
        "ddp": 6, "fsdp2": 0, "zero1": 0, "zero2": 0, "zero3": 0, "failed": "-",
    }  # fmt: skip
    # what the verdict stands on sees a difference where there is one
    undisturbed = Run(campaign._recipe(drawn(9, "kill"), tmp_path / "undisturbed" / "vit-ddp-2"))
    last, before = step_of(undisturbed, STEPS), step_of(undisturbed, STEPS - SAVE_EVERY)
    assert not differences(last, last)
    assert len(differences(last, before)) > 20


def test_a_plan_is_drawn_from_seed_and_number_alone():
    def seen(seed: int) -> list[tuple]:
        plans = [plan(seed, number) for number in range(60)]
        return [(p.kind, p.backend, p.world, p.tower, p.step, p.delay_s, p.saving, p.rank) for p in plans]

    assert seen(0) == seen(0) != seen(1)
    assert {kind for kind, *_ in seen(0)} == set(KINDS)
