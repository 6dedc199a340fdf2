"""What calls of the package answer with."""

from dataclasses import dataclass
from typing import List


@dataclass(frozen=True)
class SequenceInfo:
    """indexed_min ends before the length for good (the newest tokens are scanned): wait for idle instead."""

    length: int
    length_min: int
    indexed_min: int
    pages: int
    pool_bytes: int
    index_bytes: int
    build_us: int
    idle: bool
    shared_tokens: int


@dataclass(frozen=True)
class Seal:
    """What has been sealed. known: it had been before, by whatever sequence."""

    prefix_id: int
    tokens: int
    known: bool


@dataclass(frozen=True)
class Selection:
    """The answer to a retrieve; the lists have one entry per (sequence, KV head), sequences outermost."""

    partial: bool
    counts: List[int]
    changed: List[int]
    masses: List[float]
    indexed: List[int]
    versions: List[int]
    bytes_moved: int
    queue_us: int
    search_us: int
    fetch_us: int
    copy_us: int


def selection(result):
    heads = result.head_count
    return Selection(
        result.partial,
        result.counts[:heads],
        result.changed[:heads],
        result.masses[:heads],
        result.indexed[:heads],
        result.versions[:heads],
        result.bytes_moved,
        result.queue_us,
        result.search_us,
        result.fetch_us,
        result.copy_us,
    )


@dataclass(frozen=True)
class Hint:
    """The answer to a hint: pages that were asked for, and lanes (of sequences x KV heads) that were searched."""

    pages: int
    lanes: int
