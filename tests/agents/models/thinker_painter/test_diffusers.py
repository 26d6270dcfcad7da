"""What the painter relies on in diffusers, so that a new version that changes it fails here first.

Each message says which habit of the pipelines is gone.
"""

import inspect
import tomllib
from pathlib import Path

import diffusers
import pytest
import torch
from packaging.requirements import Requirement
from tiny import FAMILIES

from agents.models.thinker_painter.painter import Painter

PROJECT = Path(__file__).parents[4] / "pyproject.toml"
HERE = f"diffusers {diffusers.__version__}"


@pytest.fixture(scope="module", params=FAMILIES)
def painter(request):
    pipeline, call = FAMILIES[request.param]()
    return Painter(pipeline, **call)


def counted(owner, name, monkeypatch):
    """The arguments of each call of a method, which works on as before."""
    calls = []
    own = getattr(owner, name)

    def call(*args, **kwargs):
        calls.append((args, kwargs))
        return own(*args, **kwargs)

    call.__signature__ = inspect.signature(own)
    monkeypatch.setattr(owner, name, call)
    return calls


def test_the_installed_version_is_in_the_range_of_the_project():
    wanted = tomllib.loads(PROJECT.read_text())["project"]["dependencies"]
    (requirement,) = [r for r in map(Requirement, wanted) if r.name == "diffusers"]
    assert diffusers.__version__ in requirement.specifier, f"{HERE} is outside {requirement}"


def test_the_call_can_be_unwrapped(painter):
    """`torch.no_grad` is the only decorator, and it keeps what it wraps."""
    kind = type(painter.pipeline)
    function = inspect.unwrap(kind.__call__)
    assert function is not kind.__call__, f"{HERE}: {kind.__name__}.__call__ has no __wrapped__"
    inside = inspect.getclosurevars(function).nonlocals
    assert not inside, f"{HERE}: {kind.__name__}.__call__ is wrapped in more: {inside}"
    assert inspect.getsourcefile(function) == inspect.getsourcefile(kind)
    known = inspect.signature(function).parameters
    missing = {"prompt", "generator", "num_inference_steps", "output_type"} - known.keys()
    assert not missing, f"{HERE}: {kind.__name__}.__call__ does not take {missing}"


def test_a_step_is_one_call_of_everything(painter, monkeypatch):
    pipeline = painter.pipeline
    name = f"{HERE}: {type(pipeline).__name__}"
    names = ("encode_prompt", "prepare_latents")
    calls = {member: counted(pipeline, member, monkeypatch) for member in names}
    steps = counted(pipeline.scheduler, "step", monkeypatch)
    sets = counted(pipeline.scheduler, "set_timesteps", monkeypatch)
    decodes = counted(pipeline.vae, "decode", monkeypatch)
    forwards = []
    handle = pipeline.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    options = {"num_inference_steps": 1, "output_type": "pt", **painter.call}
    if painter.needs_source:
        options["image"] = diffusers.utils.numpy_to_pil(torch.zeros(16, 24, 3).numpy())[0]
    pipeline(prompt=["a tree"], **options)
    handle.remove()
    for member, found in calls.items():
        assert len(found) == 1, f"{name} calls {member} {len(found)} times"
    assert len(sets) == 1, f"{name} sets its schedule in another way than by set_timesteps"
    assert len(steps) == len(forwards) == 1, f"{name} takes a step in another way"
    velocity, _, sample = steps[0][0]
    assert velocity.shape == sample.shape, f"{name} hands something else to scheduler.step"
    assert len(decodes) == 1, f"{name} decodes in another way than by vae.decode"


def test_the_scheduler_takes_what_is_asked():
    """`_OneTime` stands in its place, so pipelines may ask for no more than it has."""
    known = inspect.signature(diffusers.FlowMatchEulerDiscreteScheduler.set_timesteps).parameters
    expected = {"self", "num_inference_steps", "device", "sigmas", "mu", "timesteps"}
    assert known.keys() == expected, f"{HERE}: set_timesteps has other arguments"
    step = list(inspect.signature(diffusers.FlowMatchEulerDiscreteScheduler.step).parameters)
    assert step[:4] == ["self", "model_output", "timestep", "sample"]


def test_members_of_a_pipeline_can_be_replaced(painter):
    """They are looked up on the object at each call."""
    pipeline = painter.pipeline
    for name in ("scheduler", "vae", "transformer"):
        assert name in vars(pipeline), f"{HERE}: {name} is no plain attribute any more"
    assert not hasattr(type(pipeline), "scheduler")


def test_whether_a_scheduler_follows_a_flow_is_told():
    solver = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction")
    assert solver.config.get("prediction_type") == "flow_prediction"
    euler = diffusers.FlowMatchEulerDiscreteScheduler()
    assert euler.config["num_train_timesteps"] == 1000
