"""The head with its summed cross-entropy against torch's own, in values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from accessory.ops import cross_entropy
from accessory.ops.cross_entropy import VocabularyPart, head_cross_entropy_sum


def cross_entropy_sum(logits_NV, label_N):
    """With a head that returns its input, in memory that may be written over."""
    return head_cross_entropy_sum(logits_NV, label_N, lambda x: x * 1, (), VocabularyPart(0, logits_NV.shape[1]))


def both(logits_NV, label_N, factor=1.0):
    """(value, gradient) of ours and of torch's in fp64."""
    ours = logits_NV.clone().requires_grad_()
    loss = cross_entropy_sum(ours, label_N)
    (loss * factor).backward()
    theirs = logits_NV.double().requires_grad_()
    wanted = F.cross_entropy(theirs, label_N, reduction="sum")
    (wanted * factor).backward()
    return loss, ours.grad, wanted, theirs.grad


@settings(deadline=None)
@example(38, 19, 452, -3.0)  # a label of nearly all the mass
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 1000), st.sampled_from([1.0, 0.01, -3.0]))
def test_it_is_torchs(n, v, seed, factor):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, v, generator=generator) * 3
    label = torch.randint(0, v, (n,), generator=generator)
    loss, grad, wanted, wanted_grad = both(logits, label, factor)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=1e-5, atol=1e-6)


def test_a_hand_made_row():
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log()
    loss, grad, _, _ = both(logits, torch.tensor([1]))
    torch.testing.assert_close(loss, torch.tensor(4.0).log())
    torch.testing.assert_close(grad, torch.tensor([[1 / 8, -6 / 8, 5 / 8]]))


@pytest.mark.parametrize("rows", [1, 3, 7, 8])
def test_pieces_of_rows_add_up(monkeypatch, rows):
    """Rows are converted to fp32 a piece at a time; the last piece may be short."""
    monkeypatch.setattr(cross_entropy, "ROWS", rows)
    test_it_is_torchs.hypothesis.inner_test(7, 11, 5, 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_widened_first(dtype):
    """The value is exact for the rounded logits; the gradient is rounded once."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(50, 300, generator=generator) * 4).to(dtype)
    label = torch.randint(0, 300, (50,), generator=generator)
    loss, grad, wanted, wanted_grad = both(logits, label)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=1e-4)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_large_logits_do_not_overflow():
    loss, grad, wanted, wanted_grad = both(torch.tensor([[1e4, -1e4, 9e3], [3e38, 0.0, 0.0]]), torch.tensor([2, 0]))
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), wanted_grad)


def test_no_rows_give_zero_and_an_empty_gradient():
    """A rank whose rows have no tokens to learn still takes part in the step."""
    weight = torch.randn(5, 4, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    h, whole = torch.zeros(0, 4, requires_grad=True), VocabularyPart(0, 5)
    loss = head_cross_entropy_sum(h, none, lambda h: h @ weight.T, [weight], whole)
    loss.backward()
    assert loss.item() == 0
    assert not weight.grad.any()


def test_without_gradients_none_are_kept():
    with torch.no_grad():
        assert cross_entropy_sum(torch.zeros(2, 4), torch.tensor([0, 3])).item() == pytest.approx(2 * 1.3862944)


def test_gradients_are_finite_differences():
    """The loss is computed in fp32, so the steps are long.

    torch's gradcheck does not fit: it runs backward twice, and here backward can run only once.
    """
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 6, generator=generator)
    label = torch.randint(0, 6, (4,), generator=generator)
    grad, step = both(logits, label)[1], 1e-2
    for n in range(4):
        for v in range(6):
            move = torch.zeros_like(logits)
            move[n, v] = step
            slope = (cross_entropy_sum(logits + move, label) - cross_entropy_sum(logits - move, label)) / (2 * step)
            assert grad[n, v].item() == pytest.approx(slope.item(), abs=5e-4)


@pytest.mark.parametrize("logits", [1, 33, 40, 1000])
def test_the_heads_gradients_do_not_depend_on_the_pieces(monkeypatch, logits):
    """Pieces of one row, of three, and all rows at once; the vocabulary has eleven tokens."""
    monkeypatch.setattr(cross_entropy, "LOGITS_AT_ONCE", logits)
    generator = torch.Generator().manual_seed(2)
    h, weight, bias = (torch.randn(*s, generator=generator, requires_grad=True) for s in ((7, 5), (11, 5), (11,)))
    label, seen = torch.randint(0, 11, (7,), generator=generator), []

    def head(rows):
        seen.append(len(rows))
        return F.linear(rows, weight, bias)

    loss = head_cross_entropy_sum(h, label, head, [weight, bias], VocabularyPart(0, 11))
    got = torch.autograd.grad(loss * 0.3, [h, weight, bias])
    wanted = F.cross_entropy(F.linear(h, weight, bias), label, reduction="sum")
    torch.testing.assert_close(loss, wanted)
    for ours, theirs in zip(got, torch.autograd.grad(wanted * 0.3, [h, weight, bias]), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert max(seen) * 11 <= max(logits, 11)
    assert sum(seen) == 7
