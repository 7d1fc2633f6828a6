"""The model as data: blocks are lists of parts, a layout names the block of each layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from graft.config.base import Config, Problem, knob
from graft.config.ends import EmbeddingConfig, HeadConfig
from graft.config.families import Linear, Norm, NormPlacement, Part, PartConfig, TokenMixerConfig
from graft.config.roles import Role

LayerParts = tuple[PartConfig, ...]


class InitConfig(Config):
    """How weights start. Every tensor draws from its own generator, seeded by (seed, tensor name)."""

    std: float = knob(0.02, "standard deviation of weight matrices (GPT-2's choice)", gt=0.0)
    embedding_std: float | None = knob(None, "standard deviation of the embedding table; null = std", gt=0.0)
    residual: Literal["none", "depth"] = knob(
        "none",
        "depth: matrices that write to the residual stream get std / sqrt(number of residual branches that do not "
        "start at zero)",
    )


class LayoutRun(Config):
    """A block name repeated: ``{block: slide, repeat: 5}``."""

    block: str = knob(doc="name of a block in model.blocks")
    repeat: int = knob(1, "how many layers in a row", ge=1, le=100_000)


class ModelConfig(Config):
    """A network: embedding, ``num_layers`` layers of parts (run ``loops`` times), final norm, head."""

    removable: ClassVar[tuple[str, ...]] = ("blocks", "overrides", "linears")

    vocab_size: int | None = knob(None, "rows of the embedding; null = the tokenizer's size", ge=2)
    hidden_size: int = knob(doc="width of the residual stream (D)", ge=1)
    num_layers: int = knob(doc="physical layers; layout repeats to exactly this many", ge=1, le=100_000)
    loops: int = knob(
        1,
        "how often the whole stack runs, with shared weights (Universal Transformer, 1807.03819)",
        ge=1,
        le=10_000,
    )
    bidirectional: bool = knob(False, "true: every position sees the whole document (encoder)")
    norm: Norm = knob(doc="norm of every branch and the final norm, unless a part overrides it")
    norm_placement: NormPlacement = knob("pre", "where branches put their norm; see a part's norm_placement")
    final_norm: bool = knob(True, "norm before the head")
    residual_scale: float = knob(1.0, "constant factor on every branch's output")
    embedding: EmbeddingConfig = knob(doc="token embedding", factory=EmbeddingConfig)
    blocks: Mapping[str, tuple[Part, ...]] = knob(doc="named blocks, each a list of parts", min_length=1)
    layout: tuple[str | LayoutRun, ...] | None = knob(
        None, "block names, repeated to num_layers exactly; null = the only block in every layer"
    )
    overrides: Mapping[str, Mapping[str, Any]] = knob(
        doc='per-layer changes: {"0": {attention.sliding_window: 64}, "-1": {...}, "4-7": {...}}', factory=dict
    )
    head: HeadConfig = knob(doc="output head", factory=HeadConfig)
    init: InitConfig = knob(doc="initialisation", factory=InitConfig)
    linear: Linear | None = knob(None, "kind of the linear maps inside parts, routers aside; null = dense")
    linears: Mapping[Role, Linear] = knob(
        doc="kind by the role of the map, before linear: {mlp: {type: low_rank, rank: 64}}; routers only through this",
        factory=dict,
    )

    def problems(self) -> Iterator[Problem]:
        for name, parts in self.blocks.items():
            if not parts:
                yield Problem(("blocks", name), f"block '{name}' is empty", "give it at least one part")
            yield from self._part_problems(name, parts)
        yield from self._end_problems()
        found = list(self._layout_problems())
        yield from found
        if not found:
            yield from self._override_problems()

    def _part_problems(self, name: str, parts: LayerParts) -> Iterator[Problem]:
        for i, part in enumerate(parts):
            for problem in self.problems_of(part):
                yield Problem(("blocks", name, i, *problem.path), problem.message, problem.fix)

    def problems_of(self, part: PartConfig) -> Iterator[Problem]:
        """What a part cannot be in a stream of this width and direction; paths are within the part."""
        if self.bidirectional and isinstance(part, TokenMixerConfig) and not part.supports_bidirectional:
            fix = "set model.bidirectional: false, or use another token mixer"
            yield Problem(("type",), f"{part.tag} cannot be bidirectional", fix)
        yield from part.problems_in(self.hidden_size)

    def _end_problems(self) -> Iterator[Problem]:
        for problem in self.embedding.problems_in(self.hidden_size):
            yield Problem(("embedding", *problem.path), problem.message, problem.fix)
        for problem in self.head.problems_with(self.embedding, self.hidden_size):
            yield Problem(("head", *problem.path), problem.message, problem.fix)

    def _layout_problems(self) -> Iterator[Problem]:
        if self.layout is None:
            if len(self.blocks) > 1:
                yield Problem(
                    ("layout",), f"there are {len(self.blocks)} blocks and no layout", "name each layer's block"
                )
            return
        named = [run if isinstance(run, str) else run.block for run in self.layout]
        for i, name in enumerate(named):
            if name not in self.blocks:
                yield Problem(("layout", i), f"'{name}' is no block", f"known blocks: {', '.join(self.blocks)}")
        # counted, not spelled out: a layout may claim any number of layers
        period = sum(run.repeat if isinstance(run, LayoutRun) else 1 for run in self.layout)
        if period == 0 or self.num_layers % period:
            yield Problem(
                ("layout",),
                f"a layout of {period} layers does not repeat to num_layers = {self.num_layers} exactly",
                "change one so that it divides the other",
            )
        unused = set(self.blocks) - set(named)
        for name in sorted(unused) if set(named) <= set(self.blocks) else ():  # a misspelt name explains itself
            yield Problem(("blocks", name), f"block '{name}' is in no layer", "name it in layout, or remove it")

    def _period(self) -> tuple[str, ...]:
        assert self.layout is not None
        runs = (run if isinstance(run, LayoutRun) else LayoutRun(block=run) for run in self.layout)
        return tuple(run.block for run in runs for _ in range(run.repeat))

    def _override_problems(self) -> Iterator[Problem]:
        from graft.config.layers import override_problems  # the helper needs this class

        yield from override_problems(self)

    def layer_blocks(self) -> tuple[str, ...]:
        """The block name of each physical layer."""
        if self.layout is None:
            return (next(iter(self.blocks)),) * self.num_layers
        period = self._period()
        return period * (self.num_layers // len(period))

    def branches(self) -> tuple[Mapping[str, PartConfig], ...]:
        """The parts that stand in each physical layer, by branch name, overrides applied."""
        from graft.config.layers import branches  # the helper needs this class

        return branches(self)

    def layers(self) -> tuple[LayerParts, ...]:
        """The parts that stand in each physical layer, overrides applied."""
        return tuple(tuple(named.values()) for named in self.branches())

    @property
    def leaks_future(self) -> bool:
        """Whether positions read later ones where they must not (`PartConfig.leaks_future`)."""
        return any(part.leaks_future(self.bidirectional) for parts in self.layers() for part in parts)
