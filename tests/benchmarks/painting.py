"""What asking a pipeline costs beside its transformer, called with the same arguments.

`bench.py --only painter` prints it: CPU milliseconds for each velocity of a tiny Stable Diffusion
3, and the share of a velocity at the width of Stable Diffusion 3.5 medium, four blocks deep, on an
image of 512 x 512 pixels. Weights are random.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import torch

from agents.models.thinker_painter.painter import Painter

FAMILIES_FOLDER = Path(__file__).parents[1] / "agents" / "models" / "thinker_painter"
"""Where the tests make their pipelines."""
MEDIUM = {
    "sample_size": 64,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 4,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 384,
}
"""Of Stable Diffusion 3.5 medium, but for the depth and the width of its pooled text."""

Figure = dict[str, Any]


def figures(pairs: int) -> Iterator[Figure]:
    """Both figures."""
    diffusers.utils.logging.set_verbosity_error()
    if str(FAMILIES_FOLDER) not in sys.path:
        sys.path.append(str(FAMILIES_FOLDER))
    import tiny

    pipeline, call = tiny.FAMILIES["sd3"]()
    found = measure(Painter(pipeline, **call), 5 * pairs)
    yield {"figure": "h", "name": "asking a tiny pipeline, ms", "limit": 3.0, **found}
    found = measure(medium_painter(pipeline, tiny.parts), max(2, pairs // 10))
    found["share"] = round(found["ms"] / found["direct_ms"], 4)
    yield {"figure": "h", "name": "asking / transformer of SD3.5's width", "limit": 0.03, **found}


def medium_painter(pipeline: Any, parts: Any) -> Painter:
    """The same pipeline with a transformer of real width, and text encoders to fit it."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=2,
        latent_channels=16,
        shift_factor=0.06,
    )
    members = {
        **pipeline.components,
        "transformer": diffusers.SD3Transformer2DModel(**MEDIUM),
        "text_encoder_3": parts.t5(4096),
        "vae": vae,
    }
    wide = diffusers.StableDiffusion3Pipeline(**members)
    return Painter(wide, height=512, width=512)


@torch.no_grad()
def measure(painter: Painter, rounds: int) -> dict[str, float]:
    """CPU time of one velocity above that of its transformer alone; they run in turn."""
    x = torch.randn(1, *painter.latent_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.4])
    conditions = painter.encode(["two red circles"])
    given: list[tuple[Any, Any]] = []

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        given.append((args, kwargs))

    handle = painter.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    painter.predict_velocity(conditions, x, t)
    handle.remove()
    args, kwargs = given[0]
    more: list[float] = []
    direct: list[float] = []
    for _ in range(rounds):
        before = cpu_seconds(lambda: painter.transformer(*args, **kwargs))
        asked = cpu_seconds(lambda: painter.predict_velocity(conditions, x, t))
        after = cpu_seconds(lambda: painter.transformer(*args, **kwargs))
        direct.append((before + after) / 2)
        more.append(asked - direct[-1])
    return {"ms": round(1e3 * median(more), 3), "direct_ms": round(1e3 * median(direct), 3)}


def cpu_seconds(function: Callable[[], object]) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began
