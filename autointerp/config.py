"""Configuration of the ``autointerp`` floor. Torch-free."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autointerp.engine_options import engine_options
from autointerp.judge_sizes import JudgeSizes
from autointerp.retries import check_base_url
from sae.config import require


@dataclass(kw_only=True, frozen=True)
class ExemplarConfig:
    """Which windows are drawn per latent (AUTOINTERP 2)."""

    window_tokens: int = 32
    """W, the scoring unit."""
    min_window_tokens: int = 8
    """Shorter remainders of a document are dropped."""
    left_tokens: int = 24
    """Context left of the peak in windows for the explainer."""
    n_groups: int = 10
    """Quantile groups."""
    explain_top: int = 10
    explain_silent: int = 10
    explain_random: int = 16
    """Random positive activations, for N2G."""
    calibrate_positive: int = 10
    calibrate_silent: int = 10
    score_positive: int = 20
    """Spread evenly over the quantile groups."""
    score_silent: int = 20
    score_hard: int = 10
    """Per hard kind: same_token, co_occurring; half as many for decoder_near."""
    score_embedding_near: int = 0
    """Silent windows that read most like the latent's own, by sentence embeddings. 0: none. Every window of the split
    (at most 20,000) is embedded once, 47 a second on one core; a diagnostic that moves no other number."""
    min_windows: tuple[int, int, int] = (10, 5, 20)
    """A latent is eligible with this many positive windows in explain, calibrate and score."""
    seed: int = 0

    def __post_init__(self) -> None:
        require(len(self.min_windows) == 3, f"min_windows wants three numbers, got {self.min_windows}")
        require(0 <= self.left_tokens < self.window_tokens, "left_tokens must be smaller than window_tokens")
        require(self.score_embedding_near >= 0, "score_embedding_near must be 0 or more")
        require(self.n_groups >= 1, f"n_groups must be positive, got {self.n_groups}")
        require(self.window_tokens >= self.min_window_tokens >= 1, "window_tokens must be at least min_window_tokens")


@dataclass(kw_only=True, frozen=True)
class InterpConfig:
    """Who explains, who judges, on how many latents."""

    latents: int = 36
    """Explained latents per SAE, drawn uniformly from the eligible."""
    explainers: tuple[str, ...] = ("n2g", "token_list", "pmi")
    """File names in autointerp/explainers."""
    candidates: int = 1
    """Texts per latent and explainer that a language model writes; the best on the split calibrate is scored."""
    scorers: tuple[str, ...] = ("late_interaction", "embedding", "surprisal", "simulation")
    """File names in autointerp/scorers; detection is added when a prompted judge is given."""
    costly_latents: int | None = 8
    """Of these latents at most so many are scored by `embedding` and `surprisal`, for which every window is a pass of a
    model; the other scorers take all. None: all."""
    sizes: JudgeSizes = JudgeSizes()
    """How much of a latent the dear judges read."""
    simulator: str = "word_embedding"
    """File name in autointerp/simulators, for the scorer `simulation`. all_at_once, structured and token_by_token ask
    the language model."""
    client: str = "transformers"
    """File name in autointerp/clients: transformers (embedded), openai, vllm (in this process), batch (files for
    OpenAI's Batch API)."""
    llm: str | None = None
    """Model name for the client; by default the embedded model."""
    llm_revision: str | None = None
    """Of a model on the hub; of a server, what tells apart two models that it serves under one name. Part of the key of
    every reply."""
    base_url: str | None = None
    """openai: any compatible URL. The key is read from OPENAI_API_KEY."""
    concurrency: int = 32
    """openai: requests in flight."""
    timeout_s: float = 120.0
    """openai: for one answer, its wait for a place at the server included."""
    next_token: bool = False
    """openai: the server gives log-probabilities of an answer's first token."""
    replicas: int = 1
    """vllm: engines side by side (data parallel), each on GPUs of its own."""
    vllm: tuple[str, ...] = ()
    """vllm: NAME=VALUE for its engines, such as gpu_memory_utilization=0.5, max_model_len=8192,
    tensor_parallel_size=2."""
    embedder: str = "default"
    """Sentence embedding model of the embedded judges: `default` (MiniLM from its wheel), `none`, or a folder."""
    max_llm_tokens: int | None = None
    """Stop cleanly once this many LLM tokens were used."""
    max_cost_usd: float | None = None
    """Stop cleanly before the LLM costs more; needs ``prices``."""
    prices: Path | None = None
    """JSON file {"model": {"prompt": 1.0, "cached": 0.5, "output": 4.0}}, US dollars per million tokens."""
    seed: int = 0

    def __post_init__(self) -> None:
        self.engine_options()
        check_base_url(self.base_url)
        require(self.concurrency >= 1 and self.timeout_s > 0, "concurrency and timeout_s must be positive")
        priced = self.max_cost_usd is None or self.prices is not None
        require(priced, "a limit on the cost needs prices; give --interp.prices FILE")
        require(self.candidates >= 1, f"candidates must be positive, got {self.candidates}")
        most = self.costly_latents
        require(most is None or most >= 1, f"costly_latents must be positive or None, got {most}")

    def engine_options(self) -> dict[str, Any]:
        """``vllm`` as options of an engine; :class:`sae.errors.ConfigError` for what cannot be."""
        return engine_options(self.client, self.replicas, self.vllm)
