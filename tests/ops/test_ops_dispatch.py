"""The table of kernels: every row is there and reachable, and each limit is where `limits` says."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory import limits
from accessory.formats import FORMATS
from accessory.ops import dispatch, machine
from accessory.ops.dispatch import TABLE, Kernel, Product, choose, find, host_free

SIZES = {"in_features": 4096, "out_features": 14336}
GRADIENTS = ("grouped_backward", "grouped_terms", "grouped_weights")
OPS = ("linear", "linear_backward", "grouped", *GRADIENTS, "adapters", "dequantize")
PAGED = ("attention", "rotate_and_write")  # their "weight" is a cache, dense or fp8
TOKENS = ("add_norm", "route", "gate", "gate_backward", "combine", "cross_entropy", "rope")
FIXED = ("decode", "prompt")
PRODUCTS = st.builds(
    Product,
    op=st.sampled_from((*OPS, "decode")),
    weight=st.sampled_from((dispatch.DENSE, *FORMATS)),
    rows=st.integers(0, 5000),
    experts=st.integers(1, 8),
    in_features=st.sampled_from((4096, 129)),
    out_features=st.sampled_from((14336, 24, 7)),
    device=st.sampled_from(("cpu", "cuda")),
    capability=st.sampled_from(((7, 5), (8, 0), (8, 9), (9, 0), (10, 0))),
    dtype=st.sampled_from(("bfloat16", "float16", "float32", "float64")),
    grad=st.booleans(),
    fused=st.booleans(),
    triton=st.booleans(),
    amx=st.booleans(),
    fixed=st.just(""),
)


@pytest.mark.parametrize("kernel", TABLE, ids=lambda k: f"{k.op} {k.function}")
def test_every_row_names_a_function_that_is_there(kernel):
    if kernel.triton and not dispatch.has_triton():
        pytest.skip("Triton is not installed")
    assert callable(kernel.load())


@given(p=PRODUCTS)
@settings(max_examples=300)
def test_every_product_has_a_kernel_that_fits_it(p):
    kernel = find(p)
    if kernel is None:
        # None for a single dense weight: torch computes the product and its gradients. None for decode: experts are
        # computed with grouped products.
        # Adapters and stacks that get gradients are dense. Sums of products are single ones where no kernel adds them.
        dense = p.weight == dispatch.DENSE
        none = {"decode": True, "grouped_terms": True, "adapters": not dense, "grouped_weights": not dense}
        assert none.get(p.op, dense and p.op not in ("grouped", "grouped_backward"))
        return
    assert kernel.op == p.op
    assert (p.weight in kernel.weights) if kernel.weights else (p.weight != dispatch.DENSE)
    assert not (p.grad and not kernel.grad)
    assert p.triton or "triton" not in kernel.function
    assert p.device == "cuda" or "triton" not in kernel.function


@given(p=PRODUCTS.filter(lambda p: p.weight in (dispatch.DENSE, "fp8")), op=st.sampled_from(PAGED))
def test_every_paged_cache_has_a_kernel(p, op):
    kernel = choose(p._replace(op=op, grad=False))
    on_gpu = p.device == "cuda" and p.triton and (p.weight == dispatch.DENSE or p.capability >= (8, 9))
    assert kernel.triton == on_gpu
    assert kernel.function.startswith("triton.") == on_gpu


@given(p=PRODUCTS.filter(lambda p: p.triton or p.device == "cpu"), fixed=st.sampled_from(FIXED))
@settings(max_examples=300)
def test_fixed_products_have_one_kernel_for_any_number_of_rows(p, fixed):
    p = p._replace(fixed=fixed, grad=False, capability=max(p.capability, (8, 0)))
    kernels = {find(p._replace(rows=rows)) for rows in (0, 1, 2, 3, 8, 9, 16, 65, 513, 4096, 100_000)}
    assert len(kernels) == 1
    if p.op in ("linear", "grouped") and p.dtype != "float64" and (p.device == "cuda" or p.dtype != "float16"):
        assert None not in kernels


def test_every_row_is_reached_by_some_product():
    """A row is dead if an earlier row fits all its products."""
    found = set()
    for op, weight, device in product(PAGED, (dispatch.DENSE, "fp8"), ("cpu", "cuda")):
        found.add(find(Product(op, weight, device=device)))
        found |= {find(Product(op, weight, device=device, fixed=fixed)) for fixed in FIXED}
    found |= {
        find(Product(op, experts=8, dtype=d, grad=g))
        for op in TOKENS
        for d, g in (("bfloat16", False), ("float32", True))
    }
    found.add(find(Product("decode", "int4", 2, 8, **SIZES, plain=False)))
    found.add(find(Product("adamw", rows=limits.ADAMW_NUMBERS[0], dtype="float32")))
    for op in (*OPS, "decode"):
        for weight in (dispatch.DENSE, *FORMATS):
            for rows in (1, 20, 100, 100_000):
                for device, dtype, grad in (("cpu", "float32", False), ("cpu", "bfloat16", False),
                                            ("cuda", "bfloat16", False), ("cuda", "bfloat16", True),
                                            ("cuda", "float32", False), ("cuda", "float32", True),
                                            ("cuda", "float16", False)):  # fmt: skip
                    p = Product(op, weight, rows, 8, **SIZES, device=device, dtype=dtype, grad=grad, fused=True)
                    found.add(find(p._replace(amx=device == "cpu")))
                    found |= {find(p._replace(fixed=fixed, grad=False)) for fixed in FIXED}
                    found |= {find(p._replace(fixed=fixed, grad=False, out_features=7)) for fixed in FIXED}
                    found.add(find(p._replace(capability=(8, 0))))
    assert set(TABLE) <= found


@pytest.mark.parametrize(
    ("op", "weight", "most", "here", "beyond"),
    [
        ("decode", "dense", limits.DECODE_PAIRS_GPU, "triton.decode_experts:decode_experts", None),
        ("decode", "dense", limits.IN_PLACE_PAIRS, "triton.decode_experts:decode_experts",
         "triton.grouped_experts:experts_in_tiles"),
        ("decode", "dense", limits.TILED_PAIRS, "triton.grouped_experts:experts_in_tiles", None),
        ("decode", "fp8", limits.TILED_PAIRS, "triton.grouped_experts:experts_in_tiles", None),
        ("decode", "nf4", limits.TILED_PAIRS_4_BITS, "triton.grouped_experts:experts_in_tiles", None),
        ("adapters", "dense", limits.ADAPTER_ROWS, "triton.low_rank:add_row_by_row", "triton.low_rank:add_grouped"),
        ("decode", "int4", limits.DECODE_PAIRS_GPU_QUANTIZED, "triton.packed:decode_experts", None),
        ("linear", "nf4", limits.IN_PLACE_ROWS, "triton.packed:linear", "triton.grouped_experts:linear"),
        ("linear", "nf4", limits.FEW_ROWS, "triton.grouped_experts:linear", "triton.packed_grouped:product"),
        ("linear", "nf4", limits.TILED_ROWS, "triton.packed_grouped:product", "quantized_products:dequantized_linear"),
        ("linear", "fp8", limits.TILED_ROWS, "triton.packed_grouped:product", "fp8:fp8_linear"),
        ("grouped", "int8", 8 * limits.TILED_ROWS_AN_EXPERT, "triton.packed_grouped:product",
         "quantized_products:dequantized_grouped"),
        ("grouped_backward", "int8", 8 * limits.TILED_ROWS_AN_EXPERT, "triton.packed_grouped:gradient",
         "quantized_products:dequantized_grouped_backward"),
    ],
)  # fmt: skip
def test_limits_are_where_they_were_measured(op, weight, most, here, beyond):
    experts, plain = 8 if op != "linear" else 1, op != "decode" or "experts_in_tiles" in f"{here} {beyond}"
    assert choose(Product(op, weight, most, experts, **SIZES, plain=plain)).function == here
    after = find(Product(op, weight, most + 1, experts, **SIZES, plain=plain))
    assert (after.function if after else None) == beyond


def test_large_parameters_in_fp32_have_a_kernel_for_their_update():
    large = Product("adamw", rows=limits.ADAMW_NUMBERS[0], dtype="float32")
    assert choose(large).function == "triton.adamw:update"
    for changes in ({"rows": large.rows - 1}, {"device": "cpu"}, {"dtype": "bfloat16"}, {"triton": False}):
        assert find(large._replace(**changes)) is None


@pytest.mark.parametrize(
    ("weight", "changes", "function"),
    [
        ("int8", {}, "quantized_cpu:int8_packed"),
        ("int8", {"rows": limits.INT8_ROWS_CPU + 1}, "quantized_cpu:rows_scaled_after"),
        ("int8", {"in_features": 4100}, "quantized_cpu:rows_scaled_after"),  # torch's product would read too far
        ("int8", {"rows": 0}, "quantized_cpu:rows_scaled_after"),
        ("fp8", {}, "quantized_cpu:rows_scaled_after"),
        ("fp8", {"dtype": "float32"}, "quantized_cpu:scaled_before"),
        ("nf4", {"amx": True}, "quantized_cpu:groups_scaled_after"),
        ("nf4", {}, "quantized_cpu:scaled_before"),
        ("int4", {"amx": True, "rows": limits.GROUP_SUM_ROWS_CPU + 1}, "quantized_cpu:scaled_before"),
        ("nf4-dq", {"amx": True, "dtype": "float32"}, "quantized_cpu:scaled_before"),
        ("nf4", {"dtype": "float16"}, "quantized_products:dequantized_linear"),  # unscaled sums might overflow
    ],
)
def test_a_cpu_reads_formats_without_a_whole_dequantized_weight(weight, changes, function):
    p = Product("linear", weight, **{"rows": 1, **SIZES, "device": "cpu", "capability": (0, 0), **changes})
    assert choose(p).function == function
    assert find(p._replace(op="decode", rows=2, fused=True)).function == "experts:decode_experts_fused"


def test_products_in_fp8_are_only_for_what_needs_no_gradients():
    p = Product("grouped", "fp8", 4096, 8, **SIZES)
    assert choose(p).function == "fp8:fp8_grouped_linear"
    assert choose(p._replace(grad=True)).function != "fp8:fp8_grouped_linear"
    assert choose(p._replace(capability=(8, 9))).function != "fp8:fp8_grouped_linear"


def test_graphs_hold_what_no_host_has_to_know():
    decode, grouped = Product("decode", "int4", 12, plain=False), Product("grouped", "dense", 64, 8, **SIZES)
    loop = grouped._replace(triton=False, dtype="float32")
    assert host_free(decode, [loop])  # few pairs: nothing is grouped
    assert not host_free(decode._replace(rows=14), [grouped, loop])
    assert host_free(decode._replace(rows=14), [grouped])
    # torch has no grouped product for a LoRA adapter of rank 4. Triton's kernel takes any size, but no gradients.
    narrow = grouped._replace(out_features=4)
    assert host_free(decode._replace(rows=14), [grouped, narrow])
    assert not host_free(decode._replace(rows=14), [grouped, narrow._replace(triton=False)])
    assert not host_free(decode._replace(rows=14), [grouped, narrow._replace(grad=True)])


@pytest.mark.parametrize("changes", [{"dtype": "float16"}, {"dtype": "float32"}, {"out_features": 4}], ids=str)
def test_dense_products_without_gradients_need_no_host(changes):
    for weight in ("dense", "nf4"):
        rows = 8 * limits.GROUPED_ROWS_AN_EXPERT_FP32
        p = Product("grouped", weight, rows, 8, **{**SIZES, **changes})
        assert choose(p).host_free
        # In fp32, more rows are quicker one expert after the other.
        assert choose(p._replace(rows=rows + 1)).host_free == (changes.get("dtype") != "float32")
    assert not choose(Product("grouped", "dense", 64, 8, **{**SIZES, **changes}, grad=True)).host_free
    few, many = (Product("grouped", "dense", limits.GROUPED_ROWS + n, 8, **SIZES) for n in (0, 1))
    assert choose(few).function == "triton.grouped:product"
    assert choose(many).function == "triton.grouped_tma:product"
    assert choose(many._replace(capability=(8, 9))).function == "dense_products:grouped_mm"
    assert choose(few._replace(grad=True)).function == "dense_products:grouped_mm"


def test_a_product_is_read_off_its_tensors():
    x, stack = torch.zeros(3, 16, dtype=torch.bfloat16), torch.zeros(4, 24, 16)
    with torch.no_grad():
        p = dispatch.product("grouped", x, stack, 3)
    assert p == Product(
        "grouped",
        "dense",
        3,
        4,
        16,
        24,
        "cpu",
        (0, 0),
        "bfloat16",
        False,
        False,
        True,
        dispatch.has_triton(),
        dispatch.has_amx(),
    )
    assert dispatch.product("grouped", x, stack, 3).grad


def test_a_kernel_is_a_row(monkeypatch):
    """A new kernel needs a function in accessory.ops, and a row above the slower kernels."""
    row = Kernel("grouped", "norm:rms_norm", ("dense",), ("cpu",), rows=(0, 2))
    monkeypatch.setattr(dispatch, "TABLE", (row, *TABLE))
    find.cache_clear()
    try:
        assert choose(Product("grouped", device="cpu", rows=2)) is row
        assert choose(Product("grouped", device="cpu", rows=3)).function == "dense_products:grouped_loop"
    finally:
        find.cache_clear()


@pytest.fixture
def with_triton(monkeypatch, tmp_path):
    """A machine where Triton is installed: with a compiler gcc on PATH and Python's headers. Both may be taken away."""
    (tmp_path / "gcc").write_text("")
    (tmp_path / "gcc").chmod(0o755)
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: "a spec" if name == "triton" else None)
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: str(tmp_path) if name == "include" else "")
    dispatch.has_triton.cache_clear()
    yield tmp_path
    dispatch.has_triton.cache_clear()


@pytest.mark.parametrize(
    ("missing", "cc", "lacks"),
    [(None, None, None), ("gcc", None, "a C compiler"), ("gcc", "tcc", None), ("Python.h", None, "Python.h")],
)
def test_triton_without_what_it_compiles_with_is_not_used(missing, cc, lacks, with_triton, monkeypatch, caplog):
    if missing is not None:
        (with_triton / missing).unlink()
    if cc is not None:
        monkeypatch.setenv("CC", cc)
    assert dispatch.has_triton() is (lacks is None)
    machine.warn_of_slow_kernels()
    if lacks is None:
        assert not caplog.messages
        return
    (said,) = caplog.messages
    assert said.startswith(f"Triton lacks {lacks} (install ")
    decode = dispatch.Product("decode", "int4", 2, 8, 64, 64, triton=dispatch.has_triton())
    assert dispatch.find(decode) is None
    assert not dispatch.choose(decode._replace(op="linear")).triton
