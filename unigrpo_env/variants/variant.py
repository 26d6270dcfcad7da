"""A scenario joined with a processor, a task and a reward; and all of them by name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewards import Reward
from rewards.factory import Options
from rewards.registry import Registry, did_you_mean
from unigrpo_env.mdp.rules import Rules, count_rounds
from unigrpo_env.processor import Processor
from unigrpo_env.tasks.task import Task

RewardSpec = str | Reward | Mapping[Any, float] | Sequence[Any]
"""What `rewards.WeightedReward` takes: a name, a sum, a callable, or weights."""


@dataclass(frozen=True)
class Variant:
    """All that an env needs to know, as data.

    Attributes:
        rules: budgets and special tokens.
        processor: text to tokens, images to latents, and back.
        task: the source of prompts.
        reward: of a finished episode.
        thought_reward: of a thought, paid when it opens its image, before that is drawn; None for
            none.
        round_reward: of an image, paid when it is drawn; None for none. Both see the episode as far
            as it has come.
        lowest_reward: of an episode that ends without an image where one was asked for. No image
            may be worth less, or leaving becomes the exploit.
        system_prompt: a text of its own before every prompt.
        reward_options: of the rewards above, by name; see `rewards.make_reward`.
    """

    rules: Rules
    processor: Processor
    task: Task
    reward: RewardSpec
    thought_reward: RewardSpec | None = None
    round_reward: RewardSpec | None = None
    lowest_reward: float = 0.0
    system_prompt: str = ""
    # A mapping has no hash, and a variant should keep its own.
    reward_options: Options = field(default_factory=dict, hash=False)

    def with_image_steps(self, steps: int | None) -> Variant:
        """The same scenario with another number of denoising steps; None changes nothing."""
        if steps is None:
            return self
        times = self.processor.time_grid(steps, self.rules.time_shift)
        return dataclasses.replace(self, rules=dataclasses.replace(self.rules, times=times))


@dataclass(frozen=True)
class Scenario:
    """What an episode may do; nothing in it depends on a tokenizer or on pixels.

    Attributes:
        prompt_budget: tokens of the prompt with its marks, at most.
        text_budget: tokens of a thought, at most; 0 for none.
        image_steps: denoising steps of an image.
        time_shift: shift of the grid of flow times; None for the processor's own.
        times: the grid itself, from 1 to 0, in place of `image_steps` and `time_shift`.
        image_budget: images that an episode may draw; 0 for text alone.
        source_images: images that may come with the prompt, at most.
        min_source_images: and at least.
        turn_budget: tokens of a user's turn after an image; 0: no user speaks.
        text_after_images: whether the model writes once more after its last image.
        may_end: whether the model may end the episode by its processor's `end_id`.
        end_before_image: whether it may do so before the first image.
        lowest_reward: of an episode that ends without an image.
        system_prompt: a text of its own before every prompt; None for the processor's own.
    """

    prompt_budget: int = 16
    text_budget: int = 24
    image_steps: int = 10
    time_shift: float | None = None
    times: tuple[float, ...] | None = None
    image_budget: int = 1
    source_images: int = 0
    min_source_images: int = 0
    turn_budget: int = 0
    text_after_images: bool = False
    may_end: bool = False
    end_before_image: bool = False
    lowest_reward: float = 0.0
    system_prompt: str | None = None

    def rules(self, processor: Processor) -> Rules:
        """The same in a processor's tokens and latents.

        Args:
            processor: of the backbone that is to play it.

        Raises:
            ValueError: the processor lacks what this scenario needs.
        """
        thinks = self.text_budget > 0
        # Text that follows a drawn image reads it.
        rounds = count_rounds(self.image_budget, self.text_after_images)
        reads_images = self.source_images > 0 or rounds > 1
        self._check_processor(processor, reads_images)
        forbidden = set(processor.forbidden_ids(reads_images))
        # Where the model may not end the episode, its end token is never sampled. A processor may
        # have one token to end and to open an image, and that one must stay legal.
        end_id = None
        if self.may_end:
            end_id = processor.end_id
            forbidden.discard(end_id)
        elif processor.end_id is not None and processor.end_id != processor.open_image_id:
            forbidden.add(processor.end_id)
        times = self.times
        if times is None:
            times = processor.time_grid(self.image_steps, self.time_shift)
        time_shift = self.time_shift
        if time_shift is None:
            time_shift = processor.time_shift
        return Rules(
            vocab_size=processor.vocab_size,
            prompt_budget=self.prompt_budget,
            text_budget=self.text_budget,
            times=tuple(times),
            latent_shape=processor.latent_shape,
            open_image_id=processor.open_image_id,
            time_shift=time_shift,
            image_budget=self.image_budget,
            source_images=self.source_images,
            min_source_images=self.min_source_images,
            image_id=processor.image_id,
            continuation_ids=processor.continuation_ids(thinks),
            turn_budget=self.turn_budget,
            text_after_images=self.text_after_images,
            end_id=end_id,
            end_before_image=self.end_before_image,
            forbidden_ids=tuple(sorted(forbidden)),
            pad_id=processor.pad_id,
            opening_length=processor.opening_length(thinks),
            pixel_size=processor.pixel_size or (0, 0),
        )

    def _check_processor(self, processor: Processor, reads_images: bool) -> None:
        """Say at once, and by name, what a processor does not have."""
        kind = type(processor)
        # The methods of `Processor` itself only raise NotImplementedError.
        missing = ""
        if reads_images and processor.image_id is None:
            missing = "an image_id, the token that stands for an image to be read"
        elif self.source_images and kind.encode_images is Processor.encode_images:
            missing = "encode_images, to read source images"
        elif self.turn_budget and kind.encode_turn is Processor.encode_turn:
            missing = "encode_turn, to lay out what the user says"
        elif self.may_end and processor.end_id is None:
            missing = "an end_id, the token by which the model ends an episode"
        if missing:
            raise ValueError(
                f"expected a processor with {missing}, got {kind.__name__} without one; "
                "give it one, or choose a scenario that does not need it"
            )

    def variant(self, processor: Processor, task: Task, reward: RewardSpec) -> Variant:
        """This scenario played by a backbone.

        Args:
            processor: of the backbone.
            task: the source of prompts.
            reward: of a finished episode.
        """
        system_prompt = self.system_prompt
        if system_prompt is None:
            system_prompt = processor.system_prompt(
                thinks=self.text_budget > 0, draws=self.image_budget > 0
            )
        return Variant(
            self.rules(processor),
            processor,
            task,
            reward,
            lowest_reward=self.lowest_reward,
            system_prompt=system_prompt,
        )


VariantMaker = Callable[..., Variant]
"""`maker(processor=None, task=None, **settings)`: a variant, by default of the shapes world."""

VARIANTS: Registry[VariantMaker] = Registry("variant", entry_point_group="unigrpo.variants")
# By path, because these modules import this one.
for _name in ("text_to_image", "edit", "reflect", "story", "dialogue"):
    VARIANTS.add(_name, f"unigrpo_env.variants.scenarios:{_name}")
VARIANTS.add("toy", "unigrpo_env.variants.toy:toy")


def register_variant(name: str) -> Callable[[VariantMaker], VariantMaker]:
    """Decorator that makes a function which returns a `Variant` known as `name`."""

    def _register(maker: VariantMaker) -> VariantMaker:
        VARIANTS.add(name, maker)
        return maker

    return _register


def make_variant(
    variant: str | Variant,
    *,
    processor: Processor | None = None,
    task: Task | None = None,
    reward: RewardSpec | None = None,
    thought_reward: RewardSpec | None = None,
    round_reward: RewardSpec | None = None,
    reward_options: Options | None = None,
    **settings: Any,
) -> Variant:
    """A variant by name, or as given, with other parts where some are named.

    Args:
        variant: a registered name, or a finished `Variant`.
        processor: of the backbone that plays it; the shapes world's if left out.
        task: the source of prompts; the scenario's own if left out.
        reward: of a finished episode; likewise.
        thought_reward: of a thought, before its image is drawn; likewise.
        round_reward: of an image when it is drawn; likewise.
        reward_options: of these rewards by their names, such as
            `{"pickscore": {"device": "cuda:1"}}`.
        settings: what else the variant's maker takes, such as `text_budget` or `image_steps`.

    Raises:
        ValueError: an unknown name, or a processor without what the scenario needs.
        TypeError: settings that its maker does not know, or any beside a finished `Variant`.
    """
    changes: dict[str, Any] = {
        "task": task,
        "reward": reward,
        "thought_reward": thought_reward,
        "round_reward": round_reward,
        "reward_options": reward_options,
    }
    if isinstance(variant, str):
        parts = {"processor": processor, "task": task, "reward": reward}
        given = {name: part for name, part in parts.items() if part is not None}
        made = _call_maker(variant, {**given, **settings})
    else:
        made = variant
        if processor is not None or settings:
            # Its rules were made for its own processor, so neither can be changed alone.
            extra = list(settings)
            if processor is not None:
                extra.append("processor")
            raise TypeError(
                f"got {sorted(extra)} beside a finished Variant; "
                "change the Variant itself with dataclasses.replace"
            )
    found = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(made, **found)


def _call_maker(name: str, arguments: dict[str, Any]) -> Variant:
    """Call a registered maker with those of `arguments` that it takes.

    A maker that takes no processor brings its own.

    Raises:
        TypeError: a setting that the maker does not know, with the closest names.
    """
    maker = VARIANTS[name]
    parameters = inspect.signature(maker).parameters
    known = set()
    for parameter in parameters.values():
        # A maker hands its `**settings` on to `Scenario`.
        if parameter.kind is parameter.VAR_KEYWORD:
            known |= {field.name for field in dataclasses.fields(Scenario)}
        else:
            known.add(parameter.name)
    # `make_variant` puts a task or reward in place afterwards, whether the maker takes it or not.
    for part in ("processor", "task", "reward"):
        if part not in known:
            arguments.pop(part, None)
    for setting in arguments:
        if setting not in known:
            settings = sorted(known - {"processor", "task", "reward"})
            raise TypeError(
                f"the variant {name!r} has no setting {setting!r}; "
                f"{did_you_mean(setting, settings)}"
            )
    return maker(**arguments)
