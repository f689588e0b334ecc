import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accessory.engine.sampling import NO_TOKEN, Sampling, sample
from accessory.errors import InputError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", None),
    ],
)
def test_out_of_range_is_one_error_naming_the_field(field, value):
    with pytest.raises(InputError, match=field) as error:
        Sampling(**{field: value})
    assert "\n" not in str(error.value)


def test_greedy_takes_the_largest_and_never_an_id_without_a_spelling():
    logits = torch.tensor([[0.0, 3.0, 9.0], [5.0, 1.0, 9.0]])
    assert sample(logits, Sampling()).tolist() == [2, 2]
    assert sample(logits, Sampling(), vocab_size=2).tolist() == [1, 0]


def test_frequencies_are_the_nucleus_renormalised():
    # Of 0.5, 0.3, 0.15 and 0.05, top_p 0.75 keeps the first two, as 5/8 and 3/8.
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().expand(20000, 4)
    drawn = sample(logits, Sampling(temperature=1.0, top_p=0.75, seed=1), torch.Generator().manual_seed(1))
    share = torch.bincount(drawn, minlength=4) / 20000
    torch.testing.assert_close(share, torch.tensor([0, 0.625, 0, 0.375]), atol=0.015, rtol=0)


def test_temperature_sharpens():
    logits = torch.tensor([0.4, 0.6]).log().expand(20000, 2)
    drawn = sample(logits, Sampling(temperature=0.5, top_p=1.0), torch.Generator().manual_seed(0))
    assert (drawn == 1).float().mean().item() == pytest.approx(0.36 / 0.52, abs=0.015)


@given(
    st.lists(st.floats(-20, 20), min_size=2, max_size=9), st.floats(0.01, 1), st.floats(0.05, 4), st.integers(0, 999)
)
def test_a_draw_lies_in_the_nucleus(logits, top_p, temperature, seed):
    row = torch.tensor([logits])
    token = sample(row, Sampling(temperature, top_p), torch.Generator().manual_seed(seed)).item()
    p = (row[0].double() / temperature).softmax(0)
    likelier = p > p[token] * (1 + 1e-5)  # by more than fp32's rounding
    assert p[likelier].sum() < top_p + 1e-5  # the more likely tokens did not reach top_p


def test_the_global_seed_and_an_own_seed_both_repeat():
    logits = torch.randn(4, 50)
    torch.manual_seed(7)
    a = sample(logits, Sampling(temperature=1.0))
    torch.manual_seed(7)
    assert torch.equal(a, sample(logits, Sampling(temperature=1.0)))
    own = Sampling(temperature=1.0, seed=3)
    assert torch.equal(sample(logits, own, own.generator()), sample(logits, own, own.generator()))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_gets_no_token_and_its_neighbours_get_theirs(temperature):
    rows = torch.tensor([[0.0, 30.0], [0.0, float("nan")], [float("inf"), 0.0], [float("-inf"), 30.0]])
    assert sample(rows, Sampling(temperature), torch.Generator().manual_seed(0)).tolist() == [1, NO_TOKEN, NO_TOKEN, 1]


@pytest.mark.parametrize("temperature", [1e-30, 5e-324])
def test_the_lowest_temperatures_are_greedy(temperature):
    assert sample(torch.tensor([[-700.0, 700.0, 699.0]]), Sampling(temperature)).tolist() == [1]
