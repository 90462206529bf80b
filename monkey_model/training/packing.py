"""Short conversations share a sequence, instead of one padded row for each.

A packed row holds conversations one after the other, and ``position_ids`` that start anew with
each. By these transformers' mask keeps every conversation to itself, so loss and gradients are
those of the same conversations in rows of their own.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from monkey_model.training.conversations import ConversationDataset


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of ``lengths`` in groups whose sums are at most ``capacity``: best fit, decreasing.

    The order of the groups, and within one, is that of ``lengths``.

    Raises:
        ValueError: a length above ``capacity``.
    """
    packs: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # the packs that have so much room left
    rooms: list[int] = []  # the keys of by_room, rising
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"lengths must be at most capacity, {capacity}; got {length}")
        place = bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            number = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        else:
            room, number = capacity, len(packs)
            packs.append([])
        packs[number].append(index)
        left = room - length
        if left not in by_room:
            by_room[left] = []
            insort(rooms, left)
        by_room[left].append(number)
    return sorted(map(sorted, packs))


class PackedConversations(Dataset[list[dict[str, Any]]]):
    """The conversations of ``dataset`` in groups, each of which becomes a row of a batch."""

    def __init__(self, dataset: ConversationDataset, packs: Sequence[Sequence[int]]) -> None:
        self.dataset = dataset
        self.conversations = dataset.conversations
        self.packs = packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        """A list of what :class:`ConversationDataset` gives."""
        return [self.dataset[number] for number in self.packs[index]]
