"""Other packages' indexes behind the memory's interface, where they are installed."""

from __future__ import annotations

import numpy as np
import pytest
from vicreg_jepa.memory.index import Scan
from vicreg_jepa.memory.qdrant_index import QdrantIndex, QdrantReader
from vicreg_jepa.memory.reader import Reader
from vicreg_jepa.memory.usearch_index import UsearchIndex
from vicreg_jepa.memory.writer import Writer

from tests.trainer.memory_processes import AT_ONCE, FORMAT, QUERY, filled, is_drawn


class Shared(Scan):
    """An index that other processes would see."""

    shared = True


class TestShared:
    def test_a_writer_keeps_it_up_to_date_and_a_reader_refuses_it(self, tmp_path):
        index = Shared()
        with Writer(tmp_path / "store", FORMAT, index=index) as store:
            filled(store, range(2))
            assert sorted(index.ids()) == store.rows().id.tolist()
        with pytest.raises(ValueError, match=r"^index: got Shared, which other processes see"):
            Reader(tmp_path / "store", index=index)


class TestUsearch:
    def test_it_finds_what_the_scan_finds(self, tmp_path):
        """Among few rows it looks at all."""
        pytest.importorskip("usearch")
        with (
            Writer(tmp_path / "store", FORMAT, most=64, index=UsearchIndex()) as store,
            Reader(tmp_path / "store") as exact,
        ):
            for number in range(40):
                filled(store, range(number, number + 1))
                for world in (None, "first", "another"):
                    pairs = zip(
                        store.nearest(QUERY, 5, world), exact.nearest(QUERY, 5, world), strict=True
                    )
                    for ours, true in pairs:
                        assert ours.rows.id.tolist() == true.rows.id.tolist()
                        assert np.allclose(ours.distance, true.distance, rtol=1e-5)
            assert sorted(store._index.ids()) == store.rows().id.tolist()
        with Reader(tmp_path / "store", index=UsearchIndex()) as reader:
            assert len(reader.nearest(QUERY, 99)[0].rows) == len(reader)


class TestQdrant:
    @pytest.fixture
    def client(self):
        return pytest.importorskip("qdrant_client").QdrantClient(":memory:")

    def test_other_machines_recall_from_the_collection_alone(self, client, tmp_path):
        index = QdrantIndex(client, "memory", FORMAT)
        there = QdrantReader(client, "memory", FORMAT)
        with Writer(tmp_path / "store", FORMAT, most=64, index=index) as store:
            for number in range(30):
                filled(store, range(number, number + 1))
                assert sorted(index.ids()) == store.rows().id.tolist()
        with Reader(tmp_path / "store") as exact:
            for world in (None, "first", "another"):
                pairs = zip(
                    there.nearest(QUERY, 5, world), exact.nearest(QUERY, 5, world), strict=True
                )
                for ours, true in pairs:
                    assert ours.rows.id.tolist() == true.rows.id.tolist()
                    assert np.allclose(ours.distance, true.distance, rtol=1e-5)
                    for name in ("embedding", "place", "action", "outcome", "surprise", "session"):
                        assert np.array_equal(getattr(ours.rows, name), getattr(true.rows, name))
                    assert is_drawn(ours.rows)

    def test_the_collection_follows_the_store_when_it_was_left_behind(self, client, tmp_path):
        index = QdrantIndex(client, "memory", FORMAT)
        with Writer(tmp_path / "store", FORMAT, index=index) as store:
            filled(store, range(4))
        index.remove(np.array([3, 4]))
        with Writer(tmp_path / "store", FORMAT, most=16) as store:  # evicts, without the index
            filled(store, range(4, 8))
            left = store.rows().id.tolist()
        with Writer(tmp_path / "store", FORMAT, index=QdrantIndex(client, "memory", FORMAT)):
            assert sorted(index.ids()) == left

    def test_a_database_that_does_not_answer_loses_no_row(self, client, tmp_path, monkeypatch):
        index = QdrantIndex(client, "memory", FORMAT)
        with Writer(tmp_path / "store", FORMAT, index=index) as store:
            with monkeypatch.context() as patch:
                patch.setattr(client, "upsert", lambda *_, **__: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    filled(store, range(1))
            filled(store, range(1, 2))
            assert len(store) == len(index.ids()) == 2 * AT_ONCE

    def test_bad_input_is_named(self, client, tmp_path):
        index = QdrantIndex(client, "memory", FORMAT)
        with Writer(tmp_path / "store", FORMAT):
            pass
        with pytest.raises(ValueError, match=r"^index: got QdrantIndex"):
            Reader(tmp_path / "store", index=index)
        client.create_collection(
            "other",
            vectors_config=index.models.VectorParams(size=3, distance=index.models.Distance.DOT),
        )
        with pytest.raises(ValueError, match=r"^collection: got 'other' with 3 dimensions"):
            QdrantIndex(client, "other", FORMAT)
        there = QdrantReader(client, "memory", FORMAT)
        with pytest.raises(ValueError, match=r"^queries: got shape"):
            there.nearest(QUERY[0], 1)


@pytest.mark.parametrize("module", ["usearch.index", "qdrant_client"])
def test_what_is_not_installed_is_named(module, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ImportError, match=r"pip install (usearch|qdrant-client)"):
        UsearchIndex() if module.startswith("usearch") else QdrantIndex(None, "a", FORMAT)
