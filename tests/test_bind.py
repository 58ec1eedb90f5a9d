"""bind: what rides on the optimizer."""

from __future__ import annotations

import copy
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lorica
from lorica.methods.schedules.base import AbstractSchedule
from lorica.recipe import registry
from lorica.training import checks
from lorica.training.bind import KEY, bind
from models import batch, llama, train

sys.path.insert(0, str(Path(__file__).parent / "conformance"))
from merge_often import MergeOften  # noqa: E402
from walk import recipe  # noqa: E402

LOG: list[str] = []


@dataclass(frozen=True, kw_only=True)
class Probe(AbstractSchedule):
    """Writes down what happens, and changes the rates as it is told."""

    scale: float | None = None
    factor: float | None = None
    gives: ClassVar[frozenset[str]] = frozenset({"keeps_function"})

    def init(self, adapters: Any) -> dict[str, Any]:
        return {"events": 0}

    def before_step(self, state: dict[str, Any], training: Any) -> None:
        state["events"] += 1
        if self.scale is not None:
            training.lr_scale(self.scale)
        if self.factor is not None:
            training.lr_factor(self.factor)
        grads = all(t.parameter.grad is not None for t in training.adapters.trained())
        rates = [g["lr"] for g in training.optimizer.param_groups]
        LOG.append(f"before {training.step} {grads} {rates}")

    def after_step(self, state: dict[str, Any], training: Any) -> None:
        grads = all(t.parameter.grad is not None for t in training.adapters.trained())
        LOG.append(f"after {training.step} {grads}")

    def restore(self, state: dict[str, Any], adapters: Any) -> None:
        if state["events"]:  # else the call at the start
            LOG.append(f"restore {state['events']}")


@pytest.fixture(autouse=True)
def empty_log():
    LOG.clear()


def attached(method="lora", model=None, **fields):
    return lorica.attach(model or llama(num_hidden_layers=1), method, verbose=False,
                         **{"r": 4, **fields})  # fmt: skip


def probed(**arguments):
    adapters = attached(schedules=(Probe(**arguments),))
    return adapters, lorica.optimizer(adapters, lr=1e-2)


def step(adapters, optimizer) -> None:
    adapters.model(**batch(adapters.model)).loss.backward()
    optimizer.step()


# -- the hooks -------------------------------------------------------------------------------------


def test_before_and_after_each_step_with_gradients():
    adapters, optimizer = probed()
    train(adapters, optimizer, 2)
    assert LOG == [
        "before 0 True [0.01]", "after 0 True", "before 1 True [0.01]", "after 1 True",
    ]  # fmt: skip
    assert optimizer.param_groups[0][KEY]["step"] == 2


def test_binding_touches_nothing_before_the_first_step():
    adapters = attached("olora", schedules=(MergeOften(every=1),))
    before = adapters.fingerprint()
    optimizer = lorica.optimizer(adapters, lr=1e-2)
    assert adapters.fingerprint() == before and not optimizer.state


def test_the_checkpoint_apis_fake_step_does_nothing():
    """It steps an optimizer without state once, with zero rates and zero gradients."""
    adapters, optimizer = probed()
    before = adapters.fingerprint()
    rates = [g["lr"] for g in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad()
    assert not LOG and adapters.fingerprint() == before
    assert optimizer.param_groups[0][KEY]["step"] == 0
    step(adapters, optimizer)
    assert optimizer.param_groups[0][KEY]["step"] == 1


def test_torchs_checkpoint_api_keeps_the_state():
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    adapters, optimizer = probed()
    train(adapters, optimizer, 3)
    saved = copy.deepcopy(get_optimizer_state_dict(adapters.model, optimizer))
    others, fresh = probed()
    LOG.clear()
    set_optimizer_state_dict(others.model, fresh, saved)
    assert fresh.param_groups[0][KEY]["step"] == 3
    assert fresh.param_groups[0][KEY]["schedules"]["test_bind"] == {"events": 3}
    assert not any(line.startswith(("before", "after")) for line in LOG), "no fake step counted"


def test_a_step_at_rate_zero_with_gradients_is_a_real_one():
    """The first step of a warm-up."""
    adapters = attached(schedules=(Probe(),))
    optimizer = lorica.optimizer(adapters, lr=0.0)
    step(adapters, optimizer)
    assert optimizer.param_groups[0][KEY]["step"] == 1 and len(LOG) == 2


@pytest.mark.parametrize("rule", registry.names("rules"))
def test_a_closure_is_run_before_all_that_looks_at_gradients(rule):
    """As Lightning's automatic optimization steps: the same bits as backward and step."""
    results = []
    for how in ("backward", "closure", "keyword"):
        LOG.clear()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        adapters = lorica.attach(model, recipe(rule, r=2, schedules=(Probe(),)), verbose=False)
        optimizer = lorica.optimizer(adapters, lr=1e-2, total_steps=3)

        def closure(adapters=adapters, optimizer=optimizer):
            optimizer.zero_grad()
            loss = adapters.model(torch.ones(2, 8, device="cpu")).square().sum()
            loss.backward()
            return loss

        losses = []
        for _ in range(3):
            if how == "backward":
                losses.append(closure())
                assert optimizer.step(None) is None
            else:
                more = {"closure": closure} if how == "keyword" else {}
                with torch.no_grad():
                    losses.append(optimizer.step(*() if more else (closure,), **more))
        results.append((adapters.fingerprint(), torch.stack(losses).tolist(), [*LOG]))
    assert results[0] == results[1] == results[2]
    assert len(LOG) == 6 and "before 0 True" in LOG[0], "schedules saw the closure's gradients"


# -- rates -----------------------------------------------------------------------------------------


def test_a_schedule_may_scale_or_replace_the_schedulers_factor_for_one_step():
    for arguments, expected in (({"scale": 0.5}, [5e-3, 2.5e-3]), ({"factor": 0.3}, [3e-3, 3e-3])):
        LOG.clear()
        adapters, optimizer = probed(**arguments)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5**n)
        for n in range(2):
            train(adapters, optimizer, 1, first=n)
            assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5**n)
            scheduler.step()
        used = [float(line.split("[")[1][:-1]) for line in LOG if line.startswith("before")]
        assert used == pytest.approx(expected)


def test_a_scaled_rate_is_the_rate_that_moves_the_weights():
    moved = []
    for arguments in ({"scale": 1.0}, {"scale": 0.5}):
        adapters, optimizer = probed(**arguments)
        before = {t.name: t.parameter.detach().clone() for t in adapters.trained()}
        step(adapters, optimizer)
        moved.append({t.name: t.parameter.detach() - before[t.name] for t in adapters.trained()})
    for name, whole in moved[0].items():
        torch.testing.assert_close(moved[1][name], whole / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("make", [
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=8),
    lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
])  # fmt: skip
def test_torchs_schedulers(make):
    adapters = attached("dora+loraplus")
    optimizer = lorica.optimizer(adapters, lr=1e-3, weight_decay=0.01)
    scheduler = make(optimizer)
    plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
    seen = set()
    for n in range(6):
        train(adapters, optimizer, 1, first=n)
        scheduler.step(1.0) if plateau else scheduler.step()
        seen.add(optimizer.param_groups[0]["lr"])
    assert len(seen) > 2


def test_transformers_schedulers():
    from transformers import get_scheduler

    adapters = attached()
    optimizer = lorica.optimizer(adapters, lr=1e-3)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=4)
    rates = []
    for n in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        train(adapters, optimizer, 1, first=n)
        scheduler.step()
    assert rates == pytest.approx([0, 5e-4, 1e-3, 5e-4])
    assert optimizer.param_groups[0][KEY]["step"] == 4


def test_the_default_rate_is_the_methods_own():
    assert lorica.optimizer(attached("dora")).param_groups[0]["lr"] == 1e-4
    assert lorica.optimizer(attached("lora")).param_groups[0]["lr"] == 2e-4


# -- checkpoints -----------------------------------------------------------------------------------


def test_the_state_lives_where_every_checkpoint_keeps_it(tmp_path):
    adapters, optimizer = probed()
    train(adapters, optimizer, 3)
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    saved = torch.load(tmp_path / "o.pt", weights_only=True)
    assert saved["param_groups"][0][KEY]["schedules"] == {"test_bind": {"events": 3}}
    _, fresh = probed()
    LOG.clear()
    fresh.load_state_dict(saved)
    assert LOG == ["restore 3"]
    own = fresh.param_groups[0][KEY]
    assert own["step"] == 3 and own is not saved["param_groups"][0][KEY]


@pytest.mark.parametrize(("change", "message"), [
    ({"seed": 1}, "the checkpoint has seed 1, this run 0"),
    ({"total_steps": 9}, "the checkpoint has total_steps 9, this run 0"),
])  # fmt: skip
def test_resuming_another_run_is_refused(change, message):
    other = lorica.optimizer(attached(), lr=1e-2, **change)
    mine = lorica.optimizer(attached(), lr=1e-2)
    with pytest.raises(ValueError, match=message):
        mine.load_state_dict(other.state_dict())


def test_resuming_another_recipe_is_refused():
    mine = lorica.optimizer(attached("dora"), lr=1e-2)
    with pytest.raises(ValueError, match="the checkpoint has method 'lora', this run 'dora'"):
        mine.load_state_dict(lorica.optimizer(attached("lora"), lr=1e-2).state_dict())


def test_a_checkpoint_of_another_optimizer_is_refused():
    adapters = attached()
    plain = torch.optim.AdamW([t.parameter for t in adapters.trained()])
    with pytest.raises(ValueError, match="no state of Lorica"):
        lorica.optimizer(adapters, lr=1e-2).load_state_dict(plain.state_dict())


def test_binding_twice_is_refused():
    adapters, optimizer = probed()
    with pytest.raises(ValueError, match="bound already"):
        bind(optimizer, adapters)


def test_any_torch_optimizer_can_be_bound():
    adapters = attached(schedules=(Probe(),))
    for make in (torch.optim.SGD, torch.optim.Adafactor, torch.optim.NAdam):
        LOG.clear()
        optimizer = bind(make(adapters.param_groups(1e-3)), adapters)
        train(adapters, optimizer, 2)
        assert len(LOG) == 4


def test_parameters_that_were_replaced_are_found_at_the_first_step():
    """After a `fully_shard` by hand, say: the optimizer would move tensors that nobody reads."""
    adapters = attached()
    optimizer = lorica.optimizer(adapters, lr=1e-2)
    delta = next(iter(adapters.layers.values())).update.delta
    delta.A = nn.Parameter(delta.A.detach().clone())
    with pytest.raises(ValueError, match=r"does not hold 1 of the trained parameters.*delta\.A"):
        step(adapters, optimizer)


def test_a_model_made_in_inference_mode_cannot_train():
    with torch.inference_mode():
        adapters = attached(model=nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="inference_mode.*torch computes no gradients"):
        lorica.optimizer(adapters)
    with torch.no_grad():
        assert adapters.model(torch.ones(1, 4)).shape == (1, 4)


def test_generators_depend_on_seed_step_and_key_alone():
    from lorica.training.bind import Training

    adapters, optimizer = probed()
    own = optimizer.param_groups[0][KEY]

    def draws(seed, at, *key):
        training = Training(optimizer, adapters, {**own, "seed": seed, "step": at})
        return torch.rand(3, generator=training.generator(*key)).tolist()

    torch.manual_seed(1)
    first = draws(0, 4, "layer", 1)
    torch.manual_seed(2)
    assert draws(0, 4, "layer", 1) == first
    others = [draws(1, 4, "layer", 1), draws(0, 5, "layer", 1), draws(0, 4, "layer", 2)]
    assert first not in others and len({str(o) for o in others}) == 3


# -- the start-up proof ----------------------------------------------------------------------------


class Blocks(nn.Module):
    """A checkpointed body under a head that trains."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
        self.head, self.reentrant = nn.Linear(4, 4), reentrant

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_an_adapter_without_gradient_is_named_after_ten_steps(reentrant):
    """Reentrant checkpointing over a frozen input computes no gradient within the block."""
    adapters = attached(model=Blocks(reentrant))
    optimizer = lorica.optimizer(adapters, lr=1e-3)
    for n in range(12):
        adapters.model(torch.randn(3, 4)).square().sum().backward()
        if reentrant and n == 9:
            break
        optimizer.step()
        optimizer.zero_grad()
    if not reentrant:
        return
    before = adapters.fingerprint()
    with pytest.raises(ValueError) as caught:
        optimizer.step()
    text = str(caught.value)
    assert "2 adapter(s) had no gradient in 10 steps" in text
    assert "body.0, body.2" in text and "head" not in text
    assert "use_reentrant=False" in text and "enable_input_require_grads" in text
    assert adapters.fingerprint() == before


class Experts(nn.Module):
    """One of two experts gets all tokens; the other gets none, or an empty batch."""

    def __init__(self, empty: bool) -> None:
        super().__init__()
        self.used, self.idle, self.empty = nn.Linear(4, 4), nn.Linear(4, 4), empty

    def forward(self, x):
        y = self.used(x)
        return torch.cat([y, self.idle(x[:0])]) if self.empty else y


def ten_steps(adapters):
    optimizer = lorica.optimizer(adapters, lr=1e-3)
    for _ in range(12):
        adapters.model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("empty", [True, False])
def test_a_layer_without_tokens_is_only_named(empty, caplog):
    adapters = attached(model=Experts(empty))
    with caplog.at_level(logging.WARNING, logger="lorica"):
        ten_steps(adapters)
    said = "no token reached 1 adapted layer(s)" if empty else "1 adapted layer(s) were not called"
    assert caplog.text.count(f"{said} in the first 10 steps") == 1 and ": idle" in caplog.text
    idle = adapters.model.idle
    assert not idle._forward_hooks and idle.weight_read is None, "nothing is left behind"


class Two(nn.Module):
    """Two layers, and how the second one is used."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(4, 4), nn.Linear(4, 4), how
        self.alias = [self.b]  # which `attach` cannot see

    def forward(self, x):
        return self.how(self, x)


def unused(model, x):
    model.b(x)
    return model.a(x)


def unheard(model, x):
    with torch.no_grad():
        y = model.b(x)
    return model.a(x) + y


SECOND = {  # how the second layer is used -> what a run is told, and the step that stops it
    "unused": (unused, "no gradient for the output of 1 adapted layer", None),
    "detached": (lambda m, x: m.a(x) + m.b(x).detach(), "leaves the output unused, or det", None),
    "without a graph": (unheard, "Does the loss depend on these layers", 10),
    "times nothing": (lambda m, x: m.a(x) + 0 * m.b(x), "Does the loss depend on these", 10),
    "read past": (lambda m, x: F.linear(m.a(x), m.b.weight), "reads the weight past the", 2),
    "turned": (lambda m, x: m.a(x) @ m.b.weight.T, "reads the weight past the", 2),
    "stacked": (lambda m, x: m.a(x) + torch.stack([m.b.weight] * 2).sum(), "the weight past", 2),
    "alias": (lambda m, x: m.a(x) + m.alias[0](x), "calls the layer that the adapter", 2),
    "not called": (lambda m, x: m.a(x), "1 adapted layer(s) were not called", None),
    "asked": (lambda m, x: m.a(x.to(m.b.weight.dtype)), "1 adapted layer(s) were not", None),
}


@pytest.mark.parametrize(("how", "said", "stops"), SECOND.values(), ids=SECOND)
def test_why_a_layer_has_no_gradient_is_told_apart(how, said, stops, caplog):
    adapters = attached(model=Two(how))
    assert [*adapters.layers] == ["a", "b"]
    with caplog.at_level(logging.WARNING, logger="lorica"):
        if stops is None:
            ten_steps(adapters)
            assert caplog.text.count(said) == 1 and ": b." in caplog.text
            assert not adapters.model._forward_pre_hooks and not adapters.model._forward_hooks
            return
        with pytest.raises(ValueError) as caught:
            ten_steps(adapters)
    text = str(caught.value)
    assert f"1 adapter(s) had no gradient in {stops} steps" in text and ": b." in text
    assert said in text and not caplog.text


def test_an_unused_layer_is_an_error_where_its_name_has_no_other_effect():
    adapters = attached(model=Two(unused), target_modules=["a", "b"])
    with pytest.raises(ValueError, match="1 adapter.s. had no gradient in 10 steps.*output of b:"):
        ten_steps(adapters)


def test_a_gradient_that_is_small_or_not_finite_is_a_gradient():
    for value in (1e-18, float("nan"), float("inf")):
        adapters = attached()
        optimizer = lorica.optimizer(adapters, lr=0.0)
        for _ in range(11 if value == 1e-18 else 1):  # others are left out, and soon stop a loop
            for t in adapters.trained():
                t.parameter.grad = torch.full_like(t.parameter, value)
            optimizer.step()
        assert optimizer.param_groups[0][KEY]["seen"].all()


def test_the_proof_survives_a_resume():
    adapters = attached(modules_to_save=["lm_head"])
    optimizer = lorica.optimizer(adapters, lr=1e-3)
    train(adapters, optimizer, 2)
    assert optimizer.param_groups[0][KEY]["seen"].all()
    fresh = lorica.optimizer(attached(modules_to_save=["lm_head"]), lr=1e-3)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert fresh.param_groups[0][KEY]["seen"].all()


# -- losses ----------------------------------------------------------------------------------------


def test_the_task_loss_is_left_alone_where_no_objective_is_named():
    adapters = attached()
    outputs = adapters.model(**batch(adapters.model))
    assert adapters.loss(outputs) is outputs.loss


def test_accumulation_and_clipping_are_the_callers():
    """Two half batches are one batch; hooks fire once an update."""
    adapters, optimizer = probed()
    inputs = batch(adapters.model, size=4)
    for part in (slice(0, 2), slice(2, 4)):
        (adapters.model(**{k: v[part] for k, v in inputs.items()}).loss / 2).backward()
    torch.nn.utils.clip_grad_norm_([t.parameter for t in adapters.trained()], 1.0)
    optimizer.step()
    assert LOG[0].startswith("before 0") and len(LOG) == 2


@pytest.mark.parametrize("whole", [False, True], ids=["adapters", "model"])
@pytest.mark.parametrize(
    "method",
    [
        "cola(every=2)",
        "plora(every=2)",
        "raclora(every=2)",
        "xgblora(every=2,layers=1)",
        "dora+olora",
        "relora(every=2)",
    ],
)
def test_a_plain_loop_resumes_from_either_state(method, whole, tmp_path):
    """`model.load_state_dict` and `adapters.load_state_dict`: finished links come back, and go
    where the state has none."""
    r = {} if "xgb" in method else {"r": 2}

    def run():
        adapters = lorica.attach(llama(), method, verbose=False, **r)
        return adapters, lorica.optimizer(adapters, lr=1e-2, total_steps=8)

    def states(adapters, optimizer):
        own = adapters.model.state_dict() if whole else adapters.state_dict()
        return copy.deepcopy({"weights": own, "optimizer": optimizer.state_dict()})

    def restore(adapters, optimizer, state):
        (adapters.model if whole else adapters).load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])

    straight, optimizer = run()
    train(straight, optimizer, 1)
    early = states(straight, optimizer)
    train(straight, optimizer, 4, first=1)
    torch.save(states(straight, optimizer), tmp_path / "late.pt")
    train(straight, optimizer, 2, first=5)

    resumed, other = run()
    restore(resumed, other, torch.load(tmp_path / "late.pt"))
    train(resumed, other, 2, first=5)
    assert resumed.fingerprint() == straight.fingerprint()
    restore(resumed, other, early)  # back to where no link was finished
    train(resumed, other, 6, first=1)
    assert resumed.fingerprint() == straight.fingerprint()


def test_a_state_without_adapters_leaves_their_frozen_factors_alone():
    adapters = lorica.attach(llama(), "olora", r=2, verbose=False)
    before = adapters.fingerprint()
    adapters.model.load_state_dict({"lm_head.weight": torch.zeros(61, 32)}, strict=False)
    assert adapters.fingerprint() == before


WORDS = [*registry.names("rules"), *registry.names("schedules")]


def bound(word: str):
    adapters = lorica.attach(llama(), recipe(word, r=2), verbose=False)
    return adapters, lorica.optimizer(adapters, lr=1e-3, total_steps=12)


@pytest.mark.parametrize("word", WORDS)
def test_a_step_without_any_gradient_is_none(word):
    """As in torch: before the first backward, after `zero_grad`, and with an empty group."""
    adapters, optimizer = bound(word)
    twin, other = bound(word)
    optimizer.add_param_group({**copy_of(optimizer), "params": []})
    before = adapters.fingerprint()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert adapters.fingerprint() == before and not optimizer.state
    assert optimizer.param_groups[0][KEY]["step"] == 0
    train(adapters, optimizer, 2)
    optimizer.step()
    train(adapters, optimizer, 1, first=2)
    train(twin, other, 3)
    assert adapters.fingerprint() == twin.fingerprint()


def copy_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Options of a group of no pair."""
    last = optimizer.param_groups[-1]
    return {k: v for k, v in last.items() if k not in ("params", KEY)} | {"pair": False}


@pytest.mark.parametrize("word", WORDS)
def test_what_the_caller_froze_is_said_once_and_stays(word, caplog, monkeypatch):
    monkeypatch.setattr(checks, "WATCHED_STEPS", 2)
    adapters, optimizer = bound(word)
    site = adapters.trained()[0].site
    frozen = [t.parameter for t in adapters.trained() if t.site == site]
    for p in frozen:
        p.requires_grad_(False)
    train(adapters, optimizer, 4)
    assert not any(p.requires_grad for p in frozen)
    said = [r.message for r in caplog.records if "do not train for now" in r.message]
    assert len(said) == 1 and site in said[0]
    for p in frozen:  # gradual unfreezing
        p.requires_grad_(True)
    train(adapters, optimizer, 2, first=4)
