"""Shared fixtures: a tiny random LM, texts for it, and outside plug-ins for the contract suites."""

import os
import signal

import pytest

if not os.path.exists("/dev/nvidia0"):  # before Triton is imported anywhere
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # before torch: a worker per core, so that a thread each is what there is
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so a shell starts jobs in the background, and all theirs
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--plugin",
        action="append",
        default=[],
        help="module:object of an outside plug-in to run the contract suites on",
    )


@pytest.fixture(scope="session")
def tiny_lm_dir(tmp_path_factory: pytest.TempPathFactory):
    """Folder of a random 3-block Llama with a byte tokenizer (D = 32, V = 259)."""
    from tiny import save_tiny_lm

    return save_tiny_lm(tmp_path_factory.mktemp("tiny_lm"))


@pytest.fixture(scope="session")
def tiny_lm(tiny_lm_dir):
    """The same as a LanguageModel, float32."""
    from sae.language_model import LanguageModel

    return LanguageModel.load(str(tiny_lm_dir), dtype="float32")


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory):
    """A random 3-block GPT-2 with the same tokenizer (D = 16): learned positions, LayerNorm, biases."""
    from tiny import save_tiny_gpt2

    from sae.language_model import LanguageModel

    return LanguageModel.load(str(save_tiny_gpt2(tmp_path_factory.mktemp("gpt2"))), dtype="float32")


@pytest.fixture(scope="session")
def tiny_texts(tmp_path_factory: pytest.TempPathFactory):
    """A jsonl file of 400 short documents."""
    from tiny import write_texts

    return write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")
