"""The trainer learns, freezes, stops, resumes, and says what is wrong."""

import json
import math
import shutil

import pytest
import torch

from agents.checkpoint import checkpoints, latest_checkpoint
from agents.config import Config, config_names, load_config, settings
from agents.logs import read_metrics
from agents.run import run
from agents.trainer import CLOCKED, METRICS, Trainer
from rewards import REWARDS, UnscoredError, WeightedReward

TOY = [
    "model.name=toy", "env.variant=toy", "env.time_shift=1.0", "env.image_steps=10", "env.text_budget=2", "evaluation.image_steps=10",
    "trainer.groups=8", "trainer.group_size=8", "trainer.minibatches=1", "trainer.micro_batches=1", "model.dtype=float32",
    "optimizer.text_lr=0.1", "optimizer.image_lr=0.03", "optimizer.beta2=0.99", "algorithm.text_clip=0.2", "algorithm.image_clip=0.1",
    "algorithm.refl_reward=toy", "env.thought_reward=", "evaluation.reward=", "evaluation.prompts=64", "output.tensorboard=false", "output.samples_every=0",
]  # fmt: skip


def toy_trainer(folder, *overrides, config="unigrpo"):
    return Trainer(load_config(config, [*TOY, f"output.folder={folder}", *overrides]))


@pytest.mark.parametrize("name", config_names())
def test_every_config_learns_the_toy(name, tmp_path):
    """The optimum is known: say the prompt's word, paint its grey (latents -0.5 and 0.5)."""
    # Frozen words are random words: there the picture follows the prompt alone.
    thought = ["env.text_budget=0"] if not load_config(name).algorithm.text_weight else []
    trainer = toy_trainer(tmp_path, "trainer.iterations=120", *thought, config=name)
    algorithm = trainer.config.algorithm
    before = trainer.evaluate().components
    words = trainer.model.words.detach().clone()
    pictures = trainer.model.pictures.detach().clone()
    trainer.train()
    after = trainer.evaluate().components
    if algorithm.text_weight:
        assert after["toy/word"].mean() > 0.9 > before["toy/word"].mean() + 0.3
    else:
        assert torch.equal(words, trainer.model.words)
    if algorithm.image_weight:
        target = torch.tensor([-0.5, 0.5])
        assert ((trainer.model.pictures[3:].mean((1, 2)) - target).abs() < 0.2).all()
        assert after["toy/grey"].mean() > before["toy/grey"].mean() + 0.1
    else:
        assert torch.equal(pictures, trainer.model.pictures)


def test_old_log_probs_recomputed_are_the_training_forward(small_bagel, tmp_path):
    config = load_config("unigrpo", [f"output.folder={tmp_path}", "trainer.groups=2", "trainer.group_size=2", "env.text_budget=4", "env.image_steps=6",
                                     "env.reward=shapes_score", "algorithm.old_log_prob=recompute"])  # fmt: skip
    trainer = Trainer(config, small_bagel)
    assert trainer.recompute
    metrics = trainer.iterate()
    assert metrics["text_log_ratio"] == 0
    assert metrics["image_log_ratio"] == 0


def test_half_precision_recomputes_by_itself(small_bagel, tmp_path):
    config = load_config("unigrpo", [f"output.folder={tmp_path}", "trainer.groups=2", "trainer.group_size=2", "env.text_budget=4", "env.image_steps=6",
                                     "env.reward=mean_red", "model.dtype=bfloat16", "algorithm.text_clip=0.01"])  # fmt: skip
    trainer = Trainer(config, small_bagel)
    assert trainer.recompute
    metrics = trainer.iterate()
    projection = small_bagel.language_model.model.layers[0].self_attn.q_proj.weight
    assert projection.dtype == torch.float32
    assert projection.grad.abs().sum() > 0
    assert metrics["text_log_ratio"] < 1e-3
    assert metrics["image_log_ratio"] < 1e-5
    assert metrics["image_grad_norm"] > 0


@pytest.mark.parametrize(("frozen", "weight"), [("image", "algorithm.image_weight=0.0"), ("text", "algorithm.text_weight=0.0")])
def test_frozen_means_no_gradient_and_no_change(small_bagel, tmp_path, frozen, weight):
    config = load_config("unigrpo", [weight, "trainer.groups=2", "trainer.group_size=4", "env.text_budget=4", "env.image_steps=6", "env.reward=mean_red",
                                     f"output.folder={tmp_path}"])  # fmt: skip
    lists = small_bagel.parameter_lists()
    before = {name: [p.detach().clone() for p in parameters] for name, parameters in lists.items()}
    trainer = Trainer(config, small_bagel)
    trainer.iterate()
    for name, parameters in lists.items():
        changed = any(not torch.equal(old, new) for old, new in zip(before[name], parameters, strict=True))
        assert changed == (name != frozen), name
    assert all(p.grad is None for p in lists[frozen])


def test_micro_batches_do_not_change_a_run(small_bagel, tmp_path):
    """Through the trainer, with episodes that could not be scored, in groups that fall into different parts."""
    small_bagel.save_pretrained(tmp_path / "start")
    found = []
    for parts in (1, 4):
        config = load_config("unigrpo", ["trainer.groups=4", "trainer.group_size=4", "trainer.minibatches=1", f"trainer.micro_batches={parts}", "env.text_budget=4",
                                         "env.image_steps=6", "env.reward=some_nan", f"output.folder={tmp_path}"])  # fmt: skip
        trainer = Trainer(config, type(small_bagel).from_pretrained(tmp_path / "start"))
        metrics = trainer.iterate()
        found.append((metrics, torch.cat([p.grad.flatten() for group in trainer.experts.values() for p in group])))
    assert found[0][0]["unscored"] > 0
    torch.testing.assert_close(found[0][1], found[1][1], atol=2e-6, rtol=1e-3)
    for name in ("loss_text", "loss_image", "text_grad_norm", "image_grad_norm"):
        assert found[0][0][name] == pytest.approx(found[1][0][name], rel=1e-3, abs=1e-6)


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_change(tmp_path):
    trainer = toy_trainer(tmp_path)
    trainer.iterate()
    before = weights_of(trainer)
    trainer.loss.log_ratio = lambda sample, mean, old, std: mean.mean((-2, -1)) * torch.nan
    with pytest.raises(FloatingPointError, match="weights are as before"):
        trainer.iterate()
    assert all(torch.equal(value, before[name]) for name, value in weights_of(trainer).items())


def weights_of(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("kind", ["toy", "bagel"])
def test_a_resumed_run_is_the_run_that_was_not_stopped(small_bagel, tmp_path, kind):
    overrides = ["trainer.iterations=6", "output.checkpoint_every=3", "algorithm.velocity_weight=0.01", "trainer.minibatches=2"]
    if kind == "toy":
        make = lambda folder: toy_trainer(folder, *overrides)  # noqa: E731
    else:
        settings = [
            "trainer.groups=2",
            "trainer.group_size=4",
            "env.text_budget=4",
            "env.image_steps=6",
            "env.reward=mean_red",
            "evaluation.prompts=2",
        ]
        make = lambda folder: Trainer(load_config("unigrpo", [*overrides, *settings, f"output.folder={folder}"]), small_bagel)  # noqa: E731
        small_bagel.save_pretrained(tmp_path / "start")
    whole = make(tmp_path / "whole")
    run(whole)
    expected = weights_of(whole)
    if kind == "bagel":
        small_bagel.load_state_dict(type(small_bagel).from_pretrained(tmp_path / "start").state_dict())
    stopped = make(tmp_path / "stopped")
    reference = {name: value.clone() for name, value in stopped.reference.state_dict().items()}

    class Stop(Exception):
        pass

    def stop_after_five(metrics):
        if stopped.iteration == 5:
            raise Stop

    original = stopped.train
    stopped.train = lambda after: original(lambda metrics: (after(metrics), stop_after_five(metrics)))
    with pytest.raises(Stop):
        run(stopped)
    assert len(read_metrics(tmp_path / "stopped")) == 5
    with (tmp_path / "stopped" / "metrics.csv").open("a") as file:
        file.write("6,0.5")  # what a kill in the middle of a line leaves
    torch.manual_seed(99)
    resumed = Trainer.resume(tmp_path / "stopped")
    assert resumed.iteration == 3
    assert all(torch.equal(value, reference[name]) for name, value in resumed.reference.state_dict().items())
    summary = run(resumed)
    for name, value in weights_of(resumed).items():
        assert torch.equal(value, expected[name]), name
    rows, other = read_metrics(tmp_path / "stopped"), read_metrics(tmp_path / "whole")
    assert summary["seconds_training"] == round(sum(row["seconds"] for row in rows), 3), "of both parts"
    for row in (*rows, *other):
        for name in CLOCKED:
            row.pop(name)
    assert rows == other


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    first = run(toy_trainer(tmp_path, "trainer.iterations=2"))
    curve = (tmp_path / "accuracy.json").read_text()
    assert run(Trainer.resume(tmp_path)) == first
    assert (tmp_path / "accuracy.json").read_text() == curve


def test_old_checkpoints_go(tmp_path):
    trainer = toy_trainer(tmp_path, "trainer.iterations=4", "output.checkpoint_every=1")
    run(trainer)
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["000003", "000004"]


def damage(path, how):
    if how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "foreign":
        path.write_text("{}")
    else:
        path.unlink()


@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors", "reference.safetensors", "model/model.safetensors"])
@pytest.mark.parametrize("how", ["truncated", "foreign", "missing"])
def test_damaged_checkpoints(tmp_path, name, how):
    trainer = toy_trainer(tmp_path, "trainer.iterations=1")
    trainer.iterate()
    damage(trainer.save() / name, how)
    with pytest.raises(ValueError, match=r"state of a run|safetensors file|expected a run|does not fit|missing"):
        Trainer.resume(tmp_path)


def test_a_crash_while_saving_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    trainer = toy_trainer(tmp_path, "trainer.iterations=3")
    trainer.iterate()
    first = trainer.save()
    trainer.iterate()
    monkeypatch.setattr("agents.checkpoint.write_json", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        trainer.save()
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path) == first
    assert Trainer.resume(tmp_path).iteration == 1


def test_a_run_does_not_overwrite_another(tmp_path):
    run(toy_trainer(tmp_path, "trainer.iterations=1"))
    with pytest.raises(ValueError, match="holds a run already"):
        run(toy_trainer(tmp_path, "trainer.iterations=1"))


def test_summary_report_and_metrics(tmp_path):
    run(toy_trainer(tmp_path, "trainer.iterations=3", "output.samples_every=2", "output.tensorboard=true"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    for name in ("accuracy_before", "accuracy_after", "greedy_accuracy_before", "greedy_accuracy_after", "seed"):
        assert isinstance(summary[name], int | float)
    assert summary["seconds_training"] > 0
    assert summary["cpu_seconds_training"] > 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 16
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")
    assert set(read_metrics(tmp_path)[0]) == {"iteration", *METRICS}
    assert (tmp_path / "samples" / "000002.png").is_file()
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.fixture(autouse=True)
def rewards():
    """Rewards for these tests alone."""
    kept = dict(REWARDS._entries)
    REWARDS.add("mean_red", lambda episodes: episodes.images[:, 0].mean((1, 2)))
    REWARDS.add("some_nan", lambda episodes: [math.nan if i % 8 == 0 else i % 3 for i in range(len(episodes))])
    REWARDS.add("all_nan", lambda episodes: [math.nan] * len(episodes))
    yield
    REWARDS._entries = kept


def test_a_few_unscored_episodes_are_left_out_and_counted(tmp_path):
    metrics = toy_trainer(tmp_path, "env.reward=some_nan").iterate()
    assert metrics["unscored"] == 1 / 8
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize(
    "overrides", [["env.reward=all_nan", "trainer.max_unscored=1.0"], ["env.reward=some_nan", "trainer.max_unscored=0.1"]]
)
def test_too_many_unscored_episodes_stop_the_run(tmp_path, overrides):
    trainer = toy_trainer(tmp_path, *overrides)
    before = weights_of(trainer)
    with pytest.raises(UnscoredError, match="could not be scored"):
        trainer.iterate()
    assert all(torch.equal(value, before[name]) for name, value in weights_of(trainer).items())


def test_equal_rewards_teach_nothing(tmp_path):
    REWARDS.add("constant", lambda episodes: [0.7] * len(episodes))
    trainer = toy_trainer(tmp_path, "env.reward=constant", "algorithm.velocity_weight=0.0")
    before = weights_of(trainer)
    metrics = trainer.iterate()
    assert metrics["signal"] == 0
    assert all(torch.equal(value, before[name]) for name, value in weights_of(trainer).items())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.iteration=3", "did you mean 'trainer.iterations'"),
        ("trainer.iterations=many", "trainer.iterations"),
        ("trainer.group_size=1", "judged against the others"),
        ("trainer.minibatches=3", "multiple of minibatches"),
        ("algorithm.ratio=norn", "one of"),
        ("algorithm.noise_level=0.0", "0 < algorithm.noise_level"),
        ("algorithm.image_clip=1.0", "image_clip < 1"),
        ("iterations", "unknown setting"),
    ],
)
def test_settings_that_cannot_be(override, message):
    with pytest.raises(ValueError, match=message):
        load_config("unigrpo", [override])


def test_settings_survive_json():
    config = load_config("paper", ["env.reward=shapes + 0.1 * brevity", "output.imports=[a, b]"])
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="not the settings"):
        Config.from_dict({"trainer": {"unknown": 1}})


def test_every_setting_has_help_and_is_read():
    """Each key is named somewhere outside the file that defines it."""
    from pathlib import Path

    import agents

    sources = "".join(path.read_text() for path in Path(agents.__path__[0]).rglob("*.py") if path.name != "config.py")
    for name, entry in settings():
        assert entry.metadata["help"]
        assert f".{entry.name}" in sources or f'"{entry.name}"' in sources, f"nobody reads {name}"


def test_the_reference_is_the_model_that_training_began_from(tmp_path):
    trainer = toy_trainer(tmp_path, "trainer.iterations=2")
    before = weights_of(trainer)
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.reference.state_dict().items())
    shutil.rmtree(tmp_path, ignore_errors=True)


SMALL = [
    "trainer.groups=4",
    "trainer.group_size=4",
    "trainer.minibatches=1",
    "env.text_budget=4",
    "env.image_steps=6",
    "env.reward=some_nan",
]


def gradients(model, folder, *overrides):
    trainer = Trainer(load_config("unigrpo", [*SMALL, f"output.folder={folder}", *overrides]), model)
    metrics = trainer.iterate()
    return metrics, torch.cat([p.grad.flatten() for group in trainer.experts.values() for p in group if p.grad is not None])


def halves(episodes):
    """A reward that is the same for all in every other group, NaN for some, and differs in the rest."""
    red = episodes.images[:, 0].mean((1, 2))
    group = torch.arange(len(episodes)) // 4
    return torch.where(group % 2 == 0, 0.5, red).masked_fill(torch.arange(len(episodes)) % 7 == 3, torch.nan)


@pytest.mark.parametrize(
    "choice",
    [
        ["algorithm.text_aggregation=token"],
        ["algorithm.text_kl_weight=0.1", "algorithm.velocity_weight=1.0", "algorithm.latent_kl_weight=0.5"],
        ["algorithm.text_kl_weight=0.1", "algorithm.text_aggregation=token"],
        ["algorithm.image_objective=fpo", "algorithm.kernel=ode"],
        ["trainer.dynamic_sampling=drop"],
    ],
)
def test_micro_batches_do_not_change_other_objectives(small_bagel, tmp_path, choice):
    """With a reference that is not the policy, so that every penalty pulls; with groups that have no signal and episodes without a score."""
    if "halves" not in REWARDS:
        REWARDS.add("halves", halves)
    small_bagel.save_pretrained(tmp_path / "start")
    found = []
    for parts in (1, 4):
        settings = [*SMALL, "env.reward=halves", f"output.folder={tmp_path}", f"trainer.micro_batches={parts}", *choice]
        trainer = Trainer(load_config("unigrpo", settings), type(small_bagel).from_pretrained(tmp_path / "start"))
        if trainer.reference is not None:
            with torch.no_grad():
                for parameter in trainer.reference.parameters():
                    parameter.mul_(1.1)
        metrics = trainer.iterate()
        found.append((metrics, torch.cat([p.grad.flatten() for group in trainer.experts.values() for p in group if p.grad is not None])))
    torch.testing.assert_close(found[0][1], found[1][1], atol=2e-5, rtol=2e-3)
    for name in ("loss_text", "loss_image", "loss_velocity", "loss_kl", "entropy", "text_clip_fraction"):
        assert found[0][0][name] == pytest.approx(found[1][0][name], rel=1e-3, abs=1e-6), name
    assert found[0][0]["signal"] == 0.5
    if "algorithm.text_kl_weight=0.1" in choice:
        assert found[0][0]["loss_kl"] > 0


def test_an_update_in_which_nothing_counts_changes_nothing(tmp_path):
    REWARDS._entries.setdefault("same", lambda episodes: [0.5] * len(episodes))
    trainer = toy_trainer(tmp_path, "trainer.dynamic_sampling=drop", "trainer.minibatches=1")
    trainer.iterate()
    before = weights_of(trainer)
    trainer.env.episodes.reward = WeightedReward("same")
    metrics = trainer.iterate()
    assert metrics["signal"] == 0
    assert math.isnan(metrics["loss_text"])
    assert all(torch.equal(value, before[name]) for name, value in weights_of(trainer).items())


def test_tokens_alike_is_not_episodes_alike(small_bagel, tmp_path):
    small_bagel.save_pretrained(tmp_path / "start")
    found = [
        gradients(type(small_bagel).from_pretrained(tmp_path / "start"), tmp_path, f"algorithm.text_aggregation={how}")[1]
        for how in ("sequence", "token")
    ]
    assert not torch.allclose(found[0], found[1], rtol=1e-2)


def test_groups_without_signal_are_dropped_or_replaced(tmp_path):
    """A reward that only the prompts `dark` can win."""
    if "only_dark" not in REWARDS:
        REWARDS.add(
            "only_dark",
            lambda e: [float(text.split()[-1:] == ["dark"]) if p == "dark" else 0.0 for p, text in zip(e.prompts, e.texts, strict=True)],
        )
    found = {}
    for how in ("keep", "drop", "replace"):
        trainer = toy_trainer(tmp_path / how, "env.reward=only_dark", f"trainer.dynamic_sampling={how}", "trainer.max_collects=6")
        episodes, metrics = trainer._gather(0)
        found[how] = episodes, metrics, trainer.score.prompts
    reward = found["keep"][0]["reward"]
    differ = reward.amax(1) > reward.amin(1)
    assert 0 < found["keep"][1]["signal"] == differ.float().mean() <= 0.5
    assert found["keep"][0]["counts"].all()
    assert torch.equal(found["drop"][0]["counts"], differ[:, None].expand(8, 8))
    episodes, _, prompts = found["replace"]
    assert {p.text for p in prompts} == {"dark"}
    assert (episodes["reward"].amax(1) > episodes["reward"].amin(1)).all()
    assert torch.equal(episodes["group"], torch.arange(8)[:, None].expand(8, 8))
    words = trainer.variant.tokenizer.convert_ids_to_tokens(episodes["prompt_tokens"][:, 0, 1].tolist())
    assert words == [p.text for p in prompts]


def test_several_passes_keep_the_old_log_probs(tmp_path):
    """A second pass over the same episodes has ratios off 1, and its clip fraction shows it."""
    once, twice = (
        toy_trainer(tmp_path / str(epochs), f"trainer.epochs={epochs}", "algorithm.text_clip=0.001", "optimizer.warmup=1").iterate()
        for epochs in (1, 2)
    )
    assert once["text_clip_fraction"] == 0 < twice["text_clip_fraction"]
    assert twice["text_log_ratio"] < 1e-4, "shown before the first update"


def test_refl_without_a_gradient_says_so(small_bagel, tmp_path):
    with pytest.raises(ValueError, match="expected a differentiable reward for refl, got 'shapes_score'"):
        gradients(
            small_bagel,
            tmp_path,
            "algorithm.image_objective=refl",
            "algorithm.kernel=ode",
            "algorithm.window_size=1",
            "algorithm.refl_reward=shapes_score",
        )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.kernel=ode", "stochastic algorithm.kernel"),
        ("algorithm.kernel=sde", "'flow_sde', 'flow_cps', 'dance', 'ode'"),
        ("algorithm.image_objective=ppo", "'flow_grpo', 'fpo', 'refl'"),
        ("algorithm.text_clip_high=-2", "text_clip_high > 0"),
        ("guidance.renorm=all", "'none', 'global'"),
        ("trainer.dynamic_sampling=refill", "'keep', 'drop', 'replace'"),
    ],
)
def test_choices_that_are_not_there(override, message):
    with pytest.raises(ValueError, match=message):
        load_config("unigrpo", [override])


def test_refl_does_not_train_on_what_it_cannot_score(tmp_path):
    REWARDS._entries.setdefault(
        "grey_or_nan", lambda e: torch.where(torch.arange(len(e)) % 4 == 0, torch.nan, 1) * e.images.mean((1, 2, 3))
    )
    refl = ["algorithm.refl_reward=grey_or_nan", "env.text_budget=0"]
    with pytest.raises(UnscoredError, match="16 of 64 pictures could not be scored by refl's reward 'grey_or_nan'"):
        toy_trainer(tmp_path, *refl, "trainer.max_unscored=0.1", config="refl").iterate()


@pytest.mark.parametrize(
    ("config", "override", "message"),
    [
        ("fpo", "algorithm.latent_kl_weight=0.1", "no stochastic steps"),
        ("flow_cps", "algorithm.noise_level=2", r"\(0, 1\] for flow_cps"),
    ],
)
def test_choices_that_do_not_go_together(config, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(config, [override])


def test_guidance_in_training_has_ratio_one_before_the_first_update(small_bagel, tmp_path):
    metrics, _ = gradients(small_bagel, tmp_path, "guidance.train=3.0")
    assert metrics["image_log_ratio"] < 1e-6
    assert metrics["image_grad_norm"] > 0


@pytest.mark.parametrize("kernel", ["flow_cps", "dance"])
def test_every_kernel_has_ratio_one_before_the_first_update(small_bagel, tmp_path, kernel):
    metrics, _ = gradients(
        small_bagel, tmp_path, f"algorithm.kernel={kernel}", "algorithm.noise_level=0.6", "algorithm.latent_kl_weight=0.1"
    )
    assert metrics["image_log_ratio"] < 1e-6
    assert metrics["image_clip_fraction"] == 0
    assert metrics["loss_kl"] == pytest.approx(0, abs=1e-9), "the policy is still the reference"
