"""Sparsity patterns: `"N:M"` keeps N of every M consecutive inputs of a row; a float is the share of zeros."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class NM:
    """The pattern that keeps `n` of every `m` consecutive input features of each output row.

    Attributes:
        n: weights kept in a group, from 1 to `m - 1`.
        m: weights in a group, at most 64.

    Raises:
        TypeError: `n` or `m` is not a whole number.
        ValueError: `n` or `m` is out of range.

    Example:
        >>> pattern = sparsekern.NM(2, 4)
        >>> str(pattern), pattern.sparsity
        ('2:4', 0.5)
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        for field, value in (("n", self.n), ("m", self.m)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"pattern: expected whole numbers N:M, got {field}={value!r}")
        if not 1 <= self.n < self.m:
            raise ValueError(f"pattern: expected N:M with 1 <= N < M, which keeps N of every M weights, got '{self.n}:{self.m}'")
        if self.m > 64:
            raise ValueError(f"pattern: expected M of at most 64, got '{self.n}:{self.m}'")

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return 1.0 - self.n / self.m

    def guarantees(self, n: int, m: int) -> bool:
        """Return whether every weight that fits this pattern also fits `n:m`."""
        if m % self.m == 0:
            return self.n * (m // self.m) <= n
        return self.m % m == 0 and self.n <= n

    def check_features(self, features: int, name: str = "weight") -> None:
        """Raise `ValueError`, naming the weight, unless `features` is divisible by `m`."""
        if features % self.m:
            raise ValueError(f"{name}: expected input features divisible by M={self.m} for pattern '{self}', got {features}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Unstructured:
    """The pattern that sets a share of the weights to zero, anywhere.

    Attributes:
        sparsity: share of zeros, at least 0 and below 1.

    Raises:
        TypeError: `sparsity` is not a number.
        ValueError: `sparsity` is out of range.

    Example:
        >>> str(sparsekern.Unstructured(0.5))
        '0.5'
    """

    sparsity: float

    def __post_init__(self) -> None:
        if isinstance(self.sparsity, bool) or not isinstance(self.sparsity, (int, float)):
            raise TypeError(f"pattern: expected a sparsity between 0 and 1, got {self.sparsity!r}")
        if not 0.0 <= self.sparsity < 1.0:
            raise ValueError(f"pattern: expected a sparsity of at least 0 and below 1, got {self.sparsity}")

    def check_features(self, features: int, name: str = "weight") -> None:
        """Accept any number of features, as the counterpart of `NM.check_features`."""

    def __str__(self) -> str:
        return f"{self.sparsity:g}"


Pattern = NM | Unstructured


def parse_pattern(pattern: str | float | Pattern) -> Pattern:
    """Turn `"2:4"`, `0.5`, `"0.5"`, `"50%"` or a pattern object into a pattern object.

    Raises:
        TypeError: `pattern` is neither a text, a number nor a pattern.
        ValueError: `pattern` is none of these, or out of range.
    """
    if isinstance(pattern, (NM, Unstructured)):
        return pattern
    if isinstance(pattern, str):
        return _parse_text(pattern.strip())
    if isinstance(pattern, (int, float)) and not isinstance(pattern, bool):
        return Unstructured(float(pattern))
    raise TypeError(f"pattern: expected 'N:M', a sparsity or a pattern object, got {pattern!r}")


def _parse_text(text: str) -> Pattern:
    n, colon, m = text.partition(":")
    if colon and n.isdecimal() and m.isdecimal():  # no regular expression: torch.compile of torch 2.11 cannot trace one
        return NM(int(n), int(m))
    percent = text.endswith("%")
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        raise ValueError(f"pattern: expected 'N:M' (keep N of every M) or a sparsity such as 0.5, got {text!r}") from None
    return Unstructured(value / 100 if percent else value)


def share_with_zeros(zeros: int, total: int) -> Unstructured:
    """Return the share that makes exactly `zeros` of `total` weights zero."""
    # half a weight more, so that rounding of the product cannot change the count
    return Unstructured((zeros + 0.5) / total if zeros else 0.0)


def pruned_count(total: int, sparsity: float) -> int:
    """Return the number of zeros among `total` weights: the floor of the product, corrected for rounding (0.29 * 100 is 29)."""
    return math.floor(total * sparsity + 1e-9)
