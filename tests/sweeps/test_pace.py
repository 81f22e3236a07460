"""What an image of a size is taken to cost."""

import pytest

from sweeps.pace import Pace


def test_sizes_measured_between_them_and_beyond() -> None:
    pace = Pace()
    assert pace.seconds(300) == 3 * pace.seconds(100)  # nothing known: in proportion to FLOPs
    pace.add(100, 0, 5.0)  # no image done: nothing known
    assert pace.seconds(300) == 300
    pace.add(100, 50, 5.0)
    pace.add(100, 50, 5.0)
    pace.add(300, 10, 3.0)
    assert [pace.seconds(size) for size in (50, 100, 200, 300, 600)] == pytest.approx([0.15, 0.15, 0.225, 0.3, 0.6])
