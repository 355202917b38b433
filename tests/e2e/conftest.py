"""Everything a tiny run needs, made on the spot: model, texts, embedder, labelled task."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a whole `run_all` on a random model: no asset, no network, no key."""
    from tiny import save_tiny_embedder, save_tiny_lm, write_task, write_texts

    home = tmp_path_factory.mktemp("world")
    (home / "lm").mkdir()
    (home / "embedder").mkdir()
    save_tiny_lm(home / "lm")
    save_tiny_embedder(home / "embedder")
    texts = write_texts(home / "texts.jsonl", documents=1200)
    task = write_task(home / "task.csv")
    return arguments(home / "lm", texts, home / "embedder", task)


def arguments(lm: Path, texts: Path, embedder: Path, task: Path) -> list[str]:
    return [
        "--preset",
        "tiny",
        "--model",
        str(lm),
        "--texts",
        str(texts),
        "--task-csv",
        f"numbers={task}:prompt:target:1",
        "--interp.embedder",
        str(embedder),
        "--interp.explainers",
        "n2g",
        "token_list",
        "--interp.scorers",
        "embedding",
        "surprisal",
        "simulation",
    ]
