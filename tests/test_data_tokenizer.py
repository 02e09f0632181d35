"""Ids that others agree with, exact round trips, files that `tokenizers` reads alike."""

from __future__ import annotations

import functools
import itertools
import json
import lzma
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers

from tuppence.errors import Fault, UserError
from tuppence.files import asset
from tuppence.tokenizer import ranks
from tuppence.tokenizer.json_file import merges_of, spelled
from tuppence.tokenizer.pieces import Piece, recut
from tuppence.tokenizer.ranks import GPT2_SPLIT, published_merges, published_ranks
from tuppence.tokenizer.spec import Tokenizer, build_tokenizer, load_tokenizer, spec_identity

SHARED = Path(__file__).parents[2] / "shared" / "data"
HARD = (
    "Hello world\n\n  I'll  we've 12345 \t\r\n"
    " naïve café 日本語 😀👩‍👩‍👧 \u00a0\u2003x \x1c\x85 y\n",
    "",
    " ",
    "\n\n\n",
    "a<|endoftext|>b",
    "don't DON'T 'tis  \n \n x",
)

# What the patterns treat apart: white space of all sorts, contractions, marks, digits, emoji.
ATOMS = (*" \n\t\r'", "  ", "\n\n", "\r\n", " \n ", "\u00a0", "\x1c", "\x85", "\u2028", "\u3000")
ATOMS += ("'ll", "'s", "'S", "'\u017f", "l", "a", "B", "é", "ß", "\u0130", "1", "12345", "½", "٣")
ATOMS += ("!", "-", "_", "。", "，", "日", "本語", "カ", "한", "Ж", "क", "\u093f", "س", "\u064b")
ATOMS += ("e\u0301", "😀", "👩\u200d👧", "\ufeff", "\u00ad", "ﬆ", "<|endoftext|>")


@functools.cache
def shakespeare() -> str:
    return asset("shakespeare.txt").read_text(encoding="utf-8")


def texts_of(*texts: str) -> Callable[[], Iterator[str]]:
    return lambda: iter(texts)


@functools.cache
def made(spec: str) -> Tokenizer:
    sample = shakespeare()[:200_000] if spec.startswith("bpe") else shakespeare()
    texts = (sample, *HARD) if spec != "char:shakespeare" else (sample,)
    return build_tokenizer(spec.removesuffix(":shakespeare"), texts=texts_of(*texts))


@functools.cache
def plain_tiktoken() -> tiktoken.Encoding:
    """GPT-2 with the pattern as OpenAI published it."""
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    return tiktoken.Encoding(
        "gpt2", pat_str=pattern, mergeable_ranks=published_ranks("gpt2"), special_tokens={}
    )


def test_gpt2_known_ids() -> None:
    gpt2 = made("gpt2")
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.vocab_size == 50_257
    assert gpt2.end_of_text == 50_256
    assert len(gpt2.encode(shakespeare())) == 338_025
    assert 50_256 not in gpt2.encode("<|endoftext|>")
    assert gpt2.encode("<|endoftext|>").tolist() == plain_tiktoken().encode_ordinary(
        "<|endoftext|>"
    )


def test_gpt2_merges_are_those_of_openai() -> None:
    path = SHARED / "gpt2_bpe" / "vocab.bpe"
    if not path.exists():
        pytest.skip("needs shared/data/gpt2_bpe/vocab.bpe")
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    ours = [f"{spelled(a)} {spelled(b)}" for a, b in merges_of(published_ranks("gpt2"))]
    assert ours == lines


def test_ranks_are_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ranks").write_bytes(asset("r50k_base.tiktoken").read_bytes() + b"\n")
    monkeypatch.setattr(ranks, "asset", lambda name: tmp_path / "ranks")
    with pytest.raises(Fault, match="damaged: install it again"):
        published_ranks.__wrapped__("gpt2")


@pytest.mark.parametrize("spec", ["char", "byte", "gpt2", "cl100k", "bpe:700"])
def test_round_trip_and_bytes(spec: str) -> None:
    tokenizer = made(spec)
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (tokenizer.vocab_size,)
    assert sizes.dtype == np.int32
    for text in (*HARD, shakespeare()[:50_000]):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint32
        assert tokenizer.decode(ids) == text
        assert sizes[ids].sum() == len(text.encode())
    end = tokenizer.end_of_text
    assert end is not None
    assert sizes[end] == 0
    assert tokenizer.decode([end, tokenizer.vocab_size + 7]) == ""


@pytest.mark.parametrize("spec", ["char", "byte", "gpt2", "cl100k", "bpe:700"])
def test_batch_equals_single(spec: str) -> None:
    tokenizer = made(spec)
    for text, ids in zip(HARD, tokenizer.encode_batch(HARD), strict=True):
        assert np.array_equal(ids, tokenizer.encode(text))


@pytest.mark.parametrize("spec", ["char", "char:shakespeare", "byte", "gpt2", "cl100k", "bpe:700"])
def test_saved_file_is_read_alike_by_hugging_face(spec: str, tmp_path: Path) -> None:
    tokenizer = made(spec)
    tokenizer.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert max(theirs.get_vocab().values()) == tokenizer.vocab_size - 1
    texts = [shakespeare()[i : i + 3000] for i in range(0, 60_000, 3000)]
    if spec != "char:shakespeare":  # a special token in text is one to that library, text to us
        texts += [text for text in HARD if "<|endoftext|>" not in text]
    for text in texts:
        ids = tokenizer.encode(text).tolist()
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids) == tokenizer.decode(ids) == text
    if tokenizer.end_of_text is not None:
        assert theirs.token_to_id("<|endoftext|>") == tokenizer.end_of_text


@pytest.mark.parametrize("spec", ["char", "char:shakespeare", "byte", "gpt2", "cl100k", "bpe:700"])
def test_loaded_is_the_same(spec: str, tmp_path: Path) -> None:
    tokenizer = made(spec)
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert (loaded.name, loaded.vocab_size, loaded.end_of_text) == (
        tokenizer.name,
        tokenizer.vocab_size,
        tokenizer.end_of_text,
    )
    assert loaded.sha256 == tokenizer.sha256
    text = shakespeare()[:10_000]
    assert np.array_equal(loaded.encode(text), tokenizer.encode(text))
    assert np.array_equal(loaded.token_bytes(), tokenizer.token_bytes())


def test_altered_file_is_found(tmp_path: Path) -> None:
    made("byte").save(tmp_path)
    with (tmp_path / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(Fault, match="missing or altered"):
        load_tokenizer(tmp_path)


def test_path_of_a_tokenizer_json(tmp_path: Path) -> None:
    made("gpt2").save(tmp_path)
    (tmp_path / "tokenizer.meta.json").unlink()
    for spec in (str(tmp_path), str(tmp_path / "tokenizer.json")):
        tokenizer = build_tokenizer(spec, texts=texts_of())
        assert tokenizer.cut == "before_space"
        assert tokenizer.end_of_text == 50_256
        for text in HARD:
            assert np.array_equal(tokenizer.encode(text), made("gpt2").encode(text))
        assert np.array_equal(tokenizer.token_bytes(), made("gpt2").token_bytes())
    assert spec_identity(str(tmp_path)) == spec_identity(str(tmp_path / "tokenizer.json"))


def test_char_alphabets() -> None:
    assert made("char:shakespeare").vocab_size == 65
    assert made("char:shakespeare").end_of_text is None
    two = build_tokenizer("char", texts=texts_of("ba", "cé"))
    assert two.encode("abcé").tolist() == [0, 1, 2, 3]
    assert (two.vocab_size, two.end_of_text) == (5, 4)
    one = build_tokenizer("char", texts=texts_of("ba", "c"), single_document=True)
    assert (one.vocab_size, one.end_of_text) == (3, None)
    given = build_tokenizer(r"char:0123456789+-HBL.\n", texts=texts_of("1+1\n"))
    assert given.vocab_size == 17
    assert given.encode("0.\n").tolist() == [0, 15, 16]


@pytest.mark.parametrize("count", [250, 255, 256, 400])
def test_char_lookups_of_all_widths(count: int) -> None:
    """Ids in a byte, ids beyond it, and code points beyond Latin-1 go through different lookups."""
    alphabet = "".join(map(chr, range(count)))
    tokenizer = build_tokenizer("char", texts=texts_of(alphabet))
    text = alphabet[::-1] + alphabet[:100]
    assert tokenizer.encode(text).tolist() == [alphabet.index(c) for c in text]
    assert tokenizer.encode("abc").tolist() == [alphabet.index(c) for c in "abc"]


@pytest.mark.parametrize("stranger", ["?", "é", "日"])
def test_char_names_the_stranger(stranger: str) -> None:
    tokenizer = build_tokenizer("char:abc", texts=texts_of("a"))
    with pytest.raises(UserError, match="offset 2 is not among the tokenizer's 3"):
        tokenizer.encode(f"ab{stranger}")


def test_bpe_is_deterministic_and_has_n_tokens() -> None:
    twice = [build_tokenizer("bpe:400", texts=texts_of(shakespeare()[:100_000])) for _ in range(2)]
    assert twice[0].sha256 == twice[1].sha256
    assert (twice[0].vocab_size, twice[0].end_of_text) == (400, 399)
    assert len(twice[0].encode("the king")) < 8


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("gtp2", "did you mean gpt2"),
        ("chars", "did you mean char"),
        ("bpe:many", "whole number N of at least 257"),
        ("bpe:100", "whole number N of at least 257"),
        ("bpe", "such as bpe:8192"),
        ("bpe:5000", "the corpus has merges for"),
        ("char:", "alphabet is empty"),
        ("char:abca", "alphabet has 'a' twice"),
        ("some/folder", "no tokenizer.json there"),
    ],
)
def test_bad_specs(spec: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        build_tokenizer(spec, texts=texts_of("some text, not much"))


def test_bad_file(tmp_path: Path) -> None:
    for content in ("{", json.dumps({"model": 1}), "[]"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=r"not a tokenizer\.json"):
            build_tokenizer(str(tmp_path), texts=texts_of())


def test_empty_corpus_has_no_alphabet() -> None:
    with pytest.raises(UserError, match="the corpus is empty"):
        build_tokenizer("char", texts=texts_of(""))


def in_pieces(text: str, tokenizer: Tokenizer, piece_chars: int) -> list[int]:
    pieces = list(recut([Piece(text, 0, 0, True)], cut=tokenizer.cut, piece_chars=piece_chars))
    assert len(pieces) > 1
    arrays = tokenizer.encode_batch([piece.text for piece in pieces])
    return list(itertools.chain.from_iterable(ids.tolist() for ids in arrays))


@pytest.mark.parametrize("spec", ["gpt2", "cl100k", "bpe:700"])
def test_cuts_change_no_id_on_nasty_text(spec: str) -> None:
    """Random strings of the characters that the pattern treats specially, cut everywhere."""
    tokenizer = made(spec)
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choices(ATOMS, k=120))
        assert in_pieces(text, tokenizer, 3) == tokenizer.encode(text).tolist(), repr(text)


def test_cuts_change_no_id_on_shakespeare() -> None:
    whole = plain_tiktoken().encode_ordinary(shakespeare())
    for piece_chars in (50, 1000, 65_536):
        assert in_pieces(shakespeare(), made("gpt2"), piece_chars) == whole


def test_cuts_change_no_id_on_books() -> None:
    path = SHARED / "corpora" / "books_50mb.jsonl.xz"
    if not path.exists():
        pytest.skip("needs shared/data/corpora/books_50mb.jsonl.xz")
    with lzma.open(path) as file:
        books = [json.loads(line)["text"] for line in itertools.islice(file, 4)]
    for book in books:
        assert in_pieces(book, made("gpt2"), 500) == plain_tiktoken().encode_ordinary(book)


def test_possessive_pattern_is_the_published_one() -> None:
    """Our pattern differs in backtracking only; in ids it must not."""
    assert plain_tiktoken()._pat_str != GPT2_SPLIT.regex
    for text in HARD:
        assert made("gpt2").encode(text).tolist() == plain_tiktoken().encode_ordinary(text)


@pytest.mark.parametrize("name", ["gpt2", "cl100k"])
def test_where_published_tokens_are_joined_is_what_their_ranks_say(name: str) -> None:
    assert published_merges(name) == merges_of(published_ranks(name))
