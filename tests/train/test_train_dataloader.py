"""Which rows and pixels a run learns from: the same on any number of ranks, for whole epochs and parts of one."""

import logging
import threading
import time
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from helpers.numbered_items import Items, schedule
from helpers.pictures import noise
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.data.batches import IGNORED
from accessory.data.dataset import Example
from accessory.data.transform import ImageLoader
from accessory.errors import InputError
from accessory.parallel.mesh import DeviceMesh, Ranks
from accessory.train.dataloader import DataLoader, Split
from accessory.vision_config import IMAGE_ID


class Place:
    """A data-parallel rank's place in a grid, without processes."""

    def __new__(cls, rank: int, size: int) -> DeviceMesh:
        class Ranks:
            pass

        ranks = Ranks()
        ranks.rank, ranks.size = rank, size
        return DeviceMesh(data=ranks)


def rows_of(batch):
    """The documents of each row of a batch as (item, tokens), without padding."""
    out = []
    for tokens, documents, counted in zip(batch.tokens_BT, batch.documents_BT, batch.counted_BT, strict=True):
        numbers = documents[counted].unique().tolist()
        out.append(tuple((int(tokens[documents == n][0]), int((documents == n).sum())) for n in numbers))
    return out


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 60),
    groups=st.integers(1, 3),
    packing=st.booleans(),
    seed=st.integers(0, 5),
    split=st.sampled_from([(8, 1, 1), (4, 2, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2), (1, 2, 4), (1, 1, 8), (2, 1, 4)]),
)
def test_a_step_holds_the_same_rows_however_it_is_shared(count, groups, packing, seed, split):
    data, split = Items(count, groups), Split(*split)
    plan = schedule(data, packing=packing, seed=seed)
    loaders = [DataLoader(data, plan, split, Place(rank, split.data_size)) for rank in range(split.data_size)]
    seen = []
    for step in range(plan.steps):
        wanted = plan.rows(step)
        got = [rows for loader in loaders for batch in loader.batches(step) for rows in rows_of(batch)]
        assert sorted(got) == sorted(tuple((i, int(data.lengths[i])) for i in row) for row in wanted)
        for loader in loaders:
            batches = loader.batches(step)
            assert len(batches) == split.accum_iter
            assert all(batch.tokens_BT.shape[0] == split.batch_size for batch in batches)
        items = [i for row in wanted for i in row]
        assert len({int(data.groups[i]) for i in items}) == 1
        seen += items
    assert sorted(seen) == list(range(count))


def test_micro_batches_are_consecutive_over_the_ranks():
    """Micro-step m of rank r begins at row (m · ranks + r) · batch_size, so a micro-step's rows are consecutive."""
    data, split = Items(8), Split(1, 4, 2)
    plan = schedule(data)
    order = [row[0] for row in plan.rows(0)]
    got = [[batch.items[0] for batch in DataLoader(data, plan, split, Place(rank, 2)).batches(0)] for rank in range(2)]
    assert got == [order[0::2], order[1::2]]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_threads_change_nothing(workers):
    data = Items(50)
    plan = schedule(data, epochs=2.0)
    loader = DataLoader(data, plan, Split(4, 2, 1), DeviceMesh(), workers=workers)
    got = list(loader.steps(3))
    assert [step for step, _ in got] == list(range(3, plan.steps))
    for step, batches in got:
        for a, b in zip(batches, loader.batches(step), strict=True):
            assert torch.equal(a.tokens_BT, b.tokens_BT)


def test_an_error_of_a_thread_reaches_the_run():
    data = Items(50)
    data.example = lambda i: (_ for _ in ()).throw(ValueError("broken"))
    with pytest.raises(ValueError, match="broken"):
        list(DataLoader(data, schedule(data), Split(8, 1, 1), DeviceMesh(), workers=2).steps(0))


def test_evaluation_sees_everything_once():
    data = Items(21)
    for size in (1, 2):
        plan = schedule(data, rows=4 * size)
        parts = [DataLoader(data, plan, Split(4, 1, size), Place(rank, size)).all_batches() for rank in range(size)]
        assert len({len(part) for part in parts}) == 1  # otherwise a rank would wait forever in the last collective
        assert sorted(i for part in parts for batch in part for i in batch.items) == list(range(21))


# --------------------------------------------------------------------------- images

PLACES = 3


class Seen(Items):
    """The same items. Every `every`-th one has an image; the image's path is the item's number."""

    def __init__(self, count: int, every: int = 2, groups: int = 1) -> None:
        super().__init__(count, groups)
        self.has = np.arange(count) % every == 0
        self.lengths = self.lengths + PLACES * self.has.astype(np.int32)

    def example(self, i: int) -> Example:
        example = super().example(i)
        if not self.has[i]:
            return example
        n = len(example.ids) - PLACES
        return Example([IMAGE_ID] * PLACES + [i] * n, [False] * (PLACES + 1) + [True] * (n - 1), False, str(i), PLACES)

    def where(self, i: int) -> str:
        return f"items.jsonl:{i + 1}"


class Numbers(ImageLoader):
    """Gives, instead of pixels, the number in the path and a random number for the random crop."""

    size = 2
    broken: frozenset[int] = frozenset()

    def __init__(self) -> None:
        pass

    def __call__(self, source, random=None):
        if int(source) in self.broken:
            raise InputError(f"{source}: is truncated (x); get it again, or leave it out")
        pixels = torch.full((3, 2, 2), float(source))
        pixels[1] = random.random()
        return pixels


def breaking(*items):
    load = Numbers()
    object.__setattr__(load, "broken", frozenset(items))
    return load


def images_of(batch):
    """(item, random number) of each image."""
    pixels = batch.pixels_I3PP
    return [] if pixels is None else [(int(p[0, 0, 0]), float(p[1, 0, 0])) for p in pixels]


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 40),
    every=st.integers(1, 4),
    packing=st.booleans(),
    seed=st.integers(0, 3),
    split=st.sampled_from([(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 4, 2), (1, 2, 4)]),
    workers=st.sampled_from([0, 3]),
)
def test_each_image_once_and_the_same_crop_on_any_rank(count, every, packing, seed, split, workers):
    data, split = Seen(count, every), Split(*split)
    plan = schedule(data, packing=packing, seed=seed, epochs=2.0)
    places = [Place(rank, split.data_size) for rank in range(split.data_size)]
    loaders = [DataLoader(data, plan, split, place, load=Numbers(), workers=workers) for place in places]
    alone = DataLoader(data, plan, Split(split.rows, 1, 1), DeviceMesh(), load=Numbers())
    seen: list[list[tuple[int, float]]] = [[], []]
    for parts in zip(*(loader.steps(0) for loader in loaders), strict=True):
        step = parts[0][0]
        got = [batch for _, batches in parts for batch in batches]
        for batch in got:
            wanted = [i for i in batch.items if data.has[i]]
            assert [i for i, _ in images_of(batch)] == wanted, "in the order of their places"
            assert (batch.tokens_BT == IMAGE_ID).sum() == PLACES * len(wanted)
            assert (batch.labels_BT != IMAGE_ID).all()
            if batch.pixels_I3PP is not None:
                assert batch.pixels_I3PP.dtype == torch.float32
        images = [image for batch in got for image in images_of(batch)]
        assert sorted(images) == sorted(images_of(alone.batches(step)[0])), "whoever shares the step"
        seen[plan.place(step)[0]] += images
    for epoch in seen:
        assert sorted(i for i, _ in epoch) == np.flatnonzero(data.has).tolist()
    if count > 1:
        assert dict(seen[0]) != dict(seen[1]), "another epoch, another crop"


def test_a_run_that_goes_on_sees_the_same_crops():
    data = Seen(40)
    plan = schedule(data, packing=True, epochs=2.0)
    whole = {
        s: images_of(b) for s, (b,) in DataLoader(data, plan, Split(8, 1, 1), DeviceMesh(), load=Numbers()).steps(0)
    }
    resumed = DataLoader(
        data, schedule(data, packing=True, epochs=2.0), Split(4, 1, 2), Place(1, 2), load=Numbers(), workers=2
    )
    for step, batches in resumed.steps(3):
        assert set(images_of(batches[0])) <= set(whole[step])
    other = DataLoader(data, schedule(data, packing=True, seed=1), Split(8, 1, 1), DeviceMesh(), load=Numbers())
    crops = {i: c for s in whole if s < plan.lengths[0] for i, c in whole[s]}
    assert dict(image for batch in other.all_batches() for image in images_of(batch)) != crops
    assert crops[6] == pytest.approx(Random("0 0 6").random()), "of seed, epoch and item"


def test_text_alone_has_no_pixels():
    data = Seen(8, every=100)
    batches = DataLoader(data, schedule(data), Split(4, 1, 1), DeviceMesh(), load=Numbers()).all_batches()
    assert [b.pixels_I3PP is None for b in batches] == [0 not in b.items for b in batches]
    with pytest.raises(InputError, match=r"items\.jsonl:1: image: there is nothing that loads it"):
        list(DataLoader(data, schedule(data), Split(4, 1, 1), DeviceMesh()).all_batches())


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_decoded_is_fatal_or_grey(workers, caplog):
    data, load = Seen(16), breaking(4, 10)
    plan = schedule(data, packing=True)
    with pytest.raises(
        InputError,
        match=r"^items\.jsonl:(5|11): image: (4|10): is truncated \(x\); get it again, or leave it out; "
        r"broken_images=skip goes on without it$",
    ):
        list(DataLoader(data, plan, Split(8, 1, 1), DeviceMesh(), load=load, workers=workers).steps(0))
    plain = DataLoader(data, plan, Split(8, 1, 1), DeviceMesh(), load=Numbers())
    loader = DataLoader(data, plan, Split(8, 1, 1), DeviceMesh(), load=load, broken="skip", workers=workers)
    with caplog.at_level(logging.WARNING):
        steps = [(a, b) for _, (a,) in loader.steps(0) for b in plain.batches(_)]
        list(loader.all_batches())
    assert sorted(r.getMessage() for r in caplog.records) == [
        f"broken_images: items.jsonl:{i + 1}: image: {i}: is truncated (x); get it again, or leave it out; nothing is "
        "learnt of this item"
        for i in (10, 4)
    ], "once each"
    for got, wanted in steps:
        assert torch.equal(got.tokens_BT, wanted.tokens_BT), "steps stay what they are"
        learnt = (wanted.labels_BT == 4) | (wanted.labels_BT == 10)
        assert torch.equal(got.labels_BT, wanted.labels_BT.masked_fill(learnt, IGNORED))
        for n, item in enumerate(i for i in wanted.items if data.has[i]):
            same = torch.equal(got.pixels_I3PP[n], wanted.pixels_I3PP[n])
            assert same != (item in (4, 10))
            assert same or not got.pixels_I3PP[n].any()


def test_an_item_alone():
    data = Seen(8)
    plan = schedule(data)
    loader = DataLoader(data, plan, Split(8, 1, 1), DeviceMesh(), load=Numbers())
    (batch,) = loader.batches(0)
    alone = loader.alone(0, 6)
    assert (alone.items, images_of(alone)) == ((6,), [i for i in images_of(batch) if i[0] == 6])
    assert alone.tokens_BT.tolist() == [data.example(6).ids]


class Counted(Numbers):
    """Counts the images that were loaded."""

    made = 0

    def __call__(self, source, random=None):
        object.__setattr__(self, "made", self.made + 1)
        return super().__call__(source, random)


def test_held_out_images_are_never_all_in_memory():
    data, load = Seen(64, every=1), Counted()
    loader = DataLoader(data, schedule(data, rows=4), Split(4, 1, 1), DeviceMesh(), load=load, workers=2)
    batches = loader.all_batches()
    assert len(batches) == 16
    assert load.made == 0
    for round_ in range(2):
        gone = 64 * round_
        for batch in batches:
            gone += len(batch.items)
            time.sleep(0.002)
            assert load.made - gone <= 3 * 4, "the two threads', and the one just handed out"
    assert load.made == 128
    assert [b.items for b in batches] == [batches[n].items for n in range(16)]
    assert [b.items for b in batches[-2:]] == [batches[14].items, batches[15].items]
    with pytest.raises(IndexError):
        batches[16]


def test_threads_prepare_a_bounded_number_of_micro_batches():
    data, load, threads = Seen(400, every=1), Counted(), threading.active_count()
    loader = DataLoader(data, schedule(data), Split(2, 4, 1), DeviceMesh(), load=load, workers=3)
    steps = loader.steps(0)
    next(steps)
    time.sleep(0.2)
    assert load.made == (4 + 3) * 2
    steps.close()
    assert threading.active_count() <= threads, "nobody goes on when the run has ended"


def test_real_images(tmp_path):
    data = Seen(6, every=3)
    real = {str(i): tmp_path / f"{i}.png" for i in (0, 3)}
    for seed, path in enumerate(real.values()):
        noise(60, 40, seed).save(path)
    example = data.example
    data.example = lambda i: (lambda e: replace(e, image=str(real[e.image])) if e.image else e)(example(i))
    load = ImageLoader.of("random_resized_crop", 16)
    for pin in (False, torch.cuda.is_available()):
        (batch,) = DataLoader(data, schedule(data), Split(8, 1, 1), DeviceMesh(), load=load, pin=pin).batches(0)
        wanted = [load(real[str(i)], Random(f"0 0 {i}")) for i in batch.items if i in (0, 3)]
        assert torch.equal(batch.pixels_I3PP, torch.stack(wanted))
    assert batch.to("meta").pixels_I3PP.shape == (2, 3, 16, 16)


@pytest.mark.parametrize("packing", [False, True])
def test_ranks_that_share_rows_have_their_tokens_once(packing):
    """Each of three ranks has a sixth of a row from its beginning and one from its end. Labels reach over the cuts."""
    plan = schedule(Items(24), rows=4, packing=packing)
    split = Split(2, 1, 2)
    for replica in range(2):
        whole = DataLoader(Items(24), plan, split, Place(replica, 2)).batch(0, 0)
        loaders = [
            DataLoader(
                Items(24), plan, split, DeviceMesh(data=Ranks(None, 3 * replica + r, 6), context=Ranks(None, r, 3))
            )
            for r in range(3)
        ]
        parts = [loader.batch(0, 0) for loader in loaders]
        T = parts[0].whole.tokens_BT.shape[1]
        assert T % 6 == 0
        assert 0 <= T - whole.tokens_BT.shape[1] < 6
        for name in ("tokens_BT", "labels_BT", "positions_BT", "documents_BT", "counted_BT"):
            chunks = [getattr(part, name).chunk(2, dim=1) for part in parts]
            together = torch.cat([*(first for first, _ in chunks), *(last for _, last in reversed(chunks))], dim=1)
            wanted = getattr(whole, name)
            assert torch.equal(together, getattr(parts[0].whole, name))
            assert torch.equal(together[:, : wanted.shape[1]], wanted)
            if name == "counted_BT":
                assert not together[:, wanted.shape[1] :].any()
