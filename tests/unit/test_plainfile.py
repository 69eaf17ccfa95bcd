# SPDX-License-Identifier: Apache-2.0
"""Claims about reading files that a person names."""

import os
import socket

import pytest

from allograft.errors import RejectedError
from allograft.plainfile import open_plain, read_plain


def test_reads_a_file_and_refuses_a_larger_one(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_plain(path, 5) == b"12345"
    with open_plain(path) as handle:
        assert handle.read() == b"12345"
    with pytest.raises(RejectedError) as caught:
        read_plain(path, 4)
    assert caught.value.code == "AG-IN-002"


def test_follows_links_only_where_asked_to(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert read_plain(tmp_path / "link", 1) == b"x"
    with pytest.raises(OSError, match="link"):
        read_plain(tmp_path / "link", 1, follow_links=False)


def test_never_waits_for_what_is_no_regular_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # A socket's path may be 100 bytes at most.
    os.mkfifo("pipe")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        for name in ("pipe", "folder", "socket", "/dev/zero", "absent"):
            with pytest.raises(OSError, match=name):
                open_plain(tmp_path / name)
