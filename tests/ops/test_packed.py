"""Memory of packed weights: shared areas, separate pieces, and their release."""

import gc
import mmap
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine.ops import packed

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages here")


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(1, 5000) | st.just(packed.AREA + 1), min_size=1, max_size=12))
def test_pieces_are_separate_zeros(sizes: list[int]) -> None:
    pages = packed._HugePages()
    pieces = [pages.allocate(size) for size in sizes]
    for i, piece in enumerate(pieces):
        assert piece.shape == (sizes[i],) and piece.data_ptr() % packed.ALIGNMENT == 0
        assert not piece[:5000].any() and not piece[-5000:].any()
        piece[:5000] = piece[-5000:] = i + 1
    for i, piece in enumerate(pieces):
        assert (piece[:5000] == i + 1).all() and (piece[-5000:] == i + 1).all()


def test_small_pieces_share_an_area_that_ends_with_the_last() -> None:
    pages = packed._HugePages()
    first, second = pages.allocate(100), pages.allocate(100)
    assert 0 < second.data_ptr() - first.data_ptr() < 4096
    assert pages._area is not None
    area: weakref.ref[mmap.mmap] = pages._area
    del first
    gc.collect()
    assert area() is not None
    del second
    gc.collect()
    assert area() is None
    assert torch.equal(pages.allocate(10), torch.zeros(10, dtype=torch.uint8))
