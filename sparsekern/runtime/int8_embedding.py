"""Embeddings in 8 bits, and the head that is tied to them: both read the same packed tensors, which the embeddings hold."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.functional import embedding

from ..layouts.int8_rows import restore_rows
from .formats import INT8, format_of
from .lazy_weight import LazyWeight
from .packed_format import check_shape
from .packed_weight import PackedWeight
from .sparse_linear import SparseLinear


class Int8Embedding(PackedWeight):
    """Embeddings `[num_embeddings, embedding_dim]` in the format `"int8"`, of which a lookup restores the rows that it returns.

    They take no gradients.

    Attributes:
        padding_idx: as in `nn.Embedding`.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        tensors: Mapping[str, torch.Tensor],
        *,
        padding_idx: int | None = None,
        trainable: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Make embeddings from packed tensors, whose contents only `check` checks. `from_embedding` packs dense ones.

        Args:
            shape: `(num_embeddings, embedding_dim)`.
            tensors: the packed tensors by name.
            padding_idx: as in `nn.Embedding`.
            trainable: whether the dense weight of `to_embedding` takes gradients.
            dtype: dtype of what a lookup returns.
        """
        check_shape(shape)
        super().__init__(INT8, shape, tensors, trainable=trainable, dtype=dtype)
        self.padding_idx = padding_idx

    @classmethod
    def from_embedding(cls, dense: nn.Embedding) -> Int8Embedding:
        """Pack an `nn.Embedding`, which is not changed.

        Raises:
            TypeError: its dtype cannot be packed.
            ValueError: a value is not finite.
        """
        weight = dense.weight
        made = cls(
            (weight.shape[0], weight.shape[1]),
            format_of(INT8).pack(weight),
            padding_idx=dense.padding_idx,
            trainable=weight.requires_grad,
            dtype=weight.dtype,
        )
        return made.train(dense.training)

    def to_embedding(self) -> nn.Embedding:
        """Return a dense `nn.Embedding`."""
        dense = nn.Embedding(self.num_embeddings, self.embedding_dim, padding_idx=self.padding_idx, device="meta")
        dense.weight = nn.Parameter(self.dense_weight(), requires_grad=self.trainable)
        return dense.train(self.training)

    @property
    def num_embeddings(self) -> int:
        """Rows of the weight."""
        return self.shape[0]

    @property
    def embedding_dim(self) -> int:
        """Columns of the weight."""
        return self.shape[1]

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight for models that read it; each operation on it unpacks it."""
        return LazyWeight.of(self)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of some ids.

        Args:
            ids: whole numbers of any shape.

        Returns:
            `[..., embedding_dim]` in the dtype of the embeddings.
        """
        held = self._held()
        return restore_rows(embedding(ids, held["values"]), held["scales"][ids], self._dtype_in(held))

    def extra_repr(self) -> str:
        """Return the settings that `repr` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.format}"


class TiedHead(SparseLinear):
    """A linear that multiplies by the packed weight of embeddings, which hold its tensors and are saved with them."""

    owns_tensors = False

    def __init__(self, embeddings: Int8Embedding, bias: nn.Parameter | None = None) -> None:
        """Make a head.

        Args:
            embeddings: what it is tied to.
            bias: `[num_embeddings]` parameter, or None.
        """
        shape = embeddings.num_embeddings, embeddings.embedding_dim
        super().__init__(INT8, shape, embeddings.tensors, bias, trainable=embeddings.trainable, dtype=embeddings.dtype)
        for name in self.layout.tensor_names:
            delattr(self, name)
        self._tied_to = (embeddings,)  # in a tuple, so that it is no module of this one

    @property
    def embeddings(self) -> Int8Embedding:
        """What it is tied to."""
        return self._tied_to[0]

    def _held(self) -> dict[str, torch.Tensor]:
        return {**self.embeddings._held(), **super()._held()}
