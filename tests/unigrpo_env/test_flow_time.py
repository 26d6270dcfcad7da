"""The grid of flow times."""

import pytest
import torch

from unigrpo_env.flow_time import shift_time, time_grid


@pytest.mark.parametrize("steps", [1, 4, 50])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_a_grid_falls_from_1_to_0(steps, shift):
    grid = time_grid(steps, shift)
    assert grid.shape == (steps + 1,)
    assert grid.dtype == torch.float32
    assert grid[0] == 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()


def test_a_shift_moves_times_towards_noise():
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    torch.testing.assert_close(shift_time(t, 3.0), torch.tensor([0.0, 0.5, 0.75, 1.0]))
    torch.testing.assert_close(shift_time(t, 1.0), t)


@pytest.mark.parametrize(("steps", "shift"), [(0, 1.0), (-1, 1.0), (4, 0.0), (4, float("nan"))])
def test_bad_grids(steps, shift):
    with pytest.raises(ValueError, match="expected steps >= 1 and shift > 0"):
        time_grid(steps, shift)
