"""Which files of a dataset of the Hub are meant, at which commit, or why none are."""

from __future__ import annotations

import hashlib
import sys
from typing import TYPE_CHECKING

import pytest

from tuppence.errors import UserError
from tuppence.text import corpora
from tuppence.text.corpora import CORPORA
from tuppence.text.hub_files import hub_files, place_of
from tuppence.text.sources import find_files

if TYPE_CHECKING:
    from hub_server import Hub

pytest_plugins = ["hub_server"]

SHA = "1234567890abcdef1234567890abcdef12345678"
CONVERTED = "c" * 40
PLAIN = {"README.md": b"a card", ".gitattributes": b"x", "LICENSE.txt": b"MIT"}


def names(source: str) -> list[str]:
    """The paths in the dataset, in reading order."""
    return [file.path.partition("@")[2].partition("/")[2] for file in hub_files(source)]


def test_a_file_tells_its_commit_and_content(hub: Hub) -> None:
    hub.add("owner/name", PLAIN | {"a.jsonl.gz": b"small", "b.jsonl": b"x" * 5000})
    small, large = hub_files("hf://owner/name")
    assert small.path == small.shown == f"hf://datasets/owner/name@{SHA}/a.jsonl.gz"
    assert (small.kind, small.compression, small.bytes) == ("jsonl", "gz", 5)
    assert small.identity.startswith("git:")
    assert large.identity == "sha256:" + hashlib.sha256(b"x" * 5000).hexdigest()
    assert small.remote


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["data/b.parquet", "data/a.parquet", "a.txt"], ["data/a.parquet", "data/b.parquet"]),
        (["x.txt", "x.jsonl.zst", "x.json"], ["x.jsonl.zst"]),
        (["x.txt", "x.json.gz", "dataset_infos.json"], ["x.json.gz"]),
        (["train-0.parquet", "train-1.parquet", "test-0.parquet", "val.parquet"],
         ["train-0.parquet", "train-1.parquet"]),
        (["train/0.jsonl", "validation/0.jsonl"], ["train/0.jsonl"]),
        (["en_part.jsonl", "dev.jsonl"], ["en_part.jsonl"]),
        (["only-test.parquet"], ["only-test.parquet"]),
        (["one/a.parquet", "one/b.parquet"], ["one/a.parquet", "one/b.parquet"]),
    ],
)  # fmt: skip
def test_what_a_whole_dataset_means(hub: Hub, files: list[str], chosen: list[str]) -> None:
    hub.add("owner/name", PLAIN | dict.fromkeys(files, b"x"))
    assert names("hf://owner/name") == chosen
    assert names("hf://datasets/owner/name/") == chosen


PARTS = {
    "data/c1/0.parquet": b"",
    "data/c2/0.parquet": b"",
    "sample/10BT/000.parquet": b"",
    "sample/10BT/001.parquet": b"",
    "sample/100BT/000.parquet": b"",
}
CARD = {
    "configs": [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*/*"}]},
        {
            "config_name": "sample-10BT",
            "data_files": [
                {"split": "train", "path": ["sample/10BT/000*", "sample/10BT/001*"]},
                {"split": "test", "path": "sample/100BT/*"},
            ],
        },
        {"config_name": "plain", "data_files": "data/c2/*"},
    ]
}


@pytest.mark.parametrize(
    ("inside", "chosen"),
    [
        ("", ["data/c1/0.parquet", "data/c2/0.parquet"]),
        ("/sample/10BT", ["sample/10BT/000.parquet", "sample/10BT/001.parquet"]),
        ("/sample-10BT", ["sample/10BT/000.parquet", "sample/10BT/001.parquet"]),
        ("/plain", ["data/c2/0.parquet"]),
        ("/sample/10BT/001.parquet", ["sample/10BT/001.parquet"]),
        ("/sample/*/000.parquet", ["sample/100BT/000.parquet", "sample/10BT/000.parquet"]),
        ("/**/0.parquet", ["data/c1/0.parquet", "data/c2/0.parquet"]),
    ],
)
def test_a_part_of_a_dataset(hub: Hub, inside: str, chosen: list[str]) -> None:
    hub.add("owner/name", PLAIN | dict.fromkeys(PARTS, b"x"))
    hub.cards["owner/name"] = CARD
    assert names(f"hf://owner/name{inside}") == chosen


def test_only_the_folder_that_is_asked_for_is_listed(hub: Hub) -> None:
    hub.add("owner/name", dict.fromkeys(PARTS, b"x"))
    hub.cards["owner/name"] = CARD
    for inside, folder in (("sample/10BT", "sample%2F10BT"), ("", "data"), ("plain", "data%2Fc2")):
        hub.asked.clear()
        hub_files(f"hf://owner/name/{inside}")
        assert [f"/tree/{SHA}/{folder}?" in each.path for each in hub.asked] == [False, True]


def test_many_pages(hub: Hub) -> None:
    hub.add("owner/name", {f"{i:03}.parquet": b"x" for i in range(50)})
    hub.page = 7
    assert names("hf://owner/name") == [f"{i:03}.parquet" for i in range(50)]


def test_a_revision(hub: Hub) -> None:
    old = "0" * 40
    hub.add("owner/name", {"new.jsonl": b"x"})
    hub.add("owner/name", {"old.jsonl": b"x"}, sha=old)
    hub.revisions["v1.0"] = old
    for revision in ("v1.0", old):
        (file,) = hub_files(f"hf://owner/name@{revision}/old.jsonl")
        assert file.path == f"hf://datasets/owner/name@{old}/old.jsonl"
    assert place_of("hf://a/b@refs%2Fpr%2F3/x/y") == ("a/b", "refs/pr/3", "x/y")
    assert place_of("hf://a/b@refs/convert/parquet/x") == ("a/b", "refs/convert/parquet", "x")


def test_a_dataset_of_a_script_is_taken_as_converted(hub: Hub) -> None:
    hub.add("owner/name", PLAIN | {"name.py": b"...", "subsets/a.tar": b"x"})
    converted = {"plain/train/0000.parquet": b"x", "plain/test/0000.parquet": b"x"}
    hub.add("owner/name", converted, sha=CONVERTED)
    (file,) = hub_files("hf://owner/name")
    assert file.path == f"hf://datasets/owner/name@{CONVERTED}/plain/train/0000.parquet"


def test_what_was_converted_in_part_is_refused(hub: Hub) -> None:
    hub.add("owner/name", {"name.py": b"..."})
    hub.add("owner/name", {"plain/partial-train/0000.parquet": b"x"}, sha=CONVERTED)
    whole = "hf://owner/name@refs/convert/parquet/plain/partial-train"
    with pytest.raises(UserError, match=f"converted only a part .*: {whole}$"):
        hub_files("hf://owner/name")
    assert names(whole) == ["plain/partial-train/0000.parquet"]


def refusals(hub: Hub) -> list[tuple[str, str]]:
    """(source, what the line must say)."""
    hub.add("owner/name", dict.fromkeys(PARTS, b"x"))
    hub.add("owner/parts", {"en/a.parquet": b"x", "fr/a.parquet": b"x"})
    hub.add("owner/none", PLAIN | {"a.tar": b"x"})
    hub.add("owner/gated", {})
    hub.gated.add("owner/gated")
    hub.cards["owner/name"] = {"configs": CARD["configs"][1:]}
    return [
        ("hf://owner/name", r"several parts, plain, sample-10BT: choose, .*hf://owner/name/plain$"),
        ("hf://owner/parts", r"several parts, en, fr: choose, for example hf://owner/parts/en$"),
        ("hf://owner/none", "no files of a known kind at 123456789"),
        ("hf://owner/name/sample/1TB", "nothing to read there .*; it has sample-10BT, plain$"),
        ("hf://owner/parts/de", "nothing to read there .*; it has en, fr$"),
        ("hf://owner/parts/*.txt", "nothing to read there"),
        ("hf://owner/gated", f"is gated; accept its terms at {hub.url}/datasets/owner/gated"),
        ("hf://owner/other", f"is no dataset at {hub.url}, or a private one; .* HF_TOKEN"),
        ("hf://owner/parts@v9", "has no revision v9; leave it out"),
        ("hf://parts", "a dataset of the Hub is hf://OWNER/NAME"),
        ("hf://models/owner/parts", "a dataset of the Hub is hf://OWNER/NAME"),
    ]


def test_refusals_are_one_line(hub: Hub) -> None:
    for source, said in refusals(hub):
        with pytest.raises(UserError, match=said) as caught:
            find_files(source)
        assert "\n" not in str(caught.value), source
        assert str(caught.value).startswith(source)


def test_a_busy_hub_is_asked_again(hub: Hub) -> None:
    hub.add("owner/name", {"a.parquet": b"x"})
    hub.faults.extend(["api 503"] * 3)
    assert names("hf://owner/name") == ["a.parquet"]
    hub.faults.extend(["api 503"] * 9)
    with pytest.raises(UserError, match=r"cannot be asked for at .* \(.*503.*HF_ENDPOINT"):
        hub_files("hf://owner/name")


def test_no_way_to_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="while HF_HUB_OFFLINE is set"):
        find_files("fineweb_10bt")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot be asked for at http://127\.0\.0\.1:9 \("):
        find_files("hf://owner/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"not installed: pip install 'tuppence\[hub\]'"):
        find_files("hf://owner/name")


# ---------------------------------------------------------------- named corpora


@pytest.mark.parametrize("name", [name for name, corpus in CORPORA.items() if corpus.place])
def test_a_named_corpus_is_a_place_of_the_hub(hub: Hub, name: str) -> None:
    corpus = CORPORA[name]
    place = place_of(corpus.source)
    assert place.revision is None or len(place.revision) == 40
    folder = f"{place.inside}/" * bool(place.inside)
    files = {f"{folder}train-0.parquet": b"x", "other/a.parquet": b"x", "test.parquet": b"x"}
    hub.add(place.repository, files, sha=place.revision or SHA)
    if not folder:
        hub.cards[place.repository] = {
            "configs": [{"config_name": "a", "data_files": "train-*", "default": True}]
        }
    (file,) = find_files(name)
    assert file.path.endswith(f"@{place.revision or SHA}/{folder}train-0.parquet")


def test_what_a_corpus_says_of_itself() -> None:
    assert corpora.defaults_of("fineweb") == {"text_field": "text"}
    assert corpora.defaults_of("some/file.txt") == {}
    lines = {"text_field": "text", "on_bad": "skip", "seed": None}
    assert corpora.defaults_of("wikitext_2") == lines
    for corpus in CORPORA.values():
        assert corpus.licence
        assert corpus.evidence
        assert corpus.tokens > 1e6
    with pytest.raises(UserError, match=r"data\.source=arithmetic: .* give its files"):
        find_files("arithmetic")
