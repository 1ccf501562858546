import pytest

from framp_core import memory
from framp_core.errors import DataError


def test_memory_is_what_the_container_may_use(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    whole = memory.available_memory()
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 100\nfile 200\ninactive_file 0\n")
    assert memory.available_memory() == 700 < whole


def test_files_that_were_read_do_not_take_the_memory_of_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    for name, text in {"current": "990\n", "max": "1000\n", "stat": "anon 90\ninactive_file 800\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory.available_memory() == 810


def test_what_does_not_fit_is_refused_with_both_sizes(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 2 * 10**9)
    memory.require_memory(2 * 10**9, "a graph")
    with pytest.raises(DataError, match=r"a graph; reading it takes 3 GB of memory and 2 GB are free"):
        memory.require_memory(3 * 10**9, "a graph")
