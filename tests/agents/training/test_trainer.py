"""The trainer learns, freezes, splits its updates, and says what is wrong."""

import math

import pytest
import torch

from agents.config.loading import group_options, load_config
from agents.models.registry import load_model
from agents.reporting.metrics import METRICS
from agents.training.trainer import Trainer, derived_seed
from rewards import UnscoredError, WeightedReward
from unigrpo_env.variants.variant import VARIANTS, make_variant

pytestmark = pytest.mark.slow

LEARN = [
    "trainer.iterations=40",
    "trainer.groups=8",
    "trainer.group_size=8",
    "trainer.micro_batches=1",
    "model.kind=",
    "model.thinker=",
    "model.painter=",
    "model.tells=null",
    "model.thinking=null",
    "model.dtype=float32",
    "model.height=null",
    "model.width=null",
    "model.lora.text.rank=0",
    "model.lora.image.rank=0",
    "optimizer.beta2=0.99",
    # Four times those of `model=toy`, because there are few iterations.
    "optimizer.text_lr=0.4",
    "optimizer.image_lr=0.12",
    "optimizer.warmup=1",
    "optimizer.decay=0.1",
    "algorithm.text_clip=0.2",
    "env.thought_reward=",
    "env.system_prompt=null",
    "evaluation.prompts=64",
    "evaluation.image_steps=10",
    "env.image_steps=10",
]
LARGER = ["trainer.groups=4", "trainer.group_size=4"]
LOSSES = ("loss_text", "loss_image", "loss_velocity", "loss_kl")


def gradients(trainer):
    """The last gradient of all weights that have one, flat."""
    found = []
    for weights in trainer.optimization.experts.values():
        found += [weight.grad.flatten() for weight in weights if weight.grad is not None]
    return torch.cat(found)


def changed(before, after):
    return any(not torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", group_options("algorithm"))
def test_every_algorithm_learns_the_toy(toy_trainer, name):
    """The optimum is known: write the prompt's word, draw its grey (latents -0.5 and 0.5)."""
    overrides = [f"algorithm={name}", *LEARN]
    if not load_config(overrides[:1]).algorithm.text_weight:
        # Frozen text is random text: here the image follows the prompt alone.
        overrides.append("env.text_budget=0")
    trainer = toy_trainer(*overrides)
    algorithm = trainer.config.algorithm
    before = trainer.evaluate().components
    words = trainer.model.words.detach().clone()
    images = trainer.model.images.detach().clone()
    trainer.train()
    after = trainer.evaluate().components
    if algorithm.text_weight:
        assert after["toy/word"].mean() > 0.9 > before["toy/word"].mean() + 0.3
    else:
        assert torch.equal(words, trainer.model.words)
    if algorithm.image_weight:
        greys = trainer.model.images[3:].mean((1, 2))
        assert ((greys - torch.tensor([-0.5, 0.5])).abs() < 0.2).all()
        assert after["toy/grey"].mean() > before["toy/grey"].mean() + 0.1
    else:
        assert torch.equal(images, trainer.model.images)


def test_metrics_have_their_names(toy_trainer):
    found = toy_trainer().iterate()
    assert list(found) == list(METRICS)
    assert all(math.isfinite(value) for value in found.values())


def test_recomputed_log_probs_are_exact(small_bagel, small_trainer):
    trainer = small_trainer(small_bagel, "algorithm.old_log_prob=recompute")
    assert trainer.recompute
    metrics = trainer.iterate()
    assert metrics["text_log_ratio"] == 0
    assert metrics["image_log_ratio"] == 0


def test_half_precision_recomputes_by_itself(small_bagel, small_trainer):
    overrides = ["model.dtype=bfloat16", "algorithm.text_clip=0.01"]
    trainer = small_trainer(small_bagel, *overrides)
    assert trainer.recompute
    metrics = trainer.iterate()
    projection = small_bagel.language_model.model.layers[0].self_attn.q_proj.weight
    assert projection.dtype == torch.bfloat16
    assert projection.grad is None, "it was handed on to the float32 copy"
    masters = trainer.optimization.masters
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert masters[name].grad.any()
    assert torch.equal(projection, masters[name].bfloat16())
    assert metrics["text_log_ratio"] < 1e-3
    assert metrics["image_log_ratio"] < 1e-5
    assert metrics["image_grad_norm"] > 0


@pytest.mark.parametrize("frozen", ["text", "image"])
def test_frozen_expert_does_not_change(small_bagel, small_trainer, frozen):
    lists = small_bagel.parameters_by_expert()
    before = {}
    for expert, weights in lists.items():
        before[expert] = [weight.detach().clone() for weight in weights]
    small_trainer(small_bagel, f"algorithm.{frozen}_weight=0.0").iterate()
    for expert, weights in lists.items():
        pairs = zip(before[expert], weights, strict=True)
        moved = any(not torch.equal(old, new) for old, new in pairs)
        assert moved == (expert != frozen), expert
    assert all(weight.grad is None for weight in lists[frozen])


MICRO_BATCHES = {"whole": 1, "groups": 4, "halves": 8, "episodes": 16}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choice", "split"),
    [
        ([], "groups"),
        ([], "halves"),
        ([], "episodes"),
        (["algorithm.text_aggregation=token"], "halves"),
        (
            [
                "algorithm.text_kl_weight=0.1",
                "algorithm.velocity_weight=1.0",
                "algorithm.latent_kl_weight=0.5",
            ],
            "halves",
        ),
        (["algorithm.text_kl_weight=0.1", "algorithm.text_aggregation=token"], "episodes"),
        (["algorithm.image_objective=fpo", "algorithm.kernel=ode"], "halves"),
        (["trainer.dynamic_sampling=drop"], "episodes"),
    ],
)
def test_micro_batches_change_no_update(small_bagel, small_trainer, tmp_path, choice, split):
    """With unscored episodes, groups without signal, and a reference that is not the policy."""
    small_bagel.save_pretrained(tmp_path / "start")
    found = []
    for parts in (1, MICRO_BATCHES[split]):
        overrides = [*LARGER, "env.reward=halves", f"trainer.micro_batches={parts}", *choice]
        trainer = small_trainer(load_model(str(tmp_path / "start")), *overrides)
        with torch.no_grad():
            for weight in trainer.reference.parameters():
                weight.mul_(1.1)
        metrics = trainer.iterate()
        found.append((metrics, gradients(trainer)))
    (whole, gradient), (split_up, other) = found
    torch.testing.assert_close(gradient, other, atol=2e-5, rtol=2e-3)
    for name in (*LOSSES, "entropy", "text_clip_fraction", "text_grad_norm", "image_grad_norm"):
        assert whole[name] == pytest.approx(split_up[name], rel=1e-3, abs=1e-6), name
    assert whole["frac_groups_with_signal"] == 0.5
    assert whole["unscored"] > 0
    if "algorithm.text_kl_weight=0.1" in choice:
        assert whole["loss_kl"] > 0


@pytest.mark.parametrize("parts", [1, 2, 16])
def test_refl_scores_parts_of_groups(toy_trainer, rewards, parts):
    """The share without a score is that of the update, although some parts have no score at all."""

    def grey_or_nan(episodes):
        dark = torch.tensor([prompt == "dark" for prompt in episodes.prompts])
        return torch.where(dark, math.nan, 1) * episodes.images.mean((1, 2, 3))

    rewards.add("grey_or_nan", grey_or_nan)
    overrides = ["algorithm.refl_reward=grey_or_nan", "env.text_budget=0"]
    overrides += ["trainer.max_unscored=0.8", f"trainer.micro_batches={parts}"]
    trainer = toy_trainer("algorithm=refl", *overrides)
    metrics = trainer.iterate()
    found = gradients(trainer)
    whole = toy_trainer("algorithm=refl", *overrides, "trainer.micro_batches=1")
    expected = whole.iterate()
    assert expected["loss_image"] < 0
    assert metrics["loss_image"] == pytest.approx(expected["loss_image"], rel=1e-5)
    torch.testing.assert_close(found, gradients(whole), rtol=1e-4, atol=1e-8)


def test_images_alone_learn_in_parts_without_an_image(toy_trainer):
    """A part of one episode that drew nothing has no gradient, and is no error."""
    overrides = ["algorithm=flow_grpo", "trainer.micro_batches=64"]
    trainer = toy_trainer(*overrides, "algorithm.velocity_weight=0.0")
    trainer.loss._image_loss = lambda episodes, policy: (
        torch.zeros(len(episodes)),
        torch.zeros(episodes.step_mask.flatten(1).shape),
    )
    assert trainer.iterate()["image_grad_norm"] == 0


def test_half_precision_sums_micro_batches_in_float32(small_bagel, small_trainer, tmp_path):
    small_bagel.save_pretrained(tmp_path / "start")
    found = []
    for parts in (1, 16):
        overrides = [*LARGER, "model.dtype=bfloat16", f"trainer.micro_batches={parts}"]
        trainer = small_trainer(load_model(str(tmp_path / "start")), *overrides)
        trainer.iterate()
        found.append(gradients(trainer))
        assert found[-1].dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(found[0], found[1], dim=0)
    assert cosine > 0.98


def test_long_episodes_weigh_more_by_token(small_bagel, small_trainer, tmp_path):
    small_bagel.save_pretrained(tmp_path / "start")
    found = []
    for how in ("sequence", "token"):
        model = load_model(str(tmp_path / "start"))
        trainer = small_trainer(model, f"algorithm.text_aggregation={how}")
        trainer.iterate()
        found.append(gradients(trainer))
    assert not torch.allclose(found[0], found[1], rtol=1e-2)


def test_gradient_that_is_not_finite(toy_trainer, weights_of):
    trainer = toy_trainer()
    trainer.iterate()
    before = weights_of(trainer)
    trainer.loss.log_ratio = lambda sample, mean, old, std: mean.mean((-2, -1)) * math.nan
    with pytest.raises(FloatingPointError, match="in iteration 2; the weights are as before"):
        trainer.iterate()
    assert not changed(before, weights_of(trainer))
    assert trainer.iteration == 1


def test_reference_is_the_model_at_the_start(toy_trainer, weights_of):
    trainer = toy_trainer("trainer.iterations=2")
    before = weights_of(trainer)
    trainer.train()
    assert changed(before, weights_of(trainer))
    for name, value in trainer.reference.state_dict().items():
        assert torch.equal(value, before[name]), name


LORA = ["model.lora.text.rank=2", "model.lora.image.rank=2"]


def test_adapters_learn_and_the_model_under_them_is_the_reference(
    small_bagel, small_trainer, weights_of
):
    overrides = [*LORA, "trainer.micro_batches=8", "model.checkpointing=true"]
    trainer = small_trainer(small_bagel, *overrides, "trainer.minibatches=1")
    assert trainer.model.checkpointing
    before = weights_of(trainer)
    first = trainer.iterate()
    assert first["loss_velocity"] == pytest.approx(0, abs=1e-12)
    assert trainer.iterate()["loss_velocity"] > 0, "the policy has moved, the reference has not"
    moved = {name for name, value in weights_of(trainer).items() if changed(before, {name: value})}
    assert moved
    assert all("lora" in name for name in moved)
    for name, weight in small_bagel.named_parameters():
        assert "lora" in name or weight.grad is None, name


def test_evaluation_may_use_the_averaged_weights(small_bagel, small_trainer, weights_of):
    overrides = ["optimizer.ema=0.9", "optimizer.image_lr=0.05"]
    trainer = small_trainer(small_bagel, *overrides)
    trainer.iterate()
    now = trainer.evaluate()
    weights = weights_of(trainer)
    trainer.config.evaluation.ema = True
    averaged = trainer.evaluate()
    assert not changed(weights, weights_of(trainer)), "training goes on with its own weights"
    assert not torch.equal(now.reward, averaged.reward)
    trainer.model.load_state_dict(trainer.optimization.average.averages, strict=False)
    trainer.config.evaluation.ema = False
    assert torch.equal(trainer.evaluate().reward, averaged.reward)


def test_no_penalty_needs_no_reference(toy_trainer):
    assert toy_trainer("algorithm.velocity_weight=0.0").reference is None


def test_unscored_episodes_are_left_out(toy_trainer):
    metrics = toy_trainer("env.reward=some_nan").iterate()
    assert metrics["unscored"] == 1 / 8
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize(
    "overrides",
    [
        ["env.reward=all_nan", "trainer.max_unscored=1.0"],
        ["env.reward=some_nan", "trainer.max_unscored=0.1"],
    ],
)
def test_too_many_unscored_episodes(toy_trainer, weights_of, overrides):
    trainer = toy_trainer(*overrides)
    before = weights_of(trainer)
    with pytest.raises(UnscoredError, match="could not be scored"):
        trainer.iterate()
    assert not changed(before, weights_of(trainer))


def test_equal_rewards_train_nothing(toy_trainer, weights_of):
    trainer = toy_trainer("env.reward=constant", "algorithm.velocity_weight=0.0")
    before = weights_of(trainer)
    assert trainer.iterate()["frac_groups_with_signal"] == 0
    assert not changed(before, weights_of(trainer))


def test_update_without_an_episode_is_left_out(toy_trainer, weights_of):
    """A step would follow Adam's momentum alone."""
    trainer = toy_trainer("trainer.dynamic_sampling=drop")
    trainer.iterate()
    before = weights_of(trainer)
    trainer.env.episodes.scorer.final = WeightedReward("constant")
    metrics = trainer.iterate()
    assert metrics["frac_groups_with_signal"] == 0
    assert math.isnan(metrics["loss_text"])
    assert not changed(before, weights_of(trainer))


def only_dark(episodes):
    """Only the prompts `dark` can win."""
    found = []
    for prompt, text in zip(episodes.prompts, episodes.texts, strict=True):
        found.append(float(prompt == "dark" and text.split()[-1:] == ["dark"]))
    return found


def have_signal(episodes):
    return episodes.reward.amax(1) > episodes.reward.amin(1)


@pytest.mark.parametrize("how", ["keep", "drop"])
def test_groups_without_signal_may_be_dropped(toy_trainer, rewards, how):
    rewards.add("only_dark", only_dark)
    trainer = toy_trainer("env.reward=only_dark", f"trainer.dynamic_sampling={how}")
    episodes, metrics = trainer._collect(0)
    signal = have_signal(episodes)
    assert 0 < metrics["frac_groups_with_signal"] == signal.float().mean() <= 0.5
    expected = signal[:, None].expand(8, 8)
    if how == "keep":
        expected = torch.ones_like(expected)
    assert torch.equal(episodes.is_scored, expected)


def test_groups_without_signal_may_be_replaced(toy_trainer, rewards):
    rewards.add("only_dark", only_dark)
    overrides = ["trainer.dynamic_sampling=replace", "trainer.max_collects=6"]
    trainer = toy_trainer("env.reward=only_dark", *overrides)
    episodes, _ = trainer._collect(0)
    assert have_signal(episodes).all()
    assert {prompt.text for prompt in trainer.score.prompts} == {"dark"}
    assert torch.equal(episodes.group, torch.arange(8)[:, None].expand(8, 8))
    tokens = episodes.prompt_tokens[:, 0]
    for row, prompt in zip(tokens.tolist(), trainer.score.prompts, strict=True):
        assert trainer.variant.processor.decode_text(row) == prompt.text


def test_later_epochs_keep_the_old_log_probs(toy_trainer):
    """A second pass over the same episodes has ratios off 1, and its clip fraction shows it."""
    overrides = ["algorithm.text_clip=0.001", "optimizer.warmup=1"]
    once = toy_trainer("trainer.epochs=1", *overrides).iterate()
    twice = toy_trainer("trainer.epochs=2", *overrides).iterate()
    assert once["text_clip_fraction"] == 0 < twice["text_clip_fraction"]
    assert twice["text_log_ratio"] < 1e-4, "it is that before the first update"


def test_guided_rollouts_have_ratio_one(small_bagel, small_trainer):
    metrics = small_trainer(small_bagel, "guidance.train=3.0").iterate()
    assert metrics["image_log_ratio"] < 1e-6
    assert metrics["image_grad_norm"] > 0


@pytest.mark.parametrize("kernel", ["flow_cps", "dance"])
def test_every_kernel_has_ratio_one(small_bagel, small_trainer, kernel):
    overrides = [f"algorithm.kernel={kernel}", "algorithm.noise_level=0.6"]
    metrics = small_trainer(small_bagel, *overrides, "algorithm.latent_kl_weight=0.1").iterate()
    assert metrics["image_log_ratio"] < 1e-6
    assert metrics["image_clip_fraction"] == 0
    assert metrics["loss_kl"] == pytest.approx(0, abs=1e-9), "the policy is still the reference"


def test_refl_needs_scores(toy_trainer, rewards):
    def grey_or_nan(episodes):
        row = torch.arange(len(episodes))
        return torch.where(row % 4 == 0, math.nan, 1) * episodes.images.mean((1, 2, 3))

    rewards.add("grey_or_nan", grey_or_nan)
    overrides = ["algorithm.refl_reward=grey_or_nan", "env.text_budget=0"]
    trainer = toy_trainer("algorithm=refl", *overrides, "trainer.max_unscored=0.1")
    with pytest.raises(UnscoredError, match="16 of 64 images could not be scored by refl's rewa"):
        trainer.iterate()


@pytest.fixture
def variants(short_variant):
    """Register variants of text alone, of text after the image, and of 0 to 2 sources."""
    kept = dict(VARIANTS._entries)
    for name in ("text_alone", "last_text", "mixed_sources"):
        VARIANTS.add(name, lambda name=name, **settings: short_variant(name, **settings))
    yield
    VARIANTS._entries = kept


@pytest.mark.parametrize("name", ["text_alone", "last_text", "mixed_sources"])
@pytest.mark.parametrize("advantage", ["episode", "reward_to_go"])
def test_further_scenarios_train(
    small_bagel, small_trainer, weights_of, variants, short_variant, name, advantage
):
    reward = short_variant("text_to_image").reward
    overrides = [f"env.variant={name}", f"algorithm.advantage={advantage}", "env.reward="]
    trainer = small_trainer(small_bagel, *overrides, "trainer.groups=3")
    trainer.env.episodes.scorer.final = WeightedReward(reward)
    before = weights_of(trainer)
    metrics = trainer.iterate()
    assert metrics["text_log_ratio"] < 1e-3
    assert metrics["image_log_ratio"] < 1e-6
    assert metrics["text_grad_norm"] > 0
    assert (metrics["image_grad_norm"] > 0) == (name != "text_alone")
    assert changed(before, weights_of(trainer))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reflect", "story"])
def test_reward_to_go_trains_over_rounds(small_bagel, small_trainer, weights_of, name):
    trainer = small_trainer(
        small_bagel,
        f"env={name}",
        "algorithm.advantage=reward_to_go",
        "env.thought_reward=brevity",
        "env.round_reward=crispness",
        "env.reward=extra_images",
    )
    before = weights_of(trainer)
    metrics = trainer.iterate()
    assert metrics["text_clip_fraction"] < 0.1
    assert metrics["image_log_ratio"] < 1e-6
    assert changed(before, weights_of(trainer))


def test_supervised_iteration_draws_no_episode(toy_trainer, weights_of):
    trainer = toy_trainer("algorithm=sft", "trainer.minibatches=2")
    before = weights_of(trainer)
    metrics = trainer.iterate()
    assert metrics["reward"] == 1
    assert metrics["loss_text"] > 0
    assert math.isnan(metrics["unscored"])
    assert changed(before, weights_of(trainer))
    steps = [int(state["step"]) for state in trainer.optimization.optimizer.state.values()]
    assert steps == [2, 2], "one update for each mini-batch"


def test_supervised_without_text(small_bagel, small_trainer):
    overrides = ["algorithm=sft", "env.text_budget=0", "env.reward=shapes"]
    metrics = small_trainer(small_bagel, *overrides).iterate()
    assert metrics["loss_text"] == 0
    assert metrics["loss_image"] > 0
    assert metrics["text_grad_norm"] > 0, "the image follows the prompt"


def test_own_seed_for_every_iteration():
    found = {derived_seed(seed, iteration) for seed in range(10) for iteration in range(10)}
    assert len(found) == 100
    assert all(0 <= seed < 2**31 for seed in found)


def test_same_seed_is_the_same_run(toy_trainer, weights_of):
    runs = []
    for seed in (0, 0, 1):
        trainer = toy_trainer("trainer.iterations=2", f"trainer.seed={seed}")
        trainer.train()
        runs.append(weights_of(trainer))
    assert not changed(runs[0], runs[1])
    assert changed(runs[0], runs[2])


def test_after_iteration_gets_the_metrics(toy_trainer):
    trainer = toy_trainer("trainer.iterations=2")
    seen = []
    trainer.train(lambda metrics: seen.append((trainer.iteration, metrics["reward"])))
    assert [iteration for iteration, _ in seen] == [1, 2]


def test_evaluation_has_its_own_settings(small_bagel, small_trainer):
    trainer = small_trainer(small_bagel, "evaluation.reward=brevity", "evaluation.image_steps=2")
    found = trainer.evaluate(prompts=3)
    expected = make_variant("text_to_image").task.prompts("test", 4, 1_000_000)
    assert found.prompts == expected[:3]
    assert set(found.components) == {"brevity"}
    again = trainer.evaluate(prompts=3)
    other = trainer.evaluate(prompts=3, attempt=1)
    assert found.thoughts == again.thoughts != other.thoughts
    greedy = [trainer.evaluate(greedy=True, attempt=attempt).texts for attempt in (0, 1)]
    assert greedy[0] == greedy[1]


def test_own_model_in_place_of_the_named_one(small_bagel, small_trainer):
    trainer = small_trainer(small_bagel, "model.name=toy")
    assert trainer.model is small_bagel
    assert isinstance(trainer, Trainer)
