"""How many ranks on which GPUs: accepted requests, and the errors for the others."""

from __future__ import annotations

import pytest

from accessory.errors import InputError
from accessory.launch.gpus import check_device, count_ranks, default_device, use_gpus, visible_devices, visible_gpus


@pytest.mark.parametrize(
    ("n", "ids", "shown", "expected"),
    [(1, None, None, 1), (8, None, None, 8), (2, None, 2, 2), (None, [3, 1], None, 2), (2, [0, 1], 2, 2)],
)
def test_ranks_are_counted(n, ids, shown, expected):
    assert count_ranks(n, ids, shown=shown) == expected


@pytest.mark.parametrize(
    ("n", "ids", "shown", "message"),
    [
        (None, None, None, "--n: got None, but it must be a whole number of at least 1"),
        (0, None, None, "--n: got 0, but it must be a whole number of at least 1"),
        (1.5, None, None, "--n: got 1.5, but it must be a whole number of at least 1"),
        (3, None, 2, "--n: got 3, but this machine shows 2 GPUs"),
        (None, [], None, "--ids: got none, but they must be different numbers of GPUs, at least one"),
        (None, [1, 1], None, "--ids: got 1 1, but they must be different numbers of GPUs, at least one"),
        (None, [0, -1], None, "--ids: got 0 -1, but they must be different numbers of GPUs, at least one"),
        (None, [0, 2], 2, "--ids: got 0 2, but this machine shows 2 GPUs, the first of which is 0"),
        (3, [0, 1], None, "--n: got 3, but --ids names 2; give one of the two"),
    ],
)
def test_what_makes_no_sense_names_the_option(n, ids, shown, message):
    with pytest.raises(InputError) as error:
        count_ranks(n, ids, shown=shown, n_field="--n", ids_field="--ids")
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("visible", "names", "chosen"),
    [(None, None, "2,0"), ("", None, "2,0"), ("5,GPU-a,7", ["5", "GPU-a", "7"], "7,5")],
)
def test_ids_number_what_is_visible(monkeypatch, visible, names, chosen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus() == names
    assert visible_devices([2, 0]) == chosen
    use_gpus([2, 0])
    assert visible_gpus() == chosen.split(",")
    assert visible_devices([1]) == chosen.split(",")[1]


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:99", "cuda:x"])
def test_a_device_that_is_not_there_is_one_line(name):
    with pytest.raises(InputError, match=f"^--device: got '{name}', but [^\n]+$"):
        check_device(name)


def test_a_device_that_is_there_stays_as_it_is():
    assert (check_device(None), check_device("cpu")) == (None, "cpu")


@pytest.mark.parametrize(
    ("visible", "build", "warned"),
    [("7", "12.8", True), ("7", None, False), ("", "12.8", False), ("-1", "12.8", False), (None, "12.8", False)],
)
def test_a_variable_that_hides_all_gpus_is_a_warning(visible, build, warned, monkeypatch, caplog):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", build)
    assert default_device() == "cpu"
    assert [m for m in caplog.messages if "CUDA_VISIBLE_DEVICES: got 7" in m] == caplog.messages
    assert bool(caplog.messages) == warned
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert default_device() == "cuda"


@pytest.mark.parametrize("visible", ["", "7"])
def test_a_device_that_the_variable_hides_is_named_with_it(visible, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(InputError, match=f"sees 0 CUDA devices here .CUDA_VISIBLE_DEVICES={visible!r}"):
        check_device("cuda")
