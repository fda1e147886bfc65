from __future__ import annotations

import io

import numpy as np
from matplotlib.image import imread

from lbp_ray.roi.contact_sheet import MASK_COLOUR, TILE_PX, chosen_rows, contact_sheet, tile

AMBER = (230, 159, 0)
IMAGE = np.arange(96 * 48).reshape(96, 48)


def test_box_is_drawn_where_it_is():
    picture = tile(IMAGE, (24, 12, 48, 24))
    marked = (picture == AMBER).all(axis=2)
    rows, columns = np.nonzero(marked)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (48, 144, 24, 72)


def test_mask_is_outlined_where_it_is():
    mask = np.zeros(IMAGE.shape, dtype=bool)
    mask[24:72, 12:36] = True
    rows, columns = np.nonzero((tile(IMAGE, None, mask) == MASK_COLOUR).all(axis=2))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (48, 143, 24, 71)
    assert not ((rows > 60) & (rows < 130) & (columns > 30) & (columns < 65)).any()


def test_proportions_are_kept_and_no_box_is_drawn_unasked():
    picture = tile(IMAGE)
    assert picture.shape == (TILE_PX, TILE_PX, 3)
    assert not picture[:, TILE_PX // 2 :].any()
    assert not (picture == AMBER).all(axis=2).any()


def test_sheet_holds_every_tile_and_is_deterministic():
    sheet = contact_sheet([tile(IMAGE)] * 11)
    assert imread(io.BytesIO(sheet)).shape[:2] == (2 * TILE_PX, 8 * TILE_PX)
    assert sheet == contact_sheet([tile(IMAGE)] * 11)


def test_chosen_rows_span_the_cohort():
    assert chosen_rows(3) == [0, 1, 2]
    assert (chosen_rows(500)[0], chosen_rows(500)[-1], len(chosen_rows(500))) == (0, 499, 24)
