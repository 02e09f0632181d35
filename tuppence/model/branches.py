"""Several continuations of one text in one pass.

    row        [ stem ........ | branch 1 .. | branch 2 .... | branch 3 .. | pad ]
    position     0 ........ s-1  s ........    s ..........    s ........    0
    branch       0 ........ 0    1 ........    2 ..........    3 ........   -1

A position looks at the stem and at its own branch, up to itself, so that a stem which all share is
computed once and not once for each continuation. Shapes: B rows, T places in a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Branches:
    """Of each place in each row [B, T]: its position in its own text, and its branch."""

    position_BT: Tensor
    branch_BT: Tensor

    def visible(self, window: int | None = None) -> Tensor:
        """Who may look at whom [B, T, T]; with a `window` at that many positions in all.

        What fills a row up looks at itself too, so that no softmax is empty.
        """
        T = self.branch_BT.shape[1]
        asks, gives = self.branch_BT[:, :, None], self.branch_BT[:, None, :]
        seen_BTT = (asks == gives) | (gives == 0)
        seen_BTT &= torch.ones(T, T, dtype=torch.bool, device=asks.device).tril()
        if window is not None:
            back_BTT = self.position_BT[:, :, None] - self.position_BT[:, None, :]
            seen_BTT &= back_BTT < window
        return seen_BTT

    def mask(
        self, dtype: torch.dtype, *, window: int | None = None, docs_BT: Tensor | None = None
    ) -> Tensor:
        """The same as an additive mask [B, T, T]: zero, or minus infinity; within documents where
        there are several."""
        seen_BTT = self.visible(window)
        if docs_BT is not None:
            seen_BTT &= docs_BT[:, :, None] == docs_BT[:, None, :]
        zero = torch.zeros((), dtype=dtype, device=seen_BTT.device)
        return torch.where(seen_BTT, zero, float("-inf"))

    def count_before(self, marks_BT: Tensor) -> Tensor:
        """How many marks stand before each place in its own text."""
        in_stem_BT = (marks_BT & (self.branch_BT == 0)).int()
        own_BT = (marks_BT & (self.branch_BT > 0)).int()
        before_BT = own_BT.cumsum(1, dtype=torch.int32) - own_BT
        begins_BT = self.branch_BT.diff(dim=1, prepend=self.branch_BT[:, :1]) != 0
        base_BT = torch.where(begins_BT, before_BT, 0).cummax(1).values
        return in_stem_BT.cumsum(1, dtype=torch.int32) - in_stem_BT + before_BT - base_BT

    def picked(self, index_BP: Tensor) -> "Branches":
        """Of some places only, in their order."""
        return Branches(self.position_BT.gather(1, index_BP), self.branch_BT.gather(1, index_BP))
