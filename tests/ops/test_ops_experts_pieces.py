"""The experts' training with more rows than are computed at once: the pieces together are what all rows at once are."""

from collections import Counter

import pytest
import torch
from helpers.trained_experts import WAYS, D, E, F, agree, case, gradients, leaves, single_products
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from accessory.ops import experts_autograd, quantized_products
from accessory.ops.experts_autograd import trained_experts

BOUND = 1e-5
MODES = pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])


@pytest.fixture(params=[7, 13, 1], ids="{} at once".format)
def few(request, monkeypatch):
    """Of 26 rows so many at once: four pieces of which the last one is shorter, two pieces, or 26."""
    monkeypatch.setattr(experts_autograd, "TRAINED_PAIRS_AT_ONCE", request.param)


@pytest.fixture
def dequantized_first(monkeypatch):
    """Quantised stacks are dequantised before their products, as on a GPU with many rows. Counts them by shape."""
    done, dequantized = Counter(), quantized_products.dequantized

    def counted(packed, dtype):
        done[tuple(packed.shape)] += 1
        return dequantized(packed, dtype)

    def product(x, packed, count_E, grad):
        return quantized_products.dequantized_grouped(x, packed, count_E)

    monkeypatch.setattr(quantized_products, "dequantized", counted)
    for module in (quantized_products, experts_autograd):
        monkeypatch.setattr(module, "multiplied_dequantized", lambda packed, x, rows: True)
    monkeypatch.setattr(experts_autograd, "packed_grouped", product)
    monkeypatch.setattr(experts_autograd, "packed_grouped_backward", quantized_products.dequantized_grouped_backward)
    return done


def check(inputs, recompute, want=None, **options):
    """Values and gradients are those of single products. Returns the gradients."""
    want, want_gradients = gradients(want or single_products, *inputs)
    got, got_gradients = gradients(trained_experts, *inputs, recompute=recompute, **options)
    agree([got, *got_gradients], [want, *want_gradients], BOUND)
    return got_gradients


@MODES
@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients_are_those_of_single_products(way, recompute, few):
    check(case(**WAYS[way]), recompute)


@MODES
@pytest.mark.parametrize("way", ["nf4", "int8"])
def test_stacks_that_are_dequantised_before_their_products(way, recompute, few, dequantized_first):
    """w2 is dequantised once a pass, for all pieces. All rows at once are multiplied by w1 and w3."""
    check_dequantized(case(**WAYS[way]), recompute, dequantized_first)
    assert dequantized_first[E, D, F] == 2  # forward and backward
    assert dequantized_first[E, F, D] == (6 if recompute else 4)  # of both; computed again, once more each


def test_stacks_that_are_dequantised_for_all_pieces(dequantized_first, monkeypatch):
    """Two of them take less than two tensors (N, F) do."""
    monkeypatch.setattr(experts_autograd, "TRAINED_PAIRS_AT_ONCE", 300)
    check_dequantized(case(format="int8", lora=True, tokens=E * D), True, dequantized_first)
    assert dequantized_first[E, D, F] == 2
    assert dequantized_first[E, F, D] == 4


def check_dequantized(inputs, recompute, dequantized_first):
    want, want_gradients = gradients(single_products, *inputs)
    dequantized_first.clear()
    got, got_gradients = gradients(trained_experts, *inputs, recompute=recompute)
    agree([got, *got_gradients], [want, *want_gradients], BOUND)


@MODES
@pytest.mark.parametrize("way", ["dense", "all", "int8"])
def test_experts_without_rows_in_a_piece_or_in_all(way, recompute, few):
    x, stacks, weight, expert = case(**WAYS[way])
    for gradient in check((x, stacks, weight, torch.tensor([[0, 2]]).expand_as(expert)), recompute)[2:]:
        assert not gradient[[1, 3]].any()
        assert gradient[0].any()
        assert gradient[2].any()


@MODES
@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("way", ["dense", "all"])
def test_experts_of_other_ranks_add_nothing(way, first, recompute, few):
    def held(x, *stacks_and_routing):
        *stacks, weight, expert = stacks_and_routing
        inside = ((expert >= first) & (expert < first + 2)).float()
        return single_products(x, *stacks, weight * inside, (expert - first).clamp(0, 1))

    check(case(experts=2, **WAYS[way]), recompute, held, first=first)


@MODES
@pytest.mark.parametrize("way", ["dense", "all", "nf4"])
def test_gradients_of_micro_batches_add_up(way, recompute, few):
    """Pieces are written on top of the first one's; a hook on a gradient sees to it that autograd adds it."""
    check_micro_batches(way, recompute, stale=False)


@MODES
@pytest.mark.parametrize("way", ["dense", "lora"])
def test_a_stale_gradient_is_written_over_by_the_first_piece_alone(way, recompute, few):
    check_micro_batches(way, recompute, stale=True)


def check_micro_batches(way, recompute, stale):
    inputs = [case(seed=s, **WAYS[way]) for s in (0, 1)]
    x, stacks, weight, _ = inputs[0]
    trained = leaves(x, stacks, weight)[2:]
    for t in trained if stale else ():
        t.grad, t.gradient_is_stale = torch.full_like(t, 1e3), True
    for w in () if stale else stacks:
        if w.lora_b is not None:
            w.lora_b.register_hook(lambda grad: None)
    for x, _, weight, expert in inputs:
        trained_experts(x, *stacks, weight, expert, recompute=recompute).square().sum().backward()
        assert not any(getattr(t, "gradient_is_stale", False) for t in trained)
    want = [torch.zeros_like(t) for t in trained]
    for x, _, weight, expert in inputs:
        y = single_products(x, *stacks, weight, expert).square().sum()
        for total, part in zip(want, torch.autograd.grad(y, trained), strict=True):
            total += part
    agree([t.grad for t in trained], want, BOUND)


def test_a_gradient_may_have_a_dtype_of_its_own(few):
    x, stacks, weight, expert = case()
    for w in stacks:
        w.weight.grad_dtype = torch.bfloat16
    trained_experts(x, *stacks, weight, expert).square().sum().backward()
    dense = [w.weight for w in stacks]
    want = torch.autograd.grad(single_products(x, *stacks, weight, expert).square().sum(), dense)
    assert all(w.grad.dtype == torch.bfloat16 for w in dense)
    agree([w.grad.float() for w in dense], want, 1e-2)


def test_in_bf16(few):
    x, stacks, weight, expert = case(lora=True)
    want, want_gradients = gradients(single_products, x, stacks, weight, expert)
    x16 = x.detach().bfloat16().requires_grad_()
    got, got_gradients = gradients(trained_experts, x16, stacks, weight, expert)
    agree([got, *got_gradients], [want, *want_gradients], 2e-2)


# --------------------------------------------------------------------------- memory


class Whole(TorchDispatchMode):
    """The most tensors of so many bytes that are there at once."""

    def __init__(self, nbytes):
        super().__init__()
        self.nbytes, self.there, self.most = nbytes, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for t in made if isinstance(made, tuple | list) else [made]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes() == self.nbytes:
                reference = StorageWeakRef(t.untyped_storage())
                self.there[reference.cdata] = reference
        self.there = {place: reference for place, reference in self.there.items() if not reference.expired()}
        self.most = max(self.most, len(self.there))
        return made


def most_whole(inputs, recompute):
    """Tensors (N, F), forward and backward. Nothing else here has their size."""
    x, stacks, weight, expert = inputs
    with Whole(x.element_size() * expert.numel() * F) as tensors:
        y = trained_experts(x, *stacks, weight, expert, recompute=recompute).sum()
        forward, tensors.most = tensors.most, 0
        y.backward()
    return forward, tensors.most


def test_of_the_hidden_size_two_tensors_are_whole_at_most(monkeypatch):
    """w1 x and w3 x, then their gradients; computed again, none. The rest is of the rows of one piece."""
    assert min(most_whole(case(), recompute=False)) > 2  # all rows are one piece
    monkeypatch.setattr(experts_autograd, "TRAINED_PAIRS_AT_ONCE", 7)
    assert most_whole(case(), recompute=False) == (2, 2)
    assert most_whole(case(), recompute=True) == (0, 0)


def test_two_are_whole_where_copies_of_stacks_take_more(monkeypatch):
    """Stacks of another dtype than the products' are cast, and w2's copy is given back before w1's and w3's are."""
    monkeypatch.setattr(experts_autograd, "TRAINED_PAIRS_AT_ONCE", 7)
    x, *rest = case()
    assert most_whole((x.double(), *rest), recompute=True) == (2, 2)
    x, *rest = case(tokens=E * D)
    assert most_whole((x.double(), *rest), recompute=True) == (0, 0)


@MODES
def test_two_are_whole_where_stacks_are_dequantised_first(recompute, monkeypatch, dequantized_first):
    monkeypatch.setattr(experts_autograd, "TRAINED_PAIRS_AT_ONCE", 7)
    assert most_whole(case(format="int8"), recompute) == (2, 2)


def test_what_is_dequantised_is_given_back(monkeypatch, dequantized_first):
    """No two stacks are there dequantised. The second tensor of their size is what one is made of."""
    monkeypatch.setattr(experts_autograd, "TRAINED_PAIRS_AT_ONCE", 7)
    x, stacks, weight, expert = case(format="int8")
    for recompute in (False, True):
        with Whole(4 * E * D * F) as tensors:
            trained_experts(x, *stacks, weight, expert, recompute=recompute).sum().backward()
        assert tensors.most == 2
