"""On a GPU: training in bf16 against fp32 on the CPU, packed rows in torch's kernel, and resuming a run."""

import json

import pytest
import torch
from helpers.random_models import write_speaking
from helpers.runs import ended_after
from helpers.training import ARGS, batches, make_decoder

from accessory.ops.attention import Documents, attention, attention_reference, has_varlen
from accessory.ops.shared_rows import SharedRows, places_of
from accessory.parallel.mesh import DeviceMesh
from accessory.train.trainer import LossWeights, Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda")


def agree(got, want, inputs, generator):
    """Values to 1%, gradients of the inputs to 2%."""
    assert (got - want).norm() <= 1e-2 * want.norm()
    pull = torch.randn(want.shape, generator=generator, device="cuda", dtype=torch.bfloat16)
    for a, b in zip(
        torch.autograd.grad((got * pull).sum(), inputs),
        torch.autograd.grad((want * pull).sum(), inputs),
        strict=True,
    ):
        assert (a - b).norm() <= 2e-2 * b.norm()


@pytest.mark.skipif(not has_varlen(CUDA, torch.bfloat16), reason="this torch has no kernel for packed rows")
@pytest.mark.parametrize(("heads", "groups"), [(8, 8), (8, 2), (4, 1)])
def test_packed_rows_are_attention_within_documents(heads, groups):
    generator = torch.Generator("cuda").manual_seed(0)
    number_BT = torch.tensor([[0] * 50 + [1] * 3 + [2] * 75, [0] * 1 + [1] * 100 + [2] * 27])
    q, k, v = (
        torch.randn(2, 128, n, 64, generator=generator, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for n in (heads, groups, groups)
    )
    mask = (number_BT[:, :, None] == number_BT[:, None]) & torch.ones(128, 128, dtype=torch.bool).tril()
    got = attention(q, k, v, Documents.of(number_BT).to("cuda"))
    want = attention_reference(q, k, v, mask.cuda())
    agree(got, want, (q, k, v), generator)


@pytest.mark.skipif(not has_varlen(CUDA, torch.bfloat16), reason="this torch has no kernel for packed rows")
@pytest.mark.parametrize(("heads", "groups"), [(8, 8), (8, 2)])
@pytest.mark.parametrize("size", [2, 4])
def test_shared_rows_are_attention_within_documents(heads, groups, size):
    """Each rank's queries over the keys of all ranks, one rank after the other; gradients are summed over the ranks."""
    generator = torch.Generator("cuda").manual_seed(0)
    number_BT = torch.tensor([[0] * 50 + [1] * 3 + [2] * 75, [0] * 128, [0] * 1 + [1] * 100 + [2] * 27])
    q, k, v = (
        torch.randn(3, 128, n, 64, generator=generator, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for n in (heads, groups, groups)
    )
    mask = (number_BT[:, :, None] == number_BT[:, None]) & torch.ones(128, 128, dtype=torch.bool).tril()
    want = attention_reference(q, k, v, mask.cuda())
    places = [places_of(128, rank, size).cuda() for rank in range(size)]
    order = torch.cat(places)
    got = torch.zeros_like(want)
    for rank, place in enumerate(places):
        shared = SharedRows.of(number_BT, rank, size).to("cuda")
        got = got.index_copy(1, place, attention(q[:, place], k[:, order], v[:, order], shared))
    agree(got, want, (q, k, v), generator)


@pytest.mark.parametrize("implementation", ["base", "sparse"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("peft", [None, {"lora_rank": 8, "bias_tuning": True}])
def test_bf16_steps_follow_fp32(implementation, packed, peft):
    """The losses of ten steps agree to 2%. Rounding may change a token's expert, but only a mistake moves the curve."""
    curves = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        decoder = make_decoder(implementation, peft=peft, device=device, dtype=dtype)
        trainer = Trainer(decoder, DeviceMesh(), LossWeights(ARGS.load_balancing_weight), clip=1.0)
        assert all(p.dtype == torch.float32 for _, p in trainer.named)
        records = [trainer.step(batches(step, packed=packed), 1e-3) for step in range(10)]
        curves.append([r["loss"] + r["balance"] for r in records])
    for exact, got in zip(*curves, strict=True):
        assert got == pytest.approx(exact, rel=2e-2)


def test_a_run_on_the_gpu_is_resumed(tmp_path):
    from accessory.train.config import FinetuneConfig
    from accessory.train.metrics import read_metrics
    from accessory.train.run import finetune

    write_speaking(tmp_path / "model", ARGS.replace(vocab_size=32000), std=0.05)
    with open(tmp_path / "data.jsonl", "w") as file:
        for n in range(32):
            turns = [
                {"role": "user", "content": f"What is {n}?"},
                {"role": "assistant", "content": f"It is {n}." * (n % 5)},
            ]
            file.write(
                json.dumps({"messages": turns if n % 5 else [turns[0], {**turns[1], "content": "A number."}]}) + "\n"
            )
    (tmp_path / "data.yaml").write_text("META:\n  - {path: data.jsonl, type: text}\n")

    def run(name, **options):
        config = FinetuneConfig(
            pretrained_path=[str(tmp_path / "model")],
            data_config=str(tmp_path / "data.yaml"),
            output_dir=str(tmp_path / name),
            batch_size=2,
            max_words=96,
            lr=1e-3,
            checkpointing=True,
            **{"epochs": 2.0, **options},
        )
        finetune(config)
        return [r["loss"] for r in read_metrics(tmp_path / name) if r["kind"] == "train"]

    whole = run("whole")
    with ended_after(3):
        run("parts")
    assert run("parts", resume="auto") == pytest.approx(whole, rel=2e-2)
