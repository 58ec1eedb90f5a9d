"""Started by torchrun, once per process: every rule on sharded parameters, against one process.

python -m torch.distributed.run --standalone --nproc-per-node=2 sharded_rules.py RULE ...
"""

from __future__ import annotations

import copy
import sys
import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import load as read_shards
from torch.distributed.checkpoint import save as write_shards
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lorica
from lorica import Recipe


def adapted(method: str, *, shard: bool) -> tuple[lorica.Adapters, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(n, m) for n, m in ((7, 8), (8, 8), (8, 8), (8, 5)))).double()
    plain = Recipe.parse(method)
    fields = {} if plain.whole else {"modules_to_save": ["3"]}
    if "r" in plain.takes:
        fields["r"] = 3
    adapters = lorica.attach(model, method, verbose=False, **fields)
    if shard:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in model.parameters())
    return adapters, lorica.optimizer(adapters, 1e-2, weight_decay=0.1)


def train(adapters, optimizer, steps, *, divided: bool) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 7, generator=generator, dtype=torch.float64)
        if divided:
            x = x.chunk(dist.get_world_size())[dist.get_rank()]
        adapters.model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def follows(method: str) -> None:
    (one, plain), (many, sharded) = adapted(method, shard=False), adapted(method, shard=True)
    train(one, plain, range(5), divided=False)
    train(many, sharded, range(5), divided=True)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(many.state_dict()[name], value, rtol=0, atol=1e-6)
    assert many.fingerprint() != adapted(method, shard=False)[0].fingerprint()
    prints = [None] * dist.get_world_size()
    dist.all_gather_object(prints, many.fingerprint())
    assert len(set(prints)) == 1


def on_disk(model, optimizer, folder=None):
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    if folder is not None:
        read_shards(state, checkpoint_id=folder)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        return None
    made = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made)
    write_shards(state, checkpoint_id=made[0])
    return made[0]


def in_memory(model, optimizer, saved=None):
    if saved is not None:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, saved[0], options=options)
        set_optimizer_state_dict(model, optimizer, saved[1], options=options)
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return copy.deepcopy(
        (
            get_model_state_dict(model, options=options),
            get_optimizer_state_dict(model, optimizer, options=options),
        )
    )


def resumes(method: str, keep) -> None:
    adapters, optimizer = adapted(method, shard=True)
    train(adapters, optimizer, range(3), divided=True)
    saved = keep(adapters.model, optimizer)
    train(adapters, optimizer, range(3, 6), divided=True)
    again, resumed = adapted(method, shard=True)
    keep(again.model, resumed, saved)
    train(again, resumed, range(3, 6), divided=True)
    assert again.fingerprint() == adapters.fingerprint(), f"{method} resumed otherwise"


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for rule in sys.argv[1:]:
        for check in (follows, lambda m: resumes(m, on_disk), lambda m: resumes(m, in_memory)):
            check(f"dora+{rule}" if Recipe.parse(rule).delta.wraps else rule)
        if dist.get_rank() == 0:
            print(f"ok {rule}", flush=True)
    dist.destroy_process_group()
