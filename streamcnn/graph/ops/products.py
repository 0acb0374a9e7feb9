"""Matrix products and attention: no rules, since they mix positions, but what they cost on whole values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from streamcnn.graph.costs import Cost, Operand, Operation, Routine, Saves, declare
from streamcnn.graph.ops.rules import Sample

aten = torch.ops.aten

declare(
    *(aten.addmm, aten.baddbmm, aten.bmm, aten.matmul, aten.mm),
    cost=Cost(routine=Routine.MATRIX_PRODUCT),
)


def _attention_bytes(operation: Operation) -> int:
    """Bytes of the matrix of queries by keys, where attention is not one kernel that never forms it.

    Strides are not known here: on a CPU the kernel also wants the channels to be dense.
    """
    query, key, value, mask, dropout = operation.bind("query", "key", "value", "attn_mask", "dropout_p")
    is_fused = len(query.shape) == 4 and query.shape[-1] == value.shape[-1]
    if not operation.fuses_attention:
        is_trained = isinstance(mask, Operand) and mask.is_trained
        is_fused = is_fused and not dropout and not is_trained
    if is_fused:
        return 0
    return int(query.tensor.nbytes) // int(query.shape[-1]) * int(key.shape[-2])


def _attention_saved(operation: Operation) -> int:
    """The matrix's softmax and, with dropout, the mask in the same type and what is left."""
    (dropout,) = operation.bind("dropout_p")
    return (3 if dropout else 1) * _attention_bytes(operation)


declare(
    aten.scaled_dot_product_attention.default,
    cost=Cost(saves=Saves(operands=True, beside=_attention_saved), inner=_attention_bytes),
)


class _Attention(nn.Module):
    """Every position with every other, by matrix products and by one operator."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        scores = torch.softmax(torch.bmm(tokens, tokens.transpose(1, 2)) / 7, -1)
        mixed = torch.matmul(scores, tokens)
        heads = mixed.unsqueeze(1)
        attended: Tensor = nn.functional.scaled_dot_product_attention(heads, heads, tokens.unsqueeze(1))
        return attended.mean((1, 2))


SAMPLES = (
    Sample("attention", lambda: nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), _Attention()), resident=True),
)
