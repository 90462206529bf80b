"""Many pictures: which ones there are, and what each is called in the results."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Picture:
    """One of many pictures.

    Args:
        id: what results call it; no other picture of a run has the same.
        source: a path or an address.
        name: a relative path, under which its results are stored where each has a file.
    """

    id: str
    source: str
    name: str
