"""Physics videos on disk and in DataLoaders: the same samples however they are made."""

from __future__ import annotations

import json
import os
import tarfile

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from vicreg_jepa.files.output import OutputError
from vicreg_jepa.physics import __main__, possible, quadruplet, shards
from vicreg_jepa.physics.datasets import PhysicsShards, Simulated

SETTINGS = shards.Settings(seed=7, per_shard=4)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    shards.write(folder, 10, SETTINGS)
    return folder


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_give_back_what_was_simulated(written):
    stored = PhysicsShards(written)
    assert len({stored[index].numpy().tobytes() for index in range(10)}) == len(stored) == 10
    for index in (0, 5, 9):
        sample = possible(shards.sample_seed(7, index))
        assert np.array_equal(stored[index].numpy(), sample.video)
        assert stored.record(index) == json.loads(json.dumps(sample.record))


def test_a_resumed_run_gives_the_same_shards(written, tmp_path):
    count = 0

    def stop(more):
        nonlocal count
        count += more
        if count == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.write(tmp_path, 10, SETTINGS, done=stop)
    assert sorted(content(tmp_path)) == ["dataset.json", "physics-000000.tar"]
    shards.write(tmp_path, 6, SETTINGS)
    kept = (tmp_path / "physics-000000.tar").stat().st_mtime_ns
    shards.write(tmp_path, 10, SETTINGS, workers=1)
    assert (tmp_path / "physics-000000.tar").stat().st_mtime_ns == kept
    assert content(tmp_path) == content(written)
    with pytest.raises(ValueError, match=r"seed: got 8, but .* was begun with 7"):
        shards.write(tmp_path, 10, shards.Settings(seed=8, per_shard=4))


def test_damaged_shards_are_refused(written, tmp_path):
    whole = (written / "physics-000000.tar").read_bytes()
    path = tmp_path / "physics-000000.tar"
    entry = shards.index_of(written / "physics-000000.tar")[1]
    # In the end mark, in a sample, between two samples, and at whole records of an archive.
    for size in (0, 1, len(whole) - 512, len(whole) // 2, entry.arrays[0] - 512, 10240, 20480):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"physics-000000\.tar' is truncated"):
            PhysicsShards(tmp_path)
    broken = bytearray(whole)
    middle = entry.arrays[0] + entry.arrays[1] // 2
    broken[middle : middle + 8] = bytes(8)
    path.write_bytes(broken)
    with pytest.raises(ValueError, match="sample 000000001: "):
        PhysicsShards(tmp_path)[1]


def test_quadruplets_go_into_shards(tmp_path):
    shards.write(tmp_path, 1, shards.Settings(seed=2, property="inertia"))
    stored = PhysicsShards(tmp_path)
    again = quadruplet("inertia", shards.sample_seed(2, 0))
    assert np.array_equal(stored[0].numpy(), again.videos)
    assert stored.record(0)["first_difference"] == again.first_difference


def test_workers_simulate_each_video_once(written):
    whole = PhysicsShards(written)
    alone = [video for video in Simulated(7, videos=4, first=2)]
    assert all(torch.equal(video, whole[2 + n]) for n, video in enumerate(alone))
    simulated = []
    for rank in (0, 1):
        source = Simulated(7, videos=10, rank=rank, ranks=2)
        for batch in DataLoader(source, batch_size=2, num_workers=2 if rank else 0):
            assert batch.dtype == torch.uint8
            simulated += [video.numpy().tobytes() for video in batch]
    assert sorted(simulated) == sorted(video.numpy().tobytes() for video in whole)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Simulated(-1), "seed: got -1"),
        (lambda: Simulated(0, videos=0), "videos: got 0"),
        (lambda: Simulated(0, first=-1), "first: got -1"),
        (lambda: Simulated(0, rank=2, ranks=2), "rank: got 2 of 2"),
        (lambda: PhysicsShards("no/such/folder"), "folder: got 'no/such/folder'"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# The command


def test_the_command_writes_and_counts(tmp_path, capsys):
    __main__.main(["--output", str(tmp_path), "--videos", "3", "--workers", "0", "--seed", "7"])
    assert "3 videos in 1 shards" in capsys.readouterr().out
    assert len(PhysicsShards(tmp_path)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--output"),
        (["--output", __file__], "--output: got"),
        (["--output", "OUT", "--videos", "0"], "--videos: got '0', takes an integer from 1"),
        (["--output", "OUT", "--workers", "-1"], "--workers: got '-1'"),
        (["--output", "OUT", "--seed", "x"], "--seed: got 'x'"),
        (["--output", "OUT", "--property", "magic"], "--property: invalid choice: 'magic'"),
        (["--output", "OUT", "--seed", "1"], "--seed: got 1, but"),
        (["--output", "OUT", "--seed", "7"], "--videos-per-shard: got 256, but"),
    ],
)
def test_bad_options_are_named(options, message, written, capsys):
    options = [str(written) if option == "OUT" else option for option in options]
    before = content(written)
    with pytest.raises(SystemExit) as stopped:
        __main__.main(options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert content(written) == before


@pytest.mark.parametrize("content", [b"", b'{"seed": 0', b"[]", b"\xff", b"[" * 100000])
def test_damaged_settings_are_named(content, tmp_path):
    (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"dataset\.json: is damaged"):
        shards.write(tmp_path, 1, shards.Settings(0))


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "dataset.json")
    with pytest.raises(ValueError, match=r"dataset\.json' is no regular file"):
        shards.write(tmp_path, 1, shards.Settings(0))


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile, "open", full)
    with pytest.raises(OutputError, match=rf"{tmp_path}.*No space left on device\): free some"):
        shards.write(tmp_path, 1, shards.Settings(0))
    assert [path.name for path in tmp_path.iterdir()] == ["dataset.json"]


def test_ctrl_c_has_its_exit_code(tmp_path, monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "write", stopped)
    with pytest.raises(SystemExit) as ended:
        __main__.main(["--output", str(tmp_path), "--videos", "1"])
    assert ended.value.code == 130
    assert "the same command resumes" in capsys.readouterr().err
