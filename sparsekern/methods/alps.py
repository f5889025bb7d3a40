"""ALPS: choose mask and weights together by ADMM, then solve for the weights on that mask exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from .. import ops
from .._checks import check_finite
from .._warnings import warn
from ..backends.products import add_product, full_float32
from ..pattern import NM, Pattern
from ._fields import choice, flag, number, whole
from .base import LinearMethod
from .selection import keep_mask, keep_mask_of_team
from .solution import Solution, Team, Work
from .statistics import Gram, HasGram

LOOK_EVERY = 3  # iterations between two looks at the mask, at which its change is measured and the penalty adapted
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # (share, factor): the penalty grows by the factor if a larger share has changed
STUCK = 0.1  # if no larger share changes at first, the penalty is too large:
RESTART = 0.2  # ADMM restarts with this times the penalty,
SMALLEST_PENALTY, LARGEST_PENALTY = 1e-3, 1e6  # unless the penalty is already below the smallest


@dataclass(frozen=True)
class ALPS(LinearMethod):
    """Alternating direction method of multipliers (ADMM) on each linear, then least squares on the support that it found.

    The support is that of the projected iterate `D`, which the dense iterate approaches. The public program projects the dense
    iterate instead. ADMM runs in the basis in which the damped Gram matrix has a unit diagonal. The more of the support still
    changes, the faster the penalty grows, and as it grows, the support settles. Features that were never active are pruned
    first. Where the pattern keeps their weights, these are set to zero.

    Example:
        >>> report = sparsekern.prune(model, sparsekern.ALPS(damping=0.02), "2:4", calibration=ids, progress=False)
        >>> report.sparsity
        0.5

    Source: Meng et al., ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models, 2024, algorithms
    1 and 2. The dual is scaled by the penalty, and each penalty takes one Cholesky factorisation instead of an eigendecomposition.
    """

    name: ClassVar[str] = "alps"
    needs: ClassVar = Gram

    damping: float = number(
        0.01, at_least=0, help="share of the Gram matrix's mean diagonal that is added to its diagonal (paper: 0.01)"
    )
    scope: str = choice("matrix", ("matrix", "row"), help="where a sparsity is counted: over the matrix (paper) or each row")
    rho: float = number(0.1, above=0, help="first penalty, relative to the unit diagonal (paper: 0.1)")
    tolerance: float = number(
        0.01,
        at_least=0,
        help="ADMM ends when three iterations change no larger share of the mask, relative to its kept or pruned entries, "
        "whichever are fewer",
    )
    max_iterations: int = whole(300, at_least=1, help="maximum ADMM iterations (paper: 300); warns if the mask has not converged")
    keep_zeros: bool = flag(
        True, help="leave zeros of the weight zero, as the first that are pruned; False lets them become weights"
    )

    def solving_bytes(self, rows: int, features: int) -> int:
        return 36 * rows * features + 19 * features**2  # measured

    def solve(self, weight: torch.Tensor, statistics: HasGram, pattern: Pattern) -> Solution:
        return self.solve_tiles(weight, [slice(0, len(weight))], statistics, pattern, Team())

    def solves_tiles(self, pattern: Pattern) -> bool:
        return True

    def solve_tiles(
        self, weight: torch.Tensor, tiles: Sequence[slice], statistics: HasGram, pattern: Pattern, team: Team
    ) -> Solution:
        check_finite("weight", weight)
        check_finite("gram", statistics.gram.tril())
        basis = _unit_basis(statistics.gram, self.damping)
        target = weight.float() * basis.scale
        mask = keep_mask(target.abs(), pattern, self.scope)
        zero = weight == 0
        held = zero if self.keep_zeros and zero.any() else None
        rows = slice(tiles[0].start, tiles[-1].stop) if tiles else slice(0, 0)
        tiles = [slice(tile.start - rows.start, tile.stop - rows.start) for tile in tiles]
        kept, total = int(mask.sum()), mask.numel()
        weight, target, mask = weight[rows], target[rows], mask[rows]
        held = None if held is None else held[rows]
        start = None
        if 0 < kept < total:  # otherwise there is nothing to choose
            problem = _Problem(target, mask, basis.gram, pattern, self.scope, held, tiles, team, kept, total)
            start, mask = self._find_support(_Admm(problem, self.rho))
        if held is not None:
            mask = mask & ~held  # where a group has fewer weights than the pattern keeps
        new_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        row_error = target.new_empty(len(target), dtype=torch.float64)
        for tile in tiles:
            found, _ = ops.masked_lstsq(target[tile], basis.gram, mask[tile], start=None if start is None else start[tile])
            new_weight[tile] = (found * basis.inverse_scale).to(weight.dtype)
            row_error[tile] = statistics.row_energy(new_weight[tile].float() - weight[tile].float())
        return Solution(new_weight, row_error)

    def work(self, rows: int, features: int) -> Work:
        """Return the work of some sixty iterations with twenty penalties, and of the fit, which is as much as twenty iterations."""
        return Work(0.0, 80.0 * rows * features**2, 10.0 * features**3)

    def _find_support(self, admm: _Admm) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sparse weights that ADMM ends with, and their mask."""
        moving = False
        for left in range(self.max_iterations, 0, -LOOK_EVERY):
            changed = admm.run(min(LOOK_EVERY, left))
            moving = moving or changed > STUCK or admm.rho < SMALLEST_PENALTY
            if not moving:
                admm.restart(admm.rho * RESTART)
            elif changed <= self.tolerance:
                break
            else:
                admm.set_penalty(min(admm.rho * next(growth for share, growth in GROWTH if changed > share), LARGEST_PENALTY))
        else:
            warn(
                f"ALPS.max_iterations: ADMM did not settle in {self.max_iterations} iterations; the last {min(LOOK_EVERY, left)} changed "
                f"{changed:.2%} of the mask, and ALPS.tolerance is {self.tolerance:.2%}",
                stacklevel=2,
            )
        return admm.solution(), admm.mask


class _Problem(NamedTuple):
    """Rows of one weight in the basis of a unit diagonal, and what ADMM must know of the rest.

    Attributes:
        target: `[rows, in_features]`, the dense weights.
        first: bool, the mask to begin with.
        gram: the Gram matrix.
        pattern: the pattern to prune to.
        scope: where a sparsity is counted.
        held: bool, True at zeros of `target` that the projection leaves zero; None where there are none.
        tiles: the rows that are multiplied at once, all of them.
        team: the processes that solve other rows.
        kept: how many weights of all rows are kept,
        total: of so many.
    """

    target: torch.Tensor
    first: torch.Tensor
    gram: torch.Tensor
    pattern: Pattern
    scope: str
    held: torch.Tensor | None
    tiles: Sequence[slice]
    team: Team
    kept: int
    total: int


class _Admm:
    """The state of ADMM on one weight, as `ops.admm_step_` describes it, and its penalty `rho`.

    Attributes:
        mask: bool, True at the current support.
        rho: the current penalty.
    """

    def __init__(self, problem: _Problem, rho: float) -> None:
        self._problem = problem
        self._fewer = min(problem.kept, problem.total - problem.kept)
        self._live = float(problem.gram.diagonal().mean()) or 1.0
        self._product = torch.empty_like(problem.target)
        self.restart(rho)

    def restart(self, rho: float) -> None:
        """Begin again from the first mask, with penalty `rho`."""
        target, first = self._problem.target, self._problem.first
        self._offset = -target.masked_fill(first, 0)
        self._dual = torch.zeros_like(target)
        self.mask = first.clone()
        self._factor(rho)

    @full_float32()
    def run(self, iterations: int) -> float:
        """Run `iterations` steps. Return how many mask entries changed, relative to the kept or pruned ones, whichever are fewer."""
        before = self.mask.clone()
        for left in range(iterations, 0, -1):
            for tile in self._problem.tiles:
                add_product(self._product[tile], self._offset[tile], self._step, begins=True)
            self._offset, self._product = self._product, self._offset
            mask = before if left == 1 else self.mask  # the last step counts what all steps have changed
            changed = self._project(mask)
        self.mask = before
        return int(self._problem.team.total(changed)) / self._fewer

    def _project(self, mask: torch.Tensor) -> torch.Tensor:
        """Take the step of `ops.admm_step_`, in which held zeros are not candidates: all of their value goes to the dual."""
        held, dual = self._problem.held, None
        if held is not None:
            dual = (self._offset + self._dual).masked_fill_(~held, 0)
            self._offset.masked_fill_(held, 0)
            self._dual.masked_fill_(held, 0)
        changed = self._step_of_team(mask)
        if dual is not None:
            self._dual.add_(dual)
            self._offset.sub_(dual)
        return changed

    def _step_of_team(self, mask: torch.Tensor) -> torch.Tensor:
        """Take the step of `ops.admm_step_`, whose mask may be counted over the rows of other processes too."""
        problem = self._problem
        target, pattern, scope, team = problem.target, problem.pattern, problem.scope, problem.team
        if team.size == 1 or scope != "matrix" or isinstance(pattern, NM):
            return ops.admm_step_(self._offset, self._dual, mask, target, pattern, scope=scope)
        z = target + self._offset + self._dual
        check_finite("dual", z)
        kept = keep_mask_of_team(z.abs(), problem.kept, team)
        torch.sub(torch.where(kept, z, -z), target, out=self._offset)
        self._dual.copy_(z.masked_fill_(kept, 0))
        changed = (kept != mask).sum()
        mask.copy_(kept)
        return changed

    def set_penalty(self, rho: float) -> None:
        """Go on with penalty `rho`."""
        # The dual is scaled by the penalty, and so is its share of offset = projected - dual - target.
        factor = self.rho / rho
        self._offset.add_(self._dual, alpha=1 - factor)
        self._dual.mul_(factor)
        self._factor(rho)

    def solution(self) -> torch.Tensor:
        """Return the sparse weights, zero outside the mask."""
        return (self._offset + self._problem.target).masked_fill_(~self.mask, 0)

    def _factor(self, rho: float) -> None:
        """Set the penalty and `rho (gram + rho I)^-1`, which maps the target's offset to the solution's."""
        self.rho = rho
        self._step = ops.gram_inverse(self._problem.gram, rho / self._live).mul_(rho)


class _Basis(NamedTuple):
    """The basis in which the damped Gram matrix has a unit diagonal.

    Attributes:
        gram: the Gram matrix in this basis, lower triangle; zero at dead features.
        scale: factor of a weight into the basis, by feature.
        inverse_scale: factor of a weight back, by feature.
    """

    gram: torch.Tensor
    scale: torch.Tensor
    inverse_scale: torch.Tensor


def _unit_basis(gram: torch.Tensor, damping: float) -> _Basis:
    diagonal = gram.diagonal().double()
    dead = diagonal == 0
    damped = (diagonal + damping * diagonal.mean()).masked_fill(dead, 1)
    scale, inverse_scale = damped.sqrt().masked_fill(dead, 0).float(), damped.rsqrt().masked_fill(dead, 0).float()
    unit = (gram * inverse_scale).mul_(inverse_scale[:, None])
    unit.diagonal().copy_(~dead)
    return _Basis(unit, scale, inverse_scale)
