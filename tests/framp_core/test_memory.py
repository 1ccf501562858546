import pytest

from framp_core import memory
from framp_core.errors import DataError


def test_memory_is_what_the_container_may_use(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    whole = memory.available_memory()
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 300\nfile 0\n")
    assert memory.available_memory() == 700 < whole
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory() > 1000


def test_files_that_were_read_take_no_memory_from_a_container(tmp_path, monkeypatch):
    """A container that has read more than it may use is full of pages that the kernel drops when it needs them."""
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 300\nfile 690\nshmem 40\ninactive_file 600\nactive_file 50\n")
    assert memory.available_memory() == 1000 - 1000 + 600 + 50


def test_what_does_not_fit_is_refused_with_both_sizes(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 2 * 10**9)
    memory.require_memory(2 * 10**9, "a graph")
    with pytest.raises(DataError, match=r"a graph; reading it takes 3 GB of memory and 2 GB are free"):
        memory.require_memory(3 * 10**9, "a graph")
