"""The table of cards: every usual name is found, ceilings say where they are from."""

import csv
from pathlib import Path

import pytest

from tuppence.errors import UserError
from tuppence.plan.gpus import ceiling_tflops, find_gpu, gpus, supports

FACTS = Path(__file__).parent.parent / "tuppence" / "plan" / "facts"
PUBLISHED = Path(__file__).parent.parent / "bench" / "published" / "throughput.csv"

SPELLINGS = {
    "A10G": "A10G-24GB",
    "a10": "A10-24GB",
    "A100": "A100-40GB-SXM4",
    "A100-40GB": "A100-40GB-SXM4",
    "A100-80GB": "A100-80GB-SXM4",
    "A100-80GB-SXM": "A100-80GB-SXM4",
    "A10080GB": "A100-80GB-SXM4",
    "NVIDIA A100-SXM4-80GB": "A100-80GB-SXM4",
    "NVIDIA A100-PCIE-40GB": "A100-40GB-PCIe",
    "A800-PCIe": "A800-80GB-PCIe",
    "H100": "H100-80GB-SXM5",
    "h100 sxm": "H100-80GB-SXM5",
    "NVIDIA H100 80GB HBM3": "H100-80GB-SXM5",
    "H100-MEGA": "H100-80GB-SXM5",
    "H100-PCIe": "H100-80GB-PCIe",
    "H100-80GB-PCIe": "H100-80GB-PCIe",
    "H100 NVL": "H100-NVL-94GB",
    "H100-96GB": "H100-96GB-HBM2e-500W",
    "H200": "H200-SXM-141GB",
    "H200-141GB": "H200-SXM-141GB",
    "H20": "H20-96GB",
    "GH200": "GH200-96GB",
    "NVIDIA GH200 480GB": "GH200-96GB",
    "B200": "B200-180GB",
    "GB300": "GB300-288GB",
    "4090": "RTX-4090-24GB",
    "RTX4090": "RTX-4090-24GB",
    "NVIDIA GeForce RTX 3090": "RTX-3090-24GB",
    "RTX5090-32GB": "RTX-5090-32GB",
    "V100": "V100-16GB-SXM2",
    "V100-32GB": "V100-32GB-SXM2",
    "Tesla V100-SXM2-32GB": "V100-32GB-SXM2",
    "Tesla T4": "T4",
    "l4": "L4-24GB",
    "L40": "L40-48GB",
    "L40S": "L40S-48GB",
    "A6000": "RTX-A6000-48GB",
    "RTX6000": "Quadro-RTX-6000-24GB",
    "RTX 6000 Ada": "RTX-6000-Ada-48GB",
    "RTX PRO 6000 Blackwell Server Edition": "RTX-PRO-6000-Blackwell-96GB",
    "MI300X": "MI300X-192GB",
}


@pytest.mark.parametrize(("said", "meant"), SPELLINGS.items())
def test_usual_names_are_found(said: str, meant: str) -> None:
    assert find_gpu(said).name == meant


def test_the_tables_own_names_are_found_in_any_case_and_punctuation() -> None:
    for name in gpus():
        assert find_gpu(name).name == name
        assert find_gpu(name.lower().replace("-", " ")).name == name
        assert find_gpu(name.upper().replace("-", "_")).name == name


def test_every_card_of_the_price_book_and_of_the_published_runs_is_known() -> None:
    with (FACTS / "prices.csv").open(newline="", encoding="utf-8") as file:
        sold = {row["accelerator"] for row in csv.DictReader(file)} - {""}
    with PUBLISHED.open(newline="", encoding="utf-8") as file:
        used = {row["gpu_type"] for row in csv.DictReader(file)} - {"", "unknown"}
    assert len(sold) > 10
    for name in sold | used:
        find_gpu(name)


@pytest.mark.parametrize(
    ("said", "near"), [("A100G", "A100-80GB"), ("H101", "H100"), ("RTX 4091", "RTX-4090-24GB")]
)
def test_an_unknown_card_is_refused_with_the_nearest(said: str, near: str) -> None:
    with pytest.raises(UserError, match=rf"machine\.gpu={said} .*{near}"):
        find_gpu(said)


def test_nonsense_and_nothing_are_refused_with_examples() -> None:
    for said in ("banana", "", "   "):
        with pytest.raises(UserError, match="such as A10G"):
            find_gpu(said)


def test_measured_ceilings_are_used_and_sheets_discounted_and_both_say_so() -> None:
    value, source = ceiling_tflops(find_gpu("H100-PCIe"), "bf16")
    assert value == pytest.approx(495.93)
    assert "measured" in source
    assert "sheet" not in source
    value, source = ceiling_tflops(find_gpu("A10G"), "bf16")
    assert value == pytest.approx(0.8 * 70)
    assert "0.8 x data sheet" in source
    assert "not measured" in source


def test_old_cards_have_no_bf16_and_their_ceiling_shows_it() -> None:
    for name, fp16 in (("V100-32GB", 88.9), ("T4", 42.3)):
        card = find_gpu(name)
        assert not supports(card, "bf16")
        assert not supports(card, "fp8")
        assert supports(card, "fp16")
        assert ceiling_tflops(card, "fp16")[0] == pytest.approx(fp16, rel=0.01)
        assert ceiling_tflops(card, "bf16")[0] < 0.12 * fp16


def test_fp8_needs_ada_or_hopper() -> None:
    assert not supports(find_gpu("A100"), "fp8")
    for name in ("4090", "H100", "GH200", "B200", "MI300X"):
        assert supports(find_gpu(name), "fp8")
        assert ceiling_tflops(find_gpu(name), "fp8")[0] > ceiling_tflops(find_gpu(name), "bf16")[0]
    with pytest.raises(UserError, match="fp8"):
        ceiling_tflops(find_gpu("A100"), "fp8")


def test_memory_is_what_a_process_gets_not_what_the_box_says() -> None:
    for name, said_gb in (("H100", 80), ("A100-80GB", 80), ("A10G", 24), ("4090", 24), ("T4", 16)):
        gib = find_gpu(name).memory_gib
        assert 0.9 * said_gb < gib < said_gb, name
    assert find_gpu("H100").memory_gib == pytest.approx(79.1)
    assert find_gpu("A10G").memory_gib == pytest.approx(22.1)


def test_links() -> None:
    assert (find_gpu("H100").link, find_gpu("H100").link_gbs) == ("nvlink", 900)
    assert (find_gpu("H100-PCIe").link, find_gpu("H100-PCIe").link_gbs) == ("pcie", 128)
    assert find_gpu("4090").link == "none"
    assert find_gpu("A10G").link == "pcie"
    assert {card.link for card in gpus().values()} == {"nvlink", "pcie", "none"}


def test_every_card_has_what_the_roofline_needs() -> None:
    for card in gpus().values():
        assert card.bandwidth_gbs > 100, card.name
        assert card.watts > 50, card.name
        assert card.vector_tflops > 5, card.name
        assert "fp16" in card.sheet_tflops, card.name
        for precision in ("bf16", "fp16"):
            if supports(card, precision):
                assert ceiling_tflops(card, precision)[0] > 15, card.name
