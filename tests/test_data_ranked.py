"""Byte pairs: cl100k's and learned ones, languages, files of before, text that is none."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers
from test_data_tokenizer import ATOMS, HARD, made, shakespeare, texts_of

from tuppence.tokenizer import compression, learned, pieces
from tuppence.tokenizer.compression import beside_published, table
from tuppence.tokenizer.json_file import byte_level
from tuppence.tokenizer.kinds import JsonTokenizer, UnknownCharacter
from tuppence.tokenizer.pieces import Piece, UnbrokenText, recut
from tuppence.tokenizer.ranks import GPT4_SPLIT, PUBLISHED, published_ranks
from tuppence.tokenizer.spec import build_tokenizer, load_tokenizer, spec_identity

LANGUAGES = {
    "russian": "Все счастливые семьи похожи друг на друга, каждая по-своему. Ёлка, съёмка № 5!\n",
    "chinese": "道可道，非常道；名可名，非常名。無名天地之始。\n有名萬物之母《老子》第1章。",
    "arabic": "كان يا ما كان في قديم الزمان، مَلِكٌ يُحِبُّ القِصَصَ؟ ١٢٣ لَا",
    "hindi": "एक समय की बात है, हिन्दी में कहानी। क्षत्रिय १२३ ज्ञान\u200dी",
    "emoji": "😀👩‍👩‍👧‍👦 🇩🇪🏳️‍🌈 ok👍🏽 ☃️e\u0301",
}
SPECS = ["gpt2", "cl100k", "bpe:700"]


def plain_cl100k() -> tiktoken.Encoding:
    """cl100k with the pattern as it was first published."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return tiktoken.Encoding(
        "plain", pat_str=pattern, mergeable_ranks=published_ranks("cl100k"), special_tokens={}
    )


def nasty(count: int, *, length: int) -> list[str]:
    draw = random.Random(1)
    return ["".join(draw.choices(ATOMS, k=length)) for _ in range(count)]


# ---------------------------------------------------------------- cl100k


def test_cl100k_known_ids() -> None:
    cl100k = made("cl100k")
    assert cl100k.encode("hello world").tolist() == [15339, 1917]
    assert cl100k.encode("tiktoken is great!").tolist() == [83, 1609, 5963, 374, 2294, 0]
    assert (cl100k.vocab_size, cl100k.end_of_text) == (100_277, 100_257)


def test_cl100k_is_the_published_one() -> None:
    plain = plain_cl100k()
    for text in (*HARD, *nasty(300, length=60), shakespeare()[:100_000], *LANGUAGES.values()):
        assert made("cl100k").encode(text).tolist() == plain.encode_ordinary(text), repr(text)


def test_cl100k_ids_without_a_text() -> None:
    """100,256 and those behind the first specials stand for nothing."""
    cl100k = made("cl100k")
    special = [*PUBLISHED["cl100k"].special.values(), 100_256, 100_270, 100_277, 2**31]
    assert cl100k.decode([15339, *special, 1917]) == "hello world"
    assert cl100k.token_bytes()[100_256:].tolist() == [0] * 21
    for token in PUBLISHED["cl100k"].special:
        assert max(cl100k.encode(f"a {token}")) < 100_256


# ---------------------------------------------------------------- cuts


@pytest.mark.parametrize("spec", SPECS)
def test_every_cut_is_safe(spec: str) -> None:
    """At each place of each text, not only at those that a size of piece asks for."""
    tokenizer = made(spec)
    cuts = 0
    for text in nasty(400, length=25):
        whole = tokenizer.encode(text).tolist()
        for place in pieces._PLACE.finditer(text):
            left, right = text[: place.end()], text[place.end() :]
            parts = tokenizer.encode_batch([left, right])
            assert [*parts[0].tolist(), *parts[1].tolist()] == whole, (left, right)
            cuts += 1
    assert cuts > 1000


def test_before_a_line_end_is_no_place_in_general() -> None:
    parts = made("cl100k").encode_batch(["So.", "\n\nIt"])
    assert [*parts[0].tolist(), *parts[1].tolist()] != made("cl100k").encode("So.\n\nIt").tolist()


def test_text_without_spaces_is_cut() -> None:
    """Chinese by its punctuation, base64 by its digits."""
    chinese = LANGUAGES["chinese"].replace("\n", "") * 500
    encoded = "aGVsbG8gd29ybGQxMjM0NTY3ODkw" * 500
    for text in (chinese, encoded):
        parts = [
            p.text for p in recut([Piece(text, 0, 0, True)], cut="before_space", piece_chars=99)
        ]
        assert max(map(len, parts)) < 150
        arrays = made("cl100k").encode_batch(parts)
        ids = list(itertools.chain.from_iterable(a.tolist() for a in arrays))
        assert ids == made("cl100k").encode(text).tolist()


# ---------------------------------------------------------------- what is no text


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("unit", ["a", " ", "\n", "-", "漢", "7"])
def test_unbroken_text_is_refused_and_named(spec: str, unit: str) -> None:
    longest = pieces.LONGEST_UNBROKEN
    before = "some words here, " * 20_000  # longer than a piece
    with pytest.raises(UnbrokenText) as caught:
        made(spec).encode(before + "end!" + unit * (longest + 5) + "!")
    start = caught.value.offset
    assert len(before) - 17 <= start <= len(before) + 4
    assert f"character {start + 1:,}: no space" in str(caught.value)


@pytest.mark.parametrize("spec", SPECS)
def test_as_much_unbroken_text_as_there_may_be(spec: str) -> None:
    """White space is what the regular expressions need most stack for."""
    text = " " * (pieces.LONGEST_UNBROKEN - 1) + "x"
    ids = made(spec).encode(text)
    assert made(spec).token_bytes()[ids].sum() == len(text)


def test_unbroken_text_does_not_depend_on_how_it_arrives() -> None:
    text = "word " * 30 + "x" * 95 + " y" + "z" * 101 + " end"

    def cut(size: int) -> list[Piece]:
        arriving = [Piece(text[i : i + size], 4, i, False) for i in range(0, len(text), size)]
        parts = recut(
            [*arriving, Piece("", 4, len(text), True)],
            cut="before_space",
            piece_chars=40,
            longest=100,
        )
        out = []
        with pytest.raises(UnbrokenText, match="document 5, character 246: ") as caught:
            out.extend(parts)
        assert caught.value.document == 4
        return out

    assert cut(7) == cut(50) == cut(1000)


def test_what_is_no_word_is_not_learned_from() -> None:
    """A megabyte of letters would be one word, which every merge has to walk."""
    draw = random.Random(0)
    noise = "".join(draw.choices("abcdefghij", k=3 * learned.LONGEST_WORD))
    text = shakespeare()[:50_000]
    clean = learned.learn(600, [text, " a b"])
    assert learned.learn(600, [text, f" a{noise} b"]).sha256 == clean.sha256
    assert learned.learn(600, [text, f" {noise[:4000]} b"]).sha256 != clean.sha256


# ---------------------------------------------------------------- learned


def test_learned_ids_are_those_of_hugging_face(tmp_path: Path) -> None:
    made("bpe:700").save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (*nasty(500, length=40), *LANGUAGES.values()):
        if "<|endoftext|>" not in text:
            assert theirs.encode(text).ids == made("bpe:700").encode(text).tolist(), repr(text)


def test_learned_split_is_that_of_gpt4() -> None:
    tokens = {made("bpe:700").decode([i]) for i in range(256, 699)}
    text = "It's 12345 o'clock.\n\nIT'S"
    ids = made("bpe:700").encode(text)
    assert made("bpe:700").decode(ids) == text
    assert "'s" in tokens
    assert not any(token.startswith("\n") and token.strip() for token in tokens)
    assert any(token.endswith("\n") and token.strip() for token in tokens)  # ".\n"


LEARN = """
import itertools, sys
from tuppence.tokenizer.learned import learn
from tuppence.files import asset
text = asset("shakespeare.txt").read_text(encoding="utf-8")
texts = [text[i : i + 999] for i in range(0, 300_000, 999)]
print(learn(1000, texts).sha256, "torch" in sys.modules)
"""


def test_learning_does_not_depend_on_threads() -> None:
    settings = [
        {"RAYON_NUM_THREADS": "1"},
        {"RAYON_NUM_THREADS": "5"},
        {"TOKENIZERS_PARALLELISM": "false"},
    ]
    said = [
        subprocess.Popen(
            [sys.executable, "-c", LEARN],
            env=os.environ | more,
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            text=True,
        )
        for more in settings
    ]
    lines = [process.communicate()[0] for process in said]
    assert lines[0].endswith(" False\n")
    assert set(lines) == {lines[0]}


def test_identities_say_what_tokens_depend_on() -> None:
    assert json.dumps(GPT4_SPLIT.pre_tokenizer) in spec_identity("bpe:700")
    assert spec_identity("bpe:700") != spec_identity("bpe:701")
    assert PUBLISHED["cl100k"].sha256 in spec_identity("cl100k")


def test_files_of_before_load_and_are_cut(tmp_path: Path) -> None:
    """Learned vocabularies had GPT-2's split, and were kept as files of another kind."""
    rules = json.loads(made("bpe:700")._json)  # type: ignore[attr-defined]
    rules["pre_tokenizer"] = byte_level(use_regex=True)
    JsonTokenizer(json.dumps(rules).encode(), name="bpe:700").save(tmp_path)
    old = load_tokenizer(tmp_path)
    assert (old.name, old.cut, old.vocab_size) == ("bpe:700", "before_space", 700)
    for text in nasty(100, length=60):
        parts = recut([Piece(text, 0, 0, True)], cut=old.cut, piece_chars=3)
        arrays = old.encode_batch([part.text for part in parts])
        assert np.array_equal(np.concatenate(arrays), old.encode(text))


def test_other_splits_are_seen_whole(tmp_path: Path) -> None:
    rules = json.loads(made("bpe:700")._json)  # type: ignore[attr-defined]
    split = rules["pre_tokenizer"]["pretokenizers"][0]
    assert JsonTokenizer(json.dumps(rules).encode(), name="x").cut == "before_space"
    split["pattern"]["Regex"] = split["pattern"]["Regex"].replace("{1,3}", "{1,2}")
    assert JsonTokenizer(json.dumps(rules).encode(), name="x").cut == "nowhere"
    rules["pre_tokenizer"] = byte_level(use_regex=True) | {"add_prefix_space": True}
    assert JsonTokenizer(json.dumps(rules).encode(), name="x").cut == "nowhere"


# ---------------------------------------------------------------- languages


@pytest.mark.parametrize("language", LANGUAGES)
def test_languages(language: str) -> None:
    text = LANGUAGES[language] * 3
    own = build_tokenizer("bpe:290", texts=texts_of(LANGUAGES[language] * 20))
    for tokenizer in (own, *(made(spec) for spec in SPECS)):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert len(own.encode(text)) < 0.7 * len(made("bpe:700").encode(text))  # it knows the language


# ---------------------------------------------------------------- to other processes


@pytest.mark.parametrize(
    ("spec", "most_bytes"),
    [("char", 500), ("byte", 100), ("gpt2", 200), ("cl100k", 200), ("bpe:700", 4500)],
)
def test_tokenizers_travel_light(spec: str, most_bytes: int) -> None:
    """What was made on first use stays behind: cl100k's ranks are ten megabytes in memory."""
    tokenizer = build_tokenizer(spec, texts=texts_of(shakespeare()[:200_000]))
    ids = tokenizer.encode("words")
    assert tokenizer.sha256
    packed = pickle.dumps(tokenizer)
    assert len(packed) < most_bytes
    again = pickle.loads(packed)
    assert np.array_equal(again.encode("words"), ids)
    assert again.sha256 == tokenizer.sha256


def test_files_travel(tmp_path: Path) -> None:
    made("bpe:700").save(tmp_path)
    tokenizer = build_tokenizer(str(tmp_path), texts=texts_of())
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode("some words").tolist() == tokenizer.encode("some words").tolist()


def test_errors_travel() -> None:
    tokenizer = build_tokenizer("char:abc", texts=texts_of("a"))
    with pytest.raises(UnknownCharacter) as caught:
        tokenizer.encode_batch(["abc", "", "bé"])
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.text, again.offset, again.character) == (2, 1, "é")
    assert str(again) == str(caught.value)
    unbroken = pickle.loads(pickle.dumps(UnbrokenText(3, offset=1000)))
    assert (unbroken.document, unbroken.offset) == (3, 1000)
    assert str(unbroken) == str(UnbrokenText(3, offset=1000))


# ---------------------------------------------------------------- compression


def test_compression_on_shakespeare() -> None:
    rows = beside_published([shakespeare()], made("bpe:700"))
    assert [row.name for row in rows] == ["bpe:700", "gpt2", "cl100k"]
    ours, gpt2, cl100k = rows
    assert (gpt2.tokens, cl100k.tokens) == (338_025, 301_829)
    assert gpt2.bytes_per_token == pytest.approx(1_115_394 / 338_025)
    assert gpt2.used == pytest.approx(11_706 / 50_257, abs=1e-3)
    assert ours.tokens == len(made("bpe:700").encode(shakespeare()))
    lines = table(rows).splitlines()
    assert lines[2].split() == ["gpt2", "50,257", "338,025", "3.300", "23%"]


def test_compression_takes_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "SAMPLE_BYTES", 8000)
    texts = itertools.repeat(LANGUAGES["russian"])
    (row,) = compression.compression(texts, [made("byte")])
    assert 8000 <= row.tokens < 9500
    assert row.bytes_per_token == 1


def test_compression_beside_itself_is_one_row() -> None:
    rows = beside_published(["some text"], made("gpt2"))
    assert [row.name for row in rows] == ["gpt2", "cl100k"]
