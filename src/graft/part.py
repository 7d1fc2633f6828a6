"""The one interface of everything that joins the residual stream."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from graft.config.families import LinearConfig, NormConfig, PartConfig
from graft.config.model import InitConfig
from graft.config.registry import variants
from graft.config.roles import DENSE_ROLES, MATRIX_ROLES, Role
from graft.data.tokenizers.base import Tokenizer
from graft.errors import ConfigError
from graft.linears.dense_config import DenseConfig
from graft.linears.packed_ternary import PackedTernary
from graft.ops.kernels import Kernel, Kernels

State = Any
"""What a part hands to its own next call: a pytree of tensors (and ints). Opaque to everyone else."""


class SharedModules(nn.ModuleDict):
    """Modules that parts of several layers read, by name. The model owns each once; the parts do not register them."""

    def __init__(self) -> None:
        super().__init__()
        self._readers: dict[str, list[int]] = {}

    def take(self, name: str, layer_idx: int, make: Callable[[], nn.Module], *, every: int | None = None) -> nn.Module:
        """The module of a name, made at the first call.

        Args:
            name: without dots.
            layer_idx: physical layer of the reader; readers come layer by layer.
            make: makes it.
            every: one module for each this many layers that read under the name, consecutive among themselves; they
                are called ``<name>_0``, ``<name>_1``, …; None = one for all.
        """
        readers = self._readers.setdefault(name, [])
        if layer_idx not in readers:
            readers.append(layer_idx)
        key = name if every is None else f"{name}_{readers.index(layer_idx) // every}"
        if key not in self:
            self[key] = make()
        return self[key]


@dataclass(frozen=True)
class Site:
    """All a part knows of its surroundings when it is built.

    Args:
        hidden_size: width of the residual stream (D).
        layer_idx: physical layer, from 0.
        num_layers: physical layers.
        num_branches: residual branches in the whole network that add something at the start (loops counted), for
            depth-scaled initialisation.
        causal: False in an encoder.
        norm: the model's norm, for parts that norm something inside.
        linear: the model's kind of linear map.
        init: the model's initialisation.
        linears: kinds of linear map by role, which win over ``linear``.
        shared: what parts of several layers share, owned by the model.
        vocab_size: token ids there are; None outside a model.
        matrix_role: role of every hidden matrix (`MATRIX_ROLES`) that `make_linear` makes, for parts inside a part;
            None = the one it is asked for.
    """

    hidden_size: int
    layer_idx: int
    num_layers: int
    num_branches: int
    causal: bool
    norm: NormConfig
    linear: LinearConfig
    init: InitConfig
    linears: Mapping[Role, LinearConfig] = field(default_factory=dict[Role, LinearConfig])
    shared: SharedModules = field(default_factory=SharedModules)
    vocab_size: int | None = None
    matrix_role: Role | None = None

    def linear_of(self, role: Role) -> LinearConfig:
        """The kind of the linear maps of a role: what ``model.linears`` says, else dense for `DENSE_ROLES`, else the
        model's.
        """
        return self.linears.get(role) or (DenseConfig() if role in DENSE_ROLES else self.linear)

    def weight_std(self, *, residual_output: bool = False) -> float:
        """The model's standard deviation of weights at start; depth-scaled, if configured, for those that write to the
        residual stream.
        """
        depth_scaled = residual_output and self.init.residual == "depth"
        return self.init.std / self.num_branches**0.5 if depth_scaled else self.init.std

    def make_linear(
        self,
        in_features: int,
        out_features: int,
        *,
        role: Role,
        bias: bool = False,
        residual_output: bool = False,
        init_std: float | None = None,
        config: LinearConfig | None = None,
    ) -> nn.Module:
        """A linear map of the kind that its role has (`linear_of`): ``y[..., out] = f(x[..., in])``.

        Args:
            in_features: channels in.
            out_features: channels out.
            role: the weight's role (decides optimizer and decay).
            bias: add a learned bias.
            residual_output: the map writes to the residual stream (gets the depth-scaled start, if configured).
            init_std: standard deviation of the weight at start, whatever the model's; None = as the model says.
            config: another kind of map; None = the model's.
        """
        if self.matrix_role is not None and role in MATRIX_ROLES:
            role = self.matrix_role
        std = self.weight_std(residual_output=residual_output) if init_std is None else init_std
        return (config or self.linear_of(role)).build(in_features, out_features, bias=bias, role=role, init_std=std)

    def make_operands(self, in_features: int, *, role: Role) -> nn.Module:
        """``(x, W) -> (x, W)`` of the kind that the role has, for products with a batch of matrices (experts).

        Args:
            in_features: columns of the matrices.
            role: theirs.

        Raises:
            ConfigError: maps of that kind are no such product.
        """
        config = self.linear_of(role)
        if config.operands is None:
            kinds = [tag for tag, kind in variants("linear").items() if getattr(kind, "operands", None)]
            raise ConfigError(
                f"matrices of the role '{role}' come many at once and cannot be of the kind '{config.tag}'",
                where=f"model.linears.{role}",
                expected=f"one of the kinds {', '.join(kinds)}",
                fix=f"set model.linears: {{{role}: {{type: dense}}}}, or another of them",
            )
        return config.build_operands(in_features)

    def make_norm(self, size: int, config: NormConfig | None = None) -> nn.Module:
        """A norm over a last axis of ``size`` channels; the model's kind unless ``config`` is given."""
        return (config or self.norm).build(size)


@dataclass(frozen=True)
class Context:
    """All a part may read of the sequence. Nothing travels through ``**kwargs``.

    Args:
        token_ids_BT: int64 token ids.
        positions_BT: int64 positions, restarting at 0 in every packed document.
        segment_ids_BT: int document numbers within the row, 0 = padding; None = every row is one document, no padding.
        causal: False in an encoder.
        tables: what position modules computed once for this forward (`graft.positions.base.TablePosition`), by key.
        published: tensors that earlier parts of this forward handed on (`PartOutput.published`), by name.
    """

    token_ids_BT: Tensor
    positions_BT: Tensor
    segment_ids_BT: Tensor | None = None
    causal: bool = True
    tables: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict[str, tuple[Tensor, ...]])
    published: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def real(self) -> Tensor:
        """[B, T] bool: False on padding."""
        if self.segment_ids_BT is None:
            return torch.ones_like(self.token_ids_BT, dtype=torch.bool)
        return self.segment_ids_BT != 0


class PartOutput(NamedTuple):
    """What a part returns.

    Args:
        y: [B, T, D], what the branch adds to the residual stream.
        state: what the part gets at its next call; None outside decoding.
        aux: named differentiable *sums* over positions that the objective may add to the loss (never means).
        published: tensors for later parts of the same forward, by name.
        usage: detached int64 counts [E] of how often each expert, chapter, … was chosen, by what is counted
            ("experts"). Only while training. `Part.after_update` gets the step's sums; telemetry reads them. Detached
            floating-point sums are for `Part.after_update` alone (moments, for running statistics).
    """

    y: Tensor
    state: State = None
    aux: Mapping[str, Tensor] = {}
    published: Mapping[str, Tensor] = {}
    usage: Mapping[str, Tensor] = {}


def add_sums(sums: dict[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Named sums of two sets of positions: equal names are added."""
    return {**sums, **{name: sums[name] + value if name in sums else value for name, value in more.items()}}


class Part(nn.Module):
    """Base of every token mixer, channel mixer and memory.

    Attributes:
        config: what is computed.
        kernels: how: "auto" = the fastest form, "reference" = the plain one. May be set at any time, the numbers agree.
        kernel: how: a kernel from elsewhere that computes whole sequences of this part; None = graft's own form.
        checkpointing: how: "block" = the layer around is recomputed in the backward pass; a part that runs several
            times within it may recompute each run by itself. May be set at any time, alike.
    """

    config: PartConfig
    kernels: Kernels = "auto"
    kernel: Kernel | None = None
    checkpointing: Literal["none", "block"] = "none"

    @abstractmethod
    def forward(self, x_BTD: Tensor, ctx: Context, state: State = None) -> PartOutput:
        """Reads the normed stream, returns what to add.

        With ``state`` (from `init_state`, then from the previous call) the T positions continue the sequences seen so
        far, and the result equals that part of one forward over the whole.
        """

    def init_state(self, batch_size: int, max_len: int, *, device: torch.device, dtype: torch.dtype) -> State:
        """State before the first position, for sequences of up to ``max_len``; None when nothing is carried."""
        return None

    def state_bytes(self, max_len: int, dtype: torch.dtype) -> int:
        """Bytes of state per sequence of ``max_len`` positions (default: the tensors of `init_state`, counted)."""
        state = self.init_state(1, max_len, device=torch.device("meta"), dtype=dtype)
        return sum(t.numel() * t.element_size() for t in tensors_of(state))

    def after_update(self, usage: Mapping[str, Tensor]) -> None:
        """Called once after each optimizer update that was made; default: nothing.

        For what is adjusted by a rule instead of a gradient. What it changes must be a persistent buffer.

        Args:
            usage: this part's counts (`PartOutput.usage`) over all micro-batches and ranks of the step.
        """

    @abstractmethod
    def flops_per_token(self, seq_len: int) -> float:
        """Forward FLOPs per position (multiply and add = 2), averaged over one document of ``seq_len`` positions.

        Counts matrix products only, and only the pairs a query may see.
        """

    def active_parameters(self) -> int:
        """Parameters that take part in computing one position (default: all)."""
        return sum(p.numel() for p in self.parameters())

    def active_shared(self) -> Mapping[nn.Module, int]:
        """Of each module shared with other parts (`SharedModules`), how many parameters one position reads here.

        Default: this part shares none.
        """
        return {}


@runtime_checkable
class CountsUpdates(Protocol):
    """A module, other than a part, that changes with the number of updates made.

    Its count must be a persistent buffer, so that a resumed run goes on where it stood.
    """

    def count_update(self) -> None:
        """Called once after each optimizer update that was made."""
        ...


@runtime_checkable
class ReadsTokenizer(Protocol):
    """A module that depends on the texts of token ids. What it takes from them must be a persistent buffer."""

    def read_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Called once, before training."""
        ...


def tensors_of(state: State) -> Iterator[Tensor]:
    """Every tensor in a state."""
    return (leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor))


def linear_flops(module: nn.Module) -> int:
    """2 · weights of every linear map below ``module``: forward FLOPs of one position through each of them once."""
    kinds = (nn.Linear, PackedTernary)
    return sum(2 * m.in_features * m.out_features for m in module.modules() if isinstance(m, kinds))


def own_roles(module: nn.Module) -> Iterator[tuple[str, Role | None]]:
    """Each parameter a module owns directly, and its role: None = the module does not say.

    A module says the roles of the parameters it owns directly: ``role`` (a Role) for matrices, ``param_roles``
    (name -> Role) for exceptions. A direct parameter called ``bias`` has the role "bias" unless listed.
    """
    exceptions: Mapping[str, Role] = getattr(module, "param_roles", {})
    for name, _ in module.named_parameters(recurse=False):
        yield name, exceptions.get(name) or ("bias" if name == "bias" else getattr(module, "role", None))


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """Full parameter name -> role (`own_roles`), for every parameter. Asserts that each has one."""
    roles: dict[str, Role] = {}
    for prefix, module in cast(Iterator[tuple[str, nn.Module]], model.named_modules()):
        for name, role in own_roles(module):
            full = f"{prefix}.{name}" if prefix else name
            assert role is not None, f"parameter {full} of {type(module).__name__} has no role"
            roles[full] = role
    return roles
