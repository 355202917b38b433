"""Replies of parts that are asked on other machines: found there, taken in at the end, also after a kill."""

import sqlite3
from pathlib import Path

import pytest

from autointerp.reply_cache import ReplyCache
from autointerp.shared_replies import KNOWN, REPLIES, gathered, reply_files
from sae.errors import ArtefactError
from sae.ray_jobs import DRIVER_VARIABLE, HOST_VARIABLE


def reply(text: str) -> dict[str, object]:
    return {"text": text, "usage": {"prompt_tokens": 3, "output_tokens": 1}}


def stored(path: Path) -> set[str]:
    with sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True) as file:
        return {key for (key,) in file.execute("SELECT key FROM replies")}


def on(machine: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> ReplyCache:
    """The cache as a process of that machine opens it, for a command of the machine "a"."""
    monkeypatch.setenv(HOST_VARIABLE, machine)
    monkeypatch.setenv(DRIVER_VARIABLE, "a")
    path, known = reply_files(root)
    cache = ReplyCache(path, known=known)
    monkeypatch.delenv(HOST_VARIABLE)
    monkeypatch.delenv(DRIVER_VARIABLE)
    return cache


def test_this_machine_and_no_cluster_use_the_one_file(tmp_path, monkeypatch):
    assert reply_files(tmp_path) == (tmp_path / REPLIES, None)
    assert on("a", tmp_path, monkeypatch).path == tmp_path / REPLIES
    assert on("b.cluster/1", tmp_path, monkeypatch).path == tmp_path / "replies.b_cluster_1.sqlite"


def test_other_machines_find_what_is_known_and_what_they_add_is_taken_in(tmp_path, monkeypatch):
    main = ReplyCache(tmp_path / REPLIES)
    main.put("old", reply("known before"))
    with gathered(tmp_path):
        b, c = on("b", tmp_path, monkeypatch), on("c", tmp_path, monkeypatch)
        assert b.get_many(["old", "new"]) == {"old": reply("known before")}
        b.put("new", reply("of b"))
        c.put("new", reply("of c"))
        c.remember({"model": "m"})
        main.put("here", reply("of a"))  # the command's machine goes on with its own file
        assert b.get_many(["new", "here"]) == {"new": reply("of b")} and stored(tmp_path / REPLIES) == {"old", "here"}
        assert b._db.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        b.close(), c.close()
    assert [p.name for p in sorted(tmp_path.glob("replies*.sqlite"))] == [REPLIES]
    assert main.get_many(["old", "new", "here"]) == {
        "old": reply("known before"), "new": reply("of b"), "here": reply("of a")
    }  # fmt: skip
    assert main.identities() == [{"model": "m"}]
    main.close()


def test_files_of_a_killed_command_are_taken_in_by_the_next(tmp_path, monkeypatch):
    b = on("b", tmp_path, monkeypatch)
    b.put("paid", reply("for"))
    b.close()
    (tmp_path / KNOWN).write_bytes(b"of the killed command")
    with gathered(tmp_path):
        assert stored(tmp_path / KNOWN) == {"paid"} == stored(tmp_path / REPLIES)
        c = on("c", tmp_path, monkeypatch)
        assert c.get_many(["paid"]) == {"paid": reply("for")}
        c.close()
    assert not (tmp_path / KNOWN).exists()


def test_a_failing_part_loses_no_reply(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="of a part"), gathered(tmp_path):
        b = on("b", tmp_path, monkeypatch)
        b.put("paid", reply("for"))
        b.close()
        raise RuntimeError("of a part")
    assert stored(tmp_path / REPLIES) == {"paid"}


def test_a_file_that_is_no_cache_is_told_and_kept(tmp_path):
    other = tmp_path / "replies.b.sqlite"
    other.write_bytes(b"no database" * 500)
    with pytest.raises(ArtefactError, match="file is not a database"), gathered(tmp_path):
        pass
    assert other.is_file()
