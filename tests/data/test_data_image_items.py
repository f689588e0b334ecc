"""Items with images among text items: positions, lengths, truncation, tags, cache, batches; broken images first."""

import json
import logging
import time

import numpy as np
import pytest
from helpers.dialogues import dialogue, learnt
from helpers.pictures import BROKEN, BROKEN_INSIDE, png_header, write_picture
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.data import image_check
from accessory.data.batches import IGNORED, EpochPlan, collate
from accessory.data.dataset import Example, FinetuneData
from accessory.data.image_check import broken_headers
from accessory.errors import InputError, MissingExtraError
from accessory.vision_config import IMAGE_ID

TALK = {"messages": dialogue("Hello?", "Hi.")}
SINGLE = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
WORDS = 5


def seen(item=TALK, image="a.png"):
    return {**item, "image": image}


@pytest.fixture
def opened(tmp_path, mixtral):
    """Open items as data, with a.png and b.png in the same folder; each list becomes a file."""
    for seed, name in enumerate(("a.png", "b.png")):
        write_picture(tmp_path / name, seed=seed)

    def run(*files, max_words=256, tokenizer=mixtral, image_tokens=WORDS, kinds=None, entry=(), **options):
        entries = []
        for n, items in enumerate(files):
            path = tmp_path / f"{n}.jsonl"
            path.write_text("".join(json.dumps(item) + "\n" for item in items))
            kind = kinds[n] if kinds else "text"
            entries.append({"path": str(path), "type": kind, "root": str(tmp_path), **dict(entry)})
        return FinetuneData.open(
            {"META": entries}, tokenizer, max_words=max_words, image_tokens=image_tokens, **options
        )

    return run


def test_places_stand_behind_bos_and_are_never_learnt(opened, mixtral, tmp_path):
    data = opened([TALK, seen()])
    plain, image = data.example(0), data.example(1)
    assert plain == opened([TALK], image_tokens=0).example(0)
    assert image.ids == [mixtral.bos_id, *[IMAGE_ID] * WORDS, *plain.ids[1:]]
    assert image.learn == [False, *[False] * WORDS, *plain.learn[1:]]
    assert (image.image, image.places, image.truncated) == (str(tmp_path / "a.png"), WORDS, False)
    assert (plain.image, plain.places) == (None, 0)
    assert data.lengths.tolist() == [len(plain.ids), len(plain.ids) + WORDS] == data.whole.tolist()
    assert data.places.tolist() == [0, WORDS]
    assert data.lengths.dtype == data.whole.dtype == data.places.dtype == np.int32
    assert learnt(image.ids, image.learn, mixtral) == learnt(plain.ids, plain.learn, mixtral)


def test_places_are_in_front_without_bos(opened, byte_level):
    assert byte_level.bos_id is None or not byte_level.add_bos
    plain, image = (opened([item], tokenizer=byte_level).example(0) for item in (TALK, seen()))
    assert image.ids == [IMAGE_ID] * WORDS + plain.ids
    assert image.learn == [False] * WORDS + plain.learn


@pytest.mark.parametrize(
    ("tagged", "clean"),
    [
        ({"messages": dialogue("<image>\nHello?", "Hi.")}, TALK),
        ({"messages": dialogue("Hello?\n<image>", "<image> Hi.")}, TALK),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "<image>Hello?"}]},
                       {"role": "assistant", "content": "Hi."}]}, TALK),
        ({"conversations": [{"from": "human", "value": "<image>Hello?"}, {"from": "gpt", "value": "Hi."}]}, TALK),
        ({**SINGLE, "instruction": "<image>Add.", "input": "1 and 2 <image>"}, SINGLE),
    ],
)  # fmt: skip
def test_the_tag_for_an_image_is_taken_out(opened, tagged, clean):
    data = opened([seen(tagged), seen(clean), tagged])
    assert data.example(0).ids == data.example(1).ids
    assert data.example(2).ids != opened([clean]).example(0).ids, "of a text without an image it is a text's own"


def test_texts_without_the_tag_keep_their_blanks(opened):
    spaced = {"messages": dialogue(" Hello? ", " Hi.")}
    image, plain = (opened([item]).example(0) for item in (seen(spaced), spaced))
    assert [i for i in image.ids if i != IMAGE_ID] == plain.ids


def test_the_original_recipes_see_images(opened):
    item = {"conversations": [{"from": "human", "value": "<image>\nHello?"}, {"from": "gpt", "value": "Hi."}]}
    data = opened([seen(item)], entry={"preprocess": "single_turn_llava"})
    assert data.example(0).ids == opened([seen({"instruction": "Hello?", "output": "Hi."})]).example(0).ids
    data = opened([{"url": "a.png", "caption": "A cat."}], entry={"preprocess": "caption"})
    assert data.example(0).places == WORDS


@given(st.integers(2, 40), st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_cuts_never_cut_an_image(mixtral, tmp_path_factory, max_words, words):
    folder = tmp_path_factory.mktemp("cuts")
    write_picture(folder / "a.png")
    items = [TALK, seen(), {"messages": dialogue("q", "a " * 30)}, seen({"messages": dialogue("q", "a " * 30)})]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, items)))
    meta = {"META": [{"path": str(folder / "a.jsonl"), "root": str(folder)}]}
    whole = FinetuneData.open(meta, mixtral, max_words=4096, image_tokens=words)
    wanted = [i for i in range(4) if any(whole.example(i).learn[1:max_words])]
    if not wanted:
        with pytest.raises(
            InputError, match=f"max_words: got {max_words}, but no item has anything to learn in so few"
        ):
            FinetuneData.open(meta, mixtral, max_words=max_words, image_tokens=words)
        return
    data = FinetuneData.open(meta, mixtral, max_words=max_words, image_tokens=words)
    assert [data.where(i) for i in range(len(data))] == [whole.where(i) for i in wanted]
    assert data.dropped == 4 - len(wanted)
    for i, w in enumerate(wanted):
        ours, full = data.example(i), whole.example(w)
        assert (ours.ids, ours.learn) == (full.ids[:max_words], full.learn[:max_words])
        assert ours.ids.count(IMAGE_ID) == ours.places == full.places
        assert data.lengths[i] == len(ours.ids)
        assert ours.truncated == (len(full.ids) > max_words)


def test_too_little_room_for_an_image_says_so(opened):
    with pytest.raises(
        InputError, match=r"max_words: got 64, but .* in so few tokens, of which an image takes 291; give"
    ):
        opened([seen()], max_words=64, image_tokens=291)


def test_a_model_that_sees_nothing_refuses_images(opened, tmp_path):
    message = (
        rf"^{tmp_path}/0\.jsonl:2: image: this item has one \(and 1 items more\), and the model looks at none; give "
        r"a llama_type that does, as mixtral_ens, and no_visual=false, or take image out of the items$"
    )
    with pytest.raises(InputError, match=message):
        opened([TALK, seen(), seen(image="gone.png")], image_tokens=0)
    problems = []
    assert len(opened([TALK, seen(), seen()], image_tokens=0, problems=problems)) == 3
    assert len(problems) == 1
    unknown = opened([TALK, seen()], image_tokens=None)
    assert [unknown.example(i).places for i in (0, 1)] == [0, 0]
    assert unknown.example(1).image == str(tmp_path / "a.png")


def test_the_cache_knows_no_places(opened, tmp_path):
    options = {"cache_ann_on_disk": True}
    first = opened([TALK, seen()], **options)
    again = opened([TALK, seen()], **options)
    assert isinstance(again.files[0].encoded.ids, np.memmap)
    assert (again.files[0].encoded.ids < 32_000).all()
    assert [again.example(i) for i in (0, 1)] == [first.example(i) for i in (0, 1)]
    assert opened([TALK, seen()], image_tokens=9, **options).lengths[1] == first.lengths[1] + 4
    (tmp_path / "a.png").unlink()
    with pytest.raises(InputError, match=r"0\.jsonl:2: image: .*a\.png: no such file"):
        opened([TALK, seen()], **options)
    assert len(opened([TALK, seen()], broken_images=None, **options)) == 2, "not looked at"


def test_data_is_the_same_data_only_with_the_same_images(opened):
    prints = [
        opened([TALK, seen()]).fingerprint(),
        opened([TALK, seen(image="b.png")]).fingerprint(),
        opened([seen(), TALK]).fingerprint(),
        opened([TALK, TALK]).fingerprint(),
        opened([TALK, seen()], image_tokens=6).fingerprint(),
    ]
    assert len(set(prints)) == 5
    assert opened([TALK, seen()]).fingerprint() == prints[0]
    assert opened([TALK, TALK], image_tokens=0).fingerprint() == prints[3], "without images, nothing has changed"


def test_images_and_texts_share_rows_and_groups_are_kept(opened):
    items = [seen() if n % 2 else TALK for n in range(20)]
    data = opened(items, [seen()] * 6, kinds=["text", "pictures"])
    plan = EpochPlan(data.lengths, data.groups, rows_per_step=2, max_words=128, packing=True, seed=0, epoch=0)
    rows = [row for step in range(plan.steps) for row in plan.rows(step)]
    assert any(len({bool(data.places[i]) for i in row}) == 2 for row in rows), "in one row"
    for step in range(plan.steps):
        assert len({int(data.groups[i]) for row in plan.rows(step) for i in row}) == 1


@st.composite
def rows_of_documents(draw):
    def document():
        n, words = draw(st.integers(2, 6)), draw(st.sampled_from([0, 0, 3]))
        ids = [1, *[IMAGE_ID] * words, *draw(st.lists(st.integers(2, 9), min_size=n, max_size=n))]
        learn = [False] * (1 + words) + draw(st.lists(st.booleans(), min_size=n, max_size=n))
        return Example(ids, learn, image="x" if words else None, places=words)

    return [[document() for _ in range(draw(st.integers(0, 3)))] for _ in range(draw(st.integers(1, 3)))]


@given(rows_of_documents())
@settings(max_examples=60, deadline=None)
def test_a_batch_with_images(rows):
    import torch

    everything = [e for row in rows for e in row]
    own = [torch.full((3, 2, 2), float(n)) for n, e in enumerate(everything) if e.places]
    batch = collate(rows, range(len(everything)), pixels=own)
    assert (batch.labels_BT != IMAGE_ID).all()
    flat = batch.tokens_BT.flatten()
    begins = ((flat == IMAGE_ID) & (flat.roll(1) != IMAGE_ID)).nonzero().flatten().tolist()
    if not own:
        assert batch.pixels_I3PP is None
        assert not begins
        return
    order = [n for n, e in enumerate(everything) if e.places]
    assert batch.pixels_I3PP[:, 0, 0, 0].tolist() == order
    assert len(begins) == len(order)
    assert batch.counted_BT[batch.tokens_BT == IMAGE_ID].all()
    # The token right after an image is the label of its last position.
    for at, n in zip(begins, order, strict=True):
        example = everything[n]
        wanted = example.ids[4] if example.learn[4] else IGNORED
        assert int(batch.labels_BT.flatten()[at + 2]) == wanted
    assert batch.to("meta").pixels_I3PP.shape == (len(own), 3, 2, 2)
    with pytest.raises(InputError, match=f"pixels: got {len(own) - 1} images, but there are places for {len(own)}"):
        collate(rows, [], pixels=own[1:])


# --------------------------------------------------------------------------- broken images


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_named_with_its_line(opened, tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / "bad.png").write_bytes(content)
    items = [TALK, seen(), seen(image="bad.png"), TALK]
    begin = rf"^{tmp_path}/0\.jsonl:3: image: {tmp_path}/bad\.png: {message}"
    with pytest.raises(InputError, match=begin) as error:
        opened(items)
    assert str(error.value).endswith("; broken_images=skip leaves such items out")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", BROKEN_INSIDE)
def test_what_only_decoding_shows_is_left_to_the_step(opened, tmp_path, name):
    (tmp_path / "bad.png").write_bytes(BROKEN_INSIDE[name][0])
    assert len(opened([TALK, seen(image="bad.png")])) == 2


def test_broken_images_are_skipped_with_one_warning(opened, tmp_path, caplog):
    (tmp_path / "bad.png").write_text("x")
    (tmp_path / "huge.png").write_bytes(png_header(30_000, 30_000))
    names = [None, "a.png", "bad.png", "gone.png", "a.png", "bad.png", "huge.png", None, "../elsewhere.png"]
    items = [TALK if name is None else seen(image=name) for name in names]
    with caplog.at_level(logging.WARNING):
        data = opened(items, [seen(image="gone.png"), TALK], broken_images="skip")
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith(
        f"broken_images: 6 of 11 items are left out: {tmp_path}/0.jsonl:3: image: {tmp_path}/bad.png: is n"
    )
    assert f"; {tmp_path}/0.jsonl:4: image: {tmp_path}/gone.png: no such file; " in said
    assert said.endswith("; and 3 more")
    assert "\n" not in said
    assert [data.where(i).rpartition("/")[2] for i in range(len(data))] == [
        "0.jsonl:1", "0.jsonl:2", "0.jsonl:5", "0.jsonl:8", "1.jsonl:2"
    ]  # fmt: skip
    assert (data.broken, data.dropped, data.truncated) == (6, 0, 0)
    assert data.places.tolist() == [0, WORDS, WORDS, 0, 0]
    assert data.fingerprint() != opened([i for i in items if "image" not in i] * 2).fingerprint()
    with pytest.raises(InputError, match=r"0\.jsonl:1: image: .*gone\.png: no such file \(and 1 more like it\)"):
        opened([seen(image="gone.png")] * 2, broken_images="skip")


def test_all_problems_are_told(opened, tmp_path):
    (tmp_path / "bad.png").write_text("x")
    items = [seen(image="bad.png"), {"messages": []}, seen(image="gone.png"), seen()]
    problems = []
    data = opened(items, problems=problems)
    assert [p.split(":")[1] for p in problems] == ["2", "1", "3"]
    assert len(data) == 1


def test_the_limit_of_pixels_is_handed_on(opened):
    with pytest.raises(InputError, match=r"has 12 × 9 pixels, more than 107"):
        opened([seen()], max_pixels=107)


def test_all_processes_agree(opened, tmp_path):
    """One process opens the images and tells the others; an image that appears in between stays left out."""
    calls = []

    def first(look):
        calls.append(look())
        return calls[-1]

    items = [TALK, seen(), seen(image="late.png")]
    one = opened(items, broken_images="skip", once=first)
    write_picture(tmp_path / "late.png")
    other = opened(items, broken_images="skip", once=lambda look: calls[0])
    assert len(calls) == 1
    assert len(one) == len(other) == 2
    assert one.fingerprint() == other.fingerprint()
    assert len(opened([TALK, TALK], once=None)) == 2, "nobody is asked about texts"


# --------------------------------------------------------------------------- looking at many


def test_every_image_is_looked_at_once(tmp_path, monkeypatch):
    looked, real = [], image_check.read_header
    monkeypatch.setattr(image_check, "read_header", lambda path, **k: (looked.append(path), real(path, **k))[1])
    paths = [str(write_picture(tmp_path / f"{n}.png")) for n in range(200)]
    (tmp_path / "7.png").write_text("x")
    (tmp_path / "150.png").unlink()
    found = list(broken_headers(paths * 3))
    assert [path for path, _ in found] == [paths[7], paths[150]]
    assert sorted(looked) == sorted(paths)
    looked.clear()
    (tmp_path / "0.png").unlink()
    first = broken_headers([paths[0]] * 2 + [str(tmp_path / f"no{n}") for n in range(5000)])
    assert next(first)[0] == paths[0]
    first.close()
    assert len(looked) < 5000, "the first one is enough"


def test_looking_takes_bounded_time(monkeypatch, caplog):
    monkeypatch.setattr(image_check, "read_header", lambda path, **k: time.sleep(0.01))
    with caplog.at_level(logging.WARNING):
        assert list(broken_headers(map(str, range(2000)), patience=0.1)) == []
    (record,) = caplog.records
    assert "of 2000 were not read within 0 s; what is wrong with them shows when they are loaded" in record.getMessage()


def test_without_pillow(opened, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(MissingExtraError, match="pip install"):
        opened([seen()])
