"""The network: embedding, layers of residual branches, final norm, head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graft.config.model import ModelConfig
from graft.data.tokenizers.base import Tokenizer
from graft.errors import ConfigError
from graft.initialization import initialize
from graft.linears.dense_config import DenseConfig
from graft.linears.packed_ternary import PackedTernary
from graft.network.block import Block, BlockOutput
from graft.network.complete import check_modules
from graft.network.ends import Head, TokenEmbedding, padded_rows
from graft.network.execution import Execution, allow_kinds_of_layers, compiled
from graft.network.kernels import give_kernels
from graft.network.linear_roles import check_linears
from graft.network.sequence import ModelState, check_ids, positions_of
from graft.part import Context, CountsUpdates, Part, ReadsTokenizer, SharedModules, Site, add_sums
from graft.positions.base import TablePosition
from graft.shapes import Float, Int


class Features(NamedTuple):
    """What the network says before the head.

    Args:
        x_BTD: the residual stream after the final norm.
        state: where the sequences stand now; None outside decoding.
        aux: the parts' named sums over positions (see `PartOutput.aux`), added up over layers and loops.
        usage: the parts' counts (see `PartOutput.usage`), named ``layers.<i>.<branch>.<what is counted>``, added up
            over loops.
    """

    x_BTD: Tensor
    state: ModelState | None
    aux: Mapping[str, Tensor]
    usage: Mapping[str, Tensor] = {}


class Model(nn.Module):
    """A language model made of parts, causal unless ``config.bidirectional``.

    ``x = embedding(ids)``, then ``loops`` times all layers with the same weights (Universal Transformer, 1807.03819;
    deviation: no step embedding and no adaptive halting), then the final norm and the head. While decoding, each part
    has a state of its own in every loop.

    Args:
        config: the network.
        vocab_size: ids that can be read and predicted (V), without padding rows.
    """

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.execution = Execution()
        num_rows = padded_rows(vocab_size, config.head.pad_vocab_to_multiple_of)
        layers, shared = config.branches(), SharedModules()
        heard = sum(not part.silent_at_start() for parts in layers for part in parts.values())
        num_branches = config.loops * max(1, heard)
        self.embedding = TokenEmbedding(config, num_rows)
        self.layers = nn.ModuleList(
            Block(parts, config, _site(config, vocab_size, layer_idx, num_branches, shared))
            for layer_idx, parts in enumerate(layers)
        )
        self.final_norm = config.norm.build(config.hidden_size) if config.final_norm else None
        self.head = Head(config, vocab_size, num_rows)
        self.shared = shared
        check_modules(self)
        check_linears(self, config.linears)
        self._counts_updates = any(isinstance(m, CountsUpdates) for m in self.modules())
        self._table_positions = {m.table_key: m for m in self.modules() if isinstance(m, TablePosition)}
        self._runners: list[Callable[..., BlockOutput]] = list(self.blocks())
        self._decoders: list[Callable[..., BlockOutput]] = list(self.blocks())
        self._decoding_head: Callable[..., Tensor] = self.head.forward

    def blocks(self) -> Iterator[Block]:
        """The physical layers, in order."""
        for block in self.layers:
            assert isinstance(block, Block)
            yield block

    def parts(self) -> Iterator[Part]:
        """Every part, layer by layer."""
        return (module for module in self.modules() if isinstance(module, Part))

    def num_parameters(self) -> int:
        """Parameters, a tied table counted once."""
        return sum(p.numel() for p in self.parameters())

    def set_runtime(
        self,
        *,
        compile: bool | None = None,
        compile_decode: bool | None = None,
        activation_checkpointing: Literal["none", "block"] | None = None,
        kernels: str | None = None,
        dtype: torch.dtype | None = None,
        loss_chunk_bytes: int | None = None,
    ) -> None:
        """Changes how the numbers are computed (see `Execution`); None leaves a choice as it is.

        Args:
            compile: see `Execution`, as of all others that are not here.
            compile_decode: alike.
            activation_checkpointing: alike.
            kernels: ``auto``, ``reference``, or a kernel from elsewhere by name (`graft.ops.kernels`); parts it is not
                meant for stay with graft's own.
            dtype: of the operands of matrix products, which decides what kernels fit; None = the weights'.
            loss_chunk_bytes: see `Execution`.

        Raises:
            ConfigError: the named kernel cannot be used.
        """
        if kernels is not None:
            weight = self.embedding.weight
            give_kernels(self.parts(), kernels, weight.device, dtype or weight.dtype)
            kernels = "reference" if kernels == "reference" else "auto"
        given = {
            "compile": compile,
            "compile_decode": compile_decode,
            "activation_checkpointing": activation_checkpointing,
            "kernels": kernels,
            "loss_chunk_bytes": loss_chunk_bytes,
        }
        self.execution = replace(self.execution, **{name: value for name, value in given.items() if value is not None})
        self.embedding.kernels = self.execution.kernels
        for part in self.parts():
            part.kernels = self.execution.kernels
            part.checkpointing = self.execution.activation_checkpointing
        for layer in self.modules():
            if isinstance(layer, PackedTernary):
                layer.kernels = self.execution.kernels
        if compile or compile_decode:
            allow_kinds_of_layers(len({repr(parts) for parts in self.config.layers()}))
        if compile is not None:
            self._runners = [compiled(block) if compile else block for block in self.blocks()]
        if compile_decode is not None:
            self._decoders = [torch.compile(block) if compile_decode else block for block in self.blocks()]
            head = self.head.forward
            self._decoding_head = torch.compile(head, dynamic=False) if compile_decode else head

    def forward(
        self,
        input_ids_BT: Int[Tensor, "B T"],
        *,
        positions_BT: Int[Tensor, "B T"] | None = None,
        segment_ids_BT: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits of every position, fp32.

        Args:
            input_ids_BT: token ids.
            positions_BT: positions; None = from 0 in every document.
            segment_ids_BT: document numbers within the row from 1, 0 = padding; None = one document per row.
        """
        return self.logits(self.features(input_ids_BT, positions_BT=positions_BT, segment_ids_BT=segment_ids_BT).x_BTD)

    def features(
        self,
        input_ids_BT: Int[Tensor, "B T"],
        *,
        positions_BT: Int[Tensor, "B T"] | None = None,
        segment_ids_BT: Int[Tensor, "B T"] | None = None,
        state: ModelState | None = None,
    ) -> Features:
        """The network without its head; arguments as in `forward`. With ``state`` the tokens continue its sequences."""
        check_ids(input_ids_BT)
        if state is not None:
            segment_ids_BT = state.continue_segments(segment_ids_BT, input_ids_BT.shape[1])
        if positions_BT is None:
            positions_BT = positions_of(input_ids_BT, segment_ids_BT, state)  # one row when all rows are alike
        carried = None if state is None else state.embedding
        x_BTD, carried = self.embedding(input_ids_BT, positions_BT, segment_ids_BT, carried)
        ctx = Context(
            token_ids_BT=input_ids_BT,
            positions_BT=positions_BT.expand(input_ids_BT.shape),
            segment_ids_BT=segment_ids_BT,
            causal=not self.config.bidirectional,
            tables=self._tables(positions_BT),
        )
        x_BTD, aux, usage = self._run_layers(x_BTD, ctx, state)
        if state is not None:
            state.embedding = carried
            state.advance(positions_BT, segment_ids_BT)
        return Features(x_BTD if self.final_norm is None else self.final_norm(x_BTD), state, aux, usage)

    def logits(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """The head on features: soft-capped, fp32, over the vocabulary without padding rows."""
        return self.head(x_BTD, self.head_weight(), self._head_projection())

    def head_features(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T R"]:
        """What meets `head_weight`, for a loss that takes the vocabulary in pieces (see `Head.features`)."""
        return self.head.features(x_BTD, self._head_projection())

    def head_weight(self) -> Tensor:
        """[V padded, R]: the head's matrix, which is the embedding table when tied; R = D unless one is factorised."""
        return self.embedding.weight if self.head.weight is None else self.head.weight

    def head_flops_per_token(self) -> int:
        """Forward FLOPs of the head per position: its matrices, padded rows included because they are computed."""
        transform, projection = self.head.transform, self._head_projection()
        matrices = [self.head_weight(), None if transform is None else transform.weight, projection]
        return sum(2 * matrix.numel() for matrix in matrices if matrix is not None)

    def _head_projection(self) -> Tensor | None:
        """[D, R], where the head is tied to a table narrower than its features."""
        if self.head.weight is not None or self.embedding.weight.shape[1] == self.head.width:
            return None
        assert self.embedding.projection is not None, "only a factorised table is narrower than the stream"
        return self.embedding.projection.weight

    def init_state(self, batch_size: int, max_len: int, *, dtype: torch.dtype | None = None) -> ModelState:
        """The state before the first token, for up to ``max_len`` tokens per sequence, padding included.

        Args:
            batch_size: sequences.
            max_len: positions to make room for.
            dtype: of the tensors carried; None = autocast's where that is on, else the weights'.

        Raises:
            ConfigError: the model is bidirectional.
        """
        if self.config.bidirectional:
            raise ConfigError(
                "a bidirectional model cannot continue sequences",
                where="model.bidirectional",
                fix="set it to false, or use forward on whole sequences",
            )
        weight = self.embedding.weight
        kind = weight.device.type
        dtype = dtype or (torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype)
        branches = [
            [
                {
                    name: branch.part.init_state(batch_size, max_len, device=weight.device, dtype=dtype)
                    for name, branch in block.branches()
                }
                for block in self.blocks()
            ]
            for _ in range(self.config.loops)
        ]
        return ModelState(
            branches,
            max_len,
            torch.zeros(batch_size, dtype=torch.int64, device=weight.device),
            self.embedding.init_state(batch_size, device=weight.device, dtype=dtype),
        )

    def decode(
        self,
        input_ids_BS: Int[Tensor, "B S"],
        state: ModelState,
        *,
        segment_ids_BS: Int[Tensor, "B S"] | None = None,
        last_only: bool = False,
    ) -> tuple[Float[Tensor, "B Q V"], ModelState]:
        """Continues the sequences of ``state`` by S tokens; equals those positions of one forward over the whole.

        Prompts of unequal length are padded on the left with segment 0; positions count from the first real token.
        The state passed in is consumed.

        Args:
            input_ids_BS: the next tokens; more than one is a prefill or a chunk.
            state: from `init_state` or the previous call.
            segment_ids_BS: documents of the tokens; None = each row's document goes on.
            last_only: logits of the last position alone, [B, 1, V].

        Raises:
            ConfigError: the state has no room for the tokens.
        """
        features = self.features(input_ids_BS, segment_ids_BT=segment_ids_BS, state=state)
        x_BTD = features.x_BTD[:, -1:] if last_only else features.x_BTD
        head = self._decoding_head if input_ids_BS.shape[1] == 1 else self.head
        return head(x_BTD, self.head_weight(), self._head_projection()), state

    def _tables(self, positions_BT: Tensor) -> dict[str, tuple[Tensor, ...]]:
        """What position modules compute from positions alone, once for all layers with equal keys."""
        return {key: position.tables(positions_BT) for key, position in self._table_positions.items()}

    def uses_tokenizer(self) -> bool:
        """Whether anything in the network depends on the texts of token ids."""
        return any(isinstance(module, ReadsTokenizer) for module in self.modules())

    def use_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Tells the modules that depend on the texts of token ids (`ReadsTokenizer`); what they take is saved."""
        for module in self.modules():
            if isinstance(module, ReadsTokenizer):
                module.read_tokenizer(tokenizer)

    def after_update(self, usage: Mapping[str, Tensor]) -> None:
        """Lets parts, and modules that count updates (`CountsUpdates`), react to an optimizer update.

        Args:
            usage: sums of `Features.usage` over the step.
        """
        for layer, block in enumerate(self.blocks()):
            for name, branch in block.branches():
                prefix = f"layers.{layer}.{name}."
                own = {key.removeprefix(prefix): n for key, n in usage.items() if key.startswith(prefix)}
                branch.part.after_update(own)
        if self._counts_updates:
            for module in self.modules():
                if isinstance(module, CountsUpdates):
                    module.count_update()

    def _run_layers(
        self, x_BTD: Tensor, ctx: Context, state: ModelState | None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The residual stream after all loops, the named sums, and the counts. Updates ``state``."""
        aux: dict[str, Tensor] = {}
        usage: dict[str, Tensor] = {}
        for loop in range(self.config.loops):
            for layer, block in enumerate(self.blocks()):
                if state is None:
                    out = self._train_layer(layer, x_BTD, ctx)
                else:
                    run = self._decoders[layer] if x_BTD.shape[1] == 1 else block
                    out = run(x_BTD, ctx, state.branches[loop][layer])
                    state.branches[loop][layer] = out.states
                x_BTD, aux = out.x, add_sums(aux, out.aux)
                usage = add_sums(usage, {f"layers.{layer}.{name}": counts for name, counts in out.usage.items()})
                ctx = replace(ctx, published=out.published)
        return x_BTD, aux, usage

    def _train_layer(self, layer: int, x_BTD: Tensor, ctx: Context) -> BlockOutput:
        """One layer outside decoding, compiled and recomputed as `execution` says."""
        run = self._runners[layer]
        if self.execution.activation_checkpointing == "block" and torch.is_grad_enabled():
            out = checkpoint(run, x_BTD, ctx, use_reentrant=False)
            assert isinstance(out, BlockOutput)
            return out
        return run(x_BTD, ctx)


def _site(config: ModelConfig, vocab_size: int, layer_idx: int, num_branches: int, shared: SharedModules) -> Site:
    return Site(
        hidden_size=config.hidden_size,
        layer_idx=layer_idx,
        num_layers=config.num_layers,
        num_branches=num_branches,
        causal=not config.bidirectional,
        norm=config.norm,
        linear=DenseConfig() if config.linear is None else config.linear,
        init=config.init,
        shared=shared,
        linears=config.linears,
        vocab_size=vocab_size,
    )


def build_model(
    config: ModelConfig,
    vocab_size: int,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model:
    """A model with its starting weights, each a function of (seed, parameter name) alone.

    Built on the meta device first, so that nothing is allocated twice; ``device="meta"`` leaves it there.

    Args:
        config: the network.
        vocab_size: ids of the tokenizer; ``config.vocab_size`` may be larger (the rows beyond are never used).
        seed: seeds the weights.
        device: where the weights go.
        dtype: of the weights.

    Raises:
        ConfigError: ``config.vocab_size`` is smaller than the tokenizer's.
    """
    rows = config.vocab_size or vocab_size
    if rows < vocab_size:
        raise ConfigError(
            f"{rows} rows cannot hold the tokenizer's {vocab_size} ids",
            where="model.vocab_size",
            expected=f"at least {vocab_size}, or null",
            fix="raise model.vocab_size, or use a smaller tokenizer",
        )
    with torch.device("meta"):
        model = Model(config, rows).to(dtype)
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    initialize(model, seed)
    return model
