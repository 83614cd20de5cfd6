"""What an accelerate config asks is done or refused by name: by the variables it sets, and really launched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands import launch
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from pretrain.accelerate_config import resolve
from pretrain.errors import UserError
from pretrain.recipe import Recipe, load_recipe, parse_recipe
from tests.ranks import free_port
from tests.runs import ENVIRONMENT, losses
from tests.tiny import recipe_data, write_recipe, write_shards

CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"
RUNS = {
    "ddp": "DistributedDataParallel on 2 x cpu",
    "fsdp2": "FSDP2 on 2 x cpu",
    "zero1": "DeepSpeed ZeRO-1 on 2 x cpu",
    "zero2": "DeepSpeed ZeRO-2 on 2 x cpu",
    "zero3": "DeepSpeed ZeRO-3 on 2 x cpu",
}
FSDP = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


def recipe(**changes) -> Recipe:
    return parse_recipe(recipe_data(Path("shards"), Path("run"), **changes), "test")


def test_alone_it_is_ddp_in_fp32():
    resolved = resolve(recipe(), {"HOME": "/"})
    assert (resolved.backend, resolved.precision) == ("ddp", "fp32")


@pytest.mark.parametrize("name", RUNS)
def test_a_shipped_config_is_what_runs(name, tmp_path):
    """Two processes of accelerate's own launcher; the run says which engine it has, and its recipe is concrete."""
    path = write_recipe(
        tmp_path / "run.yaml", recipe_data(write_shards(tmp_path / "shards"), tmp_path / "run", steps=3)
    )
    command = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{name}.yaml")]
    told = subprocess.run(
        [
            sys.executable,
            *command,
            "--num_processes",
            "2",
            "--main_process_port",
            str(free_port()),
            "-m",
            "pretrain",
            path,
        ],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    assert RUNS[name] in told.stderr
    assert list(losses(tmp_path / "run")) == [1, 2, 3]
    saved = load_recipe(str(tmp_path / "run" / "recipe.yaml"), [])
    assert (saved.backend, saved.precision) == (name, "fp32")


def test_what_is_left_open_is_taken_over():
    fsdp = resolve(recipe(), FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false", "FSDP_OFFLOAD_PARAMS": "true"})
    assert fsdp.backend == "fsdp2"
    assert fsdp.sharding.model_dump() == {"within": None, "offload": True, "reshard_after_forward": False}
    hybrid = {
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "4",
        "PARALLELISM_CONFIG_DP_SHARD_SIZE": "8",
        "PARALLELISM_CONFIG_TP_SIZE": "1",
    }
    assert resolve(recipe(), FSDP | hybrid).sharding.within == 8
    zero = resolve(recipe(), ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"})
    assert (zero.backend, zero.sharding.offload) == ("zero2", True)
    for precision in ("bf16", "fp16"):
        assert resolve(recipe(), {"ACCELERATE_MIXED_PRECISION": precision}).precision == precision


def test_what_the_recipe_says_itself_must_agree():
    same = {"backend": "fsdp2", "precision": "bf16", "accumulation": 2, "optimizer": {"clip_norm": 1.0}}
    resolve(recipe(**same), FSDP | {"ACCELERATE_MIXED_PRECISION": "bf16"})
    resolve(recipe(**same), {"ACCELERATE_MIXED_PRECISION": "no"})  # a launcher that asks nothing
    steps = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2", "ACCELERATE_GRADIENT_CLIPPING": "1.0"}
    resolve(recipe(**same | {"backend": "zero2"}), ZERO | steps)


BAD = {
    "backend": ({"backend": "ddp"}, FSDP, r"distributed_type: FSDP, the recipe has backend: ddp.*backend=fsdp2"),
    "stage": ({"backend": "zero3"}, ZERO, r"zero_stage: 2, the recipe has backend: zero3"),
    "precision": ({"precision": "fp32"}, {"ACCELERATE_MIXED_PRECISION": "bf16"}, r"mixed_precision: bf16.*precision"),
    "fp8": ({}, {"ACCELERATE_MIXED_PRECISION": "fp8"}, r"mixed_precision: fp8.*bf16"),
    "version": ({}, FSDP | {"FSDP_VERSION": "1"}, r"fsdp_version: 1.*write fsdp_version: 2"),
    "hybrid": ({}, FSDP | {"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, r"HYBRID_SHARD.*sharding\.within"),
    "wrap": ({}, FSDP | {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, r"fsdp_auto_wrap_policy: SIZE_BASED_WRAP"),
    "new key": ({}, FSDP | {"FSDP_SOMETHING_NEW": "1"}, r"fsdp_something_new: 1"),
    "checkpointing": (
        {},
        FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
        r"fsdp_activation_checkpointing: true.*compute\.checkpoint_blocks=true",
    ),
    "reshard": (
        {"sharding": {"reshard_after_forward": True}},
        FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false"},
        r"fsdp_reshard_after_forward: false, the recipe has sharding\.reshard_after_forward: true",
    ),
    "tensor parallel": (
        {},
        FSDP | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
        r"parallelism_config_tp_size: 2",
    ),
    "accumulation": ({}, ZERO | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, r"steps: 4.*accumulation=4 in"),
    "clipping": ({}, ZERO | {"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, r"optimizer\.clip_norm: null.*clip_norm=1 in the"),
    "no number": ({}, ZERO | {"ACCELERATE_GRADIENT_CLIPPING": "much"}, r"gradient_clipping: much"),
    "stage 0": ({}, ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, r"zero_stage: 0.*MULTI_GPU"),
    "nvme": ({}, ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, r"offload_optimizer_device: nvme"),
    "half offload": ({}, ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, r"cpu for both with zero_st"),
    "zero init": ({}, ZERO | {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}, r"zero3_init_flag: true"),
    "dynamo": ({}, {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, r"dynamo_backend: INDUCTOR.*compute\.compile: true"),
    "megatron": ({}, {"ACCELERATE_USE_MEGATRON_LM": "true"}, r"MEGATRON_LM"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_is_not_done_is_refused_by_name(what):
    changes, environ, message = BAD[what]
    with pytest.raises(UserError, match=message):
        resolve(recipe(**changes), environ)


def zero_file(folder: Path, **settings) -> dict[str, str]:
    path = folder / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}} | settings))
    return ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}


def test_a_deepspeed_file_is_read_key_by_key(tmp_path):
    both = {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "offload_param": {"device": "cpu"}}
    environ = zero_file(
        tmp_path, zero_optimization=both, bf16={"enabled": True}, train_batch_size=12, gradient_clipping="auto",
        optimizer="auto", fp16={"enabled": False},
    )  # fmt: skip
    resolved = resolve(recipe(), environ)
    assert (resolved.backend, resolved.precision, resolved.sharding.offload) == ("zero3", "bf16", True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": {"type": "Adam"}}, r"optimizer: \{.*the recipe has optimizer"),
        ({"zero_optimization": {"stage": 3, "overlap_comm": True}}, r"zero_optimization\.overlap_comm: true"),
        ({"train_batch_size": 64}, r"train_batch_size: 64, the recipe has global_batch: 12"),
        ({"fp16": {"enabled": True, "initial_scale_power": 4}}, r"fp16\.initial_scale_power: 4"),
        ({"zero_optimization": {}}, r"zero_stage: 0"),
    ],
)
def test_a_deepspeed_file_asks_for_nothing_unheard(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        resolve(recipe(), zero_file(tmp_path, **settings))


def test_a_damaged_deepspeed_file_is_named(tmp_path):
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(UserError, match=r"ds\.json: cannot be read as JSON"):
        resolve(recipe(), ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "ds.json")})


def environment_of(config: Path) -> dict[str, str]:
    """What accelerate's own launcher sets for the ranks; ValueError for a key that it does not know."""
    argv = ["--config_file", str(config), "--main_process_port", "0", "-m", "pretrain", "recipe"]
    args, read, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(argv))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(read.deepspeed_config)
        return prepare_deepspeed_cmd_env(args)[1]
    return prepare_multi_gpu_env(args)


@pytest.mark.parametrize("name", RUNS)
def test_a_shipped_config_says_only_what_is_done(name, tmp_path):
    """As it is it asks for its backend and nothing else; what a line of it is changed to is followed or refused."""
    resolved = resolve(recipe(), environment_of(CONFIGS / f"{name}.yaml"))
    assert (resolved.backend, resolved.precision) == (name, "fp32")
    assert resolved.sharding == recipe().sharding
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    for section in ("fsdp_config", "deepspeed_config"):
        for key, value in config.get(section, {}).items():
            changed = tmp_path / f"{key}.yaml"
            other = {"none": "cpu", 2: 1, True: False, False: True}.get(value, 2)
            changed.write_text(yaml.safe_dump(config | {section: config[section] | {key: other}}))
            try:
                followed = resolve(recipe(), environment_of(changed))
            except UserError as error:
                followed, told = None, str(error)
            assert followed != resolved if followed else key in told, key
    changed = tmp_path / "bf16.yaml"
    changed.write_text(yaml.safe_dump(config | {"mixed_precision": "bf16"}))
    assert resolve(recipe(), environment_of(changed)).precision == "bf16"
