"""One episode of the shapes world, played word by word and image by image."""

import pytest
import torch

from rewards.shapes.grid import draw
from unigrpo_env.env import InterleavedGenEnv
from unigrpo_env.tasks.shapes.vocabulary import shapes_tokenizer
from unigrpo_env.tasks.task import Prompt

IDS = shapes_tokenizer().get_vocab()


class Player:
    """Acts in a single env of the shapes world."""

    def __init__(self, variant, prompt=None, **arguments):
        self.env = InterleavedGenEnv(variant, **arguments)
        self.reset(prompt)

    def reset(self, prompt=None, seed=0):
        if isinstance(prompt, str):
            prompt = Prompt(prompt)
        options = {} if prompt is None else {"prompt": prompt}
        self.observation, self.info = self.env.reset(seed=seed, options=options)
        self.reward = 0.0
        self.ended = False

    def write(self, text):
        """Write words one by one; returns the info of the last step."""
        for word in text.split():
            self.step(IDS[word], self.observation["latent"])
        return self.info

    def paint(self, layout):
        """Draw this very layout: in one jump, then standing still."""
        image = draw(torch.tensor([layout]))
        latent = self.env.episodes.processor.encode_images(image)[0].numpy()
        for _ in range(self.env.episodes.rules.image_steps):
            self.step(0, latent)
        return self.info

    def step(self, token, latent):
        action = {"token": token, "next_latent": latent}
        self.observation, reward, self.ended, _, self.info = self.env.step(action)
        self.reward += reward

    def stream(self):
        """The words of the token stream as it stands."""
        count = int(self.observation["num_tokens"])
        ids = self.observation["tokens"][:count].tolist()
        return " ".join(shapes_tokenizer().convert_ids_to_tokens(ids))

    def may_write(self, word):
        return bool(self.observation["legal_tokens"][IDS[word]])


@pytest.fixture
def play():
    """`play(variant, prompt, **settings)`: a `Player` at the start of an episode."""
    return Player
