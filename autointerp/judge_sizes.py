"""How much the judges read for which every window is dear. Torch-free."""

from dataclasses import dataclass
from typing import Any

from sae.config import require


@dataclass(kw_only=True, frozen=True)
class JudgeSizes:
    """Windows and prompts per latent. The preset paper has the design's (AUTOINTERP 4, 5), quick what two cores carry
    (docs/decisions/024)."""

    simulated_windows: int = 10
    """`simulation`: at most so many windows of each sign, and as many to calibrate on."""
    likelihood_windows: int = 8
    """`surprisal`: at most so many windows of each sign; half as many of each set the cut."""
    steering_prompts: int = 30
    """`intervention`: prompts on which a latent is pushed."""
    steering_tokens: int | None = 64
    """Tokens of such a prompt; None: the silent windows of the split score, as wide as they are."""
    check_descriptions: int = 12
    """Descriptions on which a judge is checked before it is believed, 24 at most."""

    def __post_init__(self) -> None:
        for name in ("simulated_windows", "likelihood_windows", "steering_prompts"):
            least = 4 if name == "steering_prompts" else 2
            require(getattr(self, name) >= least, f"sizes.{name}: at least {least}, got {getattr(self, name)}")
        require(2 <= self.check_descriptions <= 24, f"sizes.check_descriptions: 2 to 24, got {self.check_descriptions}")

    def options(self) -> dict[str, Any]:
        """As arguments of scorers: each takes those that its constructor names."""
        return {
            "windows_per_sign": self.simulated_windows, "calibrate_per_sign": self.simulated_windows,
            "positive": self.likelihood_windows, "silent": self.likelihood_windows,
            "calibrate": self.likelihood_windows, "prompts": self.steering_prompts,
            "prompt_tokens": self.steering_tokens,
        }  # fmt: skip
