"""What `accelerate launch` was configured to do, taken over into the recipe or refused by name.

accelerate's launcher turns its config file into variables of the environment. A recipe that leaves `backend`,
`precision` or `sharding` to it takes theirs; what a recipe says itself must agree. What nothing here would do is
refused with the key of the config file and what to write instead: a run never silently does something else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.errors import UserError
from pretrain.recipe import Recipe

Environ = Mapping[str, str]

_FOLLOWED = {"backend", "precision", "sharding.within", "sharding.offload", "sharding.reshard_after_forward"}
_NOTHING = ("", "none", "auto", "false", "no")
"""How the launcher says that a key was left out or asks for nothing."""


class Wish(NamedTuple):
    """A line of the accelerate config, and the value of the recipe that does the same."""

    said: str
    key: str
    value: Any


def resolve(recipe: Recipe, environ: Environ) -> Recipe:
    """`recipe` with a concrete backend, precision and sharding, as the launcher's environment asks, else ddp in fp32.

    Raises:
        UserError: the accelerate config contradicts the recipe, or asks for what is not done here.
    """
    _check_launcher(environ)
    for wish in _wishes(environ):
        recipe = _follow(recipe, wish)
    rest = {"backend": "ddp", "precision": "fp32"}
    return recipe.model_copy(update={key: value for key, value in rest.items() if getattr(recipe, key) == "auto"})


def _follow(recipe: Recipe, wish: Wish) -> Recipe:
    section, _, name = wish.key.rpartition(".")
    part: Any = getattr(recipe, section) if section else recipe
    own = getattr(part, name)
    if wish.value in (own, type(part).model_fields[name].default):  # the launcher says its defaults too
        return recipe
    if wish.key not in _FOLLOWED or (name in part.model_fields_set and own != "auto"):
        raise UserError(
            f"the accelerate config asks for {wish.said}, the recipe has {wish.key}: {_yaml(own)}; make them equal: "
            f"{wish.key}={_yaml(wish.value)} in the recipe, or another value (or none) in the config"
        )
    changed = part.model_copy(update={name: wish.value})
    return recipe.model_copy(update={section: changed}) if section else changed


def _wishes(environ: Environ) -> Iterator[Wish]:
    if _asked(environ, "ACCELERATE_USE_FSDP"):
        yield from _fsdp(environ)
    if _asked(environ, "ACCELERATE_USE_DEEPSPEED"):
        yield from _deepspeed(environ)
    if _asked(environ, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        yield from _parallelism(environ)
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision == "fp8":
        raise _refused("mixed_precision: fp8", "mixed_precision: bf16")
    if precision != "no":
        yield Wish(f"mixed_precision: {precision}", "precision", precision)


def _check_launcher(environ: Environ) -> None:
    if _asked(environ, "ACCELERATE_USE_MEGATRON_LM"):
        raise _refused("distributed_type: MEGATRON_LM", "distributed_type: FSDP, DEEPSPEED or MULTI_GPU")
    if _asked(environ, "ACCELERATE_DYNAMO_BACKEND"):
        said = f"dynamo_backend: {environ['ACCELERATE_DYNAMO_BACKEND']}"
        raise _refused(said, "nothing there, and compute.compile: true in the recipe")
    if _asked(environ, "ACCELERATE_CPU_AFFINITY"):
        raise _refused("enable_cpu_affinity: true", "enable_cpu_affinity: false")


# ---- FSDP

_FSDP_LEFT_OUT: dict[str, tuple[tuple[str, ...], str]] = {
    "FSDP_AUTO_WRAP_POLICY": (("", "TRANSFORMER_BASED_WRAP"), "TRANSFORMER_BASED_WRAP: blocks are wrapped one by one"),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": (("",), "nothing: blocks are found by themselves"),
    "FSDP_BACKWARD_PREFETCH": (("", "BACKWARD_PRE"), "BACKWARD_PRE: FSDP2 always does"),
    "FSDP_FORWARD_PREFETCH": (("false",), "false"),
    "FSDP_STATE_DICT_TYPE": (("", "SHARDED_STATE_DICT"), "SHARDED_STATE_DICT: every rank saves its rows"),
    "FSDP_USE_ORIG_PARAMS": (("true",), "true: it is a choice of version 1"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": (("false",), "false"),
    "FSDP_IGNORED_MODULES": (("",), "nothing"),
}
"""Variable -> (values that ask for what is done anyway, what to write instead of others)."""
_FSDP_KNOWN = {
    "FSDP_VERSION", "FSDP_SHARDING_STRATEGY", "FSDP_RESHARD_AFTER_FORWARD", "FSDP_OFFLOAD_PARAMS",
    "FSDP_ACTIVATION_CHECKPOINTING",
    "FSDP_MIN_NUM_PARAMS",  # of a policy that is refused
    "FSDP_CPU_RAM_EFFICIENT_LOADING", "FSDP_SYNC_MODULE_STATES",  # all ranks start alike without either
    *_FSDP_LEFT_OUT,
}  # fmt: skip

_STRATEGIES = {
    "SHARD_GRAD_OP": "fsdp_reshard_after_forward: false",
    "HYBRID_SHARD": "nothing there, and sharding.within (the ranks of a node) in the recipe",
    "NO_SHARD": "distributed_type: MULTI_GPU",
}


def _fsdp(environ: Environ) -> Iterator[Wish]:
    set_ = {name: value for name, value in environ.items() if name.startswith("FSDP_")}
    if set_.get("FSDP_VERSION", "1") != "2":
        raise _refused(f"fsdp_version: {set_.get('FSDP_VERSION', '1')}", "fsdp_version: 2")
    for name, value in set_.items():
        allowed, instead = _FSDP_LEFT_OUT.get(name, ((), "nothing"))
        if name not in _FSDP_KNOWN or (allowed and value.lower() not in (*map(str.lower, allowed), "none")):
            raise _refused(f"{name.lower()}: {value}", instead)
    if (strategy := set_.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD")) not in ("FULL_SHARD", "1"):
        raise _refused(f"fsdp_sharding_strategy: {strategy}", _STRATEGIES.get(strategy, "FULL_SHARD"))
    yield Wish("distributed_type: FSDP", "backend", "fsdp2")
    for name, key in (
        ("RESHARD_AFTER_FORWARD", "sharding.reshard_after_forward"),
        ("OFFLOAD_PARAMS", "sharding.offload"),
    ):
        if f"FSDP_{name}" in set_:
            value = set_[f"FSDP_{name}"].lower()
            if value not in ("true", "false"):
                raise _refused(f"fsdp_{name.lower()}: {value}", "true or false")
            yield Wish(f"fsdp_{name.lower()}: {value}", key, value == "true")
    if _asked(set_, "FSDP_ACTIVATION_CHECKPOINTING"):
        yield Wish("fsdp_activation_checkpointing: true", "compute.checkpoint_blocks", True)


def _parallelism(environ: Environ) -> Iterator[Wish]:
    sizes = {
        name.removeprefix("PARALLELISM_CONFIG_"): int(value)
        for name, value in environ.items()
        if name.startswith("PARALLELISM_CONFIG_") and name.endswith("_SIZE")
    }
    shard, replicate = sizes.pop("DP_SHARD_SIZE", 1), sizes.pop("DP_REPLICATE_SIZE", 1)
    for name, size in sizes.items():
        if size > 1:
            raise _refused(f"parallelism_config_{name.lower()}: {size}", "1: only the batch is divided")
    if replicate > 1:
        yield Wish(f"parallelism_config_dp_shard_size: {shard}", "sharding.within", shard)


# ---- DeepSpeed


def _deepspeed(environ: Environ) -> Iterator[Wish]:
    if file := environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "").replace("none", ""):
        yield from _deepspeed_file(Path(file))
        return

    def get(name: str) -> str:
        return environ.get(f"ACCELERATE_{name}", "none").lower()

    for name, key, instead in (
        ("DEEPSPEED_ZERO3_INIT", "zero3_init_flag", "false: every rank builds the towers, then keeps its part"),
        ("DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "zero3_save_16bit_model", "false: `polyview export` writes weights"),
        ("DEEPSPEED_MOE_LAYER_CLS_NAMES", "deepspeed_moe_layer_cls_names", "nothing"),
    ):
        if get(name) not in _NOTHING:
            raise _refused(f"{key}: {get(name)}", instead)
    yield from _zero(
        get("DEEPSPEED_ZERO_STAGE").replace("none", "2"),  # accelerate's default
        get("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"),
        get("DEEPSPEED_OFFLOAD_PARAM_DEVICE"),
    )
    yield from _step("gradient_accumulation_steps", get("GRADIENT_ACCUMULATION_STEPS"))
    yield from _step("gradient_clipping", get("GRADIENT_CLIPPING"))


def _zero(stage: str, optimizer: str, parameters: str) -> Iterator[Wish]:
    if stage not in ("1", "2", "3"):
        raise _refused(f"zero_stage: {stage}", "1, 2 or 3, or distributed_type: MULTI_GPU")
    yield Wish(f"zero_stage: {stage}", "backend", f"zero{stage}")
    devices = {"offload_optimizer_device": optimizer, "offload_param_device": parameters}
    for key, device in devices.items():
        if device not in ("cpu", *_NOTHING):
            raise _refused(f"{key}: {device}", "cpu or none")
    offloads = optimizer == "cpu"
    if (parameters == "cpu") != (offloads and stage == "3"):
        raise _refused(
            f"offload_optimizer_device: {optimizer} with offload_param_device: {parameters}",
            "cpu for both with zero_stage: 3, for the optimizer alone with 1 and 2, or none for both",
        )
    yield Wish(f"offload_optimizer_device: {optimizer}", "sharding.offload", offloads)


def _step(key: str, value: Any) -> Iterator[Wish]:
    """What the recipe's own step must agree with."""
    if str(value).lower() in _NOTHING:
        return
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise _refused(f"{key}: {value}", "a number, or nothing") from None
    yield Wish(f"{key}: {value}", _IN_RECIPE[key], number or None)


_IN_RECIPE = {
    "gradient_accumulation_steps": "accumulation",
    "gradient_clipping": "optimizer.clip_norm",
    "train_batch_size": "global_batch",
}


def _deepspeed_file(path: Path) -> Iterator[Wish]:
    """A DeepSpeed file of settings, key by key; "auto" leaves a key to the recipe."""
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed_config_file {path}: cannot be read as JSON ({error})") from None
    zero = settings.pop("zero_optimization", {})
    devices = [_only(zero.pop(key, {}), key, "device", "pin_memory") for key in ("offload_optimizer", "offload_param")]
    yield from _zero(str(zero.pop("stage", 0)), *(str(found.get("device", "none")).lower() for found in devices))
    _only(zero, "zero_optimization")
    for precision in ("bf16", "fp16"):
        if _only(settings.pop(precision, {}), precision, "enabled").get("enabled", False) is True:
            yield Wish(f"{precision}.enabled: true", "precision", precision)
    for key in _IN_RECIPE:
        yield from _step(key, settings.pop(key, "auto"))
    _only(settings, "")


def _only(settings: dict[str, Any], where: str, *known: str) -> dict[str, Any]:
    """`settings`, once everything in it that asks for something is known."""
    for key, value in settings.items():
        if key not in known and str(value).lower() not in _NOTHING:
            written = json.dumps(value)
            raise _refused(
                f"{where}.{key}: {written}".lstrip(".") + " (in its deepspeed_config_file)",
                f'"auto" or nothing: {_ELSEWHERE.get(key, "polyview sets what DeepSpeed needs itself")}',
            )
    return settings


_ELSEWHERE = {
    "optimizer": "the recipe has optimizer",
    "scheduler": "the recipe has schedule",
    "activation_checkpointing": "the recipe has compute.checkpoint_blocks",
    "train_micro_batch_size_per_gpu": "the recipe has global_batch and accumulation",
    "steps_per_print": "the recipe has log.every",
    "flops_profiler": "`polyview profile` does it",
}


def _asked(environ: Environ, name: str) -> bool:
    return environ.get(name, "").lower() not in _NOTHING + ("0",)


def _refused(said: str, instead: str) -> UserError:
    return UserError(f"the accelerate config has {said}, which polyview does not do; write {instead}")


def _yaml(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value).strip('"')
