"""Stores of older and later versions, and `vicreg-jepa memory`."""

from __future__ import annotations

import sqlite3

import numpy as np
import pytest
from vicreg_jepa import cli
from vicreg_jepa.memory import database
from vicreg_jepa.memory.database import StoreError
from vicreg_jepa.memory.reader import Reader
from vicreg_jepa.memory.writer import Writer

from tests.trainer.memory_processes import FORMAT, filled, version_1


@pytest.fixture
def store(tmp_path):
    with Writer(tmp_path / "store", FORMAT) as writer:
        yield writer


def schema(path) -> list[tuple]:
    connection = sqlite3.connect(path)
    found = connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
    version = connection.execute("PRAGMA user_version").fetchall()
    connection.close()
    return found + version


class TestVersions:
    def test_version_1_is_migrated(self, tmp_path):
        version_1(tmp_path / "old", 5)
        with pytest.raises(StoreError, match=r"has version 1, readers take 2: a writer migrates"):
            Reader(tmp_path / "old")
        with Writer(tmp_path / "new", FORMAT) as new:
            filled(new, range(5))
            with Writer(tmp_path / "old", FORMAT) as old:
                assert schema(old.path) == schema(new.path)
                rows, others = old.rows(), new.rows()
                for name in ("id", "world", "time", "embedding", "action", "outcome", "surprise"):
                    assert np.array_equal(getattr(rows, name), getattr(others, name))
                assert np.isnan(rows.place[8:12]).all()
                assert np.isfinite(rows.place[12:]).all()
                assert rows.uses.tolist() == [0] * 20
                assert old.session == 2
                filled(old, range(5, 6))
        with Reader(tmp_path / "old") as reader:
            assert len(reader) == 24

    def test_a_step_that_fails_leaves_the_old_version(self, tmp_path, monkeypatch):
        path = tmp_path / "old"
        version_1(path, 5)
        before = schema(path)

        def fails(connection):
            database._second(connection)
            raise sqlite3.OperationalError("database or disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(database, "STEPS", (database._first, fails))
            with pytest.raises(StoreError, match=r"disk is full: free some space"):
                Writer(path, FORMAT)
        assert schema(path) == before
        with Writer(path, FORMAT) as store:
            assert len(store) == 20

    def test_a_later_version_is_refused(self, store):
        store.close()
        with sqlite3.connect(store.path) as connection:
            connection.execute("PRAGMA user_version = 99")
        connection.close()
        for opened in (lambda: Reader(store.path), lambda: Writer(store.path, FORMAT)):
            with pytest.raises(StoreError, match=r"has version 99, takes at most 2: a later"):
                opened()


class TestCommand:
    def run(self, capsys, *words) -> tuple[int, str]:
        code = cli.main(["memory", *map(str, words)])
        return code, "".join(capsys.readouterr())

    def test_it_says_what_a_store_holds(self, store, capsys):
        filled(store, range(3))
        store.used([1, 1])
        code, text = self.run(capsys, store.path)
        assert code == 0
        assert "version 2" in text
        assert "embeddings of 'a test': 16 numbers; place 2, action 2, outcome 3" in text
        assert "12 rows of 2 episodes" in text
        assert "1 rows used, 2 times" in text
        assert "world 'first': 6 rows" in text
        assert "every page and every row is sound" in text
        store._connection.execute("UPDATE rows SET time = 7 WHERE id = 3")
        code, text = self.run(capsys, store.path)
        assert (code, text) == (1, "damaged: row 3 is damaged: its checksum differs\n")

    def test_it_migrates_where_it_is_told_to(self, tmp_path, capsys):
        version_1(tmp_path / "old", 2)
        code, text = self.run(capsys, tmp_path / "old")
        assert code == 2
        assert "--migrate" in text
        code, text = self.run(capsys, tmp_path / "old", "--migrate")
        assert code == 0
        assert "from version 1 to 2" in text
        assert "8 rows" in text

    def test_an_empty_store_and_no_store(self, store, tmp_path, capsys):
        code, text = self.run(capsys, store.path)
        assert code == 0
        assert "0 rows of 0 episodes" in text
        code, text = self.run(capsys, tmp_path / "none")
        assert (code, "store: " in text, "is no file" in text) == (2, True, True)
        assert not (tmp_path / "none").exists()
