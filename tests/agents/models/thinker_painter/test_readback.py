"""The reward `readback` with a thinker that sees, and with one that does not."""

import pytest
import torch
from test_scenarios import joined, thinker_that_sees
from tiny import make_model

from agents.evaluation import readback
from agents.evaluation.readback import Readback
from agents.models.pixels import scale_pixels
from rewards import EpisodeBatch

PROMPTS = ["red", "two red circles and"]


@pytest.fixture
def reads_with(monkeypatch):
    def make(model, **options):
        monkeypatch.setattr(readback, "load_model", lambda name, **settings: model)
        return Readback(**options)

    return make


@torch.no_grad()
def test_words_follow_what_opens_an_answer(reads_with):
    """One whole forward of the thinker gives the same, whatever stands around the prompt."""
    model = joined("sd3", thinker_that_sees())
    reward = reads_with(model)
    reward.prepare()
    processor = model.processor
    images = torch.rand(2, 3, *processor.image_size, generator=torch.Generator().manual_seed(0))
    scores = reward(EpisodeBatch(PROMPTS, ["", ""], images, [{}, {}])).reward
    opening = processor.encode_prompt("", sources=1)
    place = opening.index(processor.image_id)
    for row, prompt in enumerate(PROMPTS):
        words = processor.encode_text(prompt)
        _, context = model.append_text(model.empty_context(1), torch.tensor([opening[:place]]))
        pixels = scale_pixels(processor.view_images(images[row : row + 1]))
        context = model.append_image(context, None, pixels)
        logits, _ = model.append_text(context, torch.tensor([opening[place + 1 :] + words]))
        log_probs = logits[0, -len(words) - 1 : -1].log_softmax(-1)
        expected = log_probs[range(len(words)), words].mean()
        assert float(scores[row]) == pytest.approx(float(expected), abs=1e-5)


def test_a_blind_thinker_beside_a_painter_that_edits_is_refused(reads_with):
    model = make_model("kontext")
    assert model.reads_images
    with pytest.raises(ValueError, match="words depend on the image"):
        reads_with(model).prepare()
