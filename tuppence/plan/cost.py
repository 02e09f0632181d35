"""Exact counts from the shape alone: parameters, FLOPs, bytes. Every family in one list of matmuls.

    params            weights that multiply + weights that are looked up + the small ones
    flops per token = 2 runs k n + 4 backward_runs k n      for every k x n matmul   (6 N where all
                    + 4 runs h w + 8 backward_runs h w      for every attention       run once)

with h = n_head x head_dim and w the tokens that a query may look at: the whole sequence for full
attention (12 n_layer n_embd T), causal or not, so that figures compare with Kaplan et al. 2020
(arXiv:2001.08361, section 2.1) and Chowdhery et al. 2022 (arXiv:2204.02311, appendix B). A tied
head is counted once, looked-up embeddings not at all. Recomputation is work but not progress: it
counts in `hardware_flops_per_token`, never in MFU. Tests hold every count to the built models.
"""

import math
from dataclasses import dataclass

GIB = 2**30
MUON = ("qkv", "attn_proj", "mlp_up", "mlp_down", "inject")
GATE_CHANNELS = 12  # of a layer's input, that gate its value embedding
LEAST_CAPACITY = 0.3  # of the tokens, that a looped model's late iterations take


@dataclass(frozen=True)
class Matmul:
    """`stored` weights of k x n; a token passes `runs` of them, and `backward_runs` backward."""

    name: str
    k: int
    n: int
    stored: int
    runs: float
    backward_runs: float

    @property
    def weights(self) -> int:
        return self.k * self.n * self.stored


@dataclass(frozen=True)
class Attention:
    """`runs` layers in which a token's query looks at up to `window` tokens before it."""

    n_head: int
    n_kv_head: int
    head_dim: int
    window: int
    runs: float
    backward_runs: float


@dataclass(frozen=True)
class Shape:
    """One model at one sequence length: all that memory, time and dollars follow from.

    `layers_run` blocks are executed a token forward, `layers_kept` of them keep activations for
    the backward pass; `params_lookup` are embeddings (not a tied head's), `params_small` norms,
    biases and scalars. `most` is a looped model at the most iterations that training may draw.
    Widths in channels, lengths in tokens.
    """

    family: str
    n_embd: int
    n_head: int
    ffn: int
    gated: bool
    vocab_size: int
    sequence_len: int
    matmuls: tuple[Matmul, ...]
    attentions: tuple[Attention, ...]
    params_lookup: int
    params_small: int
    layers_run: float
    layers_kept: float
    most: "Shape | None" = None

    @property
    def params_matmul(self) -> int:
        """Weights that multiply: blocks and head."""
        return sum(m.weights for m in self.matmuls)

    @property
    def params_body(self) -> int:
        """Weights that multiply, without the head: what is sharded and recomputed per block."""
        return sum(m.weights for m in self.matmuls if m.name != "lm_head")

    @property
    def params_muon(self) -> int:
        """Weights that Muon moves: the blocks' matrices, and a looped model's joint."""
        return sum(m.weights for m in self.matmuls if m.name in MUON)

    @property
    def params(self) -> int:
        """All parameters, a tied head once."""
        return self.params_matmul + self.params_lookup + self.params_small

    @property
    def matmul_flops_per_token(self) -> float:
        """Training FLOPs of the weights, forward and backward."""
        return sum((2 * m.runs + 4 * m.backward_runs) * m.k * m.n for m in self.matmuls)

    @property
    def attention_flops_per_token(self) -> float:
        """Training FLOPs of queries against keys and of probabilities against values."""
        return sum(
            (4 * a.runs + 8 * a.backward_runs) * a.n_head * a.head_dim * a.window
            for a in self.attentions
        )

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs, forward and backward (see the module's formula): what MFU counts."""
        return self.matmul_flops_per_token + self.attention_flops_per_token

    def hardware_flops_per_token(self, *, checkpointing: bool) -> float:
        """Model FLOPs, and with activation checkpointing each kept block's forward once more."""
        if not checkpointing:
            return self.flops_per_token
        again = sum(2 * m.backward_runs * m.k * m.n for m in self.matmuls if m.name != "lm_head")
        again += sum(
            4 * a.backward_runs * a.n_head * a.head_dim * a.window for a in self.attentions
        )
        return self.flops_per_token + again

    def kv_cache_bytes(self, tokens: int, *, bytes_each: int = 2) -> int:
        """Keys and values of one sequence of `tokens`: one cache per executed layer."""
        return int(
            sum(
                2 * a.runs * a.n_kv_head * a.head_dim * min(tokens, a.window) * bytes_each
                for a in self.attentions
            )
        )


# ---------------------------------------------------------------- families


def decoder(
    *,
    family: str,
    n_layer: int,
    n_embd: int,
    n_head: int,
    vocab_size: int,
    sequence_len: int,
    n_kv_head: int | None = None,
    ffn: int | None = None,
    gated: bool = False,
    tied_head: bool = False,
    learned_positions: bool = False,
    params_small: int = 0,
    windows: tuple[int, ...] | None = None,
    value_embeddings: int = 0,
    gate_channels: int = 0,
) -> Shape:
    """Any plain decoder: `n_layer` equal blocks between an embedding and a head.

    `windows` gives each layer's attention span (None: all full). `value_embeddings` layers add a
    looked-up value of n_kv_head x head_dim a token, gated by `gate_channels` of the input.
    """
    kv_heads = n_kv_head or n_head
    head_dim = n_embd // n_head
    hidden = ffn or 4 * n_embd
    spans = windows or (sequence_len,) * n_layer
    matmuls = [
        *_block(n_embd, n_head, kv_heads, head_dim, hidden, gated, n_layer, n_layer, n_layer),
        Matmul("lm_head", n_embd, vocab_size, 1, 1, 1),
    ]
    if value_embeddings and gate_channels:
        each = value_embeddings
        matmuls.insert(-1, Matmul("value_gate", gate_channels, kv_heads, each, each, each))
    attentions = tuple(
        Attention(n_head, kv_heads, head_dim, span, spans.count(span), spans.count(span))
        for span in sorted(set(spans))
    )
    lookup = 0 if tied_head else vocab_size * n_embd
    lookup += sequence_len * n_embd if learned_positions else 0
    lookup += value_embeddings * vocab_size * kv_heads * head_dim
    return Shape(
        family=family,
        n_embd=n_embd,
        n_head=n_head,
        ffn=hidden,
        gated=gated,
        vocab_size=vocab_size,
        sequence_len=sequence_len,
        matmuls=tuple(matmuls),
        attentions=attentions,
        params_lookup=lookup,
        params_small=params_small,
        layers_run=n_layer,
        layers_kept=n_layer,
    )


def gpt2(
    *,
    n_layer: int,
    n_head: int,
    n_embd: int,
    vocab_size: int,
    sequence_len: int,
    bias: bool = False,
    tied_head: bool = True,
) -> Shape:
    """GPT-2: learned positions, LayerNorm with weight, optional biases everywhere, tied head."""
    d = n_embd
    small = n_layer * (2 * d + (11 * d if bias else 0)) + (2 * d if bias else d)
    return decoder(
        family="gpt2",
        n_layer=n_layer,
        n_embd=d,
        n_head=n_head,
        vocab_size=vocab_size,
        sequence_len=sequence_len,
        tied_head=tied_head,
        learned_positions=True,
        params_small=small,
    )


def depth(
    *,
    n_layer: int,
    n_head: int,
    n_embd: int,
    vocab_size: int,
    sequence_len: int,
    n_kv_head: int | None = None,
    windows: tuple[int, ...] | None = None,
    value_embeddings: bool = False,
    residual_scalars: bool = False,
) -> Shape:
    """The modern decoder: rotary positions, norms without parameters, untied head.

    Optional: value embeddings in every second layer, two scalars a layer (model/depth.py).
    """
    return decoder(
        family="depth",
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_kv_head=n_kv_head,
        vocab_size=vocab_size,
        sequence_len=sequence_len,
        windows=windows,
        value_embeddings=(n_layer + 1) // 2 if value_embeddings else 0,
        gate_channels=GATE_CHANNELS,
        params_small=2 * n_layer if residual_scalars else 0,
    )


def looped(
    *,
    n_prelude: int,
    n_recurrent: int,
    n_coda: int,
    recurrence: float,
    mean_recurrence: float,
    max_recurrence: int,
    backprop_depth: float | None,
    lora_rank: int,
    n_head: int,
    n_embd: int,
    vocab_size: int,
    sequence_len: int,
    mixture_of_depths: bool = False,
) -> Shape:
    """The looped decoder (Geiping et al. 2025, arXiv:2502.05171): a core repeated `recurrence`
    times, gradients through its last `backprop_depth` iterations (None: all).

    An iteration joins state and prelude output (2d to d), runs the core's blocks and adds that
    depth's low-rank adapter; each of `max_recurrence` depths has its own.
    """
    d = n_embd
    mean = mean_recurrence if mixture_of_depths else None
    kept = recurrence if backprop_depth is None else min(recurrence, backprop_depth)
    ends = n_prelude + n_coda
    taken = _parts_taken(0, recurrence, mean)
    learned = _parts_taken(recurrence - kept, recurrence, mean)
    loops, back = sum(n * part for n, part in taken), sum(n * part for n, part in learned)
    stored, layers, layers_back = (ends + n_recurrent * times for times in (1, loops, back))
    matmuls = [
        *_block(d, n_head, n_head, d // n_head, 4 * d, False, int(stored), layers, layers_back),
        Matmul("inject", 2 * d, d, 1, loops, back),
        Matmul("lm_head", d, vocab_size, 1, 1, 1),
    ]
    if lora_rank:
        matmuls.insert(-1, Matmul("lora_a", d, lora_rank, max_recurrence, loops, back))
        matmuls.insert(-1, Matmul("lora_b", lora_rank, d, max_recurrence, loops, back))
    if mixture_of_depths:
        routed = max(0.0, recurrence - 1)  # the first iteration takes every token
        matmuls.insert(-1, Matmul("router", d, 1, 1, routed, min(routed, kept)))
    # tokens that an iteration takes look at one another only: a part of them, at a part of them
    wide = ends + n_recurrent * sum(n * part * part for n, part in taken)
    wide_back = ends + n_recurrent * sum(n * part * part for n, part in learned)
    return Shape(
        family="looped",
        n_embd=d,
        n_head=n_head,
        ffn=4 * d,
        gated=False,
        vocab_size=vocab_size,
        sequence_len=sequence_len,
        matmuls=tuple(matmuls),
        attentions=(Attention(n_head, n_head, d // n_head, sequence_len, wide, wide_back),),
        params_lookup=vocab_size * d,
        params_small=d + (max_recurrence if mixture_of_depths else 0),
        layers_run=layers,
        layers_kept=layers_back,
    )


def _parts_taken(first: float, last: float, mean: float | None) -> list[tuple[float, float]]:
    """(how much of it, the part of the tokens it takes) for each iteration from `first` to `last`.

    All of them; with mixture of depths all at first, LEAST_CAPACITY from iteration `mean` on.
    """
    found = []
    for i in range(math.floor(first), math.ceil(last)):
        run = min(i + 1, last) - max(i, first)
        done = 0.0 if mean is None else i / max(1.0, mean - 1)
        found.append((run, max(LEAST_CAPACITY, 1 - (1 - LEAST_CAPACITY) * done)))
    return found


def _block(
    d: int,
    n_head: int,
    n_kv_head: int,
    head_dim: int,
    ffn: int,
    gated: bool,
    stored: int,
    runs: float,
    backward_runs: float,
) -> list[Matmul]:
    """A block's matmuls: packed qkv, attention's output, the MLP's two (three where gated)."""
    dims = [
        ("qkv", d, (n_head + 2 * n_kv_head) * head_dim),
        ("attn_proj", n_head * head_dim, d),
        ("mlp_up", d, 2 * ffn if gated else ffn),
        ("mlp_down", ffn, d),
    ]
    return [Matmul(name, k, n, stored, runs, backward_runs) for name, k, n in dims]


# ---------------------------------------------------------------- bytes on disk


def checkpoint_bytes(params: int, *, muon_params: int = 0) -> int:
    """fp32 weights and AdamW's two moments, one for weights that Muon moves; no gradients."""
    return 12 * params - 4 * muon_params
