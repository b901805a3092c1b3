"""Files of data that are damaged or hostile are refused by name; lines are lines, whatever captions are made of."""

import io
import json
import tarfile

import numpy as np
import pytest
from test_choice import write_aro, write_sugarcrepe, write_winoground
from test_weat import build as build_weat

from multimodal.data.archives import described, read_members, read_text
from multimodal.data.manifest import Manifest
from multimodal.data.prompts import named_classes, read_templates
from multimodal.data.shards import Shards
from multimodal.data.texts import lines_of
from multimodal.evals.sts import read_pairs

DEEP = "[" * 100_000
ODD = "a\u2028b\x0cc\x85d"
"""One line, which `str.splitlines` makes four of."""


def packed(path, members, kind="w"):
    """A tar of these files; a member that is no bytes is a link."""
    with tarfile.open(path, kind) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                tar.addfile(info)
    return path


@pytest.mark.parametrize("kind", ["w", "w:gz", "w:bz2", "w:xz"])
def test_an_archive_is_read_or_refused_by_name_whatever_bytes_are_damaged(tmp_path, kind):
    rng = np.random.default_rng(0)
    texts = {f"{name}.txt": f"{name} {rng.bytes(2000).hex()}".encode() for name in "abc"}
    file = packed(tmp_path / "texts.tar", texts, kind)
    sound, read = np.frombuffer(file.read_bytes(), np.uint8), 0
    for trial in range(150):
        damaged = sound.copy()
        places = rng.integers(512 if trial % 2 else len(damaged), size=3)  # the first header says what it is
        damaged[places] = rng.integers(256, size=3)
        file.write_bytes(damaged[: rng.integers(len(damaged)) if trial % 5 == 0 else None].tobytes())
        try:
            read += read_text(tmp_path, "texts.tar", "b.txt").startswith("b")
        except ValueError as error:
            told = str(error)
        else:
            continue
        assert "texts.tar" in told, told
    assert read < 150


def test_links_in_an_archive_are_not_followed(tmp_path):
    links = {
        "lost.json": (tarfile.SYMTYPE, "nowhere.json"),
        "loop.json": (tarfile.SYMTYPE, "loop.json"),
        "hard.json": (tarfile.LNKTYPE, "gone.json"),
    }
    path = packed(tmp_path / "texts.tar.gz", {**links, "right.json": b"{}"}, "w:gz")
    assert read_members(path, lambda name: True) == (["right.json"], {"right.json": b"{}"})
    for member in links:
        with pytest.raises(ValueError, match=rf"texts.tar.gz has no file '{member}' in it, only right.json"):
            read_text(tmp_path, path.name, member)
    with pytest.raises(ValueError, match=r"texts.tar.gz is an archive: set `member` to one of right.json"):
        read_text(tmp_path, path.name, None)


def test_a_size_below_zero_is_refused_and_not_read_for_ever(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.pax_headers = {"size": "-2048"}
        tar.addfile(info)
    for build in (lambda: read_text(tmp_path, "0.tar", "a"), lambda: Shards(urls=["0.tar"]).build(tmp_path)):
        with pytest.raises(ValueError, match=r"0\.tar.*size -2048"):
            build()


def test_what_is_nested_without_end_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"swap_obj\.json: not JSON to be read .nested too deeply"):
        write_sugarcrepe(tmp_path, {"swap_obj": DEEP}).build(tmp_path)
    dataset = write_aro(tmp_path)
    (tmp_path / "aro/visual_genome_relation.json").write_text(DEEP)
    with pytest.raises(ValueError, match=r"visual_genome_relation\.json: .*nested too deeply"):
        dataset.build(tmp_path)
    dataset = write_winoground(tmp_path)
    (tmp_path / "examples.jsonl").write_text(f"\n{DEEP}\n")
    with pytest.raises(ValueError, match=r"examples\.jsonl, line 2: .*nested too deeply"):
        dataset.build(tmp_path)
    (tmp_path / "pairs.jsonl").write_text(f"{DEEP}\n")
    with pytest.raises(ValueError, match=r"pairs\.jsonl, line 1: .*nested too deeply"):
        Manifest(path="pairs.jsonl").build(tmp_path)
    with pytest.raises(ValueError, match=r"tests\.json: .*nested too deeply"):
        build_weat(tmp_path, DEEP)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_where_files_say_and_nowhere_else(tmp_path, end):
    text = end.join([ODD, "", "e", ""])
    assert lines_of(text) == [ODD, "", "e"]
    (tmp_path / "names.txt").write_bytes(text.encode("utf-8-sig"))
    assert named_classes("names.txt", tmp_path, ()) == (ODD, "", "e")
    (tmp_path / "templates.txt").write_bytes(end.join([f"{{}} {ODD}", "a {c}"]).encode())
    assert read_templates(tmp_path / "templates.txt") == (f"{{}} {ODD}", "a {}")
    row = "\t".join(["g", "f", "2012", "1", "2.5", ODD, "e"])
    assert [(pair.first, pair.second) for pair in read_pairs(f"{row}{end}{row}{end}", "x")] == [(ODD, "e")] * 2


def test_a_caption_is_a_line_of_its_file(tmp_path):
    packed(tmp_path / "0.tar", {"a.jpg": b"x", "a.txt": f"{ODD}\r\ne".encode()})
    assert Shards(urls=["0.tar"], json_field=None).build(tmp_path).captions(0) == (ODD, "e")
    dataset = write_winoground(tmp_path, caption_0=f"{ODD} e", caption_1=f"e {ODD}")
    text = (tmp_path / "examples.jsonl").read_text().replace("\\u2028", "\u2028").replace("\\u0085", "\x85")
    (tmp_path / "examples.jsonl").write_text(text)
    assert dataset.build(tmp_path).choices[0].right == f"{ODD} e"
    assert json.loads(text.split("\n")[0])["caption_0"] == f"{ODD} e"


def test_a_member_is_told_with_its_archive():
    assert described("a.tar.gz", "b.csv") == "a.tar.gz:b.csv"
    assert described("b.csv", None) == "b.csv"
