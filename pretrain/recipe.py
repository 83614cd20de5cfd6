"""A run as one typed, documented value: YAML file + ``key=value`` overrides, checked as a whole before anything starts.

Unknown keys are refused with the nearest right name. What an objective understands is declared in its own module
(`Options`) and checked by `pretrain.objectives.build`; everything else is here. torch is not imported.
"""

from __future__ import annotations

import difflib
import importlib.resources
import math
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pretrain.errors import UserError

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


class Part(BaseModel):
    """A section of the recipe: typed, closed, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class SourceRecipe(Part):
    """One set of shards."""

    shards: str | list[str]
    """A folder of tars, a glob, a brace expansion (`a-{000..009}.tar`), or a list of these."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the batch, relative to the other sources; null for all: in proportion to their samples."""


def _bare_path(value: Any) -> Any:
    return {"shards": value} if isinstance(value, str) else value


class SegmentRecipe(Part):
    """A change of the sources' weights during a run."""

    from_step: int = Field(ge=0)
    weights: list[float]


class DataRecipe(Part):
    """Where samples come from and how they are read."""

    sources: list[Annotated[SourceRecipe, BeforeValidator(_bare_path)]] = Field(min_length=1)
    segments: list[SegmentRecipe] = []
    """Weight changes, appended while the run goes on; what was seen stays as it was."""
    block: int | None = Field(default=None, ge=1)
    """Samples that lie together in a shard and are read at once; null: clamp(N / (16·lanes), 1, 256)."""
    window: int = Field(default=4096, ge=1)
    """Samples a lane shuffles among."""
    classes_per_batch: int | None = Field(default=None, ge=1)
    """P: every global batch holds P classes with global_batch / P samples each; null: the plain order."""
    threads: int = Field(default=2, ge=1)
    """Decoding threads a rank."""
    prefetch: int = Field(default=2, ge=1)
    """Batches prepared ahead a rank."""
    max_damaged: float = Field(default=0.01, ge=0, le=1)
    """Stop when more than this share of the samples is unreadable."""


class TextRecipe(Part):
    """The causal text tower; defaults are CLIP's base size."""

    width: int = Field(default=512, ge=1)
    layers: int = Field(default=12, ge=1)
    heads: int = Field(default=8, ge=1)
    context: int = Field(default=77, ge=3)
    """Longest caption in tokens, start and end included; longer ones are cut."""
    vocab: int = 49408
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_divide(self) -> TextRecipe:
        if self.width % self.heads:
            raise ValueError(f"text.width {self.width} must be a multiple of text.heads {self.heads}")
        return self


class ModelRecipe(Part):
    """The trunk: towers, preprocessing, initialisation. All of it is part of the fingerprint."""

    image: str = "vit_base_patch32_clip_224"
    """Any timm model name."""
    image_size: int = Field(default=224, ge=8)
    """Side of the square crop, pixels."""
    eval_resize: int | None = Field(default=None, ge=8)
    """Shortest side in pixels before the centre crop of image_size at evaluation; null: image_size itself, as CLIP.
    SwAV, DINO and tables of kNN have 256 for 224."""
    image_kwargs: dict[str, Any] = {}
    """Passed to timm (depth, dropout, …)."""
    text: TextRecipe | None = TextRecipe()
    """null for an image-only trunk."""
    embed_dim: int | None = Field(default=512, ge=1)
    """Width of the shared space. null: no projection, the embedding is the image tower's pooled features."""
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    """quick_gelu is what OpenAI's weights were trained with."""
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    sync_batchnorm: bool = True
    """BatchNorm over the global batch; without effect on towers that have none."""

    @model_validator(mode="after")
    def _fits_together(self) -> ModelRecipe:
        if self.embed_dim is None and self.text is not None:
            raise ValueError(
                "model.embed_dim null (no projection) goes with model.text null: a text tower needs a shared space"
            )
        if self.eval_resize is not None and self.eval_resize < self.image_size:
            raise ValueError(f"model.eval_resize {self.eval_resize} is less than model.image_size {self.image_size}")
        return self


class OptimizerRecipe(Part):
    """AdamW as CLIP used it, SGD, or LARS: of the trunk and of the objectives' own parameters alike."""

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    """lars: SGD with every tensor's gradient scaled to the tensor's length, as SwAV (apex's LARC, not clipped)."""
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
    """When to save."""

    every: int = Field(default=1000, ge=1)
    """Steps between saves; the last step is always saved."""
    keep_last: int = Field(default=3, ge=1)
    """Newest whole checkpoints kept."""
    keep_every: int | None = Field(default=None, ge=1)
    """Steps that are multiples of this are kept for good."""


class LogRecipe(Part):
    """What is written while the run goes on."""

    every: int = Field(default=10, ge=1)
    """Steps between lines of log.jsonl."""
    signals_every: int = Field(default=100, ge=1)
    """Steps between RankMe and embedding spread of the global batch."""
    tensorboard: bool = True


class Recipe(Part):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    output: Path
    """Run folder: recipe, log, checkpoints. The same folder resumes."""
    world: int | None = Field(default=None, ge=1)
    """Ranks this recipe needs; another number is refused. `python -m pretrain` alone starts that many here."""
    backend: Literal["ddp"] = "ddp"
    seed: int = Field(default=0, ge=0)
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps in all. Either this or `epochs`."""
    epochs: float | None = Field(default=None, gt=0)
    """Converted to ceil(epochs · samples / global_batch) steps."""
    global_batch: int = Field(ge=1)
    """Samples an optimizer step, over all ranks and micro-steps."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-steps a step. Exact: features are cached, the loss sees the whole batch."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast of the towers; losses and reductions stay fp32."""
    deterministic: bool = True
    """Only algorithms that give the same bits each time."""
    data: DataRecipe
    model: ModelRecipe = ModelRecipe()
    objectives: dict[str, float | dict[str, Any]] = Field(default={"clip": 1.0}, min_length=1)
    """Objective -> its weight, or a mapping of `weight` and its own options."""
    optimizer: OptimizerRecipe = OptimizerRecipe()
    schedule: ScheduleRecipe = ScheduleRecipe()
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    log: LogRecipe = LogRecipe()

    @model_validator(mode="after")
    def _as_a_whole(self) -> Recipe:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        if self.world:
            check_split(self.global_batch, self.world, self.accumulation)
        return self

    def total_steps(self, samples: int) -> int:
        """Optimizer steps of this run over `samples` samples an epoch."""
        return self.steps or math.ceil(self.epochs * samples / self.global_batch)  # type: ignore[operator]


def check_split(global_batch: int, world: int, accumulation: int) -> None:
    """ValueError with the nearest batches that work, unless the batch divides into equal micro-batches."""
    unit = world * accumulation
    if global_batch % unit:
        below, above = global_batch // unit * unit, -(-global_batch // unit) * unit
        near = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"global_batch {global_batch} must be a multiple of world {world} x accumulation {accumulation}; try {near}"
        )


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe of a file, or of a shipped recipe's name, with ``key.sub=value`` overrides applied.

    Raises:
        UserError: no such recipe, not YAML, an unknown key (with the nearest name), a wrong value.
    """
    text, where = _read(path)
    try:
        data = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{where}: a recipe is a mapping of keys to values, not {type(data).__name__}")
    for override in overrides or []:
        _override(data, override)
    return parse_recipe(data, where)


def parse_recipe(data: dict[str, Any], where: str) -> Recipe:
    """`data` as a checked Recipe; `where` names it in errors."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{where}:\n" + "\n".join(f"  {_explain(e)}" for e in error.errors())) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` reads it back to an equal value."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(f.name[:-5] for f in importlib.resources.files("recipes").iterdir() if f.name.endswith(".yaml"))


def _read(path: str | Path) -> tuple[str, str]:
    if Path(path).is_file():
        return Path(path).read_text(), str(path)
    shipped = importlib.resources.files("recipes") / f"{path}.yaml"
    if shipped.is_file():
        return shipped.read_text(), f"recipe {path}"
    near = difflib.get_close_matches(str(path), shipped_recipes(), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"no recipe {path}: neither a file nor one of {', '.join(shipped_recipes())}{hint}")


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not key=value (for example optimizer.lr=1e-3)")
    *parents, last = key.split(".")
    for parent in parents:
        data = _descend(data, parent, override)
    if isinstance(data, list):
        data[_position(data, last, override)] = _scalar(value)
    else:
        data[last] = _scalar(value)


def _descend(data: Any, part: str, override: str) -> Any:
    key: Any = _position(data, part, override) if isinstance(data, list) else part
    held = data[key] if isinstance(data, list) else data.get(key)
    if not isinstance(held, dict | list):  # a plain value (a source's bare path) gives way to the section
        data[key] = {}
    return data[key]


def _position(data: list, part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(data):
        raise UserError(f"override {override!r}: {part!r} is no position in a list of {len(data)}")
    return int(part)


def _scalar(value: str) -> Any:
    parsed = yaml.safe_load(value)
    if isinstance(parsed, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            return float(parsed)
        except ValueError:
            return parsed
    return parsed


def _explain(error: Any) -> str:
    location = ".".join(str(part) for part in error["loc"]) or "recipe"
    if error["type"] == "extra_forbidden":
        *parents, key = error["loc"]
        near = difflib.get_close_matches(str(key), _fields(parents), n=1, cutoff=0.5)
        return f"unknown key {location}" + (
            f"; did you mean {near[0]}?" if near else f"; known: {', '.join(_fields(parents))}"
        )
    message = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) or given is None else ""
    return f"{location}: {message}{shown if error['type'] != 'missing' else ''}"


def _fields(parents: list) -> list[str]:
    part: Any = Recipe
    for name in parents:
        if isinstance(name, int):
            continue
        part = next((t for t in _types(part.model_fields[name].annotation) if hasattr(t, "model_fields")), part)
    return list(part.model_fields)


def _types(annotation: Any) -> list[Any]:
    inner = get_args(annotation)
    return [annotation] if not inner else [t for a in inner for t in _types(a)]
