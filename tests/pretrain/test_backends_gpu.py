"""The backends on a GPU, over NCCL: what no CPU test can see, that they agree there, compiled and in low precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.backend_names import BACKENDS
from pretrain.distributed.process import Process
from pretrain.optim.schedule import Rates
from pretrain.parts import assemble
from pretrain.recipe import parse_recipe
from tests.pretrain.test_objective_steps import ROWS, SAMPLES, global_batch
from tests.ranks import free_port
from tests.tiny import VIT, recipe_data

pytestmark = pytest.mark.gpu
STEPS = 5


@pytest.fixture(scope="module", autouse=True)
def group():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def losses(backend: str, **changes: Any) -> list[float]:
    """Of STEPS steps; the peak of memory is printed."""
    device = torch.device("cuda", 0)
    data = recipe_data("shards", "run", global_batch=ROWS, backend=backend, model=VIT, **changes)
    torch.cuda.reset_peak_memory_stats()
    parts = assemble(parse_recipe(data, "test"), SAMPLES, Process(0, 1, 0, device))
    assert all(p.device.type == "cuda" for p in parts.backend.trunk.parameters())
    assert all(b.device.type == "cuda" for t in parts.backend.weights().values() for b in t.buffers())
    batches = [global_batch(parts, step).to(device) for step in range(STEPS)]
    for batch in batches:
        batch.weight = batch.weight.float()
    found = [float(parts.step(batch, Rates(1e-3, 0.1)).loss) for batch in batches]
    print(f"{backend} {changes}: {torch.cuda.max_memory_allocated() / 2**20:.1f} MiB at most")
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("precision", "within"), [("fp32", 1e-5), ("bf16", 5e-3), ("fp16", 5e-3)])
def test_a_backend_trains_as_ddp_does(backend, precision, within):
    found = losses(backend, precision=precision, ema={"decay": 0.9})
    assert len(set(found)) == STEPS
    assert found == pytest.approx(losses("ddp", precision=precision, ema={"decay": 0.9}), rel=within)
    assert found == pytest.approx(losses("ddp"), rel=max(within, 1e-2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_blocks_train_as_plain_ones_do(backend):
    found = losses(backend, compute={"compile": True})
    assert found == pytest.approx(losses(backend), rel=1e-4)
