"""A thinker that is read through the contexts says what the bare model says."""

import pytest
import torch
import transformers

from agents.models.thinker_painter.cache import empty_cache, grown_from
from agents.models.thinker_painter.thinker import Thinker

LENGTHS = (9, 4, 12, 4)
"""Tokens of each row; rows 1 and 3 begin with the same prompt."""
PROMPTS = (5, 3, 7, 3)
VOCABULARY = 64
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def qwen3():
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=8))


def mistral():
    """All its layers have a window."""
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=4))


def gemma2():
    """Every other layer has a window, shorter than the texts; logits are capped."""
    config = transformers.Gemma2Config(
        **SIZES, head_dim=8, sliding_window=4, final_logit_softcapping=0.1
    )
    return transformers.Gemma2ForCausalLM(config)


def qwen25vl():
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e4}
    config = transformers.Qwen2_5_VLConfig(
        text_config=SIZES | {"rope_parameters": rope},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
        },
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


FAMILIES = (llama, qwen3, mistral, gemma2, qwen25vl)


def made(family):
    torch.manual_seed(0)
    model = family().eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            # Large enough that each position counts.
            weight.data.mul_(8)
    return model


class Reader:
    """Ragged rows that are read piece by piece."""

    def __init__(self, thinker, rows, checkpointing=False):
        self.thinker = thinker
        self.checkpointing = checkpointing
        self.cache = empty_cache()
        self.valid = torch.zeros(rows, 0, dtype=torch.bool)

    def read(self, ids, mask):
        """Logits `[N, T, V]`."""
        before = self.valid.sum(1, keepdim=True)
        positions = before + mask.cumsum(1) - mask.long()
        self.valid = torch.cat([self.valid, mask], 1)
        if torch.is_grad_enabled():
            self.cache = grown_from(
                self.cache, self.cache.get_seq_length(), repeatable=self.checkpointing
            )
        states = self.thinker.states(
            ids, self.valid, positions, self.cache, checkpointing=self.checkpointing
        )
        return self.thinker.logits(states)

    def take(self, rows):
        """Go on with these rows."""
        self.cache = grown_from(self.cache, self.cache.get_seq_length(), rows)
        self.valid = self.valid[rows]


def texts():
    """Ids `[12]` of each row."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 60, (len(LENGTHS), max(LENGTHS)), generator=generator)
    ids[3, : PROMPTS[3]] = ids[1, : PROMPTS[1]]
    return ids


def piece(ids, start, stop):
    """Tokens `[N, T]` of each row from `start` to `stop`, padded, and their mask."""
    lengths = [last - first for first, last in zip(start, stop, strict=True)]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    found = torch.full(mask.shape, 7)
    for row, (first, last) in enumerate(zip(start, stop, strict=True)):
        found[row, : last - first] = ids[row, first:last]
    return found, mask


def bare_logits(model, ids):
    """Of each row alone, `[length, V]`."""
    return [
        model(input_ids=ids[row, None, :length]).logits[0] for row, length in enumerate(LENGTHS)
    ]


def assert_same(logits, mask, expected, start):
    for row, whole in enumerate(expected):
        count = int(mask[row].sum())
        torch.testing.assert_close(
            logits[row][mask[row]],
            whole[start[row] : start[row] + count],
            atol=1e-5,
            rtol=0,
        )


@pytest.mark.parametrize("mode", ["without_gradient", "with_gradient", "checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_thought_are_the_bare_models(family, mode):
    """Prompts that are read once for two rows, then ragged thoughts at once."""
    model = made(family)
    ids = texts()
    nothing = [0] * len(LENGTHS)
    with torch.set_grad_enabled(mode != "without_gradient"):
        expected = bare_logits(model, ids)
        reader = Reader(Thinker(model), 3, mode == "checkpointing")
        prompt, mask = piece(ids[:3], nothing[:3], PROMPTS[:3])
        assert_same(reader.read(prompt, mask), mask, expected[:3], nothing)
        reader.take(torch.tensor([0, 1, 2, 1]))
        thought, mask = piece(ids, PROMPTS, LENGTHS)
        assert_same(reader.read(thought, mask), mask, expected, PROMPTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_thoughts_token_by_token(family):
    """Rows that have ended read padding while others go on."""
    model = made(family)
    ids = texts()
    with torch.no_grad():
        expected = bare_logits(model, ids)
        reader = Reader(Thinker(model), len(LENGTHS))
        reader.read(*piece(ids, [0] * len(LENGTHS), PROMPTS))
        thought, mask = piece(ids, PROMPTS, LENGTHS)
        steps = [reader.read(thought[:, [step]], mask[:, [step]]) for step in range(mask.shape[1])]
        assert_same(torch.cat(steps, 1), mask, expected, PROMPTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_gives_the_bare_gradients(family):
    """A piece after a piece, each of which runs again in the backward pass."""
    model = made(family)
    ids = texts()
    weights = list(model.parameters())

    def gradients(logits):
        generator = torch.Generator().manual_seed(1)
        loss = sum((torch.randn(x.shape, generator=generator) * x).sum() for x in logits)
        return torch.autograd.grad(loss, weights, allow_unused=True)

    expected = gradients(bare_logits(model, ids))
    thinker = Thinker(model)
    for checkpointing in (False, True):
        reader = Reader(thinker, len(LENGTHS), checkpointing)
        nothing = [0] * len(LENGTHS)
        parts = []
        for start, stop in ((nothing, PROMPTS), (PROMPTS, LENGTHS)):
            part, mask = piece(ids, start, stop)
            logits = reader.read(part, mask)
            parts.append([logits[row][mask[row]] for row in range(len(LENGTHS))])
        found = gradients([torch.cat(row) for row in zip(*parts, strict=True)])
        for own, whole in zip(found, expected, strict=True):
            assert (own is None) == (whole is None)
            if own is not None:
                torch.testing.assert_close(own, whole, atol=1e-4, rtol=1e-4)


def test_checkpointing_keeps_no_activations():
    """Each layer runs twice, and is as it was afterwards."""
    model = made(qwen3)
    runs = []
    hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    reader = Reader(Thinker(model), 1, checkpointing=True)
    runs.clear()
    reader.read(torch.tensor([[3, 4]]), torch.ones(1, 2).bool()).sum().backward()
    hook.remove()
    assert len(runs) == 2
    assert "forward" not in model.model.layers[0].__dict__


def linear_attention():
    config = transformers.Qwen3NextConfig(
        **SIZES,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    )
    return transformers.Qwen3NextForCausalLM(config)


def headless():
    return transformers.Qwen3Model(transformers.Qwen3Config(**SIZES, head_dim=8))


def scaled_logits():
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**SIZES, logits_scaling=8.0))


class ForgetfulLlama(transformers.LlamaForCausalLM):
    """Counts its positions itself, padding too."""

    def __init__(self, config):
        super().__init__(config)
        own = self.model.forward
        self.model.forward = lambda position_ids=None, **rest: own(**rest)


def counts_padding():
    return ForgetfulLlama(transformers.LlamaConfig(**SIZES))


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (linear_attention, "thinker of attention layers alone, got Qwen3NextForCausalLM"),
        (headless, "Qwen3Model without a head; load it as a causal"),
        (scaled_logits, "logits are its head of its last states, got GraniteForCausalLM"),
        (counts_padding, "in pieces with padding between them"),
    ],
)
def test_refused_families(family, message):
    with pytest.raises(ValueError, match=message):
        Thinker(made(family))
