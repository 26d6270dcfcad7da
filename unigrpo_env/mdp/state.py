"""N episodes as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from unigrpo_env.mdp.noise import keyed_noise
from unigrpo_env.mdp.rules import Phase, Role, Rules, lay_out_roles


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt in the tokens and latents of a processor.

    Attributes:
        tokens: everything before the first sampled token; `image_id` stands once for each source.
        sources: `[sources, L, C]` float32, clean latents.
        turns: tokens that the env writes after each image where the user speaks, in order.
        pixels: `[sources, 3, height, width]` uint8, what a vision encoder sees of the sources; None
            without one.
        system_length: how many of `tokens` are the system's; they stand first.
    """

    tokens: list[int]
    sources: Tensor
    turns: list[list[int]]
    pixels: Tensor | None = None
    system_length: int = 0


@dataclass
class EpisodeState:
    """N episodes. All tensors have N rows.

    `legal_tokens`, `latent`, `images` and `pixels` are on the device. All else is a number that
    decides where an episode goes: it stays on the CPU, so that no step waits for the device.

    Attributes:
        phase: `[N]` int64, a `Phase`.
        tokens: `[N, max_tokens]` int64: the prompt, then the stream that follows it, padded.
        roles: `[N, max_tokens]` int64, a `Role`: who wrote each of them.
        num_tokens: `[N]` int64, how many of them count.
        prompt_length: `[N]` int64, how many of those are the prompt.
        sampled: `[N]` int64, tokens that the model chose since the last image, forced ones aside.
        legal_tokens: `[N, vocab_size]` bool; padding alone outside the text phase.
        latent: `[N, L, C]` float32, x_t of the image being drawn, or the last one drawn; 0 before.
        images: `[N, stored_images, L, C]` float32, clean latents: the sources, then what was drawn
            and may be read; see `Rules.stored_shape`.
        pixels: `[N, stored_images, 3, height, width]` uint8, what a vision encoder sees of them; of
            size 0 x 0 without one.
        image_positions: `[N, stored_images]` int64, where in `tokens` each is read; -1: nowhere.
        round_starts: `[N, rounds]` int64, where in `tokens` each round's text begins; -1: not yet.
        turns: `[N, rounds - 1, turn_slots]` int64, what the env writes after each image.
        turn_lengths: `[N, rounds - 1]` int64.
        step: `[N]` int64, denoising steps taken of the image being drawn.
        images_drawn: `[N]` int64.
        seed: `[N]` int64, what the noise of an episode is drawn from.
    """

    phase: Tensor
    tokens: Tensor
    roles: Tensor
    num_tokens: Tensor
    prompt_length: Tensor
    sampled: Tensor
    legal_tokens: Tensor
    latent: Tensor
    images: Tensor
    pixels: Tensor
    image_positions: Tensor
    round_starts: Tensor
    turns: Tensor
    turn_lengths: Tensor
    step: Tensor
    images_drawn: Tensor
    seed: Tensor

    @classmethod
    def empty(cls, rows: int, rules: Rules, device: torch.device | str = "cpu") -> EpisodeState:
        """Rows that have not begun: every phase is DONE.

        Args:
            rows: N.
            rules: what the episodes may do.
            device: of the large tensors.
        """
        rounds = rules.rounds

        def integers(*shape: int, fill: int = 0) -> Tensor:
            """`[rows, *shape]` int64."""
            return torch.full((rows, *shape), fill, dtype=torch.int64)

        stored = rules.stored_images
        pixels = torch.zeros(rows, stored, 3, *rules.pixel_size, dtype=torch.uint8, device=device)
        return cls(
            phase=integers(fill=Phase.DONE),
            tokens=integers(rules.max_tokens, fill=rules.pad_id),
            roles=integers(rules.max_tokens, fill=Role.MODEL),
            num_tokens=integers(),
            prompt_length=integers(),
            sampled=integers(),
            legal_tokens=rules.idle_tokens().to(device).repeat(rows, 1),
            latent=torch.zeros(rows, *rules.latent_shape, device=device),
            images=torch.zeros(rows, stored, *rules.stored_shape, device=device),
            pixels=pixels,
            image_positions=integers(stored, fill=-1),
            round_starts=integers(rounds, fill=-1),
            turns=integers(rounds - 1, rules.turn_slots),
            turn_lengths=integers(rounds - 1),
            step=integers(),
            images_drawn=integers(),
            seed=integers(),
        )

    def copy(self) -> EpisodeState:
        """A copy that shares no tensor with this state."""
        return EpisodeState(
            **{part.name: getattr(self, part.name).clone() for part in fields(self)}
        )

    def restore(self, saved: EpisodeState) -> None:
        """Go back, in place, to what `copy` saved: observations may be views of the tensors."""
        for part in fields(self):
            getattr(self, part.name).copy_(getattr(saved, part.name))

    def begin(
        self,
        rows: Tensor,
        rules: Rules,
        prompts: Sequence[EncodedPrompt],
        seeds: Sequence[int],
    ) -> None:
        """Start the episodes `rows` anew.

        Args:
            rows: int64 indices.
            rules: what they may do.
            prompts: of each.
            seeds: of each episode's noise.
        """
        place = self.on_device(rows)
        for counter in (self.sampled, self.step, self.images_drawn, self.turn_lengths):
            counter[rows] = 0
        # -1: no such place in the stream yet.
        for tensor in (self.round_starts, self.image_positions):
            tensor[rows] = -1
        for tensor in (self.latent, self.images, self.pixels):
            tensor[place] = 0
        self.seed[rows] = torch.tensor(seeds, dtype=torch.int64)
        self._write_prompts(rows, rules, prompts)
        for row, prompt in zip(rows.tolist(), prompts, strict=True):
            self._write_sources(row, rules, prompt)
            self.write_turns(row, prompt.turns)
        # Where a user speaks, turns come with the prompt or from the task's `reply`.
        if rules.turn_budget == 0:
            self._write_continuation(rows, rules)
        self.phase[rows] = Phase.TEXT
        self.legal_tokens[place] = self.on_device(rules.legal_tokens())
        # Without a thought the first action is a denoising step.
        if rules.text_budget == 0:
            self.open_image(rows, rules)

    def _write_prompts(self, rows: Tensor, rules: Rules, prompts: Sequence[EncodedPrompt]) -> None:
        width = self.tokens.shape[1]
        padded = []
        roles = []
        for prompt in prompts:
            rest = width - len(prompt.tokens)
            padded.append([*prompt.tokens, *[rules.pad_id] * rest])
            written = lay_out_roles(len(prompt.tokens), prompt.system_length, rules.opening_length)
            # All that follows is the model's, but for a user's turns.
            roles.append([*written, *[Role.MODEL] * rest])
        # [rows, max_tokens], so that the rest of the last episode is overwritten.
        self.tokens[rows] = torch.tensor(padded)
        self.roles[rows] = torch.tensor(roles)
        # [rows]
        lengths = torch.tensor([len(prompt.tokens) for prompt in prompts])
        self.num_tokens[rows] = lengths
        self.prompt_length[rows] = lengths
        self.round_starts[rows, 0] = lengths

    def _write_sources(self, row: int, rules: Rules, prompt: EncodedPrompt) -> None:
        count = len(prompt.sources)
        if count == 0:
            return
        # The i-th `image_id` of the prompt stands for the i-th source.
        positions = [at for at, token in enumerate(prompt.tokens) if token == rules.image_id]
        self.images[row, :count] = prompt.sources.to(self.images)
        if prompt.pixels is not None:
            self.pixels[row, :count] = prompt.pixels.to(self.pixels)
        self.image_positions[row, :count] = torch.tensor(positions)

    def _write_continuation(self, rows: Tensor, rules: Rules) -> None:
        """Where nobody speaks, the same few tokens follow every image."""
        ids = torch.tensor(rules.continuation_ids, dtype=torch.int64)
        # One row of ids, broadcast to [rows, rounds - 1, len(ids)].
        self.turns[rows, :, : len(ids)] = ids
        self.turn_lengths[rows] = len(ids)

    def write_turns(self, row: int, turns: Sequence[Sequence[int]], first: int = 0) -> None:
        """Set what the env writes after the images of one row.

        Args:
            row: which.
            turns: tokens after image `first`, `first + 1`, ...
            first: the number of the image that the first of them follows.
        """
        for number, turn in enumerate(turns, first):
            ids = torch.tensor(turn, dtype=torch.int64)
            self.turns[row, number, : len(turn)] = ids
            self.turn_lengths[row, number] = len(turn)

    def open_image(self, rows: Tensor, rules: Rules) -> None:
        """Turn `rows` (int64 indices) to the image phase, x_1 drawn from (seed, images drawn)."""
        shape = self.latent.shape[1:]
        # [rows, 2] as lists: every image of an episode has its own noise.
        keys = torch.stack([self.seed[rows], self.images_drawn[rows]], 1).tolist()
        # [rows, L, C], drawn on the CPU: a seed gives the same noise on every device.
        noise = self.on_device(keyed_noise(keys, shape))
        place = self.on_device(rows)
        self.latent.index_copy_(0, place, noise)
        self.legal_tokens[place] = self.on_device(rules.idle_tokens())
        self.phase[rows] = Phase.IMAGE
        self.step[rows] = 0

    def on_device(self, tensor: Tensor) -> Tensor:
        """Something small on the device of the large tensors, without waiting for it."""
        return tensor.to(self.latent.device, non_blocking=True)
