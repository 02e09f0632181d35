"""The price book: bad rows survive and are reported, the person's own win, SkyPilot's are read."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import pytest
from price_rows import find

from tuppence.errors import UserError
from tuppence.plan import prices
from tuppence.plan.offers import COLUMNS, Offer, Problem, read_offer
from tuppence.plan.prices import (
    Book,
    at_own_price,
    egress_usd_per_gb,
    own_machine,
    price_book,
    storage_usd_per_gb_month,
)
from tuppence.plan.skypilot import refresh_from_skypilot


@pytest.fixture(autouse=True)
def config_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration folder of the test's own: nobody's prices are read."""
    home = tmp_path / "config"
    for variable in ("XDG_CONFIG_HOME", "APPDATA", "HOME"):
        monkeypatch.setenv(variable, str(home))
    return home


def codes(book: Book, row: str) -> set[str]:
    return {p.code for p in book.problems if p.row == row}


def message(book: Book, row: str, code: str) -> str:
    return next(p.message for p in book.problems if (p.row, p.code) == (row, code))


def read(**values: object) -> tuple[Offer, dict[str, str]]:
    """One published row with some values, as an offer, and its problems by code."""
    row = {"cloud": "aws", "instance_type": "x", "price_usd_h": 1.0} | values
    problems: list[Problem] = []
    offer = read_offer({k: str(v) for k, v in row.items()}, "f.csv:2", problems)
    assert offer is not None
    return offer, {p.code: p.message for p in problems}


def write(path: Path, *lines: str, header: str = ",".join(COLUMNS)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


# ---------------------------------------------------------------- the package's book


def test_every_row_of_the_package_survives() -> None:
    with (prices.FACTS / "prices.csv").open(newline="") as file:
        listed = {(r["cloud"], r["instance_type"], r["region"]) for r in csv.DictReader(file)}
    book = price_book()
    assert {(o.cloud, o.instance_type, o.region) for o in book.offers} == listed
    assert len(listed) == 85
    assert all(o.date and o.source for o in book.offers)
    assert all(o.gpu for o in book.offers if o.accelerator)


def test_the_book_loads_in_20_ms_of_cpu() -> None:
    price_book()
    start = time.process_time()
    price_book()
    assert time.process_time() - start < 0.020


def test_known_bad_rows_of_the_package_are_reported() -> None:
    book = price_book()
    azure_h100 = find(book, "Standard_ND96isr_H100_v5")
    assert azure_h100.gpu_count == 8
    assert azure_h100.spot_usd_per_hour is None
    assert {"miscounted", "no_spot_market", "low_confidence"} <= set(azure_h100.notes)
    assert message(book, "prices.csv:42", "miscounted").startswith("the list says 12 GPUs")
    azure_t4 = find(book, "Standard_NC8as_T4_v3")
    assert (azure_t4.usd_per_hour, azure_t4.spot_usd_per_hour) == (0.752, None)
    assert "11%" in message(book, "prices.csv:37", "placeholder")
    assert "blank_price" in codes(book, "prices.csv:22")
    assert find(book, "p5e.48xlarge").price(spot=True) == 17.4812
    assert find(book, "p5e.48xlarge").price(spot=False) is None
    assert find(book, "1x-H100-75-722").notes == ("gpu_unclear",)


def test_the_newer_of_two_lists_stands_and_the_older_is_drift() -> None:
    book = price_book()
    assert find(book, "gpu_8x_h100_sxm5").usd_per_hour == 31.92
    assert "+33%" in message(book, "prices.csv:56", "drift")
    assert "+54%" in message(book, "prices.csv:57", "drift")
    assert len([o for o in book.offers if o.instance_type == "p4d.24xlarge"]) == 2  # two regions


@pytest.mark.parametrize(
    ("instance_type", "gpu"),
    [
        ("p4d.24xlarge", "A100-40GB-SXM4"),
        ("p4de.24xlarge", "A100-80GB-SXM4"),
        ("a2-highgpu-8g", "A100-40GB-SXM4"),
        ("a2-ultragpu-8g", "A100-80GB-SXM4"),
        ("a3-megagpu-8g", "H100-80GB-SXM5"),
        ("gpu_1x_a100_sxm4", "A100-40GB-SXM4"),
        ("gpu_4x_a100", "A100-40GB-PCIe"),
        ("gpu_8x_a100", "A100-40GB-SXM4"),
        ("Standard_NC96ads_A100_v4", "A100-80GB-PCIe"),
        ("Standard_ND96asr_v4", "A100-40GB-SXM4"),
        ("Standard_ND96amsr_A100_v4", "A100-80GB-SXM4"),
        ("H100_PCIE_80GB::1", "H100-80GB-PCIe"),
        ("H100_NVLINK_80GB::8", "H100-80GB-SXM5"),
        ("gpu-h100-sxm_8gpu-128vcpu-1600gb", "H100-80GB-SXM5"),
        ("p3.16xlarge", "V100-16GB-SXM2"),
        ("c5.2xlarge", None),
    ],
)
def test_cards_by_instance_type(instance_type: str, gpu: str | None) -> None:
    assert find(price_book(), instance_type).gpu == gpu


# ---------------------------------------------------------------- one row


TWELVE = {"instance_type": "p5.48xlarge", "accelerator": "H100", "accelerator_count": 12}


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"price_usd_h": "", "spot_price_usd_h": 0.3}, "blank_price"),
        ({"price_usd_h": ""}, "blank_price"),
        ({"price_usd_h": 0}, "blank_price"),
        ({"price_usd_h": "n/a"}, "bad_number"),
        ({"price_usd_h": -3}, "bad_number"),
        ({"price_usd_h": "inf"}, "bad_number"),
        ({"spot_price_usd_h": 0.1}, "placeholder"),
        ({"spot_price_usd_h": 0.11}, "placeholder"),
        ({"spot_price_usd_h": 1.0}, "no_spot_market"),
        (TWELVE, "miscounted"),
        (TWELVE | {"instance_type": "gpu_4x_h100_sxm5", "accelerator_count": 8}, "miscounted"),
        ({"accelerator": "Furby", "accelerator_count": 1}, "unknown_gpu"),
        ({"accelerator": "H100", "accelerator_count": 1}, "gpu_unclear"),
        ({"vcpus": 8, "memory_gib": 22888}, "memory_unit"),
        ({"source": "a blog (low confidence)"}, "low_confidence"),
        ({"instance_type": "t3.large", "vcpus": 2}, "burstable"),
    ],
)  # fmt: skip
def test_bad_rows_survive_with_a_code(values: dict[str, object], code: str) -> None:
    offer, problems = read(**values)
    assert code in problems
    assert code in offer.notes
    assert problems[code]


def test_what_a_bad_value_becomes() -> None:
    assert read(price_usd_h="", spot_price_usd_h=0.3)[0].price(spot=True) == 0.3
    assert not read(price_usd_h="n/a")[0].has_price
    assert read(spot_price_usd_h=0.1)[0].spot_usd_per_hour is None
    assert read(spot_price_usd_h=0.12)[0].spot_usd_per_hour == 0.12  # cheap, and believable
    assert read(**TWELVE)[0].gpu_count == 8
    unknown = read(accelerator="Furby", accelerator_count=2)[0]
    assert (unknown.gpu, unknown.accelerator, unknown.gpu_count) == (None, "Furby", 2)
    assert read(vcpus=8, memory_gib=32768)[0].memory_gib == 32


def test_a_good_row_has_no_problem() -> None:
    offer, problems = read(
        instance_type="g5.xlarge", accelerator="A10G", accelerator_count=1, vcpus=4, memory_gib=16
    )
    assert problems == {}
    assert (offer.gpu, offer.gpu_count, offer.usd_per_hour) == ("A10G-24GB", 1, 1.0)


# ---------------------------------------------------------------- the person's own


def test_own_prices_win_from_the_usual_place() -> None:
    own = write(prices.own_file(), "aws,p4d.24xlarge,,,,,12.5,,us-east-1,,reserved three years")
    book = price_book()
    offer = find(book, "p4d.24xlarge", region="us-east-1")
    assert (offer.usd_per_hour, offer.source) == (12.5, "own")
    assert (offer.gpu, offer.gpu_count, offer.vcpus) == ("A100-40GB-SXM4", 8, 96)  # from the list
    assert "your own price" in message(book, "prices.csv:17", "drift")
    assert "-43%" in message(book, "prices.csv:17", "drift")
    assert find(book, "p4d.24xlarge", region="ap-south-1").usd_per_hour == 26.3444
    own.unlink()
    assert find(price_book(), "p4d.24xlarge").usd_per_hour == 21.957642


def test_an_own_row_without_region_stands_for_all_of_them(tmp_path: Path) -> None:
    book = price_book(write(tmp_path / "mine.csv", "aws,p4d.24xlarge,,,,,2.19,,,,"))
    assert [o.usd_per_hour for o in book.offers if o.instance_type == "p4d.24xlarge"] == [2.19]


def test_own_rows_may_say_anything_and_name_new_machines(tmp_path: Path) -> None:
    """A free machine, and a spot price at a tenth: guesses about lists do not apply."""
    own = write(
        tmp_path / "mine.csv",
        "lab,dgx,A100-80GB,8,128,1024,0,,,,",
        "aws,g5.xlarge,,,,,1,0.1,us-east-1,,",
    )
    book = price_book(own)
    assert find(book, "dgx").usd_per_hour == 0  # and it is the cheapest, not unpriced
    assert min(book.offers, key=lambda o: o.cost).instance_type == "dgx"
    assert (find(book, "dgx").gpu, find(book, "dgx").gpu_count) == ("A100-80GB-SXM4", 8)
    assert find(book, "g5.xlarge").spot_usd_per_hour == 0.1


def test_few_columns_are_enough(tmp_path: Path) -> None:
    own = write(
        tmp_path / "mine.csv", "gcp,a3-highgpu-8g,40", header="cloud,instance_type,price_usd_h"
    )
    offer = find(price_book(own), "a3-highgpu-8g")
    assert (offer.usd_per_hour, offer.gpu_count) == (40, 8)


def test_a_bad_own_row_is_named_and_does_not_win(tmp_path: Path) -> None:
    own = write(
        tmp_path / "mine.csv",
        "aws,p4d.24xlarge,,,,,twelve,,us-east-1,,",
        ",,,,,,1,,,,",
        "aws,g5.xlarge,,,,,0.5,,us-east-1,,",
    )
    book = price_book(own)
    assert message(book, "mine.csv:2", "bad_number").startswith("price_usd_h=twelve")
    assert codes(book, "mine.csv:3") == {"bad_row"}
    assert find(book, "p4d.24xlarge").usd_per_hour == 21.957642
    assert find(book, "g5.xlarge").usd_per_hour == 0.5


def test_a_file_that_is_no_price_list(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.csv"):
        price_book(tmp_path / "nothing.csv")
    with pytest.raises(UserError, match="lacks cloud, instance_type, price_usd_h"):
        price_book(write(tmp_path / "other.csv", "1,2", header="a,b"))


def test_a_price_on_the_command_line() -> None:
    offer = at_own_price(find(price_book(), "p4d.24xlarge"), 33.05)
    assert (offer.price(spot=False), offer.price(spot=True), offer.source) == (33.05, 33.05, "own")
    mine = own_machine(14.0, gpu="A100-80GB", gpu_count=8)
    assert (mine.cloud, mine.gpu, mine.usd_per_hour) == ("local", "A100-80GB-SXM4", 14.0)


# ---------------------------------------------------------------- SkyPilot's catalog

AWS = "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,AvailabilityZone,Arch"  # noqa: E501
GCP = "InstanceType,vCPUs,MemoryGiB,AcceleratorName,AcceleratorCount,GpuInfo,Region,AvailabilityZone,Price,SpotPrice"  # noqa: E501


def catalog(folder: Path) -> Path:
    """A hand-written one, in the columns of the real one."""
    write(
        folder / "aws" / "vms.csv",
        "p4d.24xlarge,A100,8.0,96.0,1152.0,{},22.5,6.3,eu-west-1,euw1-az1,x86_64",
        "p4d.24xlarge,A100,8.0,96.0,1152.0,{},20.0,7.0,us-west-2,usw2-az1,x86_64",
        "p4d.24xlarge,A100,8.0,96.0,1152.0,{},20.0,6.5,us-west-2,usw2-az2,x86_64",
        "p5.48xlarge,H100,12.0,192.0,2048.0,{},50.0,5.0,us-east-1,use1-az1,x86_64",
        "c5.2xlarge,,,8.0,16.0,,0.30,0.13,us-east-1,use1-az1,x86_64",
        "c6i.2xlarge,,,8.0,16.0,,0.35,0.14,us-east-1,use1-az1,x86_64",
        "t3.2xlarge,,,8.0,32.0,,0.10,0.05,us-east-1,use1-az1,x86_64",
        "r5.24xlarge,,,96.0,768.0,,6.0,,us-east-1,use1-az1,x86_64",
        "g9.xlarge,A10G,1,4,16,,,,us-east-1,use1-az1,x86_64",
        header=AWS,
    )
    write(
        folder / "gcp" / "vms.csv",
        "a2-highgpu-8g,96.0,680.0,,,,us-central1,us-central1-a,5.9,2.9",
        ",,,A100,8,{},us-central1,us-central1-a,23.4,12.4",
        "a3-highgpu-8g,208.0,1872.0,,,,us-central1,us-central1-a,9.5,2.8",
        "n2-standard-8,8.0,32.0,,,,us-central1,us-central1-a,0.38,0.18",
        header=GCP,
    )
    return folder


def test_refresh_keeps_the_cheapest_region_of_each_machine(tmp_path: Path) -> None:
    offers = refresh_from_skypilot(catalog(tmp_path / "v8"), today="2026-10-01")
    by_type = {o.instance_type: o for o in offers}
    p4d = by_type["p4d.24xlarge"]
    assert (p4d.usd_per_hour, p4d.spot_usd_per_hour, p4d.region) == (20.0, 6.5, "us-west-2")
    assert (by_type["p5.48xlarge"].gpu_count, by_type["p5.48xlarge"].spot_usd_per_hour) == (8, None)
    # of CPU machines the cheapest of each size; no shares of cores, nothing huge, nothing unpriced
    assert set(by_type) == {
        "p4d.24xlarge", "p5.48xlarge", "c5.2xlarge", "a2-highgpu-8g", "n2-standard-8",
    }  # fmt: skip


def test_googles_machines_are_priced_with_their_gpus(tmp_path: Path) -> None:
    offers = refresh_from_skypilot(catalog(tmp_path / "v8"), today="2026-10-01")
    a2 = next(o for o in offers if o.instance_type == "a2-highgpu-8g")
    assert (a2.gpu, a2.gpu_count) == ("A100-40GB-SXM4", 8)
    assert a2.usd_per_hour == pytest.approx(29.3)
    assert a2.spot_usd_per_hour == pytest.approx(15.3)


def test_refreshed_prices_are_kept_and_used(tmp_path: Path) -> None:
    offers = refresh_from_skypilot(catalog(tmp_path / "v8"), today="2026-10-01")
    book = price_book()
    assert [o for o in book.offers if o.date == "2026-10-01"] == offers
    # the list's us-east-1 at 21.96 and ap-south-1 give way to the catalog's cheapest region
    assert [o.usd_per_hour for o in book.offers if o.instance_type == "p4d.24xlarge"] == [20.0]
    assert "2026-10-01" in message(book, "prices.csv:17", "drift")
    assert "(-9%)" in message(book, "prices.csv:17", "drift")
    assert "placeholder" in codes(book, "skypilot_prices.csv:3")  # its doubts are still told
    assert find(book, "gpu_8x_h100_sxm5").usd_per_hour == 31.92  # not in the catalog: stays


def test_an_older_catalog_does_not_win_and_own_prices_do(tmp_path: Path) -> None:
    refresh_from_skypilot(catalog(tmp_path / "v8"), today="2026-01-01")
    assert find(price_book(), "a2-highgpu-8g").usd_per_hour == 29.38708  # of 2026-07-30
    own = write(tmp_path / "mine.csv", "aws,p4d.24xlarge,,,,,12.5,,,,")
    assert find(price_book(own), "p4d.24xlarge").usd_per_hour == 12.5


def test_without_skypilot_one_line_says_so() -> None:
    with pytest.raises(UserError, match=r"no SkyPilot catalog.*sky check.*prices\.csv") as error:
        refresh_from_skypilot()
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- storage and egress


def test_storage_and_egress_by_cloud() -> None:
    assert storage_usd_per_gb_month("gcp").usd == 0.020
    assert storage_usd_per_gb_month("gcp", "block").usd == 0.10
    assert storage_usd_per_gb_month("aws", "block").usd == 0.08
    assert storage_usd_per_gb_month("runpod").usd == 0.07  # sells volumes alone
    assert egress_usd_per_gb("gcp").usd == 0.12
    assert egress_usd_per_gb("lambda").usd == 0
    assert not egress_usd_per_gb("lambda").assumed
    assert storage_usd_per_gb_month("local").usd == 0


def test_an_unknown_cloud_is_assumed_to_cost_what_aws_does() -> None:
    for rate, usd in ((storage_usd_per_gb_month("moon"), 0.023), (egress_usd_per_gb("moon"), 0.09)):
        assert (rate.usd, rate.assumed) == (usd, True)
        assert rate.source
    with pytest.raises(UserError, match="tape"):
        storage_usd_per_gb_month("aws", "tape")
