"""Other ways of spacing the times of a schedule, for models whose scheduler asks for them.

FLUX.1's own times are even before the shift; some fine-tuned models ask for Karras, exponential or
beta spacing in their `scheduler_config.json`. Reference: diffusers'
`FlowMatchEulerDiscreteScheduler`.
"""


def respaced(ts: list[float], spacing: str) -> list[float]:
    """As many times, with the first and the last of these, spaced in another way.

    karras: evenly in t^(1/7) (Karras et al. 2022, arXiv:2206.00364). exponential: evenly in log t.
    beta: at the quantiles of a Beta(0.6, 0.6) distribution (Lee et al. 2024, arXiv:2407.12173)."""
    first, last = ts[0], ts[-1]
    ramp = [i / max(len(ts) - 1, 1) for i in range(len(ts))]
    if spacing == "karras":
        a, b = first ** (1 / 7), last ** (1 / 7)
        return [(a + (b - a) * u) ** 7 for u in ramp]
    if spacing == "exponential":
        return [first * (last / first) ** u for u in ramp]
    return [last + beta_quantile(1 - u) * (first - last) for u in ramp]


def beta_quantile(p: float, a: float = 0.6) -> float:
    """The x that a Beta(a, a) variable stays below with probability p, by bisection."""
    if p > 0.5:
        return 1 - beta_quantile(1 - p, a)                                      # it is symmetric

    def area(x: float) -> float:
        """The integral of (u - u^2)^(a - 1) from 0 to x <= 1/2, by its power series."""
        total, term = 0.0, x ** a
        for n in range(60):
            total += term / (a + n)
            term *= (n + 1 - a) / (n + 1) * x
        return total

    low, high, goal = 0.0, 0.5, 2 * p * area(0.5)
    for _ in range(60):
        middle = (low + high) / 2
        if area(middle) < goal:
            low = middle
        else:
            high = middle
    return low
