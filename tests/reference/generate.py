"""Writing and its loss, written out once more: a whole pass for every token, one text at a time."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn


def log_likelihoods(backbone: nn.Module, ids: list[int], decoder_ids: list[int]) -> Tensor:
    """Of every word after each of ``decoder_ids``, [T, V], for the text ``ids``, which is not padded."""
    model: Any = backbone
    states = model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([decoder_ids])).last_hidden_state[0]
    logits = states.double() @ model.shared.weight.double().T
    return logits - logits.exp().sum(-1, keepdim=True).log()


def texts(inputs: dict[str, Tensor]) -> list[list[int]]:
    """The tokens of each row, without padding."""
    return [row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


@torch.no_grad()
def greedy(backbone: nn.Module, ids: list[int], longest: int, shortest: int = 0) -> list[int]:
    """The likeliest token each time, up to the end token."""
    config: Any = backbone.config
    written = [config.decoder_start_token_id]
    for step in range(longest):
        scores = log_likelihoods(backbone, ids, written)[-1]
        if step < shortest:
            scores[config.eos_token_id] = -torch.inf
        token = int(scores.argmax())
        if token == config.eos_token_id:
            break
        written.append(token)
    return written[1:]


@torch.no_grad()
def likeliest_of_two(backbone: nn.Module, ids: list[int], length_penalty: float) -> list[int]:
    """Of all texts that end at once, or are two tokens long, the best by log-likelihood over length to a power."""
    config: Any = backbone.config
    end, start = config.eos_token_id, config.decoder_start_token_id
    first = log_likelihoods(backbone, ids, [start])[0]
    best, found = float(first[end]), [end]
    for one, two in product(range(config.vocab_size), repeat=2):
        if one != end and two == 0:  # the same pass serves all second tokens
            second = log_likelihoods(backbone, ids, [start, one])[1]
        if one != end:
            score = float(first[one] + second[two]) / 2**length_penalty
            if score > best:
                best, found = score, [one, two]
    return [token for token in found if token != end]


def loss(backbone: nn.Module, ids: list[int], target: list[int], smoothing: float) -> Tensor:
    """Sum over a target's tokens of the cross-entropy with the smoothed target."""
    config: Any = backbone.config
    scores_TV = log_likelihoods(backbone, ids, [config.decoder_start_token_id, *target[:-1]])
    total = torch.zeros((), dtype=torch.float64)
    for scores_V, token in zip(scores_TV, target, strict=True):
        share_V = torch.full_like(scores_V, smoothing / len(scores_V))
        share_V[token] += 1 - smoothing
        total = total - (share_V * scores_V).sum()
    return total
