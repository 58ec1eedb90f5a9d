"""What all chains share: their company, their files, dropout, rules that start anew, shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_module

import lorica
from chains import one
from models import gpt2, llama, logits, train

CHAINS = {
    "cola": "cola(every=3, {})", "plora": "plora(every=3, {})",
    "plora with momentum": "plora(every=3, momentum=0.3, {})", "raclora": "raclora(every=3, {})",
    "raclora on A": "raclora(every=3, side='A', sketch='orthonormal', {})",
    "xgblora": "xgblora(every=3, layers=1, {})",
}  # fmt: skip
BESIDE = ["", "dora", "olora", "pissa", "rslora", "loraplus", "lorafa", "lorarite(escape=True)",
          "riemannian", "vectoradamw", "dora+pissa+rslora+loraplus"]  # fmt: skip
OWN_START = ("raclora", "raclora on A")  # the sketch is the start


def begin(method: str, model: Any = None, **fields: Any):
    small = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 20}
    model = llama(**small).double() if model is None else model
    fields = {**({} if "xgblora" in method else {"r": 2}), **fields}
    adapters = lorica.attach(model, method, verbose=False, **fields)
    return adapters, lorica.optimizer(adapters, lr=1e-2, total_steps=11)


def text(chain: str, beside: str, accumulate: str) -> str:
    return "+".join(w for w in (CHAINS[chain].format(f"accumulate='{accumulate}'"), beside) if w)


def refused(chain: str, beside: str) -> bool:
    """What mathematics forbids: a start of the weight in the frozen factor, and both frozen."""
    start = "pissa" in beside or "olora" in beside
    return (chain in OWN_START and start) or ("raclora" in chain and beside == "lorafa")


def watch(adapters: Any, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Logits after each step, before the schedule does anything."""
    seen: list[Tensor] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(logits(adapters.model)))
    hooks: Any = optimizer._optimizer_step_post_hooks
    hooks.move_to_end(next(iter(hooks)))
    return seen


CASES = [(c, b) for c in CHAINS for b in BESIDE if not refused(c, b)]


@pytest.mark.parametrize(("chain", "beside"), CASES)
def test_in_company_carried_and_folded_links_are_one_run(chain, beside):
    """Three restarts, each of which keeps the function."""
    runs = {}
    for accumulate in ("factors", "base"):
        adapters, optimizer = begin(text(chain, beside, accumulate))
        seen = watch(adapters, optimizer)
        runs[accumulate] = torch.tensor(train(adapters, optimizer, 3))
        for first in (3, 6, 9):
            torch.testing.assert_close(logits(adapters.model), seen[-1], rtol=0, atol=1e-9)
            losses = train(adapters, optimizer, min(3, 11 - first), first=first)
            runs[accumulate] = torch.cat([runs[accumulate], torch.tensor(losses)])
        carried = [layer.update.frozen_factors for _, layer in adapters]
        assert any(c is not None for c in carried) == (accumulate == "factors")
    torch.testing.assert_close(runs["factors"], runs["base"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("start", ["olora", "pissa"])
@pytest.mark.parametrize("accumulate", ["factors", "base"])
def test_a_link_starts_from_the_weight_as_it_then_stands(start, accumulate):
    adapters, optimizer = begin(f"cola(every=3, accumulate='{accumulate}')+{start}")
    name, layer = next(iter(adapters))
    train(adapters, optimizer, 3)
    pair = next(adapters.pairs())[1]
    W = layer.effective()[0].detach()
    other = lorica.attach(torch.nn.Sequential(torch.nn.Linear(*W.T.shape, dtype=W.dtype)), start,
                          r=2, verbose=False)  # fmt: skip
    fresh = next(other.pairs())[1]
    with torch.no_grad():
        other.recipe.init.fill(W, fresh, torch.Generator())
        torch.testing.assert_close(pair.B @ pair.A, fresh.B @ fresh.A, rtol=1e-8, atol=1e-10)


# -- the optimizer starts anew ---------------------------------------------------------------------


@pytest.mark.parametrize("chain", [c for c in CHAINS if c != "xgblora"])
@pytest.mark.parametrize("rule", ["adamw", "vectoradamw", "sgd", "riemannian",
                                  "lorarite(escape=True)"])  # fmt: skip
def test_after_a_restart_the_rule_goes_on_as_a_new_optimizer_would(chain, rule):
    """To a rule, zeroed state has to mean none: step counts, bases and escaped mass included."""
    method = text(chain, rule, "factors").replace("every=3", "every=3, lr_scheduler_type="
                                                  "'continued'")  # fmt: skip
    old = one(method, steps=9)
    for u in range(3):
        step(*old, u)
    fresh = one(method, steps=9)
    fresh[0].load_state_dict(old[0].state_dict())
    assert any(v.numel() > 1 for s in old[1].state.values() for v in s.values()) or rule == "sgd"
    for u in (3, 4):
        step(*old, u)
        step(*fresh, u)
        assert old[0].fingerprint() == fresh[0].fingerprint()


def step(adapters, optimizer, u: int) -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(u), dtype=torch.float64)
    (adapters.model(x) - x.sum()).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


# -- dropout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", CHAINS)
def test_no_dropout_falls_on_finished_links(chain):
    """They are part of the model: a run that carries them draws and computes what one does that
    has them in the base."""
    runs = []
    for accumulate in ("factors", "base"):
        adapters, optimizer = begin(text(chain, "", accumulate), lora_dropout=0.3)
        adapters.model.train()
        torch.manual_seed(0)
        runs.append(torch.tensor(train(adapters, optimizer, 9)))
    torch.testing.assert_close(*runs, rtol=1e-9, atol=0)


# -- files -----------------------------------------------------------------------------------------


def peft_logits(base: Any, folder: Path) -> Tensor:
    peft: Any = pytest.importorskip("peft")
    return logits(peft.PeftModel.from_pretrained(base, str(folder)).eval())


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("beside", ["", "dora", "pissa"])
@pytest.mark.parametrize("chain", [c for c in CHAINS if c != "plora"])
def test_a_grown_chain_is_a_plain_lora_file(chain, beside, make, tmp_path, recwarn):
    """PEFT computes its logits, and the base gets its published bytes back."""
    if refused(chain, beside):
        return
    model = make()
    published = {n: p.clone() for n, p in model.named_parameters()}
    adapters, optimizer = begin(text(chain, beside, "factors"), model)
    train(adapters, optimizer, 9)
    expected = logits(model)
    out = lorica.save(adapters, tmp_path / "out")
    recwarn.clear()
    torch.testing.assert_close(peft_logits(make(), out), expected, rtol=1e-4, atol=1e-4)
    recwarn.clear()  # PEFT on transposed layers
    loaded = lorica.load(make(), out)
    assert torch.equal(logits(loaded.model), expected)
    assert loaded.fingerprint() == adapters.fingerprint()
    lorica.detach(model)
    assert all(torch.equal(p, published[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("beside", ["", "dora", "pissa"])
@pytest.mark.parametrize("chain", CHAINS)
def test_after_loading_a_grown_chain_training_goes_on_bit_for_bit(chain, beside, tmp_path):
    if refused(chain, beside):
        return
    method = text(chain, beside, "factors")
    straight = begin(method, llama())
    train(*straight, 7)
    lorica.save(straight[0], tmp_path / "adapter")
    torch.save(straight[1].state_dict(), tmp_path / "optimizer.pt")
    train(*straight, 4, first=7)
    loaded = lorica.load(llama(), tmp_path / "adapter")
    optimizer = lorica.optimizer(loaded, lr=1e-2, total_steps=11)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(loaded, optimizer, 4, first=7)
    assert loaded.fingerprint() == straight[0].fingerprint()
    # And back: a chain takes the state of a shorter one.
    shorter = lorica.load(llama(), tmp_path / "adapter")
    kept = shorter.fingerprint()
    straight[0].load_state_dict(shorter.state_dict())
    assert straight[0].fingerprint() == kept


# -- shards ----------------------------------------------------------------------------------------


def test_carrying_in_a_sharded_model_is_refused_at_the_first_step():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        adapters, optimizer = one("cola(every=3)")
        distribute_module(adapters.model, init_device_mesh("cpu", (1,)))
        for group, t in zip([optimizer.param_groups[0]] * 2, adapters.trained(), strict=True):
            group["params"] = [x.parameter for x in adapters.trained()]
            t.parameter.grad = torch.ones_like(t.parameter)
        with pytest.raises(ValueError, match=r"'0' are sharded.*`cola\(accumulate='base'\)`"):
            optimizer.step()
    finally:
        dist.destroy_process_group()
