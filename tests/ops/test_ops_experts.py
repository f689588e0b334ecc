import pytest
import torch
from helpers.adapted import feed_forward, random_kind
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.ops.dense_products import grouped_loop, sort_by_expert
from accessory.ops.experts import combine, decode_experts_fused, decode_kernel, grouped_experts, swiglu
from accessory.ops.experts_autograd import trained_experts
from accessory.ops.linear import AdapterRows, LinearAdapter, Weight, linear


def by_definition(x_TD, w1, w2, w3, weight_TK, expert_TK):
    """The definition: token by token, expert by expert, in fp64."""
    x, w1, w2, w3 = (t.double() for t in (x_TD, w1, w2, w3))
    rows = []
    for t in range(len(x)):
        y = torch.zeros(x.shape[1], dtype=torch.float64)
        for weight, e in zip(weight_TK[t].tolist(), expert_TK[t].tolist(), strict=True):
            a = w1[e] @ x[t]
            y += weight * (w2[e] @ (a * torch.sigmoid(a) * (w3[e] @ x[t])))
        rows.append(y)
    return torch.stack(rows)


def problem(T, E, K, D=12, F=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    w1, w2, w3 = (torch.randn(E, *s, generator=g) * 0.3 for s in ((F, D), (D, F), (F, D)))
    expert_TK = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)])
    return torch.randn(T, D, generator=g), w1, w2, w3, torch.rand(T, K, generator=g), expert_TK


@settings(deadline=None, max_examples=25)
@given(T=st.integers(1, 9), E=st.integers(1, 6), K=st.integers(1, 3), seed=st.integers(0, 99))
def test_experts_are_the_definition_on_every_path(T, E, K, seed):
    args = problem(T, E, min(K, E), seed=seed)
    expected = by_definition(*args).float()
    torch.testing.assert_close(grouped_experts(*args), expected, rtol=1e-4, atol=1e-5)
    x, w1, w2, w3, weight, expert = args
    w13 = torch.cat([w1, w3], 1)
    torch.testing.assert_close(decode_experts_fused(x, w13, w2, weight, expert), expected, rtol=1e-4, atol=1e-5)
    halves = [
        decode_experts_fused(x, w13[a:b], w2[a:b], weight, expert, first=a) for a, b in ((0, E // 2), (E // 2, E))
    ]
    torch.testing.assert_close(sum(halves), expected, rtol=1e-4, atol=1e-5)


def test_slices_of_the_hidden_dimension_add_up():
    x, w1, w2, w3, weight, expert = problem(7, 4, 2)
    parts = [grouped_experts(x, w1[:, s], w2[:, :, s], w3[:, s], weight, expert) for s in (slice(0, 8), slice(8, 20))]
    torch.testing.assert_close(sum(parts), grouped_experts(x, w1, w2, w3, weight, expert))


def test_gradients_are_those_of_the_definition():
    x, w1, w2, w3, weight, expert = problem(6, 3, 2)
    leaves = [t.clone().requires_grad_() for t in (x, w1, w2, w3, weight)]
    probe = torch.randn(6, 12)
    y = trained_experts(leaves[0], *map(Weight, leaves[1:4]), leaves[4], expert)
    (y * probe).sum().backward()
    dense = [t.clone().double().requires_grad_() for t in (x, w1, w2, w3, weight)]
    y = sum(
        dense[4][:, k, None]
        * torch.stack([swiglu(dense[0][t], *(w[expert[t, k]] for w in dense[1:4])) for t in range(6)])
        for k in range(2)
    )
    (y * probe.double()).sum().backward()
    for ours, theirs in zip(leaves, dense, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=1e-4, atol=1e-5)


def test_no_rows_at_all():
    assert grouped_loop(torch.empty(0, 4), torch.randn(3, 5, 4), torch.zeros(3, dtype=torch.int64)).shape == (0, 5)


def test_sorting_is_stable_and_counts_every_pair():
    order, count = sort_by_expert(torch.tensor([[2, 0], [0, 2], [1, 2]]), 4)
    assert order.tolist() == [1, 2, 4, 0, 3, 5]
    assert count.tolist() == [2, 1, 3, 0]


def test_torch_grouped_mm_agrees_with_the_reference_where_the_cpu_has_it():
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("torch.nn.functional.grouped_mm is missing from this torch")
    x, w, count = torch.randn(9, 16), torch.randn(3, 24, 16), torch.tensor([4, 0, 5])
    y = torch.nn.functional.grouped_mm(x, w.transpose(1, 2), offs=count.cumsum(0).to(torch.int32))
    torch.testing.assert_close(y, grouped_loop(x, w, count))


@given(T=st.integers(1, 7), E=st.integers(1, 6), K=st.integers(1, 3), cut=st.integers(0, 6), seed=st.integers(0, 99))
def test_parts_of_the_experts_add_up(T, E, K, cut, seed):
    """Two ranks hold the experts before and from `cut` on. Pairs of the other rank's experts add nothing."""
    x, *weights, weight, expert = problem(T, E, min(K, E), seed=seed)
    cut = min(cut, E)
    parts = [
        grouped_experts(x, *(w[a:b] for w in weights), weight, expert, first=a)
        for a, b in ((0, cut), (cut, E))
        if a < b
    ]
    torch.testing.assert_close(sum(parts), grouped_experts(x, *weights, weight, expert), rtol=1e-4, atol=1e-5)


@given(
    experts=st.integers(1, 5),
    first=st.integers(0, 6),
    chosen=st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2), min_size=1, max_size=9),
)
def test_pairs_of_other_experts_come_behind_all_others(experts, first, chosen):
    order, count = sort_by_expert(torch.tensor(chosen), experts, first)
    flat = [e for row in chosen for e in row]
    key = [e - first if first <= e < first + experts else experts for e in flat]
    assert order.tolist() == sorted(range(len(flat)), key=lambda n: key[n])
    assert count.tolist() == [key.count(e) for e in range(experts)]


def test_what_lies_in_rows_without_a_product_adds_nothing():
    y = torch.tensor([[1.0], [2.0], [float("nan")], [float("inf")]])
    order = torch.tensor([2, 0, 1, 3])
    assert combine(y, order, torch.ones(2, 2), torch.tensor(2)).tolist() == [[2.0], [1.0]]


def adapted(E, ranks, g, D=12, F=20):
    """w1, w2 and w3, each with biases and with one adapter for each number in `ranks`."""
    shapes = ((F, D), (D, F), (F, D))
    stacks = [torch.randn(E, *s, generator=g) * 0.3 for s in shapes]
    return tuple(random_kind(w, ranks, bias=True, generator=g, dtype=torch.float32) for w in stacks)


@given(T=st.integers(1, 6), E=st.integers(1, 5), ranks=st.lists(st.integers(0, 4), min_size=1, max_size=3),
       first=st.integers(0, 4), seed=st.integers(0, 99))  # fmt: skip
@settings(max_examples=50)
def test_each_token_has_its_own_adapter(T, E, ranks, first, seed):
    g = torch.Generator().manual_seed(seed)
    first = min(first, E - 1)
    x, *_, weight, expert = problem(T, E, min(2, E), seed=seed)
    kinds, adapter = adapted(E, tuple(ranks), g), torch.randint(-1, len(ranks), (T,), generator=g)
    parts = [k.part(first, E - first, "cpu", several=True) for k in kinds]
    want = feed_forward(x, kinds, weight, expert, adapter, range(first, E))
    got = grouped_experts(x, *parts, weight, expert, first, AdapterRows(adapter, len(ranks)))
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-4)


@given(rows=st.integers(0, 5), ranks=st.lists(st.integers(0, 4), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_each_row_of_a_linear_has_its_own_adapter(rows, ranks, seed):
    g = torch.Generator().manual_seed(seed)
    x, w, bias = torch.randn(rows, 2, 6, generator=g), torch.randn(9, 6, generator=g), torch.randn(9, generator=g)
    loras = [
        LinearAdapter(torch.randn(r, 6, generator=g), torch.randn(9, r, generator=g), 0.5 + r) if r else None
        for r in ranks
    ]
    adapter = torch.randint(-1, len(ranks), (rows * 2,), generator=g)
    got = linear(x, Weight(w, bias).with_adapters(loras), adapters=AdapterRows(adapter, len(ranks)))
    for y_O, x_I, a in zip(got.flatten(0, 1), x.flatten(0, 1), adapter.tolist(), strict=True):
        lora = loras[a] if a >= 0 else None
        merged = w if lora is None else w + lora.scale * lora.b @ lora.a
        torch.testing.assert_close(y_O, merged @ x_I + bias, rtol=1e-4, atol=1e-4)


def test_weights_that_need_a_cast_are_not_read_in_place():
    """Trained weights are fp32. An evaluation of a few tokens in 16 bits takes grouped products, which cast them."""
    weights = tuple(Weight(torch.zeros(4, *shape)) for shape in ((8, 4), (4, 8), (8, 4)))
    x = torch.zeros(1, 4)
    with torch.no_grad():
        assert decode_kernel(x, weights, 2, fused=True) is not None
        assert decode_kernel(x.bfloat16(), weights, 2, fused=True) is None
