"""What Slurm is told of a pipeline: jobs for what is neither done nor under way, and how all of it stands."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pretrain.errors import UserError
from pretrain.exit_codes import CRASHED, DONE
from slurm import ledger, queue
from slurm.pipeline import Pipeline, send_parts
from slurm.stages import TRAIN, Stage
from slurm.submit import submit

POLL_S = 5.0


@dataclass
class Line:
    """A stage in the table."""

    stage: str
    state: str
    jobs: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    """Stages that it waits for."""
    before: str = ""
    """How the job that it was sent as before has ended, when it is sent again."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def send_left(pipeline: Pipeline) -> list[Line]:
    """Send what is neither done nor under way; the table of all stages.

    Raises:
        UserError: Slurm refuses a job, or a stage runs that the command would have otherwise.
    """
    with pipeline.held():
        left = pipeline.left()
        settled = ledger.settled(lambda jobs: _jobs(pipeline, jobs))
        queued = {job.job: job for job in _jobs(pipeline, settled)}
        jobs: dict[str, list[str]] = {}
        lines = []
        for stage in pipeline.stages:
            after = [job for need in stage.needs for job in jobs.get(need, ())]
            line = Line(stage.name, "done")
            if left[stage.name]:
                do = _send_training if stage.name == TRAIN else _send_stage
                line = do(pipeline, stage, left[stage.name], after, queued)
                jobs[stage.name] = line.jobs
                line.after = [need for need in stage.needs if left[need]]
            lines.append(line)
        return lines


def _jobs(pipeline: Pipeline, jobs: queue.Jobs) -> list[queue.Queued]:
    """Those of its stages, training among them."""
    return jobs.about(pipeline.out) + jobs.of(pipeline.run)


def _send_training(
    pipeline: Pipeline, stage: Stage, left: list[int], after: list[str], queued: dict[str, queue.Queued]
) -> Line:
    before = ledger.how_ended(pipeline.run / "slurm")
    for job in queue.of_run(pipeline.run, queued.values()):
        return Line(TRAIN, _told([job], stage), [job.job])
    job_id = submit(pipeline.work(stage, left), "slurm").job_id
    return Line(TRAIN, "sent", [job_id], before=list(before.values())[-1] if before else "")


def _send_stage(
    pipeline: Pipeline, stage: Stage, left: list[int], after: list[str], queued: dict[str, queue.Queued]
) -> Line:
    newest, ended = ledger.newest(pipeline.folder), ledger.how_ended(pipeline.folder)
    sent = {part: newest[stage.name, part] for part in left if (stage.name, part) in newest}
    under_way = {part: queued[job.job] for part, job in sent.items() if job.job in queued}
    stale = [part for part, job in under_way.items() if _stale(stage, sent[part], after, job)]
    if stale:
        queue.ask("scancel", *(under_way.pop(part).job for part in stale))
    missing = [part for part in left if part not in under_way]
    told = _told(list(under_way.values()), stage, stage.parts - len(left))
    jobs = _arrays([sent[part] for part in under_way])
    if not missing:
        return Line(stage.name, told, jobs)
    job = send_parts(pipeline.work(stage, missing, after), stage, missing, "slurm").job_id
    before = {ended.get(sent[part].job, "cancelled") for part in missing if part in sent and part not in stale}
    said = f"sent {len(missing)}" if stage.parts > 1 else "sent"
    return Line(
        stage.name, ", ".join(filter(None, (told, said))), [*jobs, ledger.array(job)], before=", ".join(sorted(before))
    )


def _stale(stage: Stage, sent: ledger.Sent, after: Sequence[str], job: queue.Queued) -> bool:
    """Whether a job in the queue is none of this command, or waits for what has failed."""
    if sent.argv != stage.command and job.state != "PENDING":
        raise UserError(
            f"stage {stage.name} runs as job {job.job} with other arguments: {' '.join(sent.argv)}. Let it end, or end "
            f"it: scancel {job.job}"
        )
    covered = all(need in sent.after or ledger.array(need) in sent.after for need in after)
    hopeless = job.reason == "DependencyNeverSatisfied" or not covered
    return job.state == "PENDING" and (sent.argv != stage.command or hopeless)


def _arrays(sent: Sequence[ledger.Sent]) -> list[str]:
    """Their jobs, an array in one word where all of its elements are meant."""
    meant = Counter(ledger.array(one.job) for one in sent)
    whole = {array for one in sent if meant[array := ledger.array(one.job)] == one.among}
    return list(dict.fromkeys(array if (array := ledger.array(one.job)) in whole else one.job for one in sent))


def _told(jobs: Sequence[queue.Queued], stage: Stage, done: int = 0) -> str:
    """What is under way of a stage, in words."""
    if stage.parts == 1:
        return "".join(f"{job.state.lower()}" + (f" ({job.reason})" if job.state == "PENDING" else "") for job in jobs)
    counted = {state: sum(job.state == state for job in jobs) for state in {job.state: None for job in jobs}}
    words = [f"{count} {state.lower()}" for state, count in counted.items()]
    return ", ".join(([f"{done} of {stage.parts} done"] if done else []) + words)


def wait_for(pipeline: Pipeline, say: Callable[[str], None]) -> int:
    """Until none of its jobs is in the queue; 0 when all is done. Tells of every stage that is."""
    before = pipeline.left()
    while _jobs(pipeline, queue.Jobs(queue.queued())):
        left = pipeline.left()
        for stage, parts in left.items():
            if before[stage] and not parts:
                say(f"{stage}: done")
        before = left
        time.sleep(POLL_S)
    return CRASHED if any(pipeline.left().values()) else DONE


def ends(pipeline: Pipeline) -> list[Line]:
    """The table when nothing is under way."""
    return [_end(pipeline, stage, parts) for stage, parts in zip(pipeline.stages, pipeline.left().values())]


def _end(pipeline: Pipeline, stage: Stage, left: Sequence[int]) -> Line:
    if not left:
        return Line(stage.name, "done")
    if stage.name == TRAIN:
        ended = ledger.how_ended(pipeline.run / "slurm")
        jobs = list(ended)[-1:]
    else:
        ended, newest = ledger.how_ended(pipeline.folder), ledger.newest(pipeline.folder)
        jobs = [newest[stage.name, part].job for part in left if (stage.name, part) in newest]
    told = sorted({ended[job] for job in jobs if job in ended})  # those that never began were waiting for others
    return Line(stage.name, f"not done: {', '.join(told)}" if told else "not done", jobs)
