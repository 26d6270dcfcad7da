"""Where a transformer is told another time than that of its latents."""

import pytest
import torch
from tiny import FAMILIES

from agents.models.thinker_painter.painter import Painter
from agents.models.thinker_painter.told_time import ToldTime

TOLD = torch.linspace(1, 0.001, 1000)


def shifted(times):
    return 2 * times / (1 + times)


def test_the_same_time_is_told_as_it_is():
    told = ToldTime(TOLD, TOLD + 4e-4)
    times = torch.rand(5)
    assert not told.differs
    assert told(times) is times


def test_a_time_before_a_shift_is_found():
    told = ToldTime(shifted(TOLD), TOLD)
    assert told.differs
    times = torch.tensor([1.0, 0.9, 0.5, 0.1, 1e-4, 0.0])
    torch.testing.assert_close(told(shifted(times)), times, atol=1e-5, rtol=0)


def test_another_schedule_agrees_or_not():
    told = ToldTime(shifted(TOLD), TOLD)
    few = torch.linspace(1, 0.1, 10)
    assert told.agrees(shifted(few), few)
    assert not told.agrees(shifted(few), few**2)


def test_a_time_that_depends_on_the_steps_is_refused(monkeypatch):
    pipeline, call = FAMILIES["cogview4"]()
    own = pipeline.scheduler.set_timesteps

    def set_timesteps(num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        own(num_inference_steps, device, sigmas, mu, timesteps)
        if len(pipeline.scheduler.timesteps) < 100:
            pipeline.scheduler.timesteps /= 2

    monkeypatch.setattr(pipeline.scheduler, "set_timesteps", set_timesteps)
    with pytest.raises(ValueError, match="CogView4Pipeline to tell its transformer a time"):
        Painter(pipeline, **call)
