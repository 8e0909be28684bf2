"""A store loses nothing: killed in the middle of writes, on a full disk, on a disk that cannot be
written, damaged, with a second writer, and read by other processes while it is written.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from vicreg_jepa.memory import database, report
from vicreg_jepa.memory.database import StoreError
from vicreg_jepa.memory.reader import Reader
from vicreg_jepa.memory.writer import Writer

from tests.trainer.memory_processes import (
    AT_ONCE,
    FORMAT,
    WORLDS,
    commits,
    digest,
    drawn,
    is_drawn,
    version_1,
    write,
)

ROOT = Path(__file__).resolve().parents[2]


def process(what: str, store: Path, argument: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "tests.trainer.memory_processes", what, str(store)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    return subprocess.Popen(
        [*words, str(argument)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )


def ended(child: subprocess.Popen[str]) -> str:
    text = child.communicate(timeout=120)[0]
    assert child.returncode == 0, text
    return text


class TestKilled:
    def killed(self, path: Path, most: int, seconds: float) -> tuple[int, str]:
        """The last commit that the writer told of, and what was found then."""
        child = process("writes", path, most)
        assert child.stdout is not None
        first = child.stdout.readline()
        time.sleep(seconds)
        child.send_signal(signal.SIGKILL)
        lines = [first, *child.stdout.read().splitlines(keepends=True)]
        child.wait(timeout=60)
        child.stdout.close()
        assert child.returncode == -signal.SIGKILL
        number, found = [line for line in lines if line.endswith("\n")][-1].split()
        return int(number), found

    def rounds(self, folder: Path, rounds: int, most: int) -> None:
        path, draw, same = folder / "store", np.random.default_rng(most), 0
        # A third of the kills and more must come after a commit was told, so that its bits are
        # known; on a slow disk, or a busy machine, that takes more rounds.
        least = rounds // 3
        for done in range(4 * rounds):
            if done >= rounds and same >= least:
                break
            told, found = self.killed(path, most, draw.uniform(0, 0.1))
            assert report.problems(path) == []
            with Reader(path) as store:
                number, ids = commits(store), store.rows().id
                assert number in (told, told + 1)  # it may be killed before it tells
                assert is_drawn(store.rows())
                young = range(max(1, ids[-1] - most // 4 + 1), ids[-1] + 1)
                assert set(young) <= set(ids.tolist())
                assert len(ids) <= most
                if ids[-1] <= most:
                    assert len(ids) == ids[-1]
                if number == told:
                    assert digest(store) == found
                    same += 1
                with Writer(path, FORMAT, most) as writer:  # its lock is free
                    assert digest(writer) == digest(store)
        assert same >= least

    @pytest.mark.parametrize("most", [64, 100_000], ids=["evicting", "growing"])
    def test_no_row_is_lost_and_none_is_there_by_half(self, most, tmp_path):
        self.rounds(tmp_path, 3, most)

    @pytest.mark.thorough
    @pytest.mark.parametrize("most", [64, 100_000], ids=["evicting", "growing"])
    def test_no_row_is_lost_in_25_rounds(self, most, tmp_path):
        """5 CPU-seconds each."""
        self.rounds(tmp_path, 25, most)

    def test_a_migration_that_is_killed_is_made_again(self, tmp_path):
        version_1(tmp_path / "old", 30)
        child = process("is_killed_migrating", tmp_path / "old", 70)
        child.communicate(timeout=60)
        assert child.returncode == -signal.SIGKILL
        with pytest.raises(StoreError, match="has version 1"):
            Reader(tmp_path / "old")
        with Writer(tmp_path / "old", FORMAT) as store:
            assert len(store) == 30 * AT_ONCE


def test_readers_see_whole_commits_while_another_process_writes(tmp_path):
    last = 40
    with Writer(tmp_path / "store", FORMAT) as store:
        children = [process("reads", store.path, last) for _ in range(2)]
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        episodes = store.begin(WORLDS)
        for number in range(last):
            write(store, episodes, number)
            time.sleep(0.002)
        for child in children:
            states, found = ended(child).split()
            assert int(states) > 2
            assert found == digest(store)


def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path):
    with Writer(tmp_path / "store", FORMAT) as store:
        episodes = store.begin(WORLDS)
        (tmp_path / "link").symlink_to(store.path)
        for path in (store.path, tmp_path / "link"):
            with pytest.raises(StoreError, match=r"has a writer, takes one at a time"):
                Writer(path, FORMAT)
        with pytest.raises(StoreError, match=r"has a writer"):
            report.migrated(store.path)
        write(store, episodes, 0)
        assert commits(store) == 1
    with Writer(tmp_path / "store", FORMAT) as store:
        assert commits(store) == 1


@pytest.fixture
def disk(tmp_path):
    """Mounts a file system in memory: disk("size=1m")."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if subprocess.run(words, capture_output=True).returncode:
            pytest.skip("file systems cannot be mounted here")
        return place

    yield mount
    subprocess.run(["umount", str(place)], capture_output=True)


def test_a_fork_of_the_writer_is_refused(tmp_path):
    with Writer(tmp_path / "store", FORMAT) as store:
        episodes = store.begin(WORLDS)
        write(store, episodes, 0)
        child = os.fork()
        if not child:
            try:
                write(store, episodes, 1)
            except StoreError as error:
                os._exit(0 if "was opened by another process" in str(error) else 2)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        write(store, episodes, 1)
        assert len(store) == 2 * AT_ONCE


def test_every_commit_waits_for_the_disk(tmp_path):
    """Else the system's crash could take what was said to be there; a killed process cannot show
    it.
    """
    with Writer(tmp_path / "store", FORMAT) as store:
        assert store._number("PRAGMA synchronous") == 2  # FULL
        assert store._number("PRAGMA foreign_keys") == 1


class TestRefused:
    def test_a_damaged_lock(self, tmp_path):
        Writer(tmp_path / "store", FORMAT).close()
        (tmp_path / "store-writer").write_bytes(b"no database" * 999)
        with pytest.raises(StoreError, match=r"store-writer': file is not a database"):
            Writer(tmp_path / "store", FORMAT)

    def test_a_full_disk_leaves_what_was_committed(self, disk):
        path = disk("size=400k") / "store"
        with Writer(path, FORMAT) as store:
            episodes = store.begin(WORLDS)

            def fill() -> None:
                while True:
                    write(store, episodes, commits(store))

            with pytest.raises(StoreError, match=r"is full: free some space; what was committed"):
                fill()
            number, found = commits(store), digest(store)
            assert number > 5
            assert is_drawn(store.rows())
            with pytest.raises(StoreError, match="full"):
                fill()
            assert commits(store) == number
            assert digest(store) == found
            subprocess.run(["mount", "-o", "remount,size=4m", str(path.parent)], check=True)
            write(store, episodes, number)
        with Reader(path) as reader:
            assert commits(reader) == number + 1
            assert is_drawn(reader.rows())
        assert report.problems(path) == []

    def test_a_limit_of_the_size_leaves_what_was_committed(self, tmp_path):
        child = process("is_limited", tmp_path / "store", 200_000)
        error, number = ended(child).splitlines()
        assert error.startswith("store: ")
        assert "free some space" in error or "ulimit" in error
        with Reader(tmp_path / "store") as reader:
            assert commits(reader) == int(number) > 5
            assert is_drawn(reader.rows())

    def test_a_disk_that_cannot_be_written(self, disk):
        place = disk("size=1m")
        with Writer(place / "store", FORMAT) as store:
            write(store, store.begin(WORLDS), 0)
        before = (place / "store").read_bytes()
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        with pytest.raises(StoreError, match=r"store'.*writable"):
            Writer(place / "store", FORMAT)
        with pytest.raises(StoreError, match=r"new-writer'.*writable"):
            Writer(place / "new", FORMAT)
        assert (place / "store").read_bytes() == before

    def test_a_file_that_cannot_be_written(self, tmp_path, monkeypatch):
        """As SQLite opens a file without the permission to write, which root has always."""
        path = tmp_path / "store"
        with Writer(path, FORMAT) as store:
            write(store, store.begin(WORLDS), 0)
        connect = database.connect
        monkeypatch.setattr(
            database, "connect", lambda file, mode: connect(file, "ro" if file == path else mode)
        )
        with pytest.raises(StoreError, match=r"readonly database: make the file and its folder"):
            Writer(path, FORMAT)
        with Reader(path) as reader:
            assert commits(reader) == 1

    @pytest.mark.parametrize("kind", ["folder", "pipe", "text", "empty", "database", "nowhere"])
    def test_what_is_no_store_is_named_and_left(self, kind, tmp_path):
        path = tmp_path / "thing"
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "text":
            path.write_text("no database" * 1000)
        elif kind == "empty":
            path.touch()
        elif kind == "database":
            with sqlite3.connect(path) as connection:
                connection.execute("CREATE TABLE mine (x)")
            connection.close()
        else:
            path = tmp_path / "no folder" / "thing"
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(ValueError, match=r"^store: "):
            Reader(path)
        if kind != "empty":  # a writer that was killed at once leaves an empty file
            with pytest.raises(ValueError, match=r"^store: "):
                Writer(path, FORMAT)
            assert before is None or path.read_bytes() == before


class TestDamaged:
    def test_a_damaged_page_is_an_error_and_never_another_row(self, tmp_path):
        """Each page in turn, at some bytes: what is read is what was written, or there is an error;
        the file stays as it is.
        """
        path = tmp_path / "store"
        with Writer(path, FORMAT) as store:
            for world in range(20):
                episodes = store.begin([f"{world} {name * 9}" for name in WORLDS])
                for number in range(3):
                    write(store, episodes, number)
            rows = store.rows()
            true = hashlib.sha256(repr([rows, rows.world.tolist()]).encode()).hexdigest()
        whole, draw, found = path.read_bytes(), np.random.default_rng(0), []
        for page in range(len(whole) // 4096):
            for width in (1, 64, 4096):
                hurt = bytearray(whole)
                begin = 4096 * page + int(draw.integers(0, 4097 - width))
                hurt[begin : begin + width] = draw.bytes(width)
                path.write_bytes(hurt)
                try:
                    with Reader(path) as reader:
                        rows = reader.rows()
                        text = repr([rows, rows.world.tolist()])
                        assert hashlib.sha256(text.encode()).hexdigest() == true
                except StoreError as error:
                    found.append(str(error))
                assert path.read_bytes() == hurt
                for beside in ("-wal", "-shm"):
                    path.with_name(path.name + beside).unlink(missing_ok=True)
        assert len(found) > 2 * len(whole) // 4096
        for words in (": row ", "malformed", "is damaged ("):
            assert any(words in text for text in found)

    def test_a_truncated_store_is_an_error(self, tmp_path):
        path = tmp_path / "store"
        with Writer(path, FORMAT) as store:
            episodes = store.begin(WORLDS)
            for number in range(40):
                write(store, episodes, number)
        whole = path.read_bytes()
        for length in (100, 4096, len(whole) // 2, len(whole) - 4096, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(StoreError, match=r"malformed|not a database|damaged"):
                Reader(path)
            with pytest.raises(StoreError):
                Writer(path, FORMAT)

    def test_a_row_of_other_numbers_is_found(self, tmp_path):
        path = tmp_path / "store"
        with Writer(path, FORMAT) as store:
            write(store, store.begin(WORLDS), 0)
        place = path.read_bytes().index(drawn(0)["embeddings"][2].tobytes())
        hurt = bytearray(path.read_bytes())
        hurt[place + 5] ^= 1
        path.write_bytes(hurt)
        with pytest.raises(StoreError, match=r"row 3 is damaged: restore a copy"):
            Reader(path)
        assert report.problems(path) == ["row 3 is damaged: its checksum differs"]
