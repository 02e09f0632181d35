"""Peak GPU memory of a job: what is kept, tensor by tensor, at the moment when most is kept.

    peak = weights + optimizer + max(gradients, activations + logits)   gradients not accumulated
         = weights + optimizer + gradients + activations + logits       accumulated
    plus what collectives hold; a card also spends the CUDA context, libraries and fragments.

The peak is at the end of a forward pass. Gradients of one micro-batch grow there as activations
shrink; accumulated ones are there already. Activations are counted from what each framework's
code keeps for its backward pass (a compiled one: what torch's min-cut partitioner saves of it);
tests hold the eager count to the bytes that autograd saves of the built model.
"""

import dataclasses
from dataclasses import dataclass

from tuppence.config import Interval
from tuppence.plan.cost import GIB, Shape
from tuppence.plan.job import Job
from tuppence.plan.shapes import divisors

CONTEXT_GIB = 0.7  # CUDA context, kernels, cuBLAS and cuDNN workspaces of one process
NCCL_GIB = 0.8  # channel buffers, where GPUs talk
FRAGMENTS = 0.02  # of the tensors: what the allocator cannot hand out again under pressure
SPREAD_KNOWN = 0.08  # half an 80% interval, relative: covers 12 of nanochat's 15 published peaks
SPREAD_OTHER = 0.15  # software of which nothing or next to nothing could be checked
QK_NORM = ("depth", "looped", "nanochat")  # families that norm queries and keys, and cap logits
SOFTCAP_BYTES = 4  # of a logit: eager code keeps the hyperbolic tangent too
HEAD_CHUNK = {"cpu": 2**21, "cuda": 2**27}  # logits that model/layers.py's loss has at once


@dataclass(frozen=True)
class Software:
    """What a framework keeps. Bytes per parameter, per channel, or per logit, as its code has it.

    `cast` are matrices cached in the compute precision beside their masters; `lookup` a weight of
    the embeddings (their gradients and moments are of the same type); `stream` a channel of the
    residual stream; `logit` all copies of a logit at the peak, `logit_fp8` with an fp8 head.
    `attention_outs`: copies of attention's output. `held`: copies of the weights that collectives
    still hold when the next forward pass begins; `buckets` bytes per parameter of DDP's buckets;
    `static` says that gradients are allocated at the start, not as they come; `scratch` are vectors
    a token beside the blocks'; `known`: the count was held to autograd's or to published peaks.
    `own`: depth and looped are those of model/, in which all is in the compute precision.
    """

    weight: float = 4
    lookup: float = 4
    gradient: float = 4
    master: float = 0
    cast: float = 2
    stream: float = 2
    logit: float = 12
    logit_fp8: float = 12
    attention_outs: int = 1
    compiled: bool = True
    qk_norm: bool = False
    held: float = 0
    buckets: float = 0
    static: bool = False
    scratch: int = 0
    known: bool = False
    own: bool = False


# An eager cross-entropy keeps fp32 logits, their log-softmax and its gradient (12 bytes); a
# compiled one the bf16 logits, overwritten by their gradient (2); an fp8 head needs its gradient's
# largest element before it can scale, so that two fp32 copies appear beside them (10).
_FSDP = Software(logit=14, logit_fp8=14)  # bf16 logits stay alive beside the eager loss's copies
_MEGATRON = Software(weight=2, lookup=2, master=4, cast=0, logit=8, logit_fp8=8, static=True)
SOFTWARE = {
    # nn.LayerNorm under autocast answers in fp32: so is the stream; SDPA's output is copied back.
    "tuppence": Software(stream=4, attention_outs=2, compiled=False, known=True, own=True),
    # embeddings bf16; matrices (Muon) and head fp32; optimizer state sharded over ranks. Held:
    # the stacked matrices (gradients in, weights out), the other gradients, a rank's slices.
    "nanochat": Software(lookup=2, logit=2, logit_fp8=10, held=1.2, known=True),
    "modded-nanogpt": Software(lookup=2, logit=2, qk_norm=True),
    # its records from 2025-01-13: the fp8 head is an operator of its own, whose gradient is not
    # written over the logits; the body is bf16, and so is the label.
    "modded-nanogpt fp8 head": Software(lookup=2, logit=4, qk_norm=True),
    "nanogpt": Software(stream=4, logit=2, buckets=4),
    # bf16 weights and gradients, fp32 masters; the classifier overwrites logits by gradients.
    "llm.c": Software(
        weight=2, lookup=2, gradient=2, master=4, cast=0, logit=2, static=True, scratch=5
    ),
    "megatron-lm": _MEGATRON,
    "megatron-core": _MEGATRON,
    "megatron-bridge": _MEGATRON,
    "nanotron": _MEGATRON,
    # FSDP's PURE: all in bf16, LayerNorm too; a fused cross-entropy that works in place.
    "llm-foundry": Software(logit=4, logit_fp8=4, compiled=False),
    "torchtitan": _FSDP,
    "fms-fsdp": _FSDP,
    "litgpt": _FSDP,
    "olmo": _FSDP,
    "lingua": _FSDP,
}
UNKNOWN = Software(stream=4, attention_outs=2, compiled=False)
FIRST_NANOCHAT_HELD = 3  # 2025: flat inputs and outputs of list collectives, and their gradients


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak. `overhead` is the process's: no tensor of the run."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    communication: float
    overhead: float

    @property
    def allocated(self) -> float:
        """All tensors: what torch.cuda.max_memory_allocated reports."""
        return self.total - self.overhead

    @property
    def total(self) -> float:
        """What the card must have."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
            + self.communication
            + self.overhead
        )


def memory(job: Job) -> Memory:
    """The parts of a job's peak."""
    software = SOFTWARE.get(job.framework, UNKNOWN)
    split = job.tensor * job.pipeline
    sharded = job.replicas if job.parallel == "fsdp" else 1
    states = job.replicas if job.parallel in ("zero1", "fsdp") else 1
    weights = _weights(job.shape, software, software.weight) / split
    gradients = _weights(job.shape, software, software.gradient) / split / sharded
    activations = activation_bytes(job)
    logits = _logit_bytes(job, software)
    if job.accumulation == 1 and not software.static:
        gradients = max(0.0, gradients - activations - logits)
    communication = _communication(job, software, weights)
    tensors = activations + logits + communication
    network = NCCL_GIB if job.gpu_count > 1 else 0
    return Memory(
        weights=weights / sharded + _casts(job, software),
        gradients=gradients,
        optimizer=_optimizer(job, software) / split / states,
        activations=activations,
        logits=logits,
        communication=communication,
        overhead=(CONTEXT_GIB + network) * GIB + FRAGMENTS * tensors,
    )


def peak_memory_gib(job: Job) -> Interval:
    """Peak of the run's tensors on one GPU, GiB, with its 80% interval.

    It is torch's max_memory_allocated; the card shows some 1 to 3 GiB more (`Memory.overhead`).
    """
    mid = memory(_drawn(job)).allocated / GIB
    spread = _spread(job)
    return Interval((1 - spread) * mid, mid, (1 + spread) * mid)


def fits(job: Job) -> bool:
    """Whether the job runs at the first try: the interval's high end and the overhead must fit.

    An out-of-memory error after an hour of set-up costs more than a smaller micro-batch does.
    """
    return needed_gib(job) <= job.gpu.memory_gib


def needed_gib(job: Job) -> float:
    """What a card must have for the job: the high end of its tensors, and the overhead."""
    need = memory(_drawn(job))
    return (need.allocated * (1 + _spread(job)) + need.overhead) / GIB


def _drawn(job: Job) -> Job:
    """The job in the step that needs most: a looped model at its most iterations, which a run of
    some hundred steps will draw."""
    return job if job.shape.most is None else dataclasses.replace(job, shape=job.shape.most)


def largest_micro_batch(job: Job, sequences: int) -> int:
    """The largest divisor of a replica's `sequences` a step that fits; 0 where none does."""
    for micro in reversed(divisors(sequences)):
        tried = dataclasses.replace(job, micro_batch=micro, accumulation=sequences // micro)
        if fits(tried):
            return micro
    return 0


# ---------------------------------------------------------------- parts


def _spread(job: Job) -> float:
    return SPREAD_KNOWN if SOFTWARE.get(job.framework, UNKNOWN).known else SPREAD_OTHER


def _weights(shape: Shape, software: Software, each: float) -> float:
    """Weights, or gradients of `each` bytes; embeddings of their own type."""
    lookup = min(each, software.lookup)
    return (shape.params - shape.params_lookup) * each + shape.params_lookup * lookup


def _casts(job: Job, software: Software) -> float:
    """Matrices in the compute precision. FSDP gathers them instead."""
    if job.precision == "fp32" or job.parallel == "fsdp" or not software.cast:
        return 0
    each = 1 if job.precision == "fp8" else software.cast
    return each * job.shape.params_matmul / job.tensor / job.pipeline


def _optimizer(job: Job, software: Software) -> float:
    """fp32 masters and moments: two by AdamW, one by Muon on the body's matrices."""
    shape = job.shape
    moved = shape.params_muon if software.own else shape.params_body
    body = shape.params_body * 8 - (4 * moved if job.optimizer == "muon" else 0)
    rest = (shape.params - shape.params_body - shape.params_lookup) * 8
    lookup = shape.params_lookup * (2 * software.lookup if not software.master else 8)
    return body + rest + lookup + software.master * shape.params


def _logit_bytes(job: Job, software: Software) -> float:
    tokens = job.micro_batch * job.shape.sequence_len
    if software.own and job.shape.family in QK_NORM:
        wide = 4 if job.precision == "fp32" else 2
        return _own_head_bytes(job.shape, tokens, wide, HEAD_CHUNK["cuda"]) / job.tensor
    each = software.logit_fp8 if job.precision == "fp8" else software.logit
    if job.precision == "fp32":
        each = max(4, software.logit)
    if job.shape.family in QK_NORM and not software.compiled:
        each += SOFTCAP_BYTES
    return tokens * job.shape.vocab_size * each / job.tensor


def _communication(job: Job, software: Software, weights: float) -> float:
    """What moving weights and gradients between GPUs holds beside them."""
    if job.replicas == 1:
        return 0
    shape, split = job.shape, job.tensor * job.pipeline
    if job.parallel == "fsdp":
        # Two gathered blocks and the ends in bf16; one reduced gradient in bf16 and in fp32.
        blocks = max(1, _layers_stored(shape) / job.pipeline)
        block = shape.params_body / split / blocks
        ends = (shape.params - shape.params_body) / job.tensor
        return 2 * (2 * block + ends) + 6 * max(block, shape.vocab_size * shape.n_embd / job.tensor)
    if job.parallel == "ddp":
        return software.buckets * shape.params / split
    if software.held and not _value_embeddings(shape):
        return FIRST_NANOCHAT_HELD * weights
    return software.held * weights


# ---------------------------------------------------------------- activations


def activation_bytes(job: Job) -> float:
    """What one micro-batch keeps for its backward pass on one GPU, logits aside.

    With 1F1B pipelines the first stage keeps as many micro-batches as there are stages, so that a
    pipeline saves nothing; tensor parallelism splits all (with sequence parallelism).
    """
    shape, software = job.shape, SOFTWARE.get(job.framework, UNKNOWN)
    wide = 4 if job.precision == "fp32" else 2
    own = software.own and shape.family in QK_NORM
    stream = wide if own else max(wide, software.stream)
    block = _own_block_bytes(shape, wide) if own else _block_bytes(job, software)
    kept = shape.layers_kept * block
    if job.checkpointing:
        kept = shape.layers_kept * shape.n_embd * stream + block
    elif job.recompute == "selective":
        kept = shape.layers_kept * _selective_bytes(shape, wide, stream) + block
    tokens = job.micro_batch * shape.sequence_len
    looked_up = max(shape.n_embd, shape.params_lookup / shape.vocab_size)
    ends = looked_up * wide + shape.n_embd * (stream + wide)
    ends += software.scratch * shape.n_embd * wide
    if job.recompute in ("activation", "norm"):
        ends += shape.ffn * wide  # one hidden layer for all blocks
    ends += _inject_bytes(shape, wide, stream)
    if own:
        ends = _own_end_bytes(shape, wide)
    return tokens * (kept + ends) / job.tensor


def _block_bytes(job: Job, software: Software) -> float:
    """Of one block and token: the stream before each norm, the matmuls' inputs, queries, keys and
    values (twice where they are normalised), attention's output, the MLP's two hidden layers.

    fp8 recomputes matmul inputs from the stream and the hidden layer and keeps attention's twice.
    """
    shape, a = job.shape, job.shape.attentions[0]
    wide = 4 if job.precision == "fp32" else 2
    stream = max(wide, software.stream)
    queries, keys = a.n_head * a.head_dim, a.n_kv_head * a.head_dim
    small = job.precision == "fp8" and software.compiled
    norms = 0.0 if small or job.recompute == "norm" else 2 * shape.n_embd * wide
    attention: float = (queries + 2 * keys) * wide
    if shape.family in QK_NORM or software.qk_norm:
        # Before their norm; eager code keeps them as autocast widened them, and the packed
        # projection too, of which the values are a view.
        attention += (queries + keys) * (wide if software.compiled else stream + wide)
    attention += queries * (software.attention_outs * wide + (1 if small else 0)) + 4 * a.n_head
    hidden: float = shape.ffn * wide * (2 if shape.gated else 1)
    if not small and job.recompute not in ("activation", "norm"):
        hidden += shape.ffn * wide
    streams = 2 * shape.n_embd * stream
    if _value_embeddings(shape) and not small:
        streams += shape.n_embd * wide  # each layer's scaled mix with the embedding
    if shape.family == "looped":
        streams += 2 * shape.n_embd * stream  # sandwich norms: both branches before their second
    return norms + attention + hidden + streams


def _own_block_bytes(shape: Shape, wide: float, *, fused: bool = True) -> float:
    """Of one block of model/depth.py or looped.py and token: outputs of norms, which matmuls read
    too; normed queries and keys; values with the packed projection that they are a view of, or
    repeated where heads share them; attention's output (fused kernels: twice); ReLU^2's both sides.
    """
    a = shape.attentions[0]
    queries, keys = a.n_head * a.head_dim, a.n_kv_head * a.head_dim
    gated = sum(m.stored for m in shape.matmuls if m.name == "value_gate") / _layers_stored(shape)
    values = 2 * queries if keys < queries else (3 - 2 * gated) * queries  # gated ones are new
    norms = 2 * shape.n_embd * (2 if shape.family == "looped" else 1)
    scaled = shape.n_embd if shape.family == "depth" and shape.params_small else 0
    attention = queries + keys + values + queries * (2 if fused else 1)
    roots = a.n_head * (wide + 4) + a.n_kv_head * wide  # of norms and of the softmax
    return (norms + scaled + attention + 2 * shape.ffn) * wide + roots


def _own_end_bytes(shape: Shape, wide: float) -> float:
    """Of one token beside the blocks: what is looked up and its norm in fp32; the head's input and
    its gradient; for each kept iteration of a loop its matmuls' inputs, the normed state, and with
    a router what the iteration changed."""
    joint = {m.name: m for m in shape.matmuls if m.name in ("inject", "lora_a", "lora_b", "router")}
    channels = shape.params_lookup / shape.vocab_size + 2 * shape.n_embd
    channels += sum(m.backward_runs * m.k for m in joint.values())
    if "inject" in joint:
        channels += joint["inject"].backward_runs * shape.n_embd * (2 if "router" in joint else 1)
    return channels * wide + (4 * shape.n_embd if wide < 4 else 0)


def _own_head_bytes(shape: Shape, tokens: int, wide: float, chunk: int) -> float:
    """Of model/layers.py's loss: of a chunk of logits the sigmoids and exponentials in fp32,
    and what is multiplied; and the head's whole gradient."""
    logits = min(tokens * shape.vocab_size, chunk)
    return logits * (8 + (wide if wide < 4 else 0)) + 4 * shape.vocab_size * shape.n_embd


def _selective_bytes(shape: Shape, wide: float, stream: float) -> float:
    """torchtitan's per-operation checkpointing: every other matmul and attention's output."""
    a = shape.attentions[0]
    queries, keys = a.n_head * a.head_dim, a.n_kv_head * a.head_dim
    matmuls = queries + keys + shape.ffn + (shape.n_embd if shape.gated else 0)
    return (matmuls + queries) * wide + 4 * a.n_head + shape.n_embd * stream


def _inject_bytes(shape: Shape, wide: float, stream: float) -> float:
    """A looped core's joint, each kept iteration: its matmuls' inputs, and the state before and
    after its norm."""
    joint = [m for m in shape.matmuls if m.name in ("inject", "lora_a", "lora_b", "router")]
    inputs = sum(m.backward_runs * m.k * wide for m in joint)
    return inputs + sum(2 * m.backward_runs * m.n * stream for m in joint if m.name == "inject")


def _layers_stored(shape: Shape) -> int:
    return next(m.stored for m in shape.matmuls if m.name == "attn_proj")


def _value_embeddings(shape: Shape) -> bool:
    """Whether more is looked up than a token's embedding and its position's."""
    return shape.params_lookup > (shape.vocab_size + shape.sequence_len) * shape.n_embd


# ---------------------------------------------------------------- CPUs


def state_bytes(params: int, *, muon_params: int = 0) -> int:
    """fp32 weights, gradients and AdamW's two moments, one for weights that Muon moves."""
    return 16 * params - 4 * muon_params


def cpu_activation_bytes(
    shape: Shape, *, tokens: int, precision: str, attention: str, recompute: bool = False
) -> float:
    """What one micro-batch of `tokens` keeps for its backward pass on a CPU, in bytes.

    Blocks that `recompute` keep their input alone, and one of them at a time everything.

    GPT-2, per token and layer, in units of n_embd elements: the residual stream in fp32 before each
    norm (2), and in the compute precision the norms' outputs (2), qkv (3) and its head-major copy
    (3), the attention's output (1), the MLP's hidden layer before and after GELU (8). Attention by
    matmul keeps its probabilities (n_head x T) and, for a moment, their scores. Logits are kept in
    the compute precision and in fp32, with their gradient.
    """
    wide = 2 if precision == "bf16" else 4
    if shape.family in QK_NORM:
        block = _own_block_bytes(shape, wide, fused=attention == "sdpa")
        ends = _own_end_bytes(shape, wide)
        head = _own_head_bytes(shape, tokens, wide, HEAD_CHUNK["cpu"])
    else:
        block, ends = shape.n_embd * (2 * 4 + 17 * wide), 0.0
        head = tokens * shape.vocab_size * (wide + 8)
    layers = shape.layers_kept
    kept = layers * 4 * shape.n_embd + block if recompute else layers * block
    if attention == "matmul":
        whole = 1 if recompute else sum(a.backward_runs for a in shape.attentions)
        kept += (whole + 3) * shape.attentions[0].n_head * shape.sequence_len * wide
    return tokens * (kept + ends) + head
