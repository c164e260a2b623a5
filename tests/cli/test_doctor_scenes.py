# SPDX-License-Identifier: Apache-2.0
"""What docs/doctor.md shows of `kvxfer doctor` under each condition is what it prints, with the right cause first."""

from __future__ import annotations

import pytest

from tests.cli.doctor_scenes import SCENES, block, blocks_of_page, without_figures


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.title)
def test_the_right_cause_comes_first(scene):
    """The cause is in the last line where that tells one, and the page shows the same but for figures."""
    why_not = scene.why_not()
    if why_not is not None:
        pytest.skip(why_not)
    printed = block(scene)
    where = printed.splitlines()[-2] if scene.last else printed
    assert scene.cause in where, printed
    assert without_figures(printed) == without_figures(blocks_of_page()[scene.title])


def test_the_page_shows_all():
    """Each condition stands in the page, and no other."""
    assert list(blocks_of_page()) == [scene.title for scene in SCENES]
