"""A looped decoder as tuppence trains it, for transformers (trust_remote_code=True).

The embedding goes through the prelude; a core of few blocks is then repeated `config.recurrence`
times over a state that starts as noise, each time reading the prelude's output again; the coda and
the head read the last state. Change `model.config.recurrence` to think longer or shorter. With
mixture of depths a router picks the tokens of every iteration but the first.

For inference: there is no key-value cache, and batches are of one length or padded on the right.
Shapes: B sequences, T positions, D channels, H heads, K channels of a head, P picked tokens.
"""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutput


class LoopedConfig(PretrainedConfig):
    model_type = "tuppence_looped"

    def __init__(
        self,
        vocab_size: int = 32768,
        max_position_embeddings: int = 2048,
        hidden_size: int = 256,
        num_attention_heads: int = 2,
        num_hidden_layers: int = 4,
        n_prelude: int = 1,
        n_recurrent: int = 2,
        n_coda: int = 1,
        mean_recurrence: float = 4.0,
        max_recurrence: int = 16,
        recurrence: int = 4,
        lora_rank: int = 32,
        mixture_of_depths: bool = False,
        rope_theta: float = 100000.0,
        norm_eps: float = 1e-6,
        logit_softcap: float = 15.0,
        state_std: float = 0.02,
        adapter_scale: float = 0.1,
        **others: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.num_hidden_layers = num_hidden_layers
        self.n_prelude = n_prelude
        self.n_recurrent = n_recurrent
        self.n_coda = n_coda
        self.mean_recurrence = mean_recurrence
        self.max_recurrence = max_recurrence
        self.recurrence = recurrence
        self.lora_rank = lora_rank
        self.mixture_of_depths = mixture_of_depths
        self.rope_theta = rope_theta
        self.norm_eps = norm_eps
        self.logit_softcap = logit_softcap
        self.state_std = state_std
        self.adapter_scale = adapter_scale
        super().__init__(**{"tie_word_embeddings": False, "use_cache": False, **others})


def rms_norm(x_D: Tensor, eps: float) -> Tensor:
    return x_D * torch.rsqrt(x_D.float().square().mean(-1, keepdim=True) + eps).to(x_D.dtype)


def rotary(positions: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Cosines and signed sines [2, T, K] of the halves (channel, channel + K/2)."""
    channel = torch.arange(0, head_dim, 2, device=device) / head_dim
    angle = torch.outer(torch.arange(positions, device=device).float(), theta**-channel)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([sin, -sin], -1)])


def hash32(x: Tensor) -> Tensor:
    """A mix of the low 32 bits of int64."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def noise(positions: int, channels: int, device: torch.device) -> Tensor:
    """Standard normal [T, D], a function of position and channel alone."""
    first = hash32(torch.arange(positions * channels // 2, device=device))
    second = hash32(first + 0x9E3779B1)
    radius = torch.sqrt(-2 * torch.log((first.float() + 1) / (2**32 + 1)))
    angle = second.float() * (2 * math.pi / 2**32)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).view(positions, channels)


class Attention(nn.Module):
    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        self.eps, self.n_head = config.norm_eps, config.num_attention_heads
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, turn: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = (
            t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.c_attn(x_BTD).split(D, -1)
        )
        q, k = (
            rms_norm(t * turn[0] + t.roll(t.shape[-1] // 2, -1) * turn[1], self.eps) for t in (q, k)
        )
        y_BHTK = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y_BHTK.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, 4 * config.hidden_size, bias=False)
        self.c_proj = nn.Linear(4 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.c_proj(self.c_fc(x_BTD).relu().square())


class Block(nn.Module):
    """One layer, normed before and after each branch."""

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, turn: Tensor) -> Tensor:
        x_BTD = x_BTD + rms_norm(self.attn(rms_norm(x_BTD, self.eps), turn), self.eps)
        return x_BTD + rms_norm(self.mlp(rms_norm(x_BTD, self.eps)), self.eps)


class LoopedForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = LoopedConfig
    _no_split_modules: ClassVar[list[str]] = ["Block"]

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__(config)
        D, R, rank = config.hidden_size, config.max_recurrence, config.lora_rank
        self.wte = nn.Embedding(config.vocab_size, D)
        self.prelude = nn.ModuleList(Block(config) for _ in range(config.n_prelude))
        self.inject = nn.Linear(2 * D, D, bias=False)
        self.core = nn.ModuleList(Block(config) for _ in range(config.n_recurrent))
        if rank:
            self.adapter_down = nn.Parameter(torch.zeros(R, D, rank))
            self.adapter_up = nn.Parameter(torch.zeros(R, rank, D))
        self.state_gain = nn.Parameter(torch.ones(D))
        if config.mixture_of_depths:
            self.router = nn.Linear(D, 1, bias=False)
            self.router_bias = nn.Parameter(torch.zeros(R))
        self.coda = nn.ModuleList(Block(config) for _ in range(config.n_coda))
        self.lm_head = nn.Linear(D, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wte = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> CausalLMOutput:
        """Logits [B, T, V]; with `labels` (the inputs again, -100 not counted) also the loss."""
        if past_key_values is not None:
            raise ValueError(
                "a looped model has no key-value cache here: generate(use_cache=False)"
            )
        if attention_mask is not None and (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
            raise ValueError("padding on the left would move the positions: pad on the right")
        B, T = input_ids.shape
        eps = self.config.norm_eps
        x_BTD = rms_norm(self.wte(input_ids), eps)
        head_dim = x_BTD.shape[-1] // self.config.num_attention_heads
        turn = rotary(T, head_dim, self.config.rope_theta, x_BTD.device).to(x_BTD.dtype)
        for block in self.prelude:
            x_BTD = block(x_BTD, turn)
        start_TD = self.config.state_std * noise(T, x_BTD.shape[-1], x_BTD.device)
        state_BTD = start_TD.to(x_BTD.dtype).expand(B, -1, -1)
        for i in range(self.config.recurrence):
            state_BTD = self.iterate(state_BTD, x_BTD, turn, i)
        for block in self.coda:
            state_BTD = block(state_BTD, turn)
        cap = self.config.logit_softcap
        logits_BTV = cap * torch.tanh(self.lm_head(rms_norm(state_BTD, eps)).float() / cap)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits_BTV)

    def iterate(self, state_BTD: Tensor, given_BTD: Tensor, turn: Tensor, i: int) -> Tensor:
        """One iteration over all tokens, or over those that the router scores above zero."""
        if i == 0 or not self.config.mixture_of_depths:
            return self.loop(state_BTD, given_BTD, turn, i)
        own = min(i, self.config.max_recurrence - 1)
        score_BT = (self.router(state_BTD).squeeze(-1) + self.router_bias[own]).float()
        taken_BT = score_BT > 0
        count = int(taken_BT.sum(1).max())
        if count == 0:
            return state_BTD
        index_BP = (~taken_BT).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
        index_BPD = index_BP[..., None].expand(-1, -1, state_BTD.shape[-1])
        old_BPD = state_BTD.gather(1, index_BPD)
        picked = turn[:, index_BP][:, :, None]  # [2, B, 1, P, K]
        new_BPD = self.loop(old_BPD, given_BTD.gather(1, index_BPD), picked, i)
        gate_BP = score_BT.gather(1, index_BP).sigmoid() * taken_BT.gather(1, index_BP)
        step_BPD = gate_BP[..., None].to(old_BPD.dtype) * (new_BPD - old_BPD)
        return state_BTD.scatter(1, index_BPD, old_BPD + step_BPD)

    def loop(self, state_BPD: Tensor, given_BPD: Tensor, turn: Tensor, i: int) -> Tensor:
        """The core once, with the adapter of its iteration."""
        x_BPD = self.inject(torch.cat([state_BPD, given_BPD], -1))
        for block in self.core:
            x_BPD = block(x_BPD, turn)
        if self.config.lora_rank:
            own = min(i, self.config.max_recurrence - 1)
            adapted = x_BPD @ self.adapter_down[own] @ self.adapter_up[own]
            x_BPD = x_BPD + self.config.adapter_scale * adapted
        return rms_norm(x_BPD, self.config.norm_eps) * self.state_gain
