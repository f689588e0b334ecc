"""The lazy algebra against eager torch: any chain of cuts, transposes and rotary orders gives the same values."""

import mmap

import pytest
import torch
from helpers.checkpoints import half_split
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.checkpoint.copying import copy_dense
from accessory.checkpoint.files import read_pickle
from accessory.checkpoint.lazy import Computed, Constant, Lazy, Stored, concat
from accessory.checkpoint.rotary import to_half_split

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def leaf(kind: str, tensor: torch.Tensor, tmp_path) -> Lazy:
    if kind == "constant":
        return Constant(tensor)
    if kind == "computed":
        return Computed(tuple(tensor.shape), tensor.dtype, lambda: tensor)
    path = tmp_path / "tensor.pth"
    if not path.exists():
        torch.save({"a": tensor}, path)
    lazy = read_pickle(path)["a"]
    assert isinstance(lazy, Stored)
    return lazy


def check(lazy: Lazy, eager: torch.Tensor) -> None:
    assert lazy.shape == tuple(eager.shape)
    assert lazy.dtype == eager.dtype
    assert torch.equal(lazy.load(), eager)
    flat = [block.clone() for block in lazy.blocks(64)]
    assert torch.equal(torch.cat(flat) if flat else torch.empty(0, dtype=eager.dtype), eager.reshape(-1))
    dst = torch.empty(eager.shape, dtype=torch.float32)
    lazy.copy_to(dst)
    assert torch.equal(dst, eager.float())
    if eager.dim() == 2:
        turned = torch.empty(eager.shape[::-1], dtype=eager.dtype)
        lazy.copy_to(turned.t())
        assert torch.equal(turned, eager.t())


@settings(deadline=None, max_examples=60)
@given(data=st.data(), kind=st.sampled_from(("constant", "computed", "stored")), dtype=st.sampled_from(DTYPES))
def test_any_chain_of_operations_equals_eager_torch(data, kind, dtype, tmp_path_factory):
    rows, columns = 8 * data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7))
    eager = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns).to(dtype)
    lazy = leaf(kind, eager, tmp_path_factory.mktemp("lazy"))
    for operation in data.draw(st.lists(st.sampled_from(("narrow", "t", "concat", "rotary", "cast")), max_size=6)):
        if operation == "narrow":
            dim = data.draw(st.integers(0, 1))
            start = data.draw(st.integers(0, eager.shape[dim] - 1))
            length = data.draw(st.integers(1, eager.shape[dim] - start))
            lazy, eager = lazy.narrow(dim, start, length), eager.narrow(dim, start, length)
        elif operation == "t":
            lazy, eager = lazy.t(), eager.t()
        elif operation == "concat":
            dim = data.draw(st.integers(0, 1))
            lazy, eager = concat([lazy, lazy], dim), torch.cat([eager, eager], dim)
        elif operation == "cast":
            lazy, eager = lazy.to(torch.bfloat16), eager.to(torch.bfloat16)
        elif eager.shape[0] % 4 == 0:
            heads = data.draw(st.sampled_from([n for n in (1, 2, 3) if eager.shape[0] % (2 * n) == 0]))
            lazy, eager = to_half_split(lazy, heads), half_split(eager.contiguous(), heads)
    check(lazy, eager)


def test_select_takes_an_expert_out_of_a_stack(tmp_path):
    stack = torch.randn(3, 4, 5)
    for kind in ("constant", "stored", "computed"):
        check(leaf(kind, stack, tmp_path).select(0, 1), stack[1])
        check(leaf(kind, stack, tmp_path).select(2, 4), stack[..., 4])


def test_a_computed_tensor_is_computed_once_for_all_its_blocks():
    calls = []

    def make() -> torch.Tensor:
        calls.append(1)
        return torch.arange(4096.0).view(64, 64)

    lazy = Computed((64, 64), torch.float32, make)
    for view in (lazy, lazy.t(), lazy.narrow(0, 3, 50), lazy.to(torch.bfloat16), concat([lazy], 0)):
        calls.clear()
        assert len([0 for _ in view.blocks(256)]) > 4
        assert len(calls) == 1


def test_narrowing_a_stored_tensor_touches_only_its_bytes(tmp_path):
    tensor = torch.randn(64, 4096)
    lazy = leaf("stored", tensor, tmp_path)
    part = lazy.narrow(0, 10, 2).load()
    assert part.untyped_storage().nbytes() == 2 * 4096 * 4
    assert torch.equal(part, tensor[10:12])


def test_what_is_loaded_shares_memory_with_the_file(tmp_path):
    lazy = leaf("stored", torch.randn(8, 8), tmp_path)
    assert lazy.load().data_ptr() == lazy.load().data_ptr()
    assert isinstance(lazy.source._mapped(), mmap.mmap)


def test_transposed_and_narrowed_tensors_in_a_pickle_keep_their_meaning(tmp_path):
    base = torch.randn(6, 8)
    saved = {"t": base.t(), "narrow": base[1:4, 2:5], "bare": base, "row": base[2], "scalar": base[0, 0]}
    torch.save({"model": saved, "epoch": 3}, tmp_path / "a.pth")
    read = read_pickle(tmp_path / "a.pth")
    assert list(read) == list(saved)
    for name, tensor in saved.items():
        assert torch.equal(read[name].load(), tensor)


def test_wrong_cuts_are_refused():
    lazy = Constant(torch.zeros(4, 3))
    with pytest.raises(IndexError):
        lazy.narrow(0, 2, 3)
    with pytest.raises(IndexError):
        lazy.narrow(0, -1, 2)
    with pytest.raises(ValueError, match="matrix"):
        Constant(torch.zeros(4)).t()
    with pytest.raises(ValueError, match="destination"):
        lazy.copy_to(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="does not fit"):
        concat([lazy, Constant(torch.zeros(4, 2))], 0)


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (513, 1200), (1024, 512)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_transposing_copies_tile_by_tile(shape, dtype):
    src = torch.randn(shape).to(torch.bfloat16)
    dst = torch.empty(shape[::-1], dtype=dtype)
    copy_dense(dst, src.t())
    assert torch.equal(dst, src.t().to(dtype))
    wide = torch.zeros(shape[1] + 4, shape[0] + 6, dtype=dtype)
    copy_dense(wide[2:-2, 3:-3], src.t())
    assert torch.equal(wide[2:-2, 3:-3], src.t().to(dtype))
    assert wide[:2].any() == False  # noqa: E712
