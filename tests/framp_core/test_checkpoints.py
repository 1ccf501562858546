"""Checkpoints are whole or not there, wherever the process that writes them dies."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import framp_core.checkpoints as module
from framp_core.checkpoints import Checkpoints
from framp_core.errors import RunFolderError


class Killed(BaseException):
    """In place of a signal that nothing can catch."""


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"theta": torch.full((50,), value)}


def is_whole(checkpoints: Checkpoints, round: int) -> bool:
    """What is written at round r holds r everywhere."""
    read = checkpoints._read(round)
    return torch.equal(read.tensors["theta"], torch.full((50,), float(round))) and read.state == {"note": [round]}


def half_a_file(own: dict[str, torch.Tensor], path: Path) -> None:
    """A save that leaves half of its bytes before it returns, so that the next step may find them."""
    save_file(own, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    raise Killed


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Die instead of the ``step``-th call of whatever touches the disk; returns how many calls there were."""
    calls = 0

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step:
                raise Killed
            return real(*args, **kwargs)

        return call

    for owner, name in ((Path, "mkdir"), (Path, "write_text"), (Path, "rename"), (os, "fsync"), (os, "unlink")):
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    monkeypatch.setattr(os, "rmdir", watched(os.rmdir))
    monkeypatch.setattr(module, "save_file", watched(save_file))
    return lambda: calls


@pytest.mark.parametrize("step", range(1, 16))
def test_a_write_that_dies_at_any_step_leaves_whole_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for round in (1, 2):
        checkpoints.write(round, tensors(round), {"note": [round]}, kept=2)
    with monkeypatch.context() as patch:
        steps = killed_at(step, patch)
        try:
            checkpoints.write(3, tensors(3), {"note": [3]}, kept=2)
            died = False
        except Killed:
            died = True
    assert died == (step <= steps())
    rounds = checkpoints.rounds()
    assert rounds[0] in (2, 3)
    assert len(rounds) >= 2
    assert all(is_whole(checkpoints, round) for round in rounds)
    assert Checkpoints(checkpoints.path).newest().round == rounds[0]  # type: ignore[union-attr]
    after = Checkpoints(checkpoints.path)
    after.clean(rounds[0])
    assert not list(checkpoints.path.glob("*.tmp"))
    after.write(4, tensors(4), {"note": [4]}, kept=2)
    assert after.rounds() == [4, rounds[0]]


def test_the_steps_above_are_all_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for round in (1, 2):
        checkpoints.write(round, tensors(round), {}, kept=2)
    steps = killed_at(0, monkeypatch)
    checkpoints.write(3, tensors(3), {}, kept=2)
    assert 10 <= steps() < 15


def test_half_a_tensors_file_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.write(1, tensors(1), {"note": [1]}, kept=2)
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", half_a_file)
        with pytest.raises(Killed):
            checkpoints.write(2, tensors(2), {"note": [2]}, kept=2)
    assert checkpoints.rounds() == [1]
    assert list(checkpoints.path.glob("*.tmp"))
    checkpoints.write(2, tensors(2), {"note": [2]}, kept=2)
    assert is_whole(checkpoints, 2)
    assert not list(checkpoints.path.glob("*.tmp"))


def damage_tensors(folder: Path) -> None:
    file = folder / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def damage_state(folder: Path) -> None:
    file = folder / "state.json"
    file.write_text(file.read_text().replace("3", "8", 1))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit of the tensors": damage_tensors,
    "a digit of the state": damage_state,
    "tensors cut": lambda folder: os.truncate(folder / "tensors.safetensors", 20),
    "state cut": lambda folder: os.truncate(folder / "state.json", 5),
    "no tensors": lambda folder: (folder / "tensors.safetensors").unlink(),
    "no state": lambda folder: (folder / "state.json").unlink(),
    "empty": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for round in (2, 3):
        checkpoints.write(round, tensors(round), {"note": [round]}, kept=2)
    DAMAGES[name](checkpoints.path / "round-000003")
    with caplog.at_level("WARNING", logger="flwr"):
        found = checkpoints.newest()
    assert found is not None
    assert found.round == 2
    assert "checkpoint of round 3" in caplog.text
    checkpoints.clean(2)
    assert checkpoints.rounds() == [2]
    damage_tensors(checkpoints.path / "round-000002")
    with pytest.raises(RunFolderError, match=r"every checkpoint .* damaged .*round 2"):
        checkpoints.newest()


def test_without_checkpoints_there_is_none(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.newest() is None
    assert checkpoints.rounds() == []
    checkpoints.clean(0)
    assert not checkpoints.path.exists()


@pytest.mark.parametrize("kept", [1, 3])
def test_the_newest_are_kept(tmp_path: Path, kept: int) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for round in (1, 5, 999_999, 1_000_000):
        checkpoints.write(round, tensors(round), {}, kept)
    assert checkpoints.rounds() == [1_000_000, 999_999, 5, 1][:kept]


def test_a_full_disk_is_named_and_costs_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.write(1, tensors(1), {"note": [1]}, kept=1)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunFolderError, match=r"round-000002.* cannot be written \(No space left"):
            checkpoints.write(2, tensors(2), {"note": [2]}, kept=1)
    assert is_whole(checkpoints, 1)


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    shared = torch.randn(7, generator=torch.Generator().manual_seed(0))
    written = {
        "theta": shared,
        "view": shared[2:5],
        "half": shared.to(torch.bfloat16),
        "double": shared.double(),
        "scalar": torch.tensor(3),
        "numpy": np.arange(6, dtype=np.int64).reshape(2, 3)[:, ::2],
        "leaf": torch.nn.Parameter(torch.ones(2)),
    }
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.write(4, written, {"strength": 0.1}, kept=1)
    found = checkpoints.newest()
    assert found is not None
    assert (found.round, found.state) == (4, {"strength": 0.1})
    assert set(found.tensors) == set(written)
    for name, tensor in written.items():
        expected = torch.as_tensor(tensor).detach()
        assert found.tensors[name].dtype == expected.dtype
        assert torch.equal(found.tensors[name], expected)
