"""From settings to parts, and what does not fit is refused before a run begins."""

import sys

import pytest
import torch

from agents.config.loading import load_config
from agents.models.toy import ToyModel
from agents.policy.guidance import Guidance
from agents.policy.sde import Window, cps_step
from agents.training import build
from agents.training.trainer import Trainer
from unigrpo_env.tasks.prompt_file import PromptFile
from unigrpo_env.tasks.shapes.processor import ShapesProcessor
from unigrpo_env.variants.toy import ToyProcessor

pytestmark = pytest.mark.slow

MODULE = "import builtins\nbuiltins.imported_count = getattr(builtins, 'imported_count', 0) + 1\n"


@pytest.fixture
def imported_count(monkeypatch):
    """How often the module `MODULE` was executed; everything is put back afterwards."""
    import builtins

    monkeypatch.setattr(builtins, "imported_count", 0, raising=False)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return lambda: builtins.imported_count


def test_import_of_a_module(tmp_path, monkeypatch, imported_count):
    (tmp_path / "my_own_rewards.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    build.import_modules(["my_own_rewards"])
    assert imported_count() == 1


@pytest.mark.parametrize("name", ["my_own.py", "rewards.py", "json.py"])
def test_import_of_a_path(tmp_path, monkeypatch, imported_count, name):
    """Any file name will do, that of a module which is imported already too."""
    path = tmp_path / name
    path.write_text(MODULE)
    build.import_modules([str(path)])
    monkeypatch.chdir(tmp_path)
    build.import_modules([f"./{name}", str(path)])
    assert imported_count() == 1, "one file is imported once"
    assert sys.modules["json"].dumps({}) == "{}"


def test_import_that_fails_can_be_repeated(tmp_path, imported_count):
    path = tmp_path / "broken.py"
    path.write_text("raise ValueError('broken')")
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            build.import_modules([str(path)])


def test_missing_imports(tmp_path, imported_count):
    with pytest.raises(ImportError, match=r"expected a Python file at .*nothing\.py, found none"):
        build.import_modules([str(tmp_path / "nothing.py")])
    with pytest.raises(ImportError, match="no_such_module"):
        build.import_modules(["no_such_module"])


@pytest.mark.parametrize("device", ["cuda", "cuda:99", "gpu"])
def test_device_that_is_not_there(device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is such a device")
    config = load_config(["model=toy", f"model.device={device}"])
    with pytest.raises(ValueError, match=f"model.device='{device}', got: .*use cpu") as caught:
        build.build_model(config)
    assert "\n" not in str(caught.value)


def test_weights_have_the_dtype_of_the_settings(small_bagel):
    words = ["model.dtype=bfloat16", "model.checkpointing=true", "model.max_rows=3"]
    model = build.place_model(small_bagel, load_config(words))
    assert all(weight.dtype == torch.bfloat16 for weight in model.parameters())
    assert model.checkpointing
    assert model.max_rows == 3


@pytest.fixture
def options_of(monkeypatch):
    """The name and the options with which `load_model` is called for some overrides."""

    def call(*overrides):
        calls = []

        def load(name, **options):
            calls.append((name, options))
            return ToyModel()

        monkeypatch.setattr(build, "load_model", load)
        build.build_model(load_config(list(overrides)))
        return calls[0]

    return call


def test_only_what_is_set_is_handed_to_the_model(options_of):
    """None stands for what is not set."""
    parts = ("thinker", "painter", "tells", "strict", "reads_base", "thinking")
    nothing = dict.fromkeys((*parts, "height", "width", "vision"))
    default = {**nothing, "dtype": torch.float32, "device": torch.device("cpu")}
    assert options_of("model=toy") == ("toy", default)
    name, options = options_of(
        "model.name=folder", "model.height=64", "model.vision=false", "model.dtype=bfloat16"
    )
    assert name == "folder"
    assert options == {**default, "height": 64, "vision": False, "dtype": torch.bfloat16}
    name, options = options_of(
        "model.kind=thinker_painter",
        "model.thinker=folder",
        "model.painter=some/pipeline",
        "model.tells=answer",
        "model.thinking=false",
    )
    assert name == "thinker_painter"
    given = {"thinker": "folder", "painter": "some/pipeline", "tells": "answer", "thinking": False}
    assert options == {**default, **given}


def test_settings_that_a_model_does_not_take():
    with pytest.raises(ValueError, match="got height"):
        build.build_model(load_config(["model=toy", "model.height=64"]))


def test_adapters_of_the_settings(small_bagel):
    words = ["model.lora.image.rank=3", "model.lora.targets=[q_proj]", "model.dtype=bfloat16"]
    model = build.place_model(small_bagel, load_config(words))
    assert set(model.adapted_layers) == {"text", "image"}
    assert model.adapted_layers["text"] == []
    assert all("q_proj" in name for name in model.adapted_layers["image"])
    layer = model.get_submodule(model.adapted_layers["image"][0])
    assert layer.r["default"] == 3
    assert layer.scaling["default"] == 2, "alpha is twice the rank"
    assert all(weight.dtype == torch.float32 for weight in model.trainable_by_expert()["image"])


def test_adapters_that_the_model_came_with(small_bagel):
    """They are never added twice; settings that differ are refused."""
    words = ["model.lora.image.rank=3", "model.lora.image.alpha=9"]
    model = build.place_model(small_bagel, load_config(words))
    names = [name for name, _ in model.named_parameters()]
    for same in ([], words):
        build.place_model(model, load_config(same))
        assert [name for name, _ in model.named_parameters()] == names
    for other in (
        ["model.lora.image.rank=4"],
        ["model.lora.image.rank=3"],
        [*words, "model.lora.text.rank=2"],
    ):
        with pytest.raises(ValueError, match=r"expected adapters of the \w+ expert with \(rank"):
            build.place_model(model, load_config(other))


def test_model_without_layers_for_adapters():
    with pytest.raises(ValueError, match="linear layers"):
        build.build_model(load_config(["model=toy", "model.lora.text.rank=2"]))


def test_unknown_model():
    with pytest.raises(ValueError, match="did you mean 'tiny'"):
        build.build_model(load_config(["model.name=tinny"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["env.processor=shapes"], r"ToyModel does not fit .* a vocabulary of 5, expected 64"),
        (["env.processor=shapes"], r"latents \(1, 12\), expected \(36, 48\)"),
        ([], "for ToyProcessor, got none; the scenario's own is made for the shapes world"),
    ],
)
def test_model_that_does_not_fit(tmp_path, overrides, message):
    folder = tmp_path / "run"
    settings = ["model.name=toy", "env=text_to_image", f"output.folder={folder}", *overrides]
    with pytest.raises(ValueError, match=message) as caught:
        Trainer(load_config(settings))
    assert "\n" not in str(caught.value)
    assert not folder.exists()


def test_larger_vocabulary_fits(small_bagel, short_variant):
    build.check_model_fits(small_bagel, short_variant("text_to_image").rules)


def test_processor_is_the_model_own(small_bagel):
    settings = load_config(["env=toy"]).env
    assert build.build_processor(settings, small_bagel) is small_bagel.processor
    settings.processor = "toy"
    assert isinstance(build.build_processor(settings, small_bagel), ToyProcessor)


def test_variant_has_the_settings():
    settings = load_config(
        [
            "env=story",
            "env.reward=shapes",
            "env.thought_reward=brevity",
            "env.round_reward=crispness",
            "env.reward_options.shapes.level=2",
            "env.prompt_budget=30",
            "env.text_budget=7",
            "env.image_steps=3",
            "env.time_shift=1.5",
        ]
    ).env
    variant = build.build_variant(settings)
    assert isinstance(variant.processor, ShapesProcessor)
    assert variant.rules.image_budget == 3
    assert variant.rules.prompt_budget == 30
    assert variant.rules.text_budget == 7
    assert variant.rules.image_steps == 3
    assert variant.rules.time_shift == 1.5
    rewards = (variant.reward, variant.thought_reward, variant.round_reward)
    assert rewards == ("shapes", "brevity", "crispness")
    assert variant.reward_options == {"shapes": {"level": 2}}
    assert build.build_variant(settings, reward="brevity").reward == "brevity"


def test_empty_settings_are_the_variant_own():
    variant = build.build_variant(load_config(["env=edit"]).env)
    assert variant.reward == "edit"
    assert variant.thought_reward is None
    assert variant.rules.text_budget == 24
    assert variant.rules.time_shift == variant.processor.time_shift


def test_prompt_files_replace_the_task(tmp_path):
    (tmp_path / "train.txt").write_text("a circle\na square\n")
    (tmp_path / "test.txt").write_text("a cross\n")
    words = [f"env.prompts={tmp_path}/train.txt", f"env.test_prompts={tmp_path}/test.txt"]
    task = build.build_variant(load_config(words).env).task
    assert isinstance(task, PromptFile)
    assert task.prompts("test", 1, 0)[0].text == "a cross"
    assert {prompt.text for prompt in task.prompts("train", 2, 0)} == {"a circle", "a square"}


def test_prompts_of_geneval_are_made(tmp_path):
    (tmp_path / "test.txt").write_text("a photo of a cup\n")
    words = ["env.prompts=geneval", f"env.test_prompts={tmp_path}/test.txt"]
    task = build.build_variant(load_config(words).env).task
    assert task.prompts("test", 1, 0)[0].text == "a photo of a cup"
    assert task.prompts("train", 1, 0)[0].metadata["include"]


def test_guidance_has_the_settings():
    words = ["guidance.image=2.0", "guidance.low=0.1", "guidance.high=0.9"]
    words += ["guidance.renorm=channel", "guidance.renorm_min=0.2"]
    settings = load_config(words).guidance
    expected = Guidance(3.0, 2.0, low=0.1, high=0.9, renorm="channel", renorm_min=0.2)
    assert build.build_guidance(settings, 3.0) == expected
    assert build.build_guidance(settings, 1.0) is None


def test_actor_has_the_settings():
    words = ["algorithm.window_size=2", "algorithm.window_low=1", "algorithm.window_high=6"]
    words += ["algorithm.window_slide_every=3", "algorithm.kernel=flow_cps"]
    words += ["algorithm.noise_level=0.4", "algorithm.temperature=0.7"]
    actor = build.build_actor(load_config(words), ToyModel(), Guidance(2.0))
    assert actor.window == Window(2, 1, 6, 3)
    assert actor.kernel is cps_step
    assert actor.noise_level == 0.4
    assert actor.temperature == 0.7
    assert actor.model.guidance == Guidance(2.0)


@pytest.mark.parametrize("algorithm", ["fpo", "refl", "unifpo"])
@pytest.mark.parametrize("env", ["story", "edit"])
def test_other_objectives_are_for_one_image(small_bagel, tmp_path, algorithm, env):
    words = [f"algorithm={algorithm}", f"env={env}", f"output.folder={tmp_path}"]
    with pytest.raises(ValueError, match="one image and no sources"):
        Trainer(load_config(words), small_bagel)


@pytest.mark.parametrize(
    "words",
    [
        ["algorithm=fpo", "env=text_to_image"],
        ["algorithm=unigrpo", "env=story"],
        ["algorithm=unifpo", "env=story", "algorithm.image_weight=0.0"],
        ["algorithm=fpo", "env=story", "algorithm.method=sft"],
    ],
)
def test_objectives_that_fit(words):
    config = load_config(words)
    build.check_objective(config, build.build_variant(config.env).rules)
