"""Products in the layout and the precision that the caller wrote."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lorica
from lorica.methods.kernels import _linear
from lorica.model import update
from lorica.tensors import matmul
from tolerance import rounding


@pytest.mark.parametrize("transposed", [False, True])
def test_a_sum_lies_as_what_it_is_added_to(transposed):
    w = torch.randn(7, 5).T if transposed else torch.randn(5, 7)
    b, a = torch.randn(5, 2), torch.randn(2, 7)
    v = matmul.added(w, b, a, 0.5)
    torch.testing.assert_close(v, w + 0.5 * b @ a)
    assert v.stride() == w.stride() and v.data_ptr() != w.data_ptr()


def test_nothing_is_rounded_within():
    x = torch.randn(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with matmul.no_autocast("cpu"):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


@given(n=st.integers(1, 2100), k=st.integers(1, 40), m=st.integers(1, 9), turned=st.booleans())
def test_a_product_in_parts_is_the_product(n, k, m, turned):
    small = torch.randn(n, k, dtype=torch.float64)
    x = torch.randn(m, n, dtype=torch.float64).T if turned else torch.randn(n, m).double()
    found = _linear._into_rank(small, x)
    torch.testing.assert_close(found, small.T @ x, rtol=1e-12, atol=1e-11)


class Operations(TorchDispatchMode):
    """Collects what is computed, with the shapes of the operands."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[torch.Size]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shapes = [t.shape for t in args if isinstance(t, torch.Tensor)]
        self.seen.append((str(func), shapes))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [512, 1000, 1024, 1025])
def test_parts_do_not_depend_on_the_threads(tokens):
    """Within one product, the library may share the terms out as it likes."""
    small, x = torch.randn(tokens, 8), torch.randn(tokens, 96)
    before, found, asked = torch.get_num_threads(), [], []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            with Operations() as operations:
                found.append(_linear._into_rank(small, x))
            asked.append(operations.seen)
    finally:
        torch.set_num_threads(before)
    assert any("bmm" in name for name, _ in asked[0])
    assert asked[0] == asked[1] == asked[2]
    within = rounding(torch.float32, tokens, (small.abs().T @ x.abs()).max().item())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=within)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_norms_are_the_same_however_many_rows_are_formed_at_a_time(dtype, rows, monkeypatch):
    model = nn.Sequential(nn.Linear(7, 11).to(dtype))
    one = lorica.attach(model, "lora", r=2, verbose=False).layers["0"]
    nn.init.normal_(one.update.delta.B)
    whole, v = one.update.formed_norms(one.store, keep=True)
    wide = one.store.weight().detach().to(v.dtype) + one.update.weight(one.store).detach()
    torch.testing.assert_close(v, wide)
    monkeypatch.setattr(update, "ROWS", (7 * rows, 7 * rows))
    norms, none = one.update.formed_norms(one.store, keep=False)
    assert none is None and norms.dtype == whole.dtype == v.dtype
    torch.testing.assert_close(norms, whole)
    torch.testing.assert_close(norms, torch.linalg.vector_norm(wide, dim=1))


def test_norms_of_many_rows_are_those_of_all_at_once():
    """A magnitude is set without keeping V, and meets norms of a V that is kept. Where V is W, both
    are norms of the same rows; else a product of some rows may round unlike that of all."""
    model = nn.Sequential(nn.Linear(512, 1360, bias=False))
    r = 8
    one = lorica.attach(model, "dora", r=r, verbose=False).layers["0"]
    assert 1360 * 512 > update.ROWS[0]

    def norms() -> list[torch.Tensor]:
        return [one.update.formed_norms(one.store, keep=keep)[0] for keep in (False, True)]

    assert torch.equal(*norms())
    nn.init.normal_(one.update.delta.B, std=0.1)
    # An entry of V is r products and their sum with W; a norm, 512 squares. None cancel.
    within = rounding(torch.float32, r + 1 + 512)
    torch.testing.assert_close(*norms(), rtol=within, atol=0)
