"""The text of Slurm's configuration files, as a function of what the cluster is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.cluster.network import Network

CLUSTER = "polyview"
MEMORY_MB = 16000
"""What every node says it has: nothing holds a job to it."""


@dataclass(frozen=True)
class Layout:
    """Where the files of a cluster are, how its nodes are named and what is in them."""

    folder: Path
    network: Network
    host: str
    """This machine's short name, under which the controller and the database run."""
    nodes: int
    cpus: int
    gpus: int

    @property
    def names(self) -> list[str]:
        return [f"n{i}" for i in range(1, self.nodes + 1)]

    @property
    def controller_port(self) -> int:
        return self.network.ports[0]

    @property
    def node_port(self) -> int:
        return self.network.ports[1]

    @property
    def accounting_port(self) -> int:
        return self.network.ports[2]

    @property
    def sql_port(self) -> int:
        return self.network.ports[3]


def files(layout: Layout) -> dict[str, str]:
    """Name -> text of all that goes into the cluster's etc/."""
    texts = {"slurm.conf": slurm_conf(layout), "slurmdbd.conf": slurmdbd_conf(layout), "hosts": hosts(layout)}
    if layout.gpus:
        devices = f"{layout.folder}/dev/nvidia[0-{layout.gpus - 1}]"
        texts["gres.conf"] = f"NodeName={','.join(layout.names)} Name=gpu File={devices}\n"
    return texts


def hosts(layout: Layout) -> str:
    lines = ["127.0.0.1 localhost", f"{layout.network.gateway} {layout.host}"]
    lines += [f"{layout.network.address(i)} {name}" for i, name in enumerate(layout.names, start=1)]
    return "\n".join(lines) + "\n"


def slurm_conf(layout: Layout) -> str:
    """Times are short, so that a test need not wait for what a real cluster is patient with."""
    folder, network = layout.folder, layout.network
    gres = f"Gres=gpu:{layout.gpus} " if layout.gpus else ""
    resources = f"CPUs={layout.cpus} RealMemory={MEMORY_MB} {gres}State=UNKNOWN"
    nodes = "\n".join(
        f"NodeName={name} NodeAddr={network.address(i)} Port={layout.node_port} {resources}"
        for i, name in enumerate(layout.names, start=1)
    )
    partition = f"Nodes={','.join(layout.names)} MaxTime=INFINITE DefMemPerCPU=200 State=UP"
    return f"""\
ClusterName={CLUSTER}
SlurmctldHost={layout.host}({network.gateway})
SlurmctldPort={layout.controller_port}
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/state/slurmctld.pid
SlurmdPidFile={folder}/state/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
MailProg=/bin/true

# a munge of its own; a requeued job is not begun before its first credential has run out, by default two minutes later
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5

# no cgroups: this machine's are not ours. The nodes claim more cores than it has
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
{"GresTypes=gpu" if layout.gpus else ""}

SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=0,batch_sched_delay=0,bf_interval=2
SlurmctldTimeout=10
SlurmdTimeout=6
MessageTimeout=5
TCPTimeout=2
KillWait=3
UnkillableStepTimeout=20
CompleteWait=0
JobRequeue=1
ReturnToService=2
PropagateResourceLimits=NONE

# a job that is preempted gets the signal it asked for, and GraceTime, before it is requeued
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptExemptTime=0
SlurmctldParameters=preempt_send_user_signal

AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={network.gateway}
AccountingStoragePort={layout.accounting_port}
AccountingStoragePass={folder}/munge.sock
AccountingStoreFlags=job_comment,job_env,job_script
{"AccountingStorageTRES=gres/gpu" if layout.gpus else ""}
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.log

{nodes}
PartitionName=main {partition} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high {partition} PriorityTier=10 PreemptMode=OFF
"""


def slurmdbd_conf(layout: Layout) -> str:
    folder, network = layout.folder, layout.network
    return f"""\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
DbdHost={layout.host}
DbdAddr={network.gateway}
DbdPort={layout.accounting_port}
SlurmUser=root
DebugLevel=verbose
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/state/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost={network.gateway}
StoragePort={layout.sql_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
CommitDelay=1
"""
