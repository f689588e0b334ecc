"""Kernels compile for cards that are not here, and their tiles fit those cards' shared memory."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is missing (extra: gpu)")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from accessory.ops.quantized import quantize  # noqa: E402
from accessory.ops.triton import adamw  # noqa: E402
from accessory.ops.triton import grouped_experts as kernels  # noqa: E402
from accessory.ops.triton import grouped_tma as tma  # noqa: E402
from accessory.ops.triton.nibbles import permutes  # noqa: E402

CARDS = {80: 166_912, 89: 101_376, 90: 232_448}  # compute capability → bytes that a program may have
CARDS_WITH_TMA = {90: 232_448, 100: 232_448, 120: 101_376}
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.uint8: "u8", torch.int8: "i8", torch.float8_e4m3fn: "u8"}


def compiled(kernel, pointers, constants, capability, num_warps, num_stages, multiples=()):
    """multiples: the numbers that are multiples of 16, as pointers are."""
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    places = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    aligned = [name for name, kind in pointers.items() if kind.startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={places[name]: [["tt.divisibility", 16]] for name in (*aligned, *multiples)},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("format", ["dense", "int8", "fp8", "int4", "nf4", "nf4-dq"])
@pytest.mark.skipif(not permutes(), reason="Triton's interpreter compiles nothing")
def test_tiles_fit_other_cards(format, capability):
    weight = torch.randn(1, 256, 512)
    weight = weight.bfloat16() if format == "dense" else quantize(weight, format)
    tensors, fixed = kernels._described(weight)
    kinds = [f"*{NAMES[t.dtype]}" for t in tensors]
    x = dict.fromkeys(("x_ptr", "h_ptr"), "*bf16") | dict.fromkeys(("count_ptr", "order_ptr"), "*i32")
    up = x | {f"{p}{n}_ptr": kind for n in (1, 3) for p, kind in zip("dszo", kinds, strict=False)}
    rows = x | {f"{p}_ptr": kind for p, kind in zip("dszo", kinds, strict=False)} | {"y_ptr": "*fp32"}
    for rows_an_expert in (0.25, 4, 16, 64, *([128] if format == "int8" else [])):  # the largest tiles
        for tables, kernel, pointers, sizes in (
            (kernels.UP, kernels._up_kernel, up, {"D": 4096, "F": 14336, "K": 2, "ONE": False}),
            (kernels.DOWN, kernels._rows_kernel, rows, {"OUT": 4096, "IN": 14336, "COUNTED": True, "ONE": False}),
        ):
            tile = kernels._tile(tables, weight, rows_an_expert, CARDS[capability])
            how = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
            # The tables are made for large weights, so the small one here must not have shrunk the tile.
            constants = {**sizes, "E": 8, "SLOTS": 8, "OVERLAPS": capability >= 90, **tile, **fixed}
            used = {
                name: kind for name, kind in {**pointers, "table_ptr": kinds[-1]}.items() if name in kernel.arg_names
            }
            done = compiled(kernel, used, constants, capability, **how)
            assert done.metadata.shared <= CARDS[capability], (rows_an_expert, tile, how)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CARDS_WITH_TMA)
@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.skipif(not permutes(), reason="Triton's interpreter compiles nothing")
def test_products_by_tma_fit_the_cards_that_have_it(rank, capability):
    """Forward and back, with and without a LoRA adapter's part, and the gradients of weights."""
    M, P, R = tma.TILE[:3]
    x, one = f"tensordesc<bf16[{M}, {R}]>", "*bf16"
    for back in (False, True):
        w = f"tensordesc<bf16[{R}, {P}]>" if back else f"tensordesc<bf16[{P}, {R}]>"
        low = {"low_ptr": one, "b_ptr": one, "low2_ptr": one, "b2_ptr": one} if rank else {}
        types = {"x_desc": x, "w_desc": w, "x2_desc": x, "w2_desc": w, "count_ptr": "*i64", "y_ptr": one} | low
        types |= dict.fromkeys(("few_desc", "few2_desc"), f"tensordesc<bf16[{M // 2}, {R}]>")
        nothing = {} if rank else dict.fromkeys(("low_ptr", "b_ptr", "low2_ptr", "b2_ptr"))
        tile = tma._tile(2, 4096, CARDS_WITH_TMA[capability])
        how = {name: tile[name] for name in ("num_warps", "num_stages")}
        sizes = {name: tile[name] for name in ("M", "P", "R", "SIDE")}
        constants = {
            **nothing, "OUT": 4096, "IN": 14336, "E": 8, "SLOTS": 8, "BACK": back, "TWO": True, "RANK": rank,
            "RANK2": rank, "LOW": 16, "LOW2": 16, "FEW": M // 2, **sizes,
        }  # fmt: skip
        done = compiled(tma._product_kernel, types, constants, capability, **how)
        assert done.metadata.shared <= CARDS_WITH_TMA[capability]
    tile = tma._tile(2, 4096, CARDS_WITH_TMA[capability], 14336)
    how = {name: tile[name] for name in ("num_warps", "num_stages")}
    sizes = {name: tile[name] for name in ("M", "P", "R", "SIDE")}
    M, P, R = (sizes[name] for name in "MPR")
    types = {"dy_desc": f"tensordesc<bf16[{R}, {M}]>", "x_desc": f"tensordesc<bf16[{R}, {P}]>", "count_ptr": "*i64"}
    types |= {"dy_ptr": one, "x_ptr": one, "dw_ptr": "*fp32"}
    constants = {"OUT": 14336, "IN": 4096, "E": 8, "SLOTS": 8, "WAITS": True, "PROGRAMS": 132, **sizes}
    for adds, squares in ((True, True), (False, True), (True, False)):
        more = {"ADDS": adds, "SQUARES": squares} | ({} if squares else {"squares_ptr": None})
        used = types | ({"squares_ptr": "*fp32"} if squares else {})
        done = compiled(tma._weights_kernel, used, constants | more, capability, **how)
        assert done.metadata.shared <= CARDS_WITH_TMA[capability]


@pytest.mark.slow
@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("gradient", ["*fp32", "*bf16"])
@pytest.mark.skipif(not permutes(), reason="Triton's interpreter compiles nothing")
def test_the_update_reads_and_writes_16_bytes_at_a_time(gradient, capability):
    """A thread's loads and stores are as wide as memory gives them, also behind the mask of the last numbers."""
    types = dict.fromkeys(("weight_ptr", "exp_avg_ptr", "exp_avg_sq_ptr"), "*fp32")
    types |= {"gradient_ptr": gradient, "copy_ptr": "*bf16"}
    types |= {"scale_ptr": "*fp32"} | dict.fromkeys(("kept", "beta1", "beta2", "step", "correction", "eps"), "fp32")
    constants = {"COPIES": True, "BLOCK": adamw.BLOCK}
    done = compiled(adamw._adamw_kernel, types, constants, capability, 4, 3, multiples=("N",))
    ptx = done.asm["ptx"]
    accesses = [line for line in ptx.splitlines() if "ld.global" in line or "st.global" in line]
    assert accesses
    wide = [line for line in accesses if ".v4" in line]
    assert len(accesses) - len(wide) == 1, accesses  # the scale of the gradient, one number
