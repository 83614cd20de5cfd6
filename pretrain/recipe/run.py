"""The recipe's sections that say how a run goes: optimizer, schedule, first weights, average, checkpoints, log."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from pretrain.recipe.base import Part


class OptimizerRecipe(Part):
    """AdamW as CLIP used it, SGD, LARS or Muon: of the trunk and of the objectives' own parameters alike."""

    name: Literal["adamw", "sgd", "lars", "muon"] = "adamw"
    """lars: SGD with every tensor's gradient scaled to the tensor's length, as SwAV (apex's LARC, not clipped). muon:
    for the matrices of the towers' blocks; AdamW for everything else, embeddings and projections too."""
    lr: float = Field(default=5e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's."""
    eps: float = 1e-6
    """AdamW's."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of sgd and lars; the learning rate is outside of it, as torch has it."""
    nesterov: bool = False
    """Of sgd and lars: look one step of momentum ahead."""
    trust_coefficient: float = Field(default=0.001, gt=0)
    """Of lars: length of an update, relative to the tensor, at learning rate 1."""
    weight_decay: float = Field(default=0.2, ge=0)
    """Decoupled in adamw; in sgd and lars it is added to the gradient."""
    weight_decay_final: float | None = Field(default=None, ge=0)
    """Half a cosine from weight_decay to this over the run, as DINO; null: constant."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Learning rate of a tower's block n of N is lr · layer_decay^(N - n): the deeper a layer lies, the less weights
    that were brought along are moved (BEiT, Bao et al. 2022). 1: all alike."""
    exclude_vectors: bool = True
    """Norms, biases and scalars are neither decayed nor, under lars, adapted. SwAV's own runs have false."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest joint gradient norm of trunk and objectives; null: no clipping."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> OptimizerRecipe:
        if self.nesterov and not self.momentum:
            raise ValueError("optimizer.nesterov needs optimizer.momentum above 0")
        return self


class ScheduleRecipe(Part):
    """Learning rate by step: linear warm-up, then half a cosine to `final`."""

    warmup_steps: int = Field(default=0, ge=0)
    warmup_start: float | None = Field(default=None, ge=0, le=1)
    """Share of the peak at step 0; the warm-up then is np.linspace(start, peak, warmup_steps), both ends included, as
    SwAV. null: peak/warmup_steps at step 0, as CLIP."""
    final: float = Field(default=0.0, ge=0, le=1)
    """Share of the peak reached at the last step."""


class CheckpointRecipe(Part):
    """When to save, and where."""

    every: int = Field(default=1000, ge=1)
    """Steps between saves; the last step is always saved."""
    keep_last: int = Field(default=3, ge=1)
    """Newest whole checkpoints kept."""
    keep_every: int | None = Field(default=None, ge=1)
    """Steps that are multiples of this are kept for good."""
    to: str | None = None
    """Another folder, or a URL that fsspec opens (`s3://bucket/run`, `gs://…`), for this run alone; null: `checkpoints`
    in the run's own folder."""
    lost: int | None = Field(default=None, ge=1)
    """The step of a checkpoint that is lost for good: the run goes on from the one before. Without this it does not, as
    long as its log tells of one that is nowhere to be found."""


class WandbRecipe(Part):
    """Weights & Biases, beside the run's own log; a resumed run goes on in the same place."""

    project: str
    mode: Literal["online", "offline"] = "online"
    entity: str | None = None


class LogRecipe(Part):
    """What is written while the run goes on."""

    every: int = Field(default=10, ge=1)
    """Steps between lines of log.jsonl."""
    signals_every: int = Field(default=100, ge=1)
    """Steps between RankMe and embedding spread of the global batch."""
    tensorboard: bool = True
    wandb: WandbRecipe | None = None
    """null: not used. Needs `pip install wandb`."""
    page_every: int = Field(default=100, ge=1)
    """Steps between new versions of the run's page, RUN/index.html; it is written at each save and end too."""


class InitRecipe(Part):
    """Weights that a new run starts from; a resumed run has its own."""

    weights: Path
    """A weight file, a Hugging Face model folder, or a run of ours."""
    format: Literal["auto", "native", "open_clip", "hf", "timm", "swav", "dino"] = "auto"
    """auto: told by the names of the tensors. OpenAI's files are `open_clip`; `dino` is DINO and DINOv2."""
    of: Literal["model", "teacher", "ema"] = "model"
    """Of a run of ours, or of a DINO checkpoint with both: which weights."""


class EmaRecipe(Part):
    """A running average of the weights, kept beside them for evaluation and export; it trains nothing."""

    decay: float = Field(default=0.9999, ge=0, lt=1)
    """How much of the average stays at each step."""
    warmup: bool = True
    """min(decay, (1 + step) / (10 + step)): an average of the first steps forgets where it began."""


class ShardingRecipe(Part):
    """How fsdp2 and zero1-3 spread the trunk; ddp has no use for it."""

    within: int | None = Field(default=None, ge=1)
    """fsdp2: ranks that share one copy of the weights (those of a node, say), replicated over groups of so many
    (hybrid sharding); null: all ranks share one copy."""
    offload: bool = False
    """Optimizer state in host memory (zero1-3), with fsdp2 and zero3 the weights too."""
    reshard_after_forward: bool = True
    """fsdp2: gather a block's weights again for the backward. false: faster, and whole weights stay in between."""


class ComputeRecipe(Part):
    """How the towers are computed. What comes out is the same up to rounding."""

    checkpoint_blocks: bool = False
    """Keep only what enters a block, and compute its inside again in the backward: a quarter or less of the
    activations for a third more time (Chen et al. 2016)."""
    attention: Literal["auto", "flash", "efficient", "cudnn", "math"] = "auto"
    """Kernel of scaled_dot_product_attention; auto: torch's choice."""
    compile: bool = False
    """torch.compile, block by block; the first steps take minutes."""
    channels_last: bool = True
    """Memory layout of convolutional towers."""


class FaultsRecipe(Part):
    """What is done when something goes wrong."""

    nan: Literal["raise", "skip", "rewind"] = "raise"
    """A loss or gradient that is not finite. raise: stop, nothing touched. skip: leave that step out, weights and state
    as they were. rewind: go back to the newest checkpoint and on without the batches from there to the bad one."""
    max_nan: int = Field(default=10, ge=1)
    """Skips and rewinds in a run before it stops all the same."""
    spike: float | None = Field(default=None, gt=0)
    """A loss this many median deviations above the median of the last `spike_window` steps is a spike: its sample ids
    are written to RUN/spikes.jsonl. null: not looked for."""
    spike_window: int = Field(default=100, ge=10)
    hang_s: float | None = Field(default=1800, gt=0)
    """Seconds without progress after which a rank writes the stacks of all its threads and ends; null: never."""
    heartbeat_s: float = Field(default=10, gt=0)
    """Seconds between a rank's signs of life in RUN/heartbeat."""
    straggler: float = Field(default=1.25, gt=1)
    """Name a rank whose own part of a step takes this many times the median of all ranks."""
    max_crashes: int = Field(default=5, ge=1)
    """Starts from one and the same step that ended in a crash, after which another is refused."""


class EvaluateRecipe(Part):
    """Evaluation while the run goes on, on all ranks."""

    every: int = Field(ge=1)
    """Steps between evaluations; the last step is evaluated too. A signal that comes meanwhile ends it."""
    shards: str
    """Shards that are evaluated: a folder of tars, as in data.sources."""
    train: str | None = None
    """Labelled shards that kNN votes with; needed by knn."""
    tasks: list[Literal["knn", "retrieval", "zeroshot", "rankme"]] = Field(default=["rankme"], min_length=1)
    samples: int | None = Field(default=5000, ge=1)
    """The first so many of each; null: all."""
    weights: Literal["model", "teacher", "ema"] = "model"
    """Which weights are evaluated."""
