"""`MetaModel` with images: from folders in the original's names and ours, alone and on several ranks."""

import json
import time

import numpy as np
import psutil
import pytest
import torch
from helpers.distributed import run_ranks
from helpers.rank_kills import kill_in_step
from helpers.seeing import ARGS, seeing_tensors, write_seeing
from helpers.vision import random_tower, tiny_clip, tiny_sphinx
from PIL import Image

from accessory.checkpoint.folder import open_checkpoint
from accessory.convert.convert import convert
from accessory.convert.info import info
from accessory.convert.quantize import quantize_checkpoint
from accessory.convert.verify import verify
from accessory.data.transform import get_transform
from accessory.engine.sampling_params import SamplingParams
from accessory.errors import CheckpointError, ConfigError, InputError, RankError
from accessory.formats import Quant
from accessory.model.meta import MetaModel
from accessory.model.multi_gpu_wrapper import MultiGpuWrapper
from accessory.vision_config import IMAGE_ID

PROMPTS = ["What is on the picture?", "The capital of France", "And here?"]
GENERATE = {"max_gen_len": 8}


def picture(seed=0, size=(50, 40)):
    values = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_seeing(tmp_path_factory.mktemp("seeing") / "model", vision=tiny_sphinx())


@pytest.fixture(scope="module")
def path(folder):
    picture(7).save(folder.parent / "seven.png")
    return folder.parent / "seven.png"


def equal(ours, theirs):
    """Check equality to 1e-5 of the norm: convolutions round differently for another number of images."""
    assert ours.shape == theirs.shape
    assert float((ours - theirs).norm() / theirs.norm()) <= 1e-5


def load(folder, **options):
    options = {"with_visual": True, "dtype": torch.float32, "device": "cpu", "max_seq_len": 64} | options
    return MetaModel.from_pretrained(folder, **options)


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


def test_features_are_the_towers_and_places_are_counted(model, folder):
    assert model.image_words == tiny_sphinx().image_tokens(1) == 10
    pixels = model.image_processor.open(picture())
    assert torch.equal(pixels, get_transform("padded_resize", 64)(picture()))
    ours, theirs = model.encode_images([pixels]), random_tower(tiny_sphinx()).encode(pixels[None])
    torch.testing.assert_close(ours.visual_VTC, theirs.visual_VTC)
    torch.testing.assert_close(ours.query_VQC, theirs.query_VQC)


def test_an_image_changes_what_is_said_and_no_neighbour(model, path):
    seen = model.compute_logits(PROMPTS, [picture(), None, path])
    blind = model.compute_logits(PROMPTS)
    assert not torch.allclose(seen[0], blind[0], atol=1e-2)
    equal(seen[1], blind[1])
    assert [len(s) for s in seen] == [len(b) for b in blind]  # logits of image tokens are left out
    for n, image in enumerate([picture(), None, path]):
        alone = model.compute_logits([PROMPTS[n]], [image])[0]
        equal(seen[n], alone)


def test_the_last_logits_say_what_is_generated(model, path):
    """Greedy decoding with a cache equals whole passes without one. Single, streamed and batched calls agree."""
    images = [picture(), None, path]
    texts = model.generate(PROMPTS, images, **GENERATE)
    for prompt, image, text in zip(PROMPTS, images, texts, strict=True):
        ids = model.tokenizer.encode(prompt, bos=True)
        written = []
        for _ in range(GENERATE["max_gen_len"]):
            written.append(int(model.compute_logits([ids + written], [image])[0][-1].argmax()))
        assert model.tokenizer.decode(ids + written).startswith(model.tokenizer.decode(ids) + text)
        assert list(model.stream_generate(prompt, image, **GENERATE))[-1] == {"text": text, "end_of_content": True}


@pytest.mark.parametrize("budget", [7, 13, 512])
def test_requests_with_images_come_in_chunks(model, path, monkeypatch, budget):
    """Steps of seven tokens end within an image, whose tokens take ten positions."""
    images = [picture(), path, None]
    alone = [model.generate([p], [i], **GENERATE)[0] for p, i in zip(PROMPTS, images, strict=True)]
    engine = model.engine()
    monkeypatch.setattr(engine.scheduler, "budget", budget)
    steps, submit = [], engine.executor.submit

    def counted(plan):
        steps.append(sum(1 if entry.ids is None else len(entry.ids) for entry in plan.entries))
        return submit(plan)

    monkeypatch.setattr(engine.executor, "submit", counted)
    engine.scheduler.pool.forget()
    assert model.generate(PROMPTS, images, **GENERATE) == alone
    assert max(steps) <= budget
    assert len(steps) > (GENERATE["max_gen_len"] + 3 if budget == 7 else 8)


def test_a_prompts_log_probabilities_pass_over_its_image(model, path):
    params = SamplingParams(prompt_logprobs=0)
    (answer,) = model.complete(PROMPTS[:1], [path], 4, params)
    logits_TV = model.compute_logits(PROMPTS[:1], [path])[0]
    ids = model.tokenizer.encode(PROMPTS[0], bos=True)
    expected = logits_TV.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].tolist()
    assert answer.prompt_logprobs[:10] == [None] * 10
    assert answer.prompt_logprobs[10:] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["path", "text path", "picture", "tensor", "batch tensor"])
def test_images_come_in_any_form(model, path, kind):
    pixels = model.image_processor.open(path)
    given = {
        "path": [path],
        "text path": [str(path)],
        "picture": [Image.open(path)],
        "tensor": [pixels],
        "batch tensor": pixels[None],
    }[kind]
    expected = model.compute_logits(PROMPTS[:1], [path])[0]
    assert torch.equal(model.compute_logits(PROMPTS[:1], given)[0], expected)
    answer = model.generate(PROMPTS[:1], given, **GENERATE)[0]
    assert list(model.stream_generate(PROMPTS[0], pixels[None], **GENERATE))[-1]["text"] == answer


def test_an_image_is_looked_at_once(folder, path):
    model = load(folder)
    list(model.stream_generate(PROMPTS[0], path, **GENERATE))
    model.generate(PROMPTS, [path, path, None], **GENERATE)
    assert model.tower.runs == 1


def test_evaluating_after_an_image(model, path):
    example = PROMPTS[0] + " A dog."
    result = model.evaluate_examples([example], [PROMPTS[0]], [path])
    logits = model.compute_logits([example], [path])[0]
    ids = model.tokenizer.encode(example, bos=True)
    log_p = logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    judged = len(result["non_context_logits"][0])
    assert result["log_likelihood"][0] == pytest.approx(float(log_p[-judged:].sum()), rel=1e-5)
    blind = model.evaluate_examples([example], [PROMPTS[0]])
    assert blind["log_likelihood"][0] != pytest.approx(result["log_likelihood"][0], rel=1e-3)


def test_without_eyes_text_is_bit_for_bit_the_same(model, folder):
    blind = load(folder, with_visual=False)
    assert blind.image_words == 0
    for seen, said in zip(model.compute_logits(PROMPTS), blind.compute_logits(PROMPTS), strict=True):
        assert torch.equal(seen, said)
    assert model.generate(PROMPTS, **GENERATE) == blind.generate(PROMPTS, **GENERATE)


@pytest.mark.parametrize("implementation", ["mixtral_ens", "mixtral_sparse_ens"])
@pytest.mark.parametrize("how", [{"to": "base", "shards": 2}, {"to": "sparse", "shards": 4}])
def test_either_implementation_from_either_layout(folder, model, path, tmp_path, how, implementation):
    convert(folder, tmp_path / "other", progress=False, **how)
    assert json.loads((tmp_path / "other" / "meta.json").read_text())["llama_type"].endswith("_ens")
    other = load(tmp_path / "other", llama_type=implementation)
    expected, got = model.compute_logits(PROMPTS[:1], [path])[0], other.compute_logits(PROMPTS[:1], [path])[0]
    equal(got, expected)


def test_five_views(tmp_path, path):
    model = load(write_seeing(tmp_path / "model", vision=tiny_clip(), views=5), max_seq_len=96)
    assert model.image_words == 5 * (5 + 2)
    assert model.tower.pixels == 56
    seen = model.compute_logits(PROMPTS[:2], [path, picture()])
    equal(seen[1], model.compute_logits(PROMPTS[1:2], [picture()])[0])


def on_ranks(rank, world, folder, path):
    import torch.distributed as dist

    model = load(folder, mp_group=dist.group.WORLD)
    images = [picture(), None, path]
    logits = [x[:, ::97].clone() for x in model.compute_logits(PROMPTS, images)]
    return logits, model.generate(PROMPTS, images, **GENERATE), model.tower.runs


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_see_alike(folder, model, path, world):
    images = [picture(), None, path]
    logits, texts = model.compute_logits(PROMPTS, images), model.generate(PROMPTS, images, **GENERATE)
    for ranks_logits, ranks_texts, runs in run_ranks(on_ranks, world, folder, path):
        assert ranks_texts == texts
        assert runs <= 1  # of two images
        for ours, theirs in zip(ranks_logits, logits, strict=True):
            equal(ours, theirs[:, ::97])


@pytest.mark.slow
def test_a_wrapper_of_ranks_takes_images(folder, model, path, monkeypatch):
    images = [picture(), None, model.image_processor.open(path)]
    options = {"with_visual": True, "dtype": torch.float32, "device": "cpu", "max_seq_len": 64}
    with MultiGpuWrapper(folder, gpus=2, **options) as wrapper:
        assert wrapper.image_words == model.image_words
        assert wrapper.generate(PROMPTS, images, **GENERATE) == model.generate(PROMPTS, images, **GENERATE)
        streamed = list(wrapper.stream_generate(PROMPTS[0], str(path), **GENERATE))
        assert streamed[-1]["text"] == model.generate(PROMPTS[:1], [path], **GENERATE)[0]
        with pytest.raises(InputError, match=r"no/such\.png"):
            wrapper.generate(PROMPTS[:1], ["no/such.png"], **GENERATE)
        assert wrapper.generate(PROMPTS[:1], **GENERATE) == model.generate(PROMPTS[:1], **GENERATE)
        logits = wrapper.compute_logits(PROMPTS[:1], images[:1])[0]
        equal(logits, model.compute_logits(PROMPTS[:1], images[:1])[0])
        ranks = [psutil.Process(rank._process.pid) for rank in wrapper._ranks._ranks]
        kill_in_step(wrapper, monkeypatch, 1)  # the step that encodes an image
        started = time.monotonic()
        with pytest.raises(RankError, match="rank 1 was ended by signal 9 while generating"):
            wrapper.generate(PROMPTS, [picture(3), None, None], **GENERATE)
        assert time.monotonic() - started < 10
        assert not psutil.wait_procs(ranks, timeout=10)[1]
        monkeypatch.undo()
        assert wrapper.generate(PROMPTS, images, **GENERATE) == model.generate(PROMPTS, images, **GENERATE)


def test_quantized_and_in_16_bits(folder, path):
    for options in ({"quant": "int8"}, {"dtype": torch.bfloat16}):
        model = load(folder, **options)
        assert torch.isfinite(model.compute_logits(PROMPTS[:1], [path])[0]).all()
        assert model.tower.dtype == options.get("dtype", torch.float32)  # encoders are never quantised


def test_the_originals_spelling_of_encoders_loads(tmp_path, folder, model, path):
    """Encoders load under the names of the original's checkpoints. Here BLIP-2's vision model is renamed."""
    tensors = seeing_tensors(ARGS.replace(vision=tiny_sphinx()))
    opened = open_checkpoint(folder)
    assert set(opened.vision) == {name for name in tensors if name.startswith("vision.")}
    renamed = {name.replace("vision.qformer.vision_model", "qformer.vision_model"): t for name, t in tensors.items()}
    from accessory.checkpoint.lazy import Constant
    from accessory.checkpoint.save import write_checkpoint

    write_checkpoint(
        tmp_path / "spelt",
        {name: Constant(t) for name, t in renamed.items()},
        opened.args,
        to="base",
        shards=2,
        resources=opened.resources,
        image_views=1,
        progress=False,
    )
    expected = model.compute_logits(PROMPTS[:1], [path])[0]
    got = load(tmp_path / "spelt", llama_type="mixtral_sparse_ens").compute_logits(PROMPTS[:1], [path])[0]
    equal(got, expected)


# --------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([None], r"images: got 1 for 2 prompts; give one each, None where there is none"),
        ([None] * 3, r"images: got 3 for 2 prompts"),
        ("a.png", r"images: got 'a.png', but it must be a list"),
        (["no/such.png", None], r"no/such\.png"),
        ([torch.zeros(3, 9, 9), None], r"images\[0\]: got a tensor of \(3, 9, 9\), but pixels are \(3, 64, 64\)"),
    ],
)
def test_images_that_do_not_fit(model, images, said):
    with pytest.raises(InputError, match=said):
        model.generate(PROMPTS[:2], images, **GENERATE)


def test_a_prompt_that_speaks_of_its_image(model, path):
    """A prompt may contain <image>, as in other projects' data.

    The marker does not move the image. If there is no image, it is an error.
    """
    plain = model.compute_logits(["What is it?"], [path])[0]
    assert torch.equal(model.compute_logits(["<image>\nWhat is it?"], [path])[0], plain)
    with pytest.raises(InputError, match=r"prompts\[1\]: speaks of an <image>, but images has none for it"):
        model.generate(["<image>\nWhat is it?"] * 2, [path, None], **GENERATE)
    with pytest.raises(InputError, match=r"prompts\[0\]: speaks of an <image>"):
        model.generate(["<image>\nWhat is it?"], **GENERATE)


def test_a_context_too_small_for_the_image(folder, path):
    model = load(folder, max_seq_len=18)
    with pytest.raises(InputError, match=r"its image takes 10 positions, and with max_gen_len = 8 .*give at least 20"):
        model.generate(PROMPTS[:1], [path], **GENERATE)
    with pytest.raises(InputError, match=r"tokens and an image of 10 positions, but max_seq_len is 18"):
        model.compute_logits([PROMPTS[0] * 3], [path])


def test_an_image_for_a_model_of_text(folder, path):
    blind = load(folder, with_visual=False)
    for call in (blind.generate, blind.compute_logits):
        with pytest.raises(InputError, match="this model is text only"):
            call(PROMPTS[:1], [path])


def test_eyes_that_are_not_there(folder, tmp_path):
    with pytest.raises(
        ConfigError, match=r"with_visual: got True, but mixtral_sparse takes no images; give llama_type"
    ):
        load(folder, llama_type="mixtral_sparse")
    with pytest.raises(CheckpointError, match=r"no place for what a model sees with"):
        convert(folder, tmp_path / "hf", to="hf", progress=False)


def test_ids_of_a_prompt_cannot_claim_an_images_places(model):
    with pytest.raises(InputError, match="token ids must lie in"):
        model.generate([[1, IMAGE_ID, 5]], **GENERATE)


def test_info_verify_and_quantize_know_what_a_model_sees_with(folder, path, model, tmp_path):
    lines = info(folder).lines()
    (line,) = [line for line in lines if line.startswith("images")]
    tensors = seeing_tensors(ARGS.replace(vision=tiny_sphinx()))
    held = sum(t.numel() for name, t in tensors.items() if name.startswith("vision."))
    told = "10 positions each, 1 view of 64 px by clip (28 px), convnext (64 px), dinov2 (28 px), qformer (28 px); "
    assert line == f"images          {told}{held / 1e3:.4g} k parameters of encoders here"
    assert "llama_type mixtral_sparse_ens" in "\n".join(lines)
    quantize_checkpoint(folder, tmp_path / "int8", Quant.parse("int8"), progress=False)
    assert str(info(tmp_path / "int8").llama_type) == "mixtral_sparse_ens"
    small, on_arrival = load(tmp_path / "int8"), load(folder, quant="int8")
    got, expected = (m.compute_logits(PROMPTS[:1], [path])[0] for m in (small, on_arrival))
    equal(got, expected)
    convert(folder, tmp_path / "base", to="base", shards=2, progress=False)
    report = verify(folder, tmp_path / "base", progress=False)
    assert report.ok
    assert report.a.tensors == len(tensors)
