"""Base config of every family. Subclassing one with a ``type`` tag registers a variant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from graft.config.base import Config, Problem, knob
from graft.config.placement import Layers
from graft.config.registry import Family, register, resolve
from graft.errors import ConfigError


class VariantConfig(Config):
    """A config chosen by its ``type`` tag. A family's base sets ``family``, a variant sets ``implementation``."""

    family: ClassVar[str] = ""
    implementation: ClassVar[str] = ""
    """``package.module:Class`` of what `build` makes; imported only then, so configs stay free of torch."""

    @property
    def tag(self) -> str:
        """The variant's ``type``; of a class that is no variant, its name."""
        return getattr(self, "type", type(self).__name__)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        tag = cls.model_fields.get("type")
        if tag is not None and cls.family:
            (name,) = get_args(tag.annotation)
            register(cls.family, name, cls)

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Imports ``implementation`` and calls it with this config first."""
        return resolve(self.implementation)(self, *args, **kwargs)


class NormConfig(VariantConfig):
    """A normalisation over the last axis."""

    family = "norm"


class PositionConfig(VariantConfig):
    """How positions enter: in attention (rope, alibi, …) or as vectors added to the embeddings (learned)."""

    family = "position"
    acts_in: ClassVar[Literal["attention", "embedding", "anywhere"]] = "attention"

    def problems_with(self, head_dim: int) -> Iterator[Problem]:
        """Problems that depend on the channels per head (H) of the attention around it; the default has none."""
        yield from ()


class LinearConfig(VariantConfig):
    """The kind of the linear maps inside parts."""

    family = "linear"
    operands: ClassVar[str | None] = None
    """``package.module:Class`` of a module ``(x, W) -> (x, W)`` after which the map is a plain product: for parts that
    multiply by many matrices at once (experts). None = the kind is no such product."""

    def build_operands(self, in_features: int) -> Any:
        """What makes the operands of products with matrices of ``in_features`` columns."""
        assert self.operands is not None, "the caller checked that the kind has operands"
        return resolve(self.operands)(self, in_features)


Norm = Annotated[NormConfig, Family("norm")]
Position = Annotated[PositionConfig, Family("position")]
Linear = Annotated[LinearConfig, Family("linear")]

NormPlacement = Literal["pre", "post", "sandwich", "output"]
_WITH_NORM = {"norm_placement": (None, *get_args(NormPlacement))}


class PartConfig(VariantConfig):
    """Anything that joins the residual stream. The fields here describe the branch around it, equal for all parts."""

    norm: Norm | None = knob(None, "norm of this branch; null = model.norm", only_if=_WITH_NORM)
    norm_placement: Literal["pre", "post", "sandwich", "output", "none"] | None = knob(
        None,
        "pre: x + f(n(x)); post: n(x + f(x)); sandwich: x + n2(f(n1(x))); output: x + n(f(x)); none: x + f(x), as in "
        "ModernBERT's first layer, whose input is normed already; null = model's",
    )
    residual_dropout: float = knob(0.0, "dropout rate on the branch's output, in [0, 1)", ge=0.0, lt=1.0)
    residual_scale: float | None = knob(None, "constant factor on the branch's output; null = model.residual_scale")
    layer_scale: float | None = knob(
        None, "initial value of a learned per-channel factor on the branch's output (CaiT, 2103.17239); null = none"
    )
    layers: Layers | None = knob(
        None,
        "layers of its block the part stands in: {first: 5}, {last: 5}, {every: 3} (counted among them), [0, 4, -1] "
        "(physical layers), none; null = all. The names and starting weights of other parts stay as they are (but for "
        "init.residual depth, which counts the branches that say something at the start)",
    )
    norms_inside: ClassVar[bool] = False
    """True for a part that norms what it reads itself: it gets the stream as it is, whatever the placement."""

    def build(self, site: Any) -> Any:
        """The part for a `graft.part.Site`.

        Raises:
            ConfigError: the part does not fit the width of the stream (`problems_in`; the first of them).
        """
        for problem in self.problems_in(site.hidden_size):
            where = ".".join(map(str, (self.tag, *problem.path)))
            raise ConfigError(problem.message, where=f"layer {site.layer_idx}: {where}", fix=problem.fix)
        return super().build(site)

    def problems_in(self, hidden_size: int) -> Iterator[Problem]:
        """Problems that depend on the width of the stream (D) the part reads; the default has none."""
        yield from ()

    def problems_when(self, bidirectional: bool) -> Iterator[Problem]:
        """Problems that depend on the direction of the model around; the default has none."""
        yield from ()

    def leaks_future(self, bidirectional: bool) -> bool:
        """Whether a position reads later ones where it must not: every loss of such a decoder is too good."""
        return False

    def counts_choices(self) -> bool:
        """Whether it counts in training what it chooses (`PartOutput.usage`)."""
        return False

    def silent_at_start(self) -> bool:
        """Whether the branch adds exactly nothing at first. Depth-scaled starts do not count such branches, so that the
        model starts as one without them.
        """
        return False

    def shares(self) -> Mapping[str, tuple[Any, ...]]:
        """What the model owns once for all parts that name it alike: name -> all that defines it. Default: nothing."""
        return {}

    def passes_on(self, hidden_size: int) -> Mapping[str, tuple[int, ...]]:
        """What it hands to later layers and mixes in from earlier ones: name -> shape of a position's share of it, in a
        stream of this width (D). All layers must agree on it. Default: nothing.
        """
        return {}

    def advice_in(self, hidden_size: int) -> Iterator[Problem]:
        """What is valid in a stream of this width (D) but probably not meant (`graft.config.advice`); default: nothing.

        Each has a path, and a fix.
        """
        yield from ()


class TokenMixerConfig(PartConfig):
    """A part that moves information between positions."""

    family = "token_mixer"
    supports_bidirectional: ClassVar[bool] = True
    mixes_tokens: ClassVar[bool] = True
    """False for a control, which moves nothing."""


class ChannelMixerConfig(PartConfig):
    """A part that acts on each position alone."""

    family = "channel_mixer"


class MemoryConfig(PartConfig):
    """A part that reads a learned memory."""

    family = "memory"


class ObjectiveConfig(VariantConfig):
    """What is predicted and how the loss is summed."""

    family = "objective"
    supports_bidirectional: ClassVar[bool] = True
    """False for one whose targets a bidirectional model would see."""


class ScheduleConfig(VariantConfig):
    """Learning rate as a factor of the peak over steps."""

    family = "schedule"

    def problems_for(self, max_steps: int, tokens_per_step: int) -> Iterator[Problem]:
        """Problems that depend on the run's length; the default has none."""
        yield from ()


class OptimizerConfig(VariantConfig):
    """How gradients become updates."""

    family = "optimizer"


class SourceConfig(VariantConfig):
    """Where documents come from."""

    family = "source"


class TokenizerConfig(VariantConfig):
    """How text becomes token ids."""

    family = "tokenizer"


class PackingConfig(VariantConfig):
    """How documents are laid into rows of ``seq_len`` tokens."""

    family = "packing"


Part = Annotated[PartConfig, Family("part")]
TokenMixer = Annotated[TokenMixerConfig, Family("token_mixer")]
Objective = Annotated[ObjectiveConfig, Family("objective")]
Schedule = Annotated[ScheduleConfig, Family("schedule")]
Optimizer = Annotated[OptimizerConfig, Family("optimizer")]
Source = Annotated[SourceConfig, Family("source")]
Tokenizer = Annotated[TokenizerConfig, Family("tokenizer")]
Packing = Annotated[PackingConfig, Family("packing")]
