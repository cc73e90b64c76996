"""A number format from outside the repository: 4-bit floating point, E2M1, as `weight_format: fp4` in a recipe."""

from typing import Any

from qswin.calib.grid import Grid, register_grid


class Fp4(Grid):
    """0, 0.5, 1, 1.5, 2, 3, 4, 6 and their opposites (OCP Microscaling Formats 1.0, section 5.3.3)."""

    def round(self, x: Any) -> Any:
        step = 0.5 + 0.5 * (abs(x) >= 2) + 1.0 * (abs(x) >= 4)
        return (x / step).round() * step


register_grid(Fp4("fp4", bits=4, qmin=-6, qmax=6))
