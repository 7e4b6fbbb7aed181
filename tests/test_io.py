"""Files that are whole or not there at all, and one HTTP request."""

import errno
import os

import numpy as np
import pytest
from fixtures.chat_server import serve
from safetensors.numpy import save_file

from mmr1_ds import io


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_the_place_of_the_old_one(tmp_path):
    for content in (b"first", b"second, which is longer", b""):
        io.write_whole(tmp_path / "a.json", content)
        assert (tmp_path / "a.json").read_bytes() == content and names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("broken", ["fsync", "write"])
def test_a_disk_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, broken):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "a"))

    io.write_whole(tmp_path / "a", b"old")
    if broken == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError) as caught, io.whole_file(tmp_path / "a") as temporary:
        temporary.write_bytes(b"half")
        if broken == "write":
            fail()
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"]
    assert io.in_words(caught.value).startswith(f"No space left on device: {tmp_path / 'a'} (")
    assert "bytes are free there" in io.in_words(caught.value)
    missing = FileNotFoundError(errno.ENOENT, "No such file or directory", str(tmp_path / "b"))
    assert io.in_words(missing) == f"No such file or directory: {tmp_path / 'b'}"


def test_a_folder_appears_when_all_is_in_it(tmp_path):
    (tmp_path / ".made.tmp").mkdir()
    (tmp_path / ".made.tmp" / "of a killed process").touch()
    with io.whole_folder(tmp_path / "made") as temporary:
        (temporary / "inside").mkdir()
        (temporary / "inside" / "file").write_text("x")
        assert names(tmp_path) == [".made.tmp"]
    assert names(tmp_path) == ["made"] and names(tmp_path / "made") == ["inside"]
    with pytest.raises(KeyError), io.whole_folder(tmp_path / "other"):
        raise KeyError
    assert names(tmp_path) == ["made"]


def test_files_of_safetensors_are_as_open_as_the_umask_says(tmp_path):
    """The library's own are its owner's alone, so that nobody else could load an exported model."""
    before = os.umask(0o027)
    try:
        with io.whole_folder(tmp_path / "model") as folder:
            save_file({"a": np.zeros(3)}, folder / "a.safetensors")
        with io.whole_file(tmp_path / "b.safetensors") as temporary:
            save_file({"a": np.zeros(3)}, temporary)
    finally:
        os.umask(before)
    for path in (tmp_path / "model" / "a.safetensors", tmp_path / "b.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o640


def test_a_disk_with_one_mode_for_all_files_takes_them_all_the_same(tmp_path, monkeypatch):
    def refuse(*arguments, **named):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    (tmp_path / "elsewhere").touch(0o600)
    monkeypatch.setattr(os, "chmod", refuse)
    with io.whole_folder(tmp_path / "model") as folder:
        save_file({"a": np.zeros(3)}, folder / "a.safetensors")
    io.write_whole(tmp_path / "b", b"content")
    monkeypatch.undo()
    with io.whole_folder(tmp_path / "linked") as folder:
        (folder / "link").symlink_to(tmp_path / "elsewhere")
    assert names(tmp_path / "model") == ["a.safetensors"] and (tmp_path / "b").read_bytes() == b"content"
    assert (tmp_path / "elsewhere").stat().st_mode & 0o777 == 0o600


def test_an_answer_is_given_as_it_is(monkeypatch):
    """Of any status, not followed elsewhere, and asked of no proxy unless it may be."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    statuses = iter([200, 401, 302, 503])
    with serve(lambda body, number: (next(statuses), "1234567", {"Location": "/v1/elsewhere"})) as server:
        for status in (200, 401, 302, 503):
            found = io.ask("POST", server.url, "k3y", {"a": 1}, timeout_seconds=9, most_bytes=4)
            assert (found.status, found.content, found.headers["location"]) == (status, b"1234", "/v1/elsewhere")
        assert [request["path"] for request in server.requests] == ["/v1"] * 4
        assert server.requests[0]["body"] == {"a": 1}
        assert {request["headers"]["Authorization"] for request in server.requests} == {"Bearer k3y"}
        with pytest.raises(ConnectionRefusedError):  # of the proxy
            io.ask("POST", server.url, "k3y", {}, timeout_seconds=9, through_proxies=True)
    with pytest.raises(ConnectionRefusedError):
        io.ask("GET", "http://127.0.0.1:9", None, timeout_seconds=9)
