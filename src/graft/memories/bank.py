"""The slots of a memory: what is learned once, whoever reads it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from graft.config.roles import Role
from graft.errors import ConfigError
from graft.initialization import Rng, normal_
from graft.linears.dense import Dense
from graft.linears.low_rank import LowRank
from graft.memories.memory_bank_config import BankQuantizationConfig, MemoryBankConfig, quantization_problems
from graft.ops.slot_quantization import Bits, QuantizedRows, dequantize_rows, fake_quantize_rows, quantize_rows


class Bank(nn.Module):
    """M slots of some width, N(0, init_std²) at the start; factorized, the rows of ``A Bᵀ`` with B ~ N(0, 1/R).

    Args:
        config: number and form of the slots, and the rounding they are trained with.
        hidden_size: width of the residual stream (D).
    """

    role: Role = "memory_bank"
    slots: Tensor
    codes: Tensor
    scales: Tensor

    def __init__(self, config: MemoryBankConfig, hidden_size: int):
        super().__init__()
        self.init_std, self.rounding = config.init_std, config.quantization
        self.bits: Bits | None = None
        self.width = config.bank_width(hidden_size)
        self.slots = nn.Parameter(torch.empty(config.slots, self.width))
        factorized = config.low_rank_mode == "factorized"
        self.basis = nn.Parameter(torch.empty(self.width, config.memory_dim or hidden_size)) if factorized else None

    def init_parameters(self, rng: Rng) -> None:
        normal_(self.slots, self.init_std, rng("slots"))
        if self.basis is not None:
            normal_(self.basis, self.width**-0.5, rng("basis"))

    def rows(self) -> Tensor:
        """[M, W]: the slots (of a factorized bank: A), rounded as configured or converted."""
        if self.bits is not None:
            return dequantize_rows(QuantizedRows(self.codes, self.scales, self.bits))
        if self.rounding is None:
            return self.slots
        return fake_quantize_rows(self.slots, self.rounding.bits, self.rounding.group_size)

    def read(self, rows: Tensor, linear: nn.Module) -> Tensor:
        """``linear(slots)`` of some of `rows` [..., W]: [..., out].

        The slots of a factorized bank are never formed: ``(A Bᵀ) Wᵀ = A (W B)ᵀ``.
        """
        return linear(rows) if self.basis is None else rows @ linear(self.basis)

    def factors(self, linear: nn.Module) -> list[Tensor] | None:
        """Matrices F with ``read(rows, linear) = rows F₁ … Fₖ``; None where the map is more than matrices."""
        before = [] if self.basis is None else [self.basis]
        if isinstance(linear, LowRank):
            return [*before, linear.down.weight.T, linear.up.weight.T]
        return [*before, linear.weight.T] if type(linear) is Dense else None

    def flops(self, num_rows: int, map_flops: int, out_features: int) -> int:
        """Matrix-product FLOPs of `read`.

        Args:
            num_rows: slots that are read.
            map_flops: of one row through the map.
            out_features: channels out of it.
        """
        if self.basis is None:
            return num_rows * map_flops
        return self.width * (map_flops + 2 * num_rows * out_features)

    @torch.no_grad()
    def quantize(self, bits: Bits, group_size: int | None = None) -> None:
        """Keeps the slots in 8 or 4 bits from now on: they can be read, and no longer trained.

        Args:
            bits: per number.
            group_size: channels that share a scale, a divisor of the slots' width; None = one scale per slot.
        """
        rounded = quantize_rows(self.rows(), bits, group_size)
        del self.slots
        self.register_buffer("codes", rounded.codes)
        self.register_buffer("scales", rounded.scales_MG)
        self.bits = bits

    def num_bytes(self) -> int:
        """Bytes the bank is kept in."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict().values())


def banks(model: nn.Module) -> list[Bank]:
    """Every bank below ``model``, a shared one once."""
    return [module for module in model.modules() if isinstance(module, Bank)]


def quantize_banks(model: nn.Module, bits: Bits, group_size: int | None = None) -> tuple[int, int]:
    """Rounds the slots of every bank for inference, in place; a factorized bank's basis stays as it is.

    Args:
        model: a trained model.
        bits: 8 or 4 per number.
        group_size: channels that share a scale; None = one scale per slot.

    Returns:
        Bytes of all banks before and after.

    Raises:
        ConfigError: there is no bank, or its slots cannot be rounded so.
    """
    found = banks(model)
    if not found:
        raise ConfigError("the model has no memory bank", where="--memory-bits", fix="leave it out")
    how = BankQuantizationConfig(bits=bits, group_size=group_size)
    for bank in found:
        if bank.bits is not None:
            raise ConfigError(f"the bank is rounded already, to {bank.bits} bits", where="--memory-bits")
        for problem in quantization_problems(how, bank.width):
            raise ConfigError(problem.message, where="--memory-bits", fix=problem.fix)
    before = sum(bank.num_bytes() for bank in found)
    for bank in found:
        bank.quantize(bits, group_size)
    return before, sum(bank.num_bytes() for bank in found)


def round_as_stored(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Makes room in every bank whose slots are stored rounded, so that they can be loaded.

    Args:
        model: a model as its config says, on any device (also the meta device).
        tensors: what is to be loaded, by name.
    """
    for name, module in model.named_modules():
        codes, scales = tensors.get(f"{name}.codes"), tensors.get(f"{name}.scales")
        if isinstance(module, Bank) and codes is not None and scales is not None:
            module.quantize(4 if codes.dtype == torch.uint8 else 8, module.width // scales.shape[1])
