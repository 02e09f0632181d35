"""The cards: what each can compute, hold and move, and what people call them.

One row a card in facts/gpus.csv. The ceiling that a plan may count on is what large matmuls were
measured to reach; where nobody measured, 0.8 of the data sheet (the measured ones reach 0.65 to
1.1 of theirs, 0.8 in the middle), and the source says which of the two it is. `memory_gib` is
what CUDA offers a process (torch's `total_memory`, after the driver's share: an "80 GB" card
has 79.1 GiB, a "24 GB" A10G 22.1); the context and libraries are the process's own use of it.
"""

import csv
import difflib
import re
from functools import lru_cache
from pathlib import Path

from tuppence.errors import UserError
from tuppence.plan.job import Gpu

FACTS = Path(__file__).parent / "facts" / "gpus.csv"

UNMEASURED = 0.8  # of the data sheet
WITHOUT_BF16 = ("Volta", "Turing")
WITH_FP8 = ("Ada", "Hopper", "Grace-Hopper", "Blackwell", "Blackwell Ultra", "CDNA3", "CDNA4")

_SHEET = {
    "bf16": "bf16_dense_tflops",
    "fp16": "fp16_dense_tflops",
    "fp8": "fp8_dense_tflops",
    "fp32": "tf32_dense_tflops",
}
_MEASURED = {
    "bf16": ("measured_max_bf16_tflops_MAMF", "measured_matmul_bf16_tflops_zzc"),
    "fp16": ("measured_matmul_fp16_tflops_zzc",),
    "fp8": ("measured_matmul_fp8_tflops",),
    "fp32": (),
}
_NOISE = re.compile(
    r"nvidia|geforce|amd|instinct|tesla|quadro|rtx|gpu|tensor|core|generation|hbm\d?e?|\d+w$|dgx|hgx"
    r"|mega|oam|blackwell|server|workstation|edition"
)
_MEMORY = re.compile(r"(1[026]|24|32|4[08]|80|9[46]|141|180|186|192|256|288|480)(?=gb)")
_FORMS = {"sxm": "sxm", "pcie": "pcie", "pci": "pcie", "nvl": "nvl"}


@lru_cache(maxsize=1)
def gpus() -> dict[str, Gpu]:
    """All cards by the file's names."""
    with FACTS.open(newline="", encoding="utf-8") as file:
        cards = [_gpu(row) for row in csv.DictReader(file)]
    return {card.name: card for card in cards}


@lru_cache(maxsize=1024)
def find_gpu(name: str) -> Gpu:
    """The card by the file's name or a usual one: A10G, h100, "NVIDIA A100-SXM4-80GB", 4090.

    Without a form factor it is the SXM card, without a memory size the file's first (A100: 40 GB,
    V100: 16 GB, as in the price lists). Raises UserError with the nearest names.
    """
    table = gpus()
    if name in table:
        return table[name]
    chip, form, memory_gb = _parse(name)
    family = [n for n in table if _parse(n)[0] == chip]
    fitting = [n for n in family if memory_gb in (None, _parse(n)[2])] or family
    fitting = [n for n in fitting if _parse(n)[1] == (form or "sxm")] or fitting
    if fitting:
        return table[fitting[0]]
    chips = {_parse(n)[0]: n for n in table}
    near = [chips[c] for c in difflib.get_close_matches(chip, chips, 3, 0.4)]
    hint = f"the nearest are {', '.join(near)}" if near else "such as A10G, A100-80GB, H100, 4090"
    raise UserError(f"machine.gpu={name} is not in the table of cards; {hint}")


@lru_cache(maxsize=1024)
def cards_meant(name: str) -> frozenset[str]:
    """Every card that a name may mean: A100 is four, A100-80GB two, A100-80GB-PCIe one."""
    find_gpu(name)  # or says what is near
    if name in gpus():
        return frozenset({name})
    chip, form, memory_gb = _parse(name)
    alike = ((n, _parse(n)) for n in gpus())
    return frozenset(
        n
        for n, (its_chip, its_form, its_gb) in alike
        if its_chip == chip and form in (None, its_form) and memory_gb in (None, its_gb)
    ) or frozenset({find_gpu(name).name})


def ceiling_tflops(gpu: Gpu, precision: str) -> tuple[float, str]:
    """What a large matmul reaches on this card, and where the number is from."""
    if precision in gpu.measured_tflops:
        return gpu.measured_tflops[precision], f"measured {precision} matmul ceiling of {gpu.name}"
    sheet = gpu.sheet_tflops.get(precision)
    if sheet is None:
        have = ", ".join(gpu.sheet_tflops)
        raise UserError(f"train.precision={precision} is unknown on {gpu.name}: it has {have}")
    share = f"{UNMEASURED:g} x data sheet"
    return round(UNMEASURED * sheet, 1), f"{share} ({sheet:g} TFLOPS {precision}): not measured"


def supports(gpu: Gpu, precision: str) -> bool:
    """Whether the card has matrix units for it: bf16 from Ampere on, fp8 from Ada and Hopper on."""
    if precision == "bf16":
        return gpu.arch not in WITHOUT_BF16
    if precision == "fp8":
        return gpu.arch in WITH_FP8
    return precision in ("fp16", "fp32")


def _gpu(row: dict[str, str]) -> Gpu:
    sheet = {p: float(row[column]) for p, column in _SHEET.items() if row[column]}
    seen = {p: [float(row[c]) for c in columns if row[c]] for p, columns in _MEASURED.items()}
    link = row["interconnect"].lower()
    if link.startswith(("nvlink bridge", "pcie")):
        # A bridge joins pairs; a box of eight talks over PCIe. GeForce cards go through the host.
        kind = "none" if "no p2p" in link or "no nvlink" in link else "pcie"
    else:
        kind = "nvlink"  # Infinity Fabric is alike: point to point among eight
    bridged = link.startswith("nvlink bridge")
    return Gpu(
        name=row["gpu"],
        arch=row["arch"],
        memory_gib=float(row["memory_gib"]),
        bandwidth_gbs=float(row["mem_bw_gbs"]),
        sheet_tflops=sheet,
        measured_tflops={p: max(values) for p, values in seen.items() if values},
        link=kind,
        link_gbs=128.0 if bridged else float(row["interconnect_gbs_bidir"]),
        watts=float(row["tdp_w"] or 0),
        vector_tflops=float(row["fp32_vector_tflops"] or 0),
    )


@lru_cache(maxsize=1024)
def _parse(name: str) -> tuple[str, str | None, int | None]:
    """A name's chip, form factor and memory: "NVIDIA A100-SXM4-80GB" is a100, sxm, 80."""
    chip, form, memory_gb = "", None, None
    text = re.sub(r"(sxm|pcie?|nvl)\d?", r" \1 ", _MEMORY.sub(r" \1", name.lower()))
    for word in re.findall(r"[a-z0-9]+", text):
        size = re.fullmatch(r"(\d{2,3})(g|gb|gib)", word)
        if size:
            memory_gb = int(size[1])
        elif word in _FORMS:
            form = _FORMS[word]
        else:
            chip += _NOISE.sub("", word)
    return chip, form, memory_gb
