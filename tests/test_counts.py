"""How numbers of parameters are written, by hand."""

import pytest

from accessory.counts import spell_parameters


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1 k"),
        (49_152, "49.15 k"),
        (720_348_480, "720.3 M"),
        (999_949_999, "999.9 M"),
        (999_960_000, "1 B"),
        (46_702_792_704, "46.7 B"),
        (12_748_000_000, "12.75 B"),
        (140_600_000_000, "140.6 B"),
    ],
)
def test_a_number_of_parameters(number, said):
    assert spell_parameters(number) == said
