"""The settings of the model, with those of its adapters."""

from __future__ import annotations

from dataclasses import dataclass, field

from agents.config.fields import setting

# It repeats the names of `thinker_painter.telling.TELLINGS`, which need torch: so the settings can
# be listed without it. A test compares them.
TELLINGS = ("prompt_and_answer", "answer", "all")


@dataclass
class ExpertLora:
    """The low-rank adapters of one expert."""

    rank: int = setting(
        0, "rank of the adapters; 0: none (the expert is frozen if the other has some)", at_least=0
    )
    alpha: float | None = setting(
        None, "the adapters count alpha / rank; empty: twice the rank", above=0
    )


@dataclass
class LoraSettings:
    """Low-rank adapters, which are trained in place of the weights."""

    text: ExpertLora = field(default_factory=ExpertLora)
    image: ExpertLora = field(default_factory=ExpertLora)
    targets: list[str] = setting(
        [], "regular expressions of the layers that get adapters; empty: the model's own"
    )


@dataclass
class ModelSettings:
    """The model that is trained."""

    name: str = setting(
        "tiny",
        "known model, or the folder of a saved one or of a release; not read with model.kind",
    )
    kind: str = setting(
        "",
        "thinker_painter: put together from model.thinker and model.painter; empty: model.name",
        choices=("", "thinker_painter"),
    )
    thinker: str = setting(
        "", "folder or hub id of a language model; empty: the text encoder of the painter"
    )
    painter: str = setting("", "folder or hub id of a diffusers pipeline")
    tells: str | None = setting(
        None,
        "what the painter is told: prompt_and_answer, answer or all; empty: the first of them, or"
        " what the saved model says",
        choices=TELLINGS,
    )
    strict: bool | None = setting(
        None, "whether a text that the painter would cut off is an error; empty: a warning"
    )
    reads_base: bool | None = setting(
        None,
        "whether a thinker that is the painter's text encoder reads for it without adapters;"
        " empty: with them",
    )
    thinking: bool | None = setting(
        None, "option enable_thinking of the thinker's chat template; empty: the template's own"
    )
    height: int | None = setting(
        None, "height of the images in pixels; empty: the model's own", at_least=1
    )
    width: int | None = setting(
        None, "width of the images in pixels; empty: the model's own", at_least=1
    )
    vision: bool = setting(True, "load the vision encoder, of a model that has one")
    dtype: str = setting(
        "float32",
        "dtype of the weights and of the computations; weights that are trained are kept in"
        " float32 beside it",
        choices=("float32", "bfloat16"),
    )
    device: str = setting("cpu", "device of the model and of the env")
    max_rows: int | None = setting(
        None, "images that the model denoises at once; empty: as many as fit", at_least=1
    )
    checkpointing: bool = setting(
        False, "compute the activations of a layer again in the backward pass: less memory"
    )
    lora: LoraSettings = field(default_factory=LoraSettings)

    @property
    def source(self) -> str:
        """What `load_model` is asked for."""
        return self.kind or self.name
