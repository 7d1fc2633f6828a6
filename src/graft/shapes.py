"""The one legend of tensor-shape letters. Names of tensors in model code end in them: ``q_BTNH``.

=====  =====================================================================
B      sequences in a batch
T      positions of a sequence (queries)
S      positions that are looked at (keys), where they differ from T
D      hidden_size: width of the residual stream
N      num_heads: query heads
K      num_kv_heads: key/value heads
G      query heads per key/value head, N = K · G
H      head_dim: channels of a head
F      intermediate_size: inner width of a channel mixer
V      vocab_size
E      num_experts, or chapters of a memory
M      num_slots of a memory
R      rank of a low-rank map
P      query positions of one block of a block-wise computation
C      length of one chunk
=====  =====================================================================

Public forwards annotate shapes too: ``x_BTD: Float[Tensor, "B T D"]``. These names do nothing at run time; the
tests put jaxtyping's in their place and check every call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import Annotated as Bool
    from typing import Annotated as Float
    from typing import Annotated as Int
else:

    class _Unchecked:
        """``Float[Tensor, "B T D"]`` is just Tensor."""

        def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
            return item[0]

    class Bool(_Unchecked):
        """Truth values."""

    class Float(_Unchecked):
        """Floating point values of any width."""

    class Int(_Unchecked):
        """Integers of any width."""


__all__ = ["Bool", "Float", "Int"]
