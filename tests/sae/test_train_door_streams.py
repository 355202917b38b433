"""The door ``python -m sae train`` with several hookpoints and with activations on the fly."""

from pathlib import Path

import paired_costs
import pytest

from sae import checkpoint, predict, train_door
from sae.__main__ import main
from sae.config import StreamConfig
from sae.errors import ConfigError
from sae.manifest import read_manifest
from sae.streams import LiveStream

SMALL = (
    "--tokens.context-tokens=64 --tokens.train-tokens=8192 --tokens.explain-tokens=1024 --tokens.calibrate-tokens=1024 "
    "--tokens.score-tokens=1024 --tokens.test-tokens=1024 --train.d-sae=64 --train.k=4 --train.batch-tokens=512 "
    "--train.train-tokens=10240 --train.aux-k=8 --train.dead-tokens=4096"
).split()
LIVE = ["--stream.source=live", "--stream.buffer-tokens=4096"]
FILES = (checkpoint.WEIGHTS, checkpoint.CFG, checkpoint.REFERENCE)


@pytest.fixture
def common(tiny_lm_dir: Path, tiny_texts: Path) -> list[str]:
    return ["train", f"--model={tiny_lm_dir}", f"--texts={tiny_texts}", *SMALL]


def saes(root: Path) -> dict[str, list[bytes]]:
    folders = [path.parent for path in root.glob("saes/*/manifest.json")]
    return {folder.name: [(folder / name).read_bytes() for name in FILES] for folder in folders}


@pytest.mark.parametrize("stream", [[], LIVE, [*LIVE, "--stream.prefetch=on"]])
def test_hookpoints_of_one_run_are_those_of_single_runs(
    stream: list[str], common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ["--grid", "architecture=topk,batchtopk"]
    one, alone = tmp_path / "one", tmp_path / "alone"
    names = ["layers.0", "layers.1.mlp"]
    assert main([*common, f"--root={one}", *stream, "--hookpoint", names[0], f"--hookpoint={names[1]}", *grid]) == 0
    printed = capsys.readouterr().out
    assert "2 hookpoints in one pass" in " ".join(printed.split())
    for name in names:
        assert main([*common, f"--root={alone}", *stream, f"--hookpoint={name}", *grid]) == 0
    found = saes(one)
    assert len(found) == 4 and found == saes(alone)
    assert sorted({name.split(".topk")[0].split(".batchtopk")[0] for name in found}) == sorted(
        f"{next(iter(found)).split('.layers')[0]}.{name}" for name in names
    )
    assert (one / "activations").exists() == (not stream)
    for name in found:
        made = checkpoint.load(one / "saes" / name).cfg.meta
        assert made is not None and made.token_filter["n_seen"] == 8_192 and made.token_filter["norm_median"] > 0


def test_a_grid_names_hookpoints_too(common: list[str], tmp_path: Path) -> None:
    cfg = train_door.parse([*common[1:], f"--root={tmp_path}", "--grid", "hookpoint=layers.0,layers.2", "k=2,4"])
    cfgs = train_door.grid_configs(cfg.train, cfg.grid)
    assert cfg.hookpoints == ("layers.0", "layers.2") and [one.k for one in cfgs] == [2, 4]
    folders = train_door.run(cfg, cfgs, train_door.subject(cfg))
    places = [(checkpoint.load(folder).cfg.meta.hookpoint, checkpoint.load(folder).cfg.k) for folder in folders]  # type: ignore[union-attr]
    assert places == [("layers.0", 2), ("layers.0", 4), ("layers.2", 2), ("layers.2", 4)]


def test_words_given_twice_are_one_list() -> None:
    words = ["--hookpoint", "a", "--train.k=3", "--hookpoint=b,c"]
    assert train_door.joined(words) == ["--train.k=3", "--hookpoint=a,b,c"]
    assert train_door.joined(["--train.k=3", "--hookpoint-out=x"]) == ["--train.k=3", "--hookpoint-out=x"]
    assert train_door.TrainDoor(hookpoint="a, b,a").hookpoints == ("a", "b")
    assert train_door.TrainDoor().hookpoints == ()


def test_what_a_live_run_takes_is_printed_and_nothing_is_stored(
    common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*common, f"--root={tmp_path}", *LIVE]
    assert main([*words, "--dry-run"]) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "buffer 4,096 tokens = 64 contexts of 64" in printed and "8 batches" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens"]
    cfg = train_door.parse(words[1:])
    expected = train_door.predict(cfg, [cfg.train], train_door.subject(cfg))
    assert [line.stage for line in expected.lines] == ["sample", "training"]
    assert main(words) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saes", "tokens"]
    (folder,) = (tmp_path / "saes").iterdir()
    size = sum(path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json")
    assert expected.disk_bytes == pytest.approx(size, rel=0.2)
    assert read_manifest(folder)["inputs"]["activations"] == train_door.subject(cfg).stores[0].key  # type: ignore[union-attr]
    capsys.readouterr()
    monkeypatch.setattr(LiveStream, "chunk", lambda *_: pytest.fail("the model was run"))
    complete = train_door.predict(cfg, [cfg.train], train_door.subject(cfg))
    assert complete.lines == () and main(words) == 0, "a complete run costs nothing"


def test_a_transcoder_on_the_fly(common: list[str], tmp_path: Path) -> None:
    pair = ["--hookpoint=layers.1.mlp:in", "--hookpoint-out=layers.1.mlp", "--train.input-norm=dataset_rms"]
    words = [*common, f"--root={tmp_path}", *LIVE, *pair, "--train.architecture=transcoder"]
    cfg = train_door.parse(words[1:])
    expected = train_door.predict(cfg, [cfg.train], train_door.subject(cfg))
    assert main(words) == 0
    (folder,) = (tmp_path / "saes").iterdir()
    sae = checkpoint.load(folder)
    assert sae.cfg.meta is not None
    assert (sae.cfg.meta.hookpoint, sae.cfg.meta.hookpoint_out) == ("layers.1.mlp:in", "layers.1.mlp")
    size = sum(path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json")
    assert expected.disk_bytes == pytest.approx(size, rel=0.2)
    assert train_door.predict(cfg, [cfg.train], train_door.subject(cfg)).lines == ()


def test_the_passes_of_the_model_are_those_that_were_stated(
    common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows are computed whole, and none in vain."""
    cfg = train_door.parse([*common[1:], f"--root={tmp_path}", *LIVE])
    found = train_door.subject(cfg)
    expected = train_door.predict(cfg, [cfg.train], found)
    calls, real = [0], LiveStream.chunk
    monkeypatch.setattr(
        LiveStream, "chunk", lambda self, number: calls.__setitem__(0, calls[0] + 1) or real(self, number)
    )
    train_door.run(cfg, [cfg.train], train_door.subject(cfg))
    assert "12,288 tokens through the model" in expected.lines[-1].note, "10,240 in windows of 4,096"
    stated = (12_288 + 8_000) / (8 * 64)
    assert stated - 1 <= calls[0] <= stated + 3


def test_disk_is_bounded_before_the_run(
    common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "time_lm", lambda *_: pytest.fail("work began"))
    words = [*common, f"--root={tmp_path}", "--hookpoint=layers.0,layers.1"]
    assert main([*words, "--stream.disk-gb=0.0005"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "take 0.001 GB of disk" in said and "--stream.source live" in said
    allowed = int(said.split("--tokens.train-tokens to ")[1].split()[0].replace(",", ""))
    assert allowed * 2 * (32 * 2 + 1) <= 0.5e6 < (allowed + 1) * 2 * (32 * 2 + 1)
    monkeypatch.undo()
    assert main([*words, "--stream.disk-gb=0.002"]) == 0
    assert sum(path.stat().st_size for path in (tmp_path / "activations").rglob("*.bin")) <= 2e6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stream.source=live", "--stream.buffer-tokens=2000"], "--stream.buffer-tokens 2048"),
        (["--stream.source=live", "--train.batch-tokens=16384", "--train.train-tokens=16384"], "give more text"),
        (["--stream.source=live", "--hookpoint-out=layers.1.mlp"], "is for transcoders"),
        (["--hookpoint=layers.0,layers.1", "--hookpoint-out=layers.1.mlp"], "has one --hookpoint"),
        (["--hookpoint=layers.0", "--hookpoint=layers.77"], "layers.77"),
        (["--stream.source=live", "--train.d-sae=2000000000"], "lower train.d-sae"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_work(
    words: list[str], message: str, common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(LiveStream, "chunk", lambda *_: pytest.fail("the model was run"))
    try:
        assert main([*common, f"--root={tmp_path}", *words]) == 2
    except SystemExit as error:  # a configuration that is refused while it is parsed
        assert error.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not saes(tmp_path)


def test_streams_that_do_not_exist() -> None:
    with pytest.raises(ConfigError, match="buffer_tokens"):
        StreamConfig(buffer_tokens=0)
    with pytest.raises(ConfigError, match="disk_gb"):
        StreamConfig(disk_gb=0)
    with pytest.raises(ConfigError, match="stored ones"):
        train_door.TrainDoor(activations=Path("x"), stream=StreamConfig(source="live"))


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("source", ["disk", "live"])
def test_what_is_predicted_is_what_is_paid(source: str) -> None:
    """Within 20 %, in two processes of which neither knows the other's result; seconds of the processor."""
    paired_costs.assert_near("stream_cost_probe.py", source)
