"""Both directions of a recurrence: who is added to whom, and what a position gives to itself."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.ops.bidirectional import bidirectional_sum, own_values
from graft.ops.documents import Documents, begins


def running_sum(x_BT: Tensor, weight_BT: Tensor, documents: Documents | None) -> Tensor:
    """The sum of ``x · weight`` so far over the real positions of a document."""
    y_BT, total = torch.zeros_like(x_BT), torch.zeros_like(x_BT[:, 0])
    for t in range(x_BT.shape[1]):
        if documents is not None:
            total = torch.where(begins(documents)[:, t], 0.0, total)
        real = 1.0 if documents is None else documents.real_BT[:, t]
        total = total + real * x_BT[:, t] * weight_BT[:, min(t, weight_BT.shape[1] - 1)]
        y_BT[:, t] = total
    return y_BT


def test_every_position_gets_the_whole_document_and_itself_once_more():
    x, weight = torch.randn(2, 2, 6, dtype=torch.float64)
    y = bidirectional_sum(running_sum, (x, weight))
    torch.testing.assert_close(y, (x * weight).sum(1, keepdim=True) + x * weight)


def test_what_does_not_vary_may_have_one_position():
    x, weight = torch.randn(2, 6, dtype=torch.float64), torch.randn(2, 1, dtype=torch.float64)
    y = bidirectional_sum(running_sum, (x, weight))
    torch.testing.assert_close(y, weight * (x.sum(1, keepdim=True) + x))


def test_documents_and_padding_stay_apart():
    segments = torch.tensor([[0, 4, 4, 0, 4, 2, 0, 0], [1, 3, 3, 3, 7, 7, 7, 7]])
    x, weight = torch.randn(2, 2, 8, dtype=torch.float64)
    y = bidirectional_sum(running_sum, (x, weight), segments)
    same = (segments[:, :, None] == segments[:, None, :]).double()
    wanted = torch.einsum("bts,bs->bt", same, x * weight) + x * weight
    torch.testing.assert_close(y[segments != 0], wanted[segments != 0])


def test_own_values_of_heads_that_share_queries_and_keys():
    q, k, v = torch.randn(2, 3, 2, 5), torch.randn(2, 3, 2, 5), torch.randn(2, 3, 6, 4)
    own = own_values(q, k, v)
    for head in range(6):
        scores = torch.einsum("bth,bth->bt", q[:, :, head // 3], k[:, :, head // 3])
        torch.testing.assert_close(own[:, :, head], scores[..., None] * v[:, :, head])


def test_own_values_round_no_products():
    q, k, v = (x.bfloat16() for x in torch.randn(3, 1, 7, 2, 16))
    own = own_values(q, k, v)
    assert own.dtype == torch.float32
    torch.testing.assert_close(own.double(), own_values(q.double(), k.double(), v.double()), rtol=1e-5, atol=1e-5)
