"""Shards: whatever is wrong in a tar is named with its place, and no sample goes missing unsaid."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from vicreg_jepa.files import tar_index


def tar_of(files: dict[str, bytes], format: int = tarfile.USTAR_FORMAT) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=format) as shard:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return packed.getvalue()


FILES = {f"{n:03d}.{s}": bytes([n]) * 700 for n in range(4) for s in ("png", "cls")}
LONG = {f"{'deep' * 40}/{name}": content for name, content in FILES.items()}


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_damaged_header_is_named_with_its_place(format, tmp_path):
    whole = tar_of(LONG if format != tarfile.USTAR_FORMAT else FILES, format)
    with tarfile.open(fileobj=io.BytesIO(whole)) as shard:
        places = [member.offset_data - 512 for member in shard]
    assert len(tar_index.index(put(tmp_path / "a.tar", whole))) == 4
    for place in places:
        for at in (0, 124, 148, 156, 257):  # name, size, checksum, type, magic
            hurt = bytearray(whole)
            hurt[place + at] ^= 0x40
            path = put(tmp_path / "a.tar", bytes(hurt))
            with pytest.raises(ValueError, match=r"a\.tar' is truncated or damaged \(.*byte \d+"):
                tar_index.index(path)


def test_what_follows_the_last_member_is_named_with_its_place(tmp_path):
    whole = tar_of(FILES)
    assert len(whole) == 20480  # eight members of three blocks, the end, and padding
    for place in (12288, 13312, 20479, 20480, 30000):
        hurt = bytearray(whole.ljust(40960, b"\0"))
        hurt[place] = 1
        path = put(tmp_path / "a.tar", bytes(hurt))
        with pytest.raises(ValueError, match=rf"byte {place}\b"):
            tar_index.index(path)
    # two archives in one file: reading the first alone would lose the second
    path = put(tmp_path / "a.tar", whole + tar_of({"9.png": b"x"}))
    with pytest.raises(ValueError, match=r"byte 20480\b"):
        tar_index.index(path)
    # more zeros than needed are what `tar -b` leaves
    assert len(tar_index.index(put(tmp_path / "a.tar", whole + bytes(100000)))) == 4


def test_a_member_that_reaches_beyond_the_file_is_named(tmp_path):
    member = tarfile.TarInfo("0.png")
    for size in (10**6, 8**11 - 1):
        member.size = size
        path = put(tmp_path / "a.tar", member.tobuf(tarfile.USTAR_FORMAT) + bytes(4096))
        with pytest.raises(ValueError, match=r"a\.tar' is truncated or damaged"):
            tar_index.index(path)
    for text in (b"-1", b"\xff" * 12, b"9" * 11):  # sizes that are no octal number
        header = bytearray(tarfile.TarInfo("0.png").tobuf(tarfile.USTAR_FORMAT))
        header[124:136] = text.ljust(12, b"\0")
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:]))
        path = put(tmp_path / "a.tar", bytes(header) + bytes(4096))
        with pytest.raises(ValueError, match=r"a\.tar' is truncated or damaged"):
            tar_index.index(path)


def test_extended_headers_that_say_nonsense_are_named(tmp_path):
    def with_pax(content: bytes) -> bytes:
        extended = tarfile.TarInfo("x")
        extended.type, extended.size = tarfile.XHDTYPE, len(content)
        header = extended.tobuf(tarfile.USTAR_FORMAT)
        return header + content.ljust(-(-len(content) // 512) * 512, b"\0") + tar_of(FILES)

    assert len(tar_index.index(put(tmp_path / "a.tar", with_pax(b"15 comment=abc\n")))) == 4
    for content in (
        b"14 size=abcde\n",
        b"99 path=a\n",
        b"11 path=a\n",
        b"junk",
        b"16 size=9999999\n",
        b"10 qath=a\n",
        b"9 path=a\n9 path=b\r",
        b"9" * 30 + b" path=a\n",
        b"9 path=a\n\0\0",
    ):
        path = put(tmp_path / "a.tar", with_pax(content))
        with pytest.raises(ValueError, match=r"a\.tar' is truncated or damaged"):
            tar_index.index(path)


def linked(kind: bytes, name: str, target: str) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member.tobuf(tarfile.USTAR_FORMAT)


def test_links_stand_for_the_member_that_they_name(tmp_path):
    """GNU tar stores the second name of a file as a hard link: its sample must not vanish."""
    first = tar_of({"a/0.png": b"picture"})[:1024]
    for kind, target in ((tarfile.LNKTYPE, "a/0.png"), (tarfile.SYMTYPE, "../a/0.png")):
        path = put(tmp_path / "a.tar", first + linked(kind, "b/1.png", target) + bytes(1024))
        samples = tar_index.index(path)
        assert [sample.key for sample in samples] == ["a/0", "b/1"]
        assert tar_index.read(path, samples[1].files["png"]) == b"picture"
    for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
        path = put(tmp_path / "a.tar", first + linked(kind, "1.png", "/data/1.png") + bytes(1024))
        with pytest.raises(ValueError, match=r"'1\.png' is a link to '/data/1\.png'"):
            tar_index.index(path)


def test_what_is_no_plain_file_in_a_shard_is_named(tmp_path):
    sparse = tarfile.TarInfo("0.png")
    sparse.type = tarfile.GNUTYPE_SPARSE
    path = put(tmp_path / "a.tar", sparse.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(ValueError, match=r"'0\.png' is a sparse file"):
        tar_index.index(path)
    folder = tarfile.TarInfo("a.b")  # only holds others
    folder.type = tarfile.DIRTYPE
    path = put(tmp_path / "a.tar", folder.tobuf(tarfile.USTAR_FORMAT) + tar_of({"a.b/0.png": b"x"}))
    assert [sample.key for sample in tar_index.index(path)] == ["a.b/0"]


def test_a_compressed_shard_is_said_to_be_compressed(tmp_path):
    import gzip

    path = put(tmp_path / "a.tar", gzip.compress(tar_of(FILES)))
    with pytest.raises(ValueError, match=r"a\.tar' is compressed, takes a plain tar"):
        tar_index.index(path)


def test_hidden_members_and_shards_are_skipped_with_a_word(tmp_path, capsys):
    put(tmp_path / "a.tar", tar_of({"0.png": b"x", "._0.png": b"y", "d/.b/1.png": b"z"}))
    put(tmp_path / "._a.tar", b"\0\5\x16\7")
    shards = tar_index.paths(tmp_path)
    assert [path.name for path in shards] == ["a.tar"]
    assert "._a.tar" in capsys.readouterr().err
    assert [[sample.key for sample in shard] for shard in tar_index.indices(shards)] == [["0"]]
    told = capsys.readouterr().err
    assert "2 hidden files are skipped" in told
    assert "._0.png" in told


@pytest.mark.parametrize(
    ("names", "pattern", "stems"),
    [
        (["set[v2].tar"], "set[v2].tar", ["set[v2]"]),
        (["p[1]-0.tar", "p1-0.tar"], "p[1]-*.tar", ["p[1]-0"]),
        (["p[1]-0.tar", "p[1]-1.tar"], "p[1]-{0..1}.tar", ["p[1]-0", "p[1]-1"]),
        (["a*.tar", "ab.tar"], "a*.tar", ["a*"]),
        (["a{x}.tar"], "a{x}.tar", ["a{x}"]),
        (["why?.tar"], "why?.tar", ["why?"]),
    ],
)
def test_characters_of_patterns_in_names(names, pattern, stems, tmp_path, monkeypatch):
    """A file of that very name is meant; brackets are no pattern."""
    folder = tmp_path / "run [v2]"
    folder.mkdir()
    for name in names:
        put(folder / name, b"")
    assert [path.stem for path in tar_index.paths(folder / pattern)] == stems
    monkeypatch.chdir(folder)
    assert [path.stem for path in tar_index.paths(pattern)] == stems
    assert len(tar_index.paths(folder)) == len(names)


def test_what_is_no_regular_file_is_refused_unopened(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    for pattern in (tmp_path, tmp_path / "a.tar", tmp_path / "*.tar"):
        with pytest.raises(ValueError, match=r"a\.tar' is no regular file"):
            tar_index.paths(pattern)
    (tmp_path / "a.tar").unlink()
    (tmp_path / "a.tar").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"a\.tar' is a link that leads nowhere"):
        tar_index.paths(tmp_path)
