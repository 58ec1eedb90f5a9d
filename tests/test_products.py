"""Products in the layout and the precision that the caller wrote."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lorica
from lorica.methods.kernels import _linear
from lorica.model import update
from lorica.tensors import matmul


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


@pytest.mark.parametrize("tokens", [512, 1000, 1024, 1025])
def test_parts_do_not_depend_on_the_threads(tokens):
    small, x = torch.randn(tokens, 8), torch.randn(tokens, 96)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(_linear._into_rank(small, x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


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


def test_norms_of_many_rows_have_the_bits_of_all_at_once():
    """A magnitude is set without keeping V, and meets norms of a V that is kept."""
    model = nn.Sequential(nn.Linear(512, 1360, bias=False))
    one = lorica.attach(model, "dora", r=8, verbose=False).layers["0"]
    nn.init.normal_(one.update.delta.B, std=0.1)
    parted, _ = one.update.formed_norms(one.store, keep=False)
    whole, _ = one.update.formed_norms(one.store, keep=True)
    assert 1360 * 512 > update.ROWS[0] and torch.equal(parted, whole)
