"""Two samples with variances of their own: Welch's t, its p-value, an interval of the difference.

Student's distribution comes from the regularised incomplete beta function, by its continued
fraction (Abramowitz and Stegun 26.5.8), so that no library is needed.
"""

import math
from dataclasses import dataclass
from statistics import fmean, variance

FRACTION_STEPS = 200
HALVINGS = 80


@dataclass(frozen=True)
class Welch:
    """mean(a) - mean(b), its standard error, and the degrees of freedom that go with it."""

    difference: float
    error: float
    freedom: float

    @property
    def t(self) -> float:
        """The difference in standard errors."""
        return self.difference / self.error

    @property
    def p(self) -> float:
        """Two-sided: how often equal means would differ at least as much."""
        return two_sided(self.t, self.freedom)

    def interval(self, covered: float = 0.95) -> tuple[float, float]:
        """Two-sided, around the difference."""
        reach = quantile(covered, self.freedom) * self.error
        return self.difference - reach, self.difference + reach


def welch(a: list[float], b: list[float]) -> Welch:
    """Compare the means of two samples of two or more."""
    parts = [variance(each) / len(each) for each in (a, b)]
    spread = sum(parts)
    shares = [part**2 / (len(each) - 1) for part, each in zip(parts, (a, b), strict=True)]
    return Welch(fmean(a) - fmean(b), math.sqrt(spread), spread**2 / sum(shares))


def two_sided(t: float, freedom: float) -> float:
    """P(|T| >= |t|) of Student's T."""
    return beta(freedom / (freedom + t * t), freedom / 2, 0.5)


def quantile(covered: float, freedom: float) -> float:
    """The t that |T| stays below with probability `covered`."""
    low, high = 0.0, 1e6
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, freedom) > 1 - covered else (low, middle)
    return high


def beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction would converge slowly
        return 1 - beta(1 - x, b, a)
    logs = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(logs + a * math.log(x) + b * math.log1p(-x)) / a
    value = 1.0
    for m in range(FRACTION_STEPS, 0, -1):  # from the inside out
        half = m // 2
        if m % 2:
            d = -(a + half) * (a + b + half) * x / ((a + m - 1) * (a + m))
        else:
            d = half * (b - half) * x / ((a + m - 1) * (a + m))
        value = 1 + d / value
    return front / value
