"""Five published guides, claim by claim: what was said, what its premises give, what is so.

    claim                said      from its premises      by arithmetic      code of the warning

`as_published` reproduces a guide's own figure from the guide's own premises, so that a reader can
see where it came from; `arithmetic` is what a plan says. A claim that arithmetic refutes carries
the code of its error. FLOPs as in plan/cost.py; dense peaks of the data sheets, named, as the
guides use them.
"""

import dataclasses
import math

from tuppence.plan import cost, laws, memory, throughput
from tuppence.plan.claims import Claim, Guide, depth_of, implied_share, mfu_hours
from tuppence.plan.cost import GIB, Shape
from tuppence.plan.gpus import find_gpu
from tuppence.plan.job import Gpu, Job
from tuppence.plan.loss import effective_tokens

RECIPES = (
    "nanogpt_openwebtext",
    "nanogpt_4b_tokens",
    "looped_546m",
    "llmc_gpt2_124m",
    "depth_1000usd",
)


def guide(recipe: str) -> Guide | None:
    """The guide behind a recipe; None where there is none."""
    builders = (_openwebtext, _four_billion, _looped, _llmc, _thousand)
    known = dict(zip(RECIPES, builders, strict=True))
    return known[recipe]() if recipe in known else None


def _openwebtext() -> Guide:
    steps, batch, corpus = 600_000, 480 * 1024, 9.04e9
    hours = steps * 0.562 / 3600
    epochs = steps * batch / corpus
    return Guide(
        recipe="nanogpt_openwebtext",
        title="Running nanoGPT on AWS (guide 000)",
        claims=(
            Claim("preparation", "USD", 4.08, 12 * 0.34, 12 * 0.34, "12 h x $0.34/h (c5.2xlarge)"),
            Claim("storage", "USD a month", 10.0, 100 * 0.10, 100 * 0.10, "100 GB x $0.10 (gp2)"),
            Claim(
                "training time",
                "h",
                96.0,
                96.0,
                hours,
                "600,000 steps of 562 ms on 8 A100 (nanoGPT issue 110), in days 4",
            ),
            Claim(
                "training",
                "USD",
                3172.80,
                96 * 33.05,
                hours * 21.957642,
                "p4d.24xlarge: $33.05/h was an older list price, $21.96/h is in the price book",
                "stale_price",
            ),
            Claim(
                "passes over the corpus",
                "epochs",
                None,
                None,
                epochs,
                f"{steps * batch / 1e9:.0f}B tokens of a corpus of 9.04B: the guide does not say",
                "epochs_16",
            ),
        ),
    )


def _four_billion() -> Guide:
    a10g = find_gpu("A10G")
    tokens = 6_000 * 480 * 1024
    # nanoGPT counts 6 x (parameters without positions), biases and norms among them.
    counted = 6 * (124_475_904 - 1024 * 768) + 12 * 12 * 768 * 1024
    share = 0.1370159
    tflops = share * 312
    rate = tflops * 1e12 / counted
    hours = tokens / rate / 3600
    return Guide(
        recipe="nanogpt_4b_tokens",
        title="NanoGPT Training Experiment (guide 001)",
        claims=(
            Claim(
                "MFU",
                "%",
                13.70,
                100 * share,
                100 * tflops / a10g.sheet_tflops["bf16"],
                f"{tflops:.2f} TFLOPS: 13.70% of an A100's 312, which nanoGPT divides by, "
                f"and of the A10G's own {a10g.sheet_tflops['bf16']:g} this",
                "mfu_without_peak",
            ),
            Claim(
                "training tokens",
                "B",
                4.0,
                4.0,
                tokens / 1e9,
                "the file holds 4B; 6,000 steps of 491,520 read this much of it",
                "tokens_not_steps",
            ),
            Claim("speed", "tokens/s", None, None, rate, "what 13.70% of 312 TFLOPS is"),
            Claim("training time", "h", None, None, hours, "tokens / speed: the guide has none"),
            Claim(
                "on g5.8xlarge",
                "USD",
                None,
                None,
                hours * 2.448,
                f"$2.448/h; g5.xlarge has the same GPU at $1.006/h: ${hours * 1.006:.2f}",
            ),
            Claim(
                "val loss",
                "nats/token",
                3.26934,
                3.26934,
                3.26934,
                "on OpenWebText: not comparable with FineWeb's 3.28, which is about 0.17 nats "
                "harder for one and the same model",
                "losses_not_comparable",
            ),
        ),
    )


def _looped_shape() -> Shape:
    return cost.looped(
        n_prelude=2,
        n_recurrent=3,
        n_coda=1,
        recurrence=4,
        mean_recurrence=4,
        max_recurrence=16,
        backprop_depth=None,
        lora_rank=32,
        n_head=18,
        n_embd=2304,
        vocab_size=32768,
        sequence_len=2048,
    )


def _looped() -> Guide:
    shape, tokens = _looped_shape(), 10e9
    machines = (
        ("1 A10G", "A10G", 1, "bf16", 20.0, 1.624),
        ("8 V100", "V100-16GB", 8, "fp16", 4.0, 24.48),
        ("8 A100", "A100-40GB", 8, "bf16", 2.0, 32.77),
    )
    claims = [
        Claim("parameters", "M", 546.0, 546.0, shape.params / 1e6, "as its description adds up"),
        Claim(
            "work a token",
            "GFLOP",
            None,
            6 * (shape.params - shape.params_lookup) / 1e9,
            shape.flops_per_token / 1e9,
            "15 blocks are run, 6 are stored; its own estimate counts the stored ones once. At "
            "r = 4; its log-normal r has mean 4.5",
            "loops_left_out",
        ),
    ]
    for name, gpu_name, count, precision, said, price in machines:
        gpu = find_gpu(gpu_name)
        share = implied_share(shape, gpu, count, tokens, said, precision=precision)
        hours = mfu_hours(shape, gpu, count, tokens, precision=precision)
        roofline = _looped_hours(shape, gpu, count, precision, tokens)
        claims.append(
            Claim(
                f"10B tokens on {name}",
                "h",
                said,
                said,
                hours,
                f"{said:g} h need {share:.1f}x the data sheet's {precision} peak; this is 40% of "
                f"it, ${hours * price:,.0f} at the guide's ${price:g}/h; the roofline says "
                f"{roofline}",
                "faster_than_possible",
            )
        )
    v100 = find_gpu("V100-32GB")
    claims += [
        Claim(
            "bf16 on a V100",
            "TFLOPS",
            None,
            None,
            v100.measured_tflops["bf16"],
            f"no bf16 matrix units: fp16 was measured at {v100.measured_tflops['fp16']:.1f}",
            "bf16_unsupported",
        ),
        Claim(
            "memory of p3.16xlarge",
            "GB a GPU",
            32.0,
            32.0,
            16.0,
            "it carries 16 GB V100s; p3dn.24xlarge has 32 GB ones",
            "wrong_machine",
        ),
        Claim(
            "training tokens",
            "B",
            10.0,
            10.0,
            _script_horizon() / 1e9,
            "what its script trains unless told otherwise: 10.5 x (recurrent block + head)",
            "tokens_not_steps",
        ),
    ]
    return Guide("looped_546m", "Looped Transformer on AWS (guide 002)", tuple(claims))


def _looped_hours(shape: Shape, gpu: Gpu, count: int, precision: str, tokens: float) -> str:
    """The roofline's hours, in words, at the largest micro-batch that fits."""
    job = Job(
        shape=shape,
        gpu=gpu,
        gpu_count=count,
        nodes=1,
        precision=precision,
        parallel="none" if count == 1 else "zero1",
        checkpointing=True,
        micro_batch=1,
        accumulation=256 // count,
        optimizer="muon",
    )
    micro = memory.largest_micro_batch(job, 256 // count)
    if not micro:
        return "that it does not fit"
    sized = dataclasses.replace(job, micro_batch=micro, accumulation=256 // count // micro)
    rate = throughput.tokens_per_second(sized)
    low, mid, high = (tokens / r / 3600 for r in (rate.high, rate.mid, rate.low))
    return f"{mid:,.0f} h ({low:,.0f} to {high:,.0f}) with activation checkpointing"


def _script_horizon() -> float:
    return laws.RATIO["muon"] * (3 * 12 * 2304**2 + 32768 * 2304)


def _llmc() -> Guide:
    steps = 18_865
    hours = steps * 0.300 / 3600
    return Guide(
        recipe="llmc_gpt2_124m",
        title="GPT-2 in llm.c on any cloud with SkyPilot (guide 003)",
        claims=(
            Claim(
                "training time",
                "min",
                None,
                None,
                hours * 60,
                f"18,865 steps of 300 ms on 8 A100-80GB (llm.c): {steps * 2**19 / 1e9:.2f}B tokens",
            ),
            Claim(
                "cost",
                "USD",
                20.0,
                hours * 14,
                hours * 14,
                f"at $14/h; at $10.32 to $14/h ${hours * 10.32:.0f} to ${hours * 14:.0f}, on AWS "
                f"(p4de.24xlarge, $27.45/h) ${hours * 27.44705:.0f}",
            ),
            Claim(
                "8 H100 over 8 A100",
                "x",
                2.3,
                2.3,
                0.300 / 0.140,
                "300 ms against 140 ms a step, both measured",
            ),
        ),
    )


def _thousand() -> Guide:
    d64 = cost.depth(n_layer=64, n_head=32, n_embd=4096, vocab_size=32, sequence_len=2048)
    h100 = find_gpu("H100-PCIe")
    return Guide(
        recipe="depth_1000usd",
        title="$1000 Training Setup Guide (guide 004)",
        claims=(*_thousand_model(d64, h100), *_thousand_run(d64, h100)),
    )


def _thousand_model(d64: Shape, h100: Gpu) -> tuple[Claim, ...]:
    replicated = (2 * 4 + 4 / 8) * d64.params / GIB
    checkpoint = cost.checkpoint_bytes(d64.params, muon_params=d64.params_body)
    return (
        Claim(
            "parameters of depth 64",
            "B",
            4.3,
            None,
            d64.params / 1e9,
            f"12 x 64 x 4096^2: width grows with depth, so parameters with its cube, also "
            f"from its own 680M at depth 24: {0.68 * (64 / 24) ** 3:.1f}B; 4.3B is depth "
            f"{math.floor(depth_of(4.3e9))} to {math.ceil(depth_of(4.3e9))}",
            "rule_of_thumb_params",
        ),
        Claim(
            "memory a GPU",
            "GiB",
            75.0,
            None,
            replicated,
            f"replicated fp32 weights and gradients and 1/8 of the momentum, before any "
            f"activation; the card has {h100.memory_gib:.0f}",
            "replicated_state",
        ),
        Claim(
            "checkpoint",
            "GB",
            17.0,
            10.7 + 8 * 0.8,
            checkpoint / 1e9,
            f"fp32 weights and momentum; 31 of them are {31 * checkpoint / 1e12:.1f} TB, not 0.5",
            "checkpoint_vs_disk",
        ),
    )


def _thousand_run(d64: Shape, h100: Gpu) -> tuple[Claim, ...]:
    tokens = 23_000 * 2**19
    share = implied_share(d64, h100, 8, tokens, 31, precision="bf16")
    hours = mfu_hours(d64, h100, 8, tokens, precision="bf16")
    worth = effective_tokens(tokens, 350e6)
    return (
        Claim(
            "training time",
            "h",
            31.0,
            math.floor(1000 / (8 * 4)),
            hours,
            f"31 h are what $1,000 buys at 8 x $4/h, and need {share:.0%} of the data "
            f"sheet's peak; this is 40% of it",
            "faster_than_possible",
        ),
        Claim(
            "cost",
            "USD",
            992.0,
            8 * 31 * 4,
            hours * 32,
            "of those hours at 8 x $4/h",
            "faster_than_possible",
        ),
        Claim(
            "tokens a step",
            "",
            524_288.0,
            524_288.0,
            8.0 * 4 * 2048,
            "8 GPUs x 4 sequences x 2,048: 524,288 takes 8 accumulation steps",
            "batch_mismatch",
        ),
        Claim(
            "passes over 350M tokens",
            "epochs",
            34.0,
            tokens / 350e6,
            tokens / 350e6,
            f"worth about {worth / 1e9:.1f}B unique tokens at most",
            "epochs_16",
        ),
        Claim(
            "stops at the budget",
            "",
            1.0,
            None,
            0.0,
            "its stop is a step count from an estimate; no clock and no meter ends it",
            "no_wall_clock_stop",
        ),
    )
