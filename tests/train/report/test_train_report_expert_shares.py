"""Colours of shares, and the sentence about idle experts."""

from __future__ import annotations

import numpy as np

from accessory.train.report.expert_shares import colour, idle, shade, table


def rgba(text: str) -> tuple[int, ...]:
    assert len(text) == 9
    return tuple(bytes.fromhex(text[1:]))


def test_a_share_has_the_right_colour():
    share = np.array([[1 / 4, 1 / 2, 1 / 8], [1.0, 1 / 16, np.nan]])
    seen = [[rgba(colour(value)) for value in row] for row in shade(share, 4)]
    assert seen[0][0][3] == 0  # fair share: transparent
    (r, _, b, alpha) = seen[0][1]
    assert r > b  # more than fair: orange
    assert 100 < alpha < seen[1][0][3]  # larger shares are more opaque
    (r, _, b, alpha) = seen[0][2]
    assert b > r
    assert 100 < alpha < seen[1][1][3]
    assert seen[1][2] == (128, 128, 128, 110)
    assert rgba(colour(0.5, 0.5))[3] == round(rgba(colour(0.5))[3] / 2)


def test_idle_experts_are_named_until_they_are_many():
    share = np.full((20, 2), 0.5)
    assert idle(share).startswith("No expert idles")
    share[3] = [1.0, 0.0]
    assert idle(share).endswith("fair share: expert 1 of layer 3.")
    share[:, 0], share[:, 1] = 1.0, 0.001
    assert idle(share).endswith("1 of layer 10, 1 of layer 11 and 8 more.")


def test_a_missing_share_is_a_dash():
    row = table(np.array([[0.25, np.nan, 1.1, 0.6, 0.25]]), "step 3")
    assert "<caption>Mean of step 3.</caption>" in row
    assert f'<td style="background:{colour(-0.5, 0.55)}">25.0%</td>' in row
    assert ">–</td>" in row
