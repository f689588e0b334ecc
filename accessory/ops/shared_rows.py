"""Rows of a batch that several ranks share: which tokens each rank has, and what its queries may see.

Of 2N equal chunks of a row, rank r of N has chunks r and 2N - 1 - r. A late chunk, whose queries see many keys, goes
with an early one, so all ranks have equal work. Each rank has the queries of its own tokens. It gets the keys and
values of all ranks, one rank's tokens after another's.

Legend: B rows, S tokens of a row, T = S/N of them here, M keys of all segments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from accessory.ops.transfer import to_device


def places_of(tokens: int, rank: int, size: int) -> Tensor:
    """The places (T,) in a row of `tokens`, a multiple of 2 · `size`, of those tokens that `rank` has."""
    chunks_2NC = torch.arange(tokens).view(2 * size, -1)
    return torch.cat([chunks_2NC[rank], chunks_2NC[2 * size - 1 - rank]])


class SharedRows(NamedTuple):
    """The documents of this rank's queries and of all keys, and the same as segments for a kernel of packed rows.

    A segment is the part of a document that lies in one chunk of this rank. Its keys are those of the document up to
    the segment's end. So its last query sees all of them, and each one before sees one key less.
    """

    query_place_T: Tensor  # int64, in the row
    key_place_S: Tensor  # int64, in the order in which the keys of all ranks come
    query_document_BT: Tensor
    key_document_BS: Tensor
    key_M: Tensor  # int64: the keys of all segments, by their number in the flattened B · S
    query_start_N: Tensor  # int32 (segments + 1): the segments' queries in the flattened B · T
    key_start_N: Tensor  # int32 (segments + 1): the segments' keys in `key_M`
    longest_query: int
    longest_key: int

    @classmethod
    def of(cls, number_BS: Tensor, rank: int, size: int) -> SharedRows:
        """number_BS: the document of each token of the whole rows. Call it on the CPU, as `Documents.of`."""
        B, S = number_BS.shape
        place_T = places_of(S, rank, size)
        order_S = torch.cat([places_of(S, r, size) for r in range(size)])
        number_of_place_S = order_S.argsort()  # where in `order_S` a place comes

        new_BS = torch.ones_like(number_BS, dtype=torch.bool)
        new_BS[:, 1:] = number_BS[:, 1:] != number_BS[:, :-1]
        start_BS = torch.where(new_BS, torch.arange(S), 0).cummax(1).values  # where a token's document begins
        begins_BT = new_BS[:, place_T]
        begins_BT[:, [0, len(place_T) // 2]] = True  # the two chunks
        query_N = begins_BT.flatten().nonzero().squeeze(1)
        query_start_N = torch.cat([query_N, torch.tensor([B * len(place_T)])])

        row_N, first_N = query_N // len(place_T), start_BS[:, place_T].flatten()[query_N]
        end_N = place_T[(query_start_N[1:] - 1) % len(place_T)] + 1
        keys_N = end_N - first_N
        key_start_N = torch.cat([torch.zeros(1, dtype=torch.int64), keys_N.cumsum(0)])
        skipped_N = first_N - key_start_N[:-1]
        place_M = torch.arange(int(key_start_N[-1])) + skipped_N.repeat_interleave(keys_N)
        return cls(
            place_T,
            order_S,
            number_BS[:, place_T],
            number_BS[:, order_S],
            row_N.repeat_interleave(keys_N) * S + number_of_place_S[place_M],
            query_start_N.to(torch.int32),
            key_start_N.to(torch.int32),
            int(query_start_N.diff().max()),
            int(keys_N.max()),
        )

    def to(self, device: torch.device | str) -> SharedRows:
        there = torch.device(device)
        return SharedRows._make(to_device(value, there) if isinstance(value, Tensor) else value for value in self)

    def mask(self) -> Tensor:
        """Bool, (B, T, S): whether a query may attend to a key."""
        causal_TS = self.query_place_T[:, None] >= self.key_place_S
        return causal_TS & (self.query_document_BT[:, :, None] == self.key_document_BS[:, None, :])
