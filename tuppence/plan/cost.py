"""Exact counts from the configuration alone: parameters, FLOPs, bytes.

    flops/token = 6 N_matmul + 12 n_layer n_embd T

Six per matmul weight (two forward, four backward) and, for full attention, two T x T products per
layer forward and four backward, each 2 T n_embd multiply-adds a token (Kaplan et al. 2020,
arXiv:2001.08361, section 2.1; Chowdhery et al. 2022, arXiv:2204.02311, appendix B). A tied head is
counted once, looked-up embeddings not at all. Tests hold every count equal to the built model.
"""

GIB = 2**30


def gpt2_params(
    *, n_layer: int, n_embd: int, vocab_size: int, sequence_len: int, bias: bool, tied_head: bool
) -> int:
    """All parameters of the gpt2 family, a tied head once."""
    d = n_embd
    block = 12 * d * d + 2 * d + (9 * d + 2 * d if bias else 0)
    final_norm = 2 * d if bias else d
    heads = 1 if tied_head else 2
    return heads * vocab_size * d + sequence_len * d + n_layer * block + final_norm


def gpt2_params_matmul(*, n_layer: int, n_embd: int, vocab_size: int) -> int:
    """Weights that multiply: blocks and head."""
    return n_layer * 12 * n_embd * n_embd + vocab_size * n_embd


def flops_per_token(*, params_matmul: int, n_layer: int, n_embd: int, sequence_len: int) -> int:
    """Training FLOPs per token, forward and backward (see the module's formula)."""
    return 6 * params_matmul + 12 * n_layer * n_embd * sequence_len


def state_bytes(params: int) -> int:
    """fp32 weights, gradients and AdamW's two moments."""
    return 16 * params


def checkpoint_bytes(params: int) -> int:
    """fp32 weights and two moments; gradients are not saved."""
    return 12 * params


def activation_bytes(
    *,
    tokens: int,
    n_layer: int,
    n_head: int,
    n_embd: int,
    vocab_size: int,
    sequence_len: int,
    precision: str,
    attention: str,
) -> int:
    """What one micro-batch of `tokens` keeps for its backward pass, in bytes.

    Per token and layer, in units of n_embd elements: the residual stream in fp32 before each norm
    (2), and in the compute precision the norms' outputs (2), qkv (3) and its head-major copy (3),
    the attention's output (1), the MLP's hidden layer before and after GELU (8). Attention by
    matmul keeps its probabilities (n_head x T) and, for a moment, their scores. Logits are kept in
    the compute precision and in fp32, with their gradient.
    """
    width = 2 if precision == "bf16" else 4
    layer = n_embd * (2 * 4 + 17 * width)
    if attention == "matmul":
        layer += n_head * sequence_len * width
    transient = 3 * n_head * sequence_len * width if attention == "matmul" else 0
    logits = vocab_size * (width + 8)
    return tokens * (n_layer * layer + transient + logits)
