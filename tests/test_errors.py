"""Lists in messages."""

import pytest

from accessory.errors import listed


@pytest.mark.parametrize(
    ("items", "limit", "between", "expected"),
    [
        ([], 2, ", ", ""),
        (["a"], 2, ", ", "a"),
        (["a", "b"], 2, ", ", "a, b"),
        (["a", "b", "c"], 2, ", ", "a, b and 1 more"),
        (["a", "b", "c", "d"], 2, "; ", "a; b; and 2 more"),
        (["a", "b"], 2, "; ", "a; b"),
    ],
)
def test_the_first_items_are_named_and_the_others_counted(items, limit, between, expected):
    assert listed(items, limit, between=between) == expected
    assert listed(iter(items), limit, between=between) == expected


def test_five_are_named_unless_a_limit_is_given():
    assert listed("abcdefg") == "a, b, c, d, e and 2 more"
