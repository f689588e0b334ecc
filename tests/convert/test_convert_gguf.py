"""GGUF files: read against the gguf package's own writer and dequantiser."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.convert.dense import open_gguf
from accessory.convert.upcycle import open_dense
from accessory.errors import CheckpointError, MissingExtraError

gguf = pytest.importorskip("gguf")
Kind = gguf.GGMLQuantizationType

D, F, V, H, G, LAYERS = 256, 512, 96, 8, 2, 2
HD = D // H

SHAPES = {
    "token_embd.weight": (V, D),
    "output.weight": (V, D),
    "output_norm.weight": (D,),
    **{
        f"blk.{i}.{name}.weight": shape
        for i in range(LAYERS)
        for name, shape in {
            "attn_norm": (D,),
            "ffn_norm": (D,),
            "attn_q": (D, D),
            "attn_k": (G * HD, D),
            "attn_v": (G * HD, D),
            "attn_output": (D, D),
            "ffn_gate": (F, D),
            "ffn_up": (F, D),
            "ffn_down": (D, F),
        }.items()
    },
}


def random_blocks(shape: tuple[int, ...], kind, rng: np.random.Generator) -> np.ndarray:
    """Random bytes that dequantise to finite numbers: every half-precision scale among them gets a small exponent."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows = rng.integers(0, 256, (int(np.prod(shape[:-1])), shape[-1] // block, size), dtype=np.uint8)
    scales = {Kind.Q4_K: (1, 3), Kind.Q6_K: (size - 1,), Kind.Q5_K: (1, 3)}[kind]
    for byte in scales:
        rows[..., byte] = rows[..., byte] & 0x83 | 0x20
    return rows.reshape(rows.shape[0], -1)


def write_gguf(path: Path, kind=None, metadata=None, drop=(), extra=None, shapes=SHAPES, arch="llama", seed=0):
    """Writes a tiny Llama, matrices quantised as `kind`. Returns the expected value of each tensor, in fp32."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), arch)
    values = {
        "context_length": 128,
        "embedding_length": D,
        "block_count": LAYERS,
        "feed_forward_length": F,
        "attention.head_count": H,
        "attention.head_count_kv": G,
    }
    for key, value in (values | (metadata or {})).items():
        name = key if key.startswith(("tokenizer.", "split.")) else f"{arch}.{key}"
        if value is None:
            continue
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{arch}.rope.freq_base", 50000.0)
    expected: dict[str, torch.Tensor] = {}
    for name, shape in {**shapes, **(extra or {})}.items():
        if name in drop:
            continue
        data = rng.standard_normal(shape, dtype=np.float32)
        if kind is None or len(shape) == 1 or name in (extra or {}):
            writer.add_tensor(name, data)
            expected[name] = torch.from_numpy(data)
            continue
        if kind in (Kind.Q4_K, Kind.Q6_K, Kind.Q5_K):
            blocks = random_blocks(shape, kind, rng)
        else:
            blocks = gguf.quantize(data, kind)
        if kind == Kind.F16:
            writer.add_tensor(name, blocks)
        else:
            writer.add_tensor(name, blocks, raw_dtype=kind)
        expected[name] = torch.from_numpy(np.array(gguf.dequantize(blocks, kind), dtype=np.float32).reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


CANONICAL = {
    "tok_embeddings.weight": "token_embd.weight",
    "output.weight": "output.weight",
    "norm.weight": "output_norm.weight",
    "layers.1.attention_norm.weight": "blk.1.attn_norm.weight",
    "layers.1.ffn_norm.weight": "blk.1.ffn_norm.weight",
    "layers.0.attention.wq.weight": "blk.0.attn_q.weight",
    "layers.0.attention.wk.weight": "blk.0.attn_k.weight",
    "layers.0.attention.wv.weight": "blk.0.attn_v.weight",
    "layers.0.attention.wo.weight": "blk.0.attn_output.weight",
    "layers.1.feed_forward.w1.weight": "blk.1.ffn_gate.weight",
    "layers.1.feed_forward.w2.weight": "blk.1.ffn_down.weight",
    "layers.1.feed_forward.w3.weight": "blk.1.ffn_up.weight",
}


@pytest.mark.parametrize("kind", [None, "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"])
def test_each_type_is_read_as_the_package_reads_it(tmp_path, kind):
    expected = write_gguf(tmp_path / "m.gguf", kind and Kind[kind])
    dense = open_gguf(tmp_path / "m.gguf", dtype=torch.float32)
    assert len(dense.tensors) == len(SHAPES)
    for ours, theirs in CANONICAL.items():
        lazy = dense.tensors[ours]
        assert lazy.shape == tuple(expected[theirs].shape)
        assert expected[theirs].isfinite().all()
        torch.testing.assert_close(lazy.load().float(), expected[theirs], rtol=0, atol=0)
    assert dense.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind or "", torch.float32)


def test_the_sizes_are_read_from_the_metadata(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    args = open_gguf(tmp_path / "m.gguf").args
    assert (args.dim, args.hidden_dim, args.n_layers, args.n_heads, args.n_kv_heads) == (D, F, LAYERS, H, G)
    assert (args.vocab_size, args.head_dim, args.max_seq_len) == (V, HD, 128)
    assert (args.norm_eps, args.rope_theta, args.rope_scaling) == (1e-5, 50000.0, None)
    assert args.moe.num_experts == 1


def test_quantized_tensors_come_as_bfloat16_unless_asked_otherwise(tmp_path):
    expected = write_gguf(tmp_path / "m.gguf", Kind.Q8_0)
    dense = open_gguf(tmp_path / "m.gguf")
    assert dense.dtype == torch.bfloat16
    assert torch.equal(dense.tensors["output.weight"].load(), expected["output.weight"].bfloat16())
    assert dense.tensors["norm.weight"].dtype == torch.float32


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_cut_of_a_quantized_matrix_equals_the_cut_of_the_whole(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "cuts"
    folder.mkdir(exist_ok=True)
    if not (folder / "m.gguf").exists():
        write_gguf(folder / "m.gguf", Kind.Q4_0)
    dense = open_gguf(folder / "m.gguf", dtype=torch.float32)
    lazy = dense.tensors["layers.0.feed_forward.w2.weight"]
    if data.draw(st.booleans()):
        lazy.source.cache.limit = 0  # as for a tensor that is too large for the cache
    whole = open_gguf(folder / "m.gguf", dtype=torch.float32).tensors["layers.0.feed_forward.w2.weight"].load()
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()):
            lazy, whole = lazy.t(), whole.t()
        dim = data.draw(st.integers(0, 1))
        start = data.draw(st.integers(0, whole.shape[dim] - 1))
        length = data.draw(st.integers(1, whole.shape[dim] - start))
        lazy, whole = lazy.narrow(dim, start, length), whole.narrow(dim, start, length)
    assert torch.equal(lazy.load(), whole)
    out = torch.empty(whole.shape, dtype=torch.bfloat16)
    lazy.copy_to(out)
    assert torch.equal(out, whole.bfloat16())
    assert torch.equal(torch.cat([b.clone() for b in lazy.blocks(4096)]), whole.reshape(-1))


def test_without_an_output_matrix_the_embedding_serves(tmp_path):
    expected = write_gguf(tmp_path / "m.gguf", drop=["output.weight"])
    dense = open_gguf(tmp_path / "m.gguf")
    assert torch.equal(dense.tensors["output.weight"].load(), expected["token_embd.weight"])


def llama3_factors(theta: float, factor: float, original: int) -> np.ndarray:
    """The divisor of each frequency, as the published conversion writes it."""
    out = []
    for i in range(HD // 2):
        wavelength = 2 * np.pi * theta ** (2 * i / HD)
        if wavelength < original / 4:
            out.append(1.0)
        elif wavelength > original:
            out.append(factor)
        else:
            smooth = (original / wavelength - 1) / 3
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, dtype=np.float32)


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192), (4.0, 4096)])
def test_llama_3s_rotary_scaling_is_recognised(tmp_path, monkeypatch, factor, original):
    factors = llama3_factors(50000.0, factor, original)
    real = np.random.Generator.standard_normal
    write_with = tmp_path / "m.gguf"
    rng = np.random.default_rng(0)

    class Fixed:
        def standard_normal(self, shape, dtype):
            return factors if shape == (HD // 2,) else real(rng, shape, dtype=dtype)

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Fixed())
    write_gguf(write_with, extra={"rope_freqs.weight": (HD // 2,)})
    assert open_gguf(write_with).args.rope_scaling == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
    ],
)
def test_other_rotary_scalings(tmp_path, metadata, scaling):
    write_gguf(tmp_path / "m.gguf", metadata=metadata)
    assert open_gguf(tmp_path / "m.gguf").args.rope_scaling == scaling


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "qwen2"}, r"general\.architecture is 'qwen2'; only 'llama'"),
        ({"metadata": {"expert_count": 8}}, r"already a mixture: llama\.expert_count is 8"),
        ({"metadata": {"split.count": 3}}, r"one of 3 pieces; join them"),
        ({"metadata": {"block_count": None}}, r"llama\.block_count is missing"),
        ({"metadata": {"attention.head_count_kv": [2, 1]}}, r"head_count_kv is \[2, 1\], but it must be one number"),
        ({"metadata": {"attention.key_length": 64}}, r"blk\.0\.attn_q\.weight has shape \(256, 256\).*\(512, 256\)"),
        (
            {"metadata": {"attention.key_length": 32, "rope.dimension_count": 16}},
            r"rope\.dimension_count is 16, but heads of 32",
        ),
        ({"metadata": {"block_count": 2**30}}, r"the configuration says 1073741824 layers"),
        ({"metadata": {"rope.scaling.type": "longrope"}}, r"rope\.scaling\.type 'longrope'"),
        ({"metadata": {"feed_forward_length": 511}}, r"blk\.0\.ffn_gate\.weight has shape \(512, 256\).*\(511, 256\)"),
        ({"drop": ["blk.1.ffn_up.weight"]}, r"tensors are missing: blk\.1\.ffn_up\.weight"),
        ({"drop": ["token_embd.weight"]}, r"tensors are missing: token_embd\.weight"),
        ({"extra": {"blk.0.attn_q.bias": (D,)}}, r"a Mixtral cannot have: blk\.0\.attn_q\.bias"),
        ({"extra": {"rope_freqs.weight": (HD // 2,)}}, r"rope_freqs\.weight: its frequencies are not those of Llama 3"),
        ({"kind": Kind.Q5_K}, r"token_embd\.weight is of type Q5_K; readable are F32, F16, BF16, Q8_0"),
    ],
)
def test_what_cannot_be_carried_over_is_named(tmp_path, options, message):
    write_gguf(tmp_path / "m.gguf", **options)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_gguf(tmp_path / "m.gguf")
    assert "m.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_cut_anywhere_gives_one_clear_error(tmp_path):
    write_gguf(tmp_path / "m.gguf", Kind.Q8_0, metadata={"tokenizer.ggml.tokens": [f"t{i}" for i in range(V)]})
    whole = (tmp_path / "m.gguf").read_bytes()
    for size in [0, 3, 4, 7, 8, 20, 100, 500, 1000, 2000, len(whole) // 2, len(whole) - 64]:
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf: (truncated|not a GGUF)"):
            open_gguf(tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04 not this", "not a GGUF file"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(100), "big-endian"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(100), "GGUF version 1"),
        (b"GGUF" + struct.pack("<I", 9) + bytes(100), "GGUF version 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"k", 77) + bytes(64), "unknown type 77"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60) + bytes(64),
            r"general\.alignment|truncated|twice|damaged|missing",
        ),
    ],
)
def test_what_is_no_gguf_file(tmp_path, data, message):
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        open_gguf(tmp_path / "x.gguf")


@settings(max_examples=60, deadline=None)
@given(position=st.integers(8, 700), value=st.integers(0, 255))
def test_a_damaged_header_never_gives_anything_but_a_clear_error(tmp_path_factory, position, value):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    if not (folder / "whole.gguf").exists():
        write_gguf(folder / "whole.gguf", Kind.Q8_0)
    data = bytearray((folder / "whole.gguf").read_bytes())
    data[position] = value
    (folder / "m.gguf").write_bytes(data)
    try:
        open_gguf(folder / "m.gguf")
    except ValueError as error:  # the base class of CheckpointError and ConfigError
        assert type(error).__name__ in ("CheckpointError", "ConfigError")  # noqa: PT017


def test_without_the_gguf_package_the_pip_line_is_given(tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mixtral-accessory\[gguf\]'"):
        open_gguf(tmp_path / "m.gguf")


def test_which_file_of_a_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither a Hugging Face config\.json nor a \.gguf file"):
        open_dense(tmp_path)
    write_gguf(tmp_path / "a.gguf")
    found, named = open_dense(tmp_path), open_gguf(tmp_path / "a.gguf")
    assert found.args == named.args
    assert found.tensors.keys() == named.tensors.keys()
    write_gguf(tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match=r"several \.gguf files, name one of them: a\.gguf, b\.gguf"):
        open_dense(tmp_path)
