"""Configuration of the ``sae`` floor: small frozen dataclasses, one per stage, strict to read.

Free of torch, so that ``--help`` is quick.
"""

import numbers
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from sae.errors import ConfigError, did_you_mean

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON types, tuples as lists."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}


def from_dict(kind: type[T], values: Mapping[str, Any]) -> T:
    """Strict: an unknown key, a missing required field or a value of another type is a :class:`ConfigError`."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{kind.__name__}: expected an object, got {type(values).__name__}")
    known = _names(kind)  # type: ignore[arg-type]
    hints, plain = _hints(kind), _plain_types(kind)  # type: ignore[arg-type]
    others = {name: value for name, value in values.items() if type(value) not in plain.get(name, ())}
    for name, value in others.items():
        if name not in known:
            raise ConfigError(f"{kind.__name__} has no field {name!r}{did_you_mean(name, known)}")
        if not _fits(hints[name], value):
            wanted = getattr(hints[name], "__name__", None) if isinstance(hints[name], type) else str(hints[name])
            raise ConfigError(f"{kind.__name__}.{name}: expected {str(wanted).replace('typing.', '')}, got {value!r}")
    arguments = {name: _coerce(hints[name], value) for name, value in others.items()}
    try:
        return kind(**{**values, **arguments})
    except TypeError as error:
        raise ConfigError(f"{kind.__name__}: {error}") from error


# Tables of records are read through here by the hundred thousand: what depends on the type alone is looked up once.
_origin, _args = cache(typing.get_origin), cache(typing.get_args)


@cache
def _names(kind: type) -> frozenset[str]:
    return frozenset(f.name for f in fields(kind))


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


@cache
def _plain_types(kind: type) -> dict[str, frozenset[type]]:
    """By field the types whose values fit and stay as they are: nearly all cells of a table."""
    unions = (typing.Union, types.UnionType)
    options = {name: _args(hint) if _origin(hint) in unions else (hint,) for name, hint in _hints(kind).items()}
    return {name: frozenset(o for o in those if o in (str, int, float, bool, types.NoneType))
            for name, those in options.items()}


_SCALARS: dict[Any, Any] = {int: numbers.Integral, float: numbers.Real, str: str, types.NoneType: types.NoneType}


def _fits(hint: Any, value: Any) -> bool:
    """Is a JSON value one of the words or of the scalar type asked for? Other types are left to their own checks."""
    if type(value) is hint:
        return True
    origin = _origin(hint)
    if origin is Literal:
        return value in _args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(option, value) for option in _args(hint))
    if hint in _SCALARS:
        return isinstance(value, _SCALARS[hint]) and not isinstance(value, bool)
    if is_dataclass(hint):
        return isinstance(value, Mapping)
    return hint is not bool or isinstance(value, bool)


def _coerce(hint: Any, value: Any) -> Any:
    """JSON lists become tuples, JSON objects become nested configurations, words become paths where paths are."""
    if isinstance(value, str) and (hint is Path or Path in _args(hint)):
        return Path(value)
    if type(value) in (str, int, float, bool, types.NoneType):
        return value
    origin = _origin(hint)
    if origin in (typing.Union, types.UnionType):
        for option in _args(hint):
            if is_dataclass(option) and isinstance(value, Mapping):
                return from_dict(option, value)  # type: ignore[arg-type]
        return tuple(value) if isinstance(value, list) else value
    if is_dataclass(hint) and isinstance(value, Mapping):
        return from_dict(hint, value)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, list):
        return tuple(value)
    return value


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(kw_only=True, frozen=True)
class TokensConfig:
    """Text to packed rows of tokens, one set per split."""

    text: str = "default"
    """Set by --texts: `default`, a file or folder, or hf:REPO[/CONFIG]:SPLIT[:COLUMN][@REV]."""
    text_column: str = "text"
    """Column of jsonl, csv and parquet files."""
    context_tokens: int = 128
    """Tokens per row, prefix token included."""
    prefix_id: int | None = None
    """Token at position 0 of each row; by default the BOS id if the tokenizer adds one, else EOS (id 0 for SmolLM2)."""
    train_tokens: int = 256_000
    """At most this many tokens of the split train; likewise below."""
    explain_tokens: int = 24_576
    calibrate_tokens: int = 12_288
    score_tokens: int = 32_768
    test_tokens: int = 16_384
    seed: int = 0
    """Order of documents."""

    def __post_init__(self) -> None:
        require(self.context_tokens >= 8, f"context_tokens must be at least 8, got {self.context_tokens}")
        for name in ("train_tokens", "explain_tokens", "calibrate_tokens", "score_tokens", "test_tokens"):
            given = getattr(self, name)
            few = f"{name} ({given:,}) must be at least one row (context_tokens {self.context_tokens:,})"
            require(given >= self.context_tokens, few)

    def split_tokens(self, split: str) -> int:
        return int(getattr(self, f"{split}_tokens"))


@dataclass(kw_only=True, frozen=True)
class FilterConfig:
    """Which tokens are left out of training and of every activation metric (TRAINING 1)."""

    drop_positions: tuple[int, ...] = (0,)
    """Positions of each row that are never used: position 0 carries an attention sink in most models."""
    drop_special: bool = True
    """Drop BOS, EOS, pad and other special ids."""
    norm_multiple: float | None = 5.0
    """Drop tokens whose activation norm exceeds this multiple of the median; none switches the rule off."""


@dataclass(kw_only=True, frozen=True)
class StreamConfig:
    """Where the activations of training come from."""

    source: Literal["disk", "live"] = "disk"
    """disk: collected once and kept as shards; live: computed while training, through a shuffle buffer in memory."""
    buffer_tokens: int = 524_288
    """live: tokens that are shuffled together (less where the text has less); at least four batches."""
    prefetch: Literal["auto", "on", "off"] = "auto"
    """live: run the model in a thread of its own; auto: on a GPU and with more than four cores. No result changes."""
    batch_rows: int = 8
    """Rows of text in one pass of the model: a GPU wants 64 and more. With live it fixes what is shuffled as one."""
    disk_gb: float | None = None
    """disk: the activations may take so much; a run that needs more is refused before it begins."""

    def __post_init__(self) -> None:
        require(self.buffer_tokens >= 1, f"buffer_tokens must be positive, got {self.buffer_tokens}")
        require(self.batch_rows >= 1, f"batch_rows must be positive, got {self.batch_rows}")
        require(self.disk_gb is None or self.disk_gb > 0, f"disk_gb must be positive, got {self.disk_gb}")


@dataclass(kw_only=True, frozen=True)
class TrainConfig:
    """One SAE to train."""

    architecture: str = "topk"
    """File name in sae/architectures."""
    d_sae: int = 4_608
    """Number of latents."""
    k: int | None = 32
    """Active latents per token (topk), their mean (batchtopk, matryoshka) or aim (jumprelu); not for relu, gated."""
    multi_topk: bool = False
    """topk: add an eighth of the loss at 4 k, so that the SAE serves any number of latents up to 4 k."""
    l1: float = 0.2
    """Sparsity coefficient (relu), in units of the normalised loss."""
    gate_l1: float = 0.5
    """Sparsity coefficient of the gates (gated)."""
    l1_decoder_norm: bool = False
    """relu: decoder rows are free and their lengths weight the penalty; they are made unit when the SAE is saved."""
    data_start: bool = False
    """relu: latents start at tokens of the training text instead of at random (decision 014)."""
    l0_weight: float = 1.0
    """Weight of (L0 / k - 1)^2 (jumprelu)."""
    lr: float = 1e-3
    """Adam learning rate."""
    lr_warmup_steps: int = 20
    """Linear warm-up."""
    lr_decay_share: float = 0.25
    """Last share of the steps over which the learning rate falls linearly to 0; 0 keeps it constant."""
    batch_tokens: int = 2_048
    """Tokens per optimiser step."""
    train_tokens: int = 249_856
    """Tokens seen in all; more than the store holds means several passes."""
    input_norm: Literal["layer_norm", "none", "dataset_rms"] = "layer_norm"
    """Input normalisation (TRAINING 2): per token, none, or by one factor for all tokens (transcoders)."""
    aux_alpha: float = 1 / 32
    """Weight of the auxiliary loss on dead latents (all but relu)."""
    aux_k: int = 256
    """Dead latents used by the auxiliary loss."""
    dead_tokens: int = 131_072
    """A latent silent for this many tokens counts as dead."""
    adam_eps: float = 6.25e-10
    seed: int = 0
    lr_law: Literal["fixed", "sqrt_width"] = "fixed"
    """sqrt_width: lr holds at 16,384 latents, others take lr * sqrt(16,384 / d_sae); the paper's law has lr 2e-4."""
    grad_clip: float | None = None
    """Largest global norm of the gradient; none: no clipping."""
    ema_decay: float = 0.0
    """Decay of the averaged weights, which are then what is saved (the paper: 0.999); 0: no average."""
    encoder_scale: float = 1.0
    """Starting codes times this factor. At 1 they fit the sample best; below, the encoder turns faster: better in short
    runs (docs/decisions/017)."""
    encoder_dtype: Literal["float32", "bfloat16"] = "float32"
    """topk on a CPU: operands of the encoder product. bfloat16 picks about 1 % other latents while it trains; weights,
    optimiser, everything else and the SAE that is saved are float32. A GPU multiplies bfloat16 copies anyway."""

    def __post_init__(self) -> None:
        narrow = self.encoder_dtype != "float32"
        require(not narrow or self.architecture == "topk", f"encoder_dtype is not for {self.architecture!r}")
        require(self.encoder_scale > 0, f"encoder_scale must be positive, got {self.encoder_scale}")
        require(self.grad_clip is None or self.grad_clip > 0, f"grad_clip must be positive, got {self.grad_clip}")
        require(0 <= self.ema_decay < 1, f"ema_decay must lie in 0..1 (1 excluded), got {self.ema_decay}")
        require(self.d_sae >= 1, f"d_sae must be positive, got {self.d_sae}")
        require(self.k is None or 1 <= self.k <= self.d_sae, f"k must lie in 1..d_sae ({self.d_sae}), got {self.k}")
        require(self.lr > 0, f"lr must be positive, got {self.lr}")
        require(0 <= self.lr_decay_share <= 1, f"lr_decay_share must lie in 0..1, got {self.lr_decay_share}")
        require(self.l1 >= 0, f"l1 must not be negative, got {self.l1}")
        require(self.gate_l1 >= 0, f"gate_l1 must not be negative, got {self.gate_l1}")
        require(self.l0_weight >= 0, f"l0_weight must not be negative, got {self.l0_weight}")
        if self.multi_topk and self.architecture == "topk" and self.k is not None:
            require(4 * self.k <= self.d_sae, f"multi_topk needs 4 k latents, got k {self.k}, d_sae {self.d_sae}")
        require(self.aux_k >= 1 and self.aux_alpha >= 0, "aux_k must be at least 1 and aux_alpha must not be negative")
        require(self.batch_tokens >= 1, f"batch_tokens must be positive, got {self.batch_tokens}")
        few = f"train_tokens ({self.train_tokens:,}) must be at least one batch (batch_tokens {self.batch_tokens:,})"
        require(self.train_tokens >= self.batch_tokens, few)


@dataclass(kw_only=True, frozen=True)
class InputNorm:
    """How an SAE normalises its input (FORMATS 1)."""

    kind: Literal["none", "layer_norm", "unit_norm", "dataset_rms"]
    eps: float = 1e-5
    """Added to the standard deviation (layer_norm) or to the norm (unit_norm)."""
    ddof: int = 1
    """layer_norm: 1 = unbiased standard deviation, as in the OpenAI code."""
    center: bool = True
    """unit_norm: subtract the token's mean over D first."""
    target: Literal["one", "sqrt_d"] = "one"
    """unit_norm: length of the normalised token."""
    scale_in: float = 1.0
    """dataset_rms: n = x * scale_in."""
    scale_out: float = 1.0
    """dataset_rms: x_hat = y / scale_out."""


@dataclass(kw_only=True, frozen=True)
class SubjectMeta:
    """What an SAE file says of where its activations came from (FORMATS 2)."""

    lm: str
    lm_revision: str
    hookpoint: str
    lm_dtype: str
    context_length_tokens: int
    prepend_bos: bool = True
    packing: str = "concat_eos"
    tokens_key: str = ""
    activations_key: str = ""
    hookpoint_out: str | None = None
    """Where a transcoder's targets came from; null for an SAE."""
    text_sources: tuple[str, ...] = ()
    """Names of the text files seen in training."""
    token_filter: dict[str, Any] = field(default_factory=dict)
    """drop_positions, drop_token_ids, norm_multiple, norm_median, n_seen, n_dropped."""
    lm_slug: str = "lm"
    """Short readable name, used in sae_id: [a-z0-9._-] only."""


@dataclass(kw_only=True, frozen=True)
class SAEConfig:
    """Content of an SAE's cfg.json: every field is written, an unknown field is an error (FORMATS 2)."""

    format: Literal["saescope"] = "saescope"
    format_version: int = 1
    architecture: str
    """How it was trained."""
    activation: Literal["relu", "topk", "threshold", "gated", "groupmax"]
    """How it is run."""
    d_in: int
    d_out: int
    d_sae: int
    k: int | None
    """Active latents per token (topk, groupmax), their mean (batchtopk, matryoshka), the aim (jumprelu) or null."""
    apply_b_dec_to_input: bool
    input_norm: InputNorm
    decoder_unit_norm: bool
    sae_id: str
    meta: SubjectMeta | None
    """None for imports that do not say."""
    train_tokens: int | None
    train_steps: int | None
    seed: int | None
    group_sizes: tuple[int, ...] | None = None
    """matryoshka: latents of each group, in order; their sum is d_sae."""
    threshold_source: dict[str, Any] | None = None
    """Where thresholds come from: kind (learned, calibrated, imported), tokens and l0 it was measured on (or null)."""
    weights: Literal["raw", "ema"] = "raw"
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    train: dict[str, Any] | None = None
    """The TrainConfig that made it."""
    source: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.format == "saescope", f"cfg.format must be 'saescope', got {self.format!r}")
        require(self.format_version == 1, f"cfg.format_version {self.format_version}: this saescope reads only 1")
        require(min(self.d_in, self.d_out, self.d_sae) >= 1, "d_in, d_out and d_sae must be positive")
        require(
            self.activation != "topk" or (self.k is not None and 1 <= self.k <= self.d_sae),
            f"a topk SAE needs k in 1..{self.d_sae}, got {self.k}",
        )
        sizes = self.group_sizes
        require(
            sizes is None or (min(sizes, default=0) >= 1 and sum(sizes) == self.d_sae),
            f"group_sizes must be positive and add up to d_sae {self.d_sae}, got {sizes}",
        )
