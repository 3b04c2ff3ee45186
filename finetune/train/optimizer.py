"""AdamW and torch's Muon over named parameters, with a state that goes into safetensors and comes back bit for bit.

Muon (orthogonalized momentum, Jordan 2024) is for hidden matrices: whatever is not two-dimensional, and what the caller
names (embeddings, the head), stays with AdamW. Muon's steps are scaled to match AdamW's RMS (arXiv:2502.16982), so that
one learning rate does for both. Weights of norms, biases and scalars (whatever has one dimension) do not decay.

Of several processes each orthogonalizes its part of the matrices and tells the others: it takes 0.8 s of a 4.7 s step
of the shipped model, which every process would spend again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from finetune.errors import TrainingError
from finetune.train.adamw import AdamW
from finetune.train.ranks import Alone, Ranks
from finetune.train.settings import TrainSettings


@dataclass(frozen=True, eq=False)
class _Part:
    """`rate`: times the learning rate."""

    names: list[str]
    optimizer: AdamW | torch.optim.Muon
    rate: float = 1.0

    def set_rate(self, learning_rate: float) -> None:
        if isinstance(self.optimizer, AdamW):
            self.optimizer.learning_rate = learning_rate * self.rate
            return
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * self.rate


class NamedOptimizer:
    """Both as one. `adamw_names`: matrices that Muon is not for; `rates`: times the rate, by name [1]."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        settings: TrainSettings,
        *,
        adamw_names: frozenset[str] = frozenset(),
        rates: Mapping[str, float] = MappingProxyType({}),
        ranks: Ranks | None = None,
    ) -> None:
        self._parameters = dict(sorted(parameters.items()))
        self._ranks = ranks or Alone()
        muon = [
            name
            for name, tensor in self._parameters.items()
            if settings.optimizer == "muon" and tensor.ndim == 2 and name not in adamw_names
        ]
        self._muon = _shared_out(muon, parameters, self._ranks.world_size)
        kinds: dict[tuple[bool, bool, float], list[str]] = {}
        for name, tensor in self._parameters.items():
            if name not in muon or name in self._muon[self._ranks.rank]:
                is_decayed = tensor.ndim > 1 or name in adamw_names
                kinds.setdefault((name in muon, is_decayed, rates.get(name, 1.0)), []).append(name)
        self._parts = [
            _Part(names, self._optimizer(names, settings, is_muon, is_decayed), rate)
            for (is_muon, is_decayed, rate), names in kinds.items()
        ]

    def _optimizer(
        self, names: list[str], settings: TrainSettings, is_muon: bool, is_decayed: bool
    ) -> AdamW | torch.optim.Muon:
        tensors = [self._parameters[name] for name in names]
        decay = settings.weight_decay if is_decayed else 0.0
        if is_muon:
            return torch.optim.Muon(tensors, settings.learning_rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        betas = (settings.beta1, settings.beta2)
        return AdamW(tensors, settings.learning_rate, betas, weight_decay=decay)

    def step(self, learning_rate: float) -> None:
        for part in self._parts:
            part.set_rate(learning_rate)
            part.optimizer.step()
        for rank, names in enumerate(self._muon):
            if names:
                self._ranks.spread([self._parameters[name] for name in names], rank)

    def clear_gradients(self) -> None:
        for tensor in self._parameters.values():
            tensor.grad = None

    def gradients(self) -> list[Tensor]:
        """In the order of the names. A parameter that no loss reached has a gradient of zeros."""
        found = []
        for tensor in self._parameters.values():
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
            found.append(tensor.grad)
        return found

    def state(self) -> dict[str, Tensor]:
        """`<parameter>/<moment>` -> tensor, whole on rank 0. All ranks have to ask together."""
        state: dict[str, Tensor] = {}
        for part in self._parts:
            for name in part.names:
                for key, value in part.optimizer.state.get(self._parameters[name], {}).items():
                    state[f"{name}/{key}"] = value.detach().clone().contiguous()
        for rank, names in enumerate(self._muon[1:], 1):
            moments = {
                f"{name}/momentum_buffer": state.get(
                    f"{name}/momentum_buffer", torch.empty_like(self._parameters[name])
                )
                for name in names
            }
            if moments:
                self._ranks.spread(list(moments.values()), rank)
            state |= moments
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Raises TrainingError when it is the state of other parameters."""
        by_name: dict[str, dict[str, Tensor]] = {name: {} for name in self._parameters}
        for key, value in state.items():
            name, _, moment = key.rpartition("/")
            if name not in by_name:
                raise TrainingError(f"the checkpoint's optimizer has a state for {name}, which is not trained here")
            by_name[name][moment] = value.to(self._parameters[name].device)
        for part in self._parts:
            if isinstance(part.optimizer, AdamW):
                part.optimizer.state = {self._parameters[name]: by_name[name] for name in part.names if by_name[name]}
                continue
            content: dict[str, Any] = part.optimizer.state_dict()
            content["state"] = {index: by_name[name] for index, name in enumerate(part.names) if by_name[name]}
            part.optimizer.load_state_dict(content)


def _shared_out(names: list[str], parameters: Mapping[str, Tensor], num_ranks: int) -> list[list[str]]:
    """By rank: the largest first, each to the rank that has the least to do."""
    shares: list[list[str]] = [[] for _ in range(num_ranks)]
    work = [0] * num_ranks
    for name in sorted(names, key=lambda name: -parameters[name].numel()):
        rank = work.index(min(work))
        shares[rank].append(name)
        work[rank] += parameters[name].numel()
    return [sorted(share) for share in shares]
