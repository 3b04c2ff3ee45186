"""The QLoRA training model: frozen base from the served file, LoRA on its projections, loss over packed micro-batches.

    model = TrainModel.open(path, LoraSpec(rank=16))
    model.loss(packed, normalizer).backward()       # fills parameters()[name].grad

In bf16 (the default) products run in bf16, norms, sums of a softmax and the loss in float32; with `upcast` also the
residual stream and the attention's scores. float32 and float64 compute everything in that type. Equal inputs give equal
bits at one thread count. KL terms compare with the base: the same model with LoRA switched off, run without gradient
over the segments that such terms need. Not covered: optimizers and schedules, checkpoints (finetune/train).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from finetune.model.answer_losses import OFF, CallHead, margins, token_weights, with_pair_terms
from finetune.model.checkpointing import LayerInputs, run_checkpointed
from finetune.model.layer import Dropout, Layer, make_layer
from finetune.model.lora import LoraSpec, keyed_generator, make_factors
from finetune.model.terms import ROWS, RowTerms, filled_up, part_with_rows, sort_terms, with_filler
from finetune.model.weights import FrozenWeights
from finetune.ops.attention import Layout
from finetune.ops.attention_tiles import SegmentLike, make_tiles
from finetune.ops.cross_entropy import LossTerms, linear_cross_entropy
from finetune.ops.numeric import wide_dtype
from finetune.ops.rms_norm import rms_norm
from finetune.ops.rope import rope_angles
from finetune.packed import Packed, Segment
from quant.model_file import open_model
from quant.model_types import ModelConfig, ModelFile


@dataclass(frozen=True, eq=False)
class Loss:
    """Of one micro-batch."""

    total: torch.Tensor
    """sum(weight * loss) / normalizer"""
    ce_sum: float
    """sum(weight * loss)"""
    per_row: torch.Tensor
    """(N,): each term's own loss, in the packed order, without weight"""
    extra_sum: float = 0.0
    """Of the losses of whole answers"""

    def backward(self) -> None:
        """Add the gradients of `total` to the parameters'. Does nothing where no row carries loss."""
        if self.total.requires_grad:
            self.total.backward()


@dataclass(frozen=True)
class ModelOptions:
    """What trades memory, time and precision."""

    dtype: torch.dtype = torch.bfloat16
    upcast: bool = False
    """Residual stream and attention scores in float32 beside bf16 products. Error of the default model's gradient
    against float32: 2.7 % with it, 3.7 % without (transformers in bf16: 4.0 %). Costs 8 % of the time, and 2.3 KB a
    token and layer."""
    checkpointing: bool = False
    """Keep only each layer's input and run the layer again in the backward pass (+1/3 time)."""
    cache_weights: bool = False
    """Keep the layers unpacked: saves 2 % of the time at 1,024 tokens a micro-batch, costs 2 bytes a weight."""
    offload: bool = False
    """With checkpointing, keep the layers' inputs in the host's memory. Untried on a GPU; on a CPU it saves nothing."""

    def __post_init__(self) -> None:
        if self.offload and not self.checkpointing:
            raise ValueError("offload is of checkpointing's kept inputs: choose both")


class TrainModel:
    def __init__(
        self, file: ModelFile, spec: LoraSpec, *, device: torch.device, options: ModelOptions, seed: int
    ) -> None:
        self.config: ModelConfig = file.config
        self.spec, self.options, self.device = spec, options, device
        self.base_digest: Callable[[], str] = lambda: file.digest
        self.frozen = FrozenWeights(file, device=device, dtype=options.dtype, cache=options.cache_weights)
        self._file = file
        self._wide = wide_dtype(options.dtype)
        self._residual = self._wide if options.upcast else options.dtype
        self._parameters = make_factors(file.config, spec, seed=seed, dtype=self._wide, device=device)
        self._layers = [
            make_layer(file.config, index, frozen, spec, self._parameters, options.dtype)
            for index, frozen in enumerate(self.frozen.layers)
        ]
        self._base_layers = [layer.without_lora() for layer in self._layers]
        self._inputs = LayerInputs(len(self._layers), device, offload=options.offload)
        self.answer_losses = OFF
        self._call_head = CallHead.make(file.config.hidden_size, self._wide, device)

    @classmethod
    def open(
        cls,
        path: str | Path,
        spec: LoraSpec,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        upcast: bool = False,
        checkpointing: bool = False,
        cache_weights: bool = False,
        offload: bool = False,
        seed: int = 0,
    ) -> "TrainModel":
        """Raises quant's ModelFileError. `seed` draws the first values of A."""
        options = ModelOptions(dtype, upcast, checkpointing, cache_weights, offload)
        return cls(open_model(path), spec, device=torch.device(device), options=options, seed=seed)

    def close(self) -> None:
        """Unmap the file; the model cannot be used afterwards."""
        self._file.close()

    def parameters(self) -> dict[str, torch.Tensor]:
        """The LoRA factors by PEFT's names: float32 leaves (float64 in a float64 model)."""
        return self._parameters

    def trained(self) -> dict[str, torch.Tensor]:
        """The same, and what is trained beside them but not exported."""
        return self._parameters | (self._call_head.parameters() if self.answer_losses.call_head_weight else {})

    def loss(self, packed: Packed, normalizer: float, *, dropout_seed: int | None = 0) -> Loss:
        """`normalizer`: the weights of the whole optimizer step, summed. `dropout_seed` keys the dropout's masks; None:
        no dropout, as the adapter is served."""
        if not normalizer > 0:
            raise ValueError(f"the normalizer is {normalizer}; it must be above 0")
        extra = self.answer_losses
        whole = with_pair_terms(packed) if extra.dpo_weight else packed
        terms = sort_terms(whole)
        if not len(terms.rows):
            return Loss(torch.zeros((), dtype=self._wide, device=self.device), 0.0, torch.zeros(0, dtype=self._wide))
        layers = self._layers
        if self.spec.dropout and dropout_seed is not None:
            layers = self._with_dropout(dropout_seed)
        hidden = self._hidden(layers, packed.token_ids, packed.positions, packed.segments, terms.rows)
        loss_terms, value = self._loss_terms(whole, terms), 0.0
        own_weights = loss_terms.weights
        if extra.needs_sums(packed):
            added, value = token_weights(packed, self._term_losses(hidden, loss_terms, terms), extra)
            loss_terms = replace(loss_terms, weights=own_weights + torch.from_numpy(added[terms.order]).to(own_weights))
        total, losses = linear_cross_entropy(hidden, self.frozen.head, loss_terms)
        per_row = self._in_packed_order(losses, terms)[: len(packed.loss_rows)]
        ce_sum = total.item() if loss_terms.weights is own_weights else torch.dot(own_weights, losses).item()
        if loss_terms.weights is not own_weights:  # the gradient is right, the value that of the weights
            total = total + (ce_sum + value - total.detach())
        if extra.call_head_weight:
            found = self._call_head.loss(packed, hidden, terms.rows)
            if found is not None:
                total = total + extra.call_head_weight * found
                value += extra.call_head_weight * found.item()
        return Loss(total / normalizer, ce_sum, per_row, value)

    @torch.no_grad()
    def pair_margins(self, packed: Packed) -> np.ndarray:
        """log p(chosen) - log p(rejected) of the micro-batch's pairs, without dropout."""
        whole = with_pair_terms(packed)
        terms = sort_terms(whole)
        hidden = self._hidden(self._layers, whole.token_ids, whole.positions, whole.segments, terms.rows)
        return margins(packed, self._term_losses(hidden, self._loss_terms(whole, terms), terms))

    @torch.no_grad()
    def _term_losses(self, hidden: torch.Tensor, loss_terms: LossTerms, terms: RowTerms) -> np.ndarray:
        """float64 (N,), in the packed order: the cross-entropy of every term, of KL terms too."""
        plain = replace(loss_terms, is_kl=torch.zeros_like(loss_terms.is_kl), base=None, base_rows=None)
        _, losses = linear_cross_entropy(hidden.detach(), self.frozen.head, plain)
        return self._in_packed_order(losses, terms).double().cpu().numpy()

    def _in_packed_order(self, losses: torch.Tensor, terms: RowTerms) -> torch.Tensor:
        found = torch.empty_like(losses)
        found[torch.from_numpy(terms.order).to(self.device)] = losses
        return found

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int] | np.ndarray, rows: Sequence[int] | np.ndarray) -> torch.Tensor:
        """(len(rows), vocabulary) in float32 or float64: of one plain sequence, without dropout."""
        ids, wanted = np.asarray(token_ids, np.int64), np.asarray(rows, np.int64)
        whole = (Segment(0, len(ids), -1),)
        hidden = self._hidden(self._layers, ids, np.arange(len(ids)), whole, wanted)
        return torch.mm(hidden[: len(wanted)], self.frozen.head.t()).to(self._wide)

    @torch.no_grad()
    def base_hidden(self, packed: Packed, rows: np.ndarray) -> torch.Tensor:
        """What the head multiplies at `rows`, of the base without LoRA: a teacher's answers."""
        hidden = self._hidden(self._base_layers, packed.token_ids, packed.positions, packed.segments, rows)
        return hidden[: len(rows)]

    def _hidden(
        self,
        layers: Sequence[Layer],
        token_ids: np.ndarray,
        positions: np.ndarray,
        segments: Sequence[SegmentLike],
        rows: np.ndarray,
    ) -> torch.Tensor:
        """Normalized hidden states of `rows`, the last again up to a multiple of ROWS, behind the last layer, in the
        compute type."""
        config = self.config
        token_ids, positions, segments = with_filler(token_ids, positions, segments)
        at = torch.from_numpy(np.asarray(positions, np.int64)).to(self.device)
        cos, sin = rope_angles(
            at,
            theta=config.rope_theta,
            rope_dim=config.rope_dim,
            factors=config.rope_freq_factors,
            dtype=self._wide,
        )
        layout = Layout(make_tiles(segments, config.num_heads), cos, sin, self._residual)
        wanted = torch.from_numpy(filled_up(rows, ROWS)).to(self.device)
        x = self.frozen.embed(token_ids, self._residual)
        is_checkpointing = self.options.checkpointing and torch.is_grad_enabled()
        if is_checkpointing:
            self._inputs.begin(x)
        for index, layer in enumerate(layers):
            run = partial(layer.forward, layout=layout, rows=wanted if index == len(layers) - 1 else None)
            x = run_checkpointed(run, x, self._inputs, index) if is_checkpointing else run(x)
        return rms_norm(x, self.frozen.output_norm, config.rms_norm_eps, self.options.dtype)

    def _loss_terms(self, packed: Packed, terms: RowTerms) -> LossTerms:
        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

        is_kl = packed.loss_kl[terms.order]
        rows, targets = tensor(terms.term_rows), tensor(packed.loss_targets[terms.order].astype(np.int64))
        weights = tensor(packed.loss_weights[terms.order]).to(self._wide)
        if not is_kl.any():
            return LossTerms(rows, targets, weights, tensor(is_kl))
        kl_rows, places = np.unique(terms.term_rows[is_kl], return_inverse=True)
        base_rows = np.zeros(len(is_kl), np.int64)
        base_rows[is_kl] = places
        part = part_with_rows(packed, terms.rows[kl_rows])
        with torch.no_grad():
            base = self._hidden(self._base_layers, part.token_ids, part.positions, part.segments, part.rows)
        return LossTerms(rows, targets, weights, tensor(is_kl), base, tensor(base_rows))

    def _with_dropout(self, seed: int) -> list[Layer]:
        def mask_of(index: int, group: str) -> Dropout:
            def mask(x: torch.Tensor) -> torch.Tensor:
                kept = 1 - self.spec.dropout
                drawn = torch.rand(x.shape, generator=keyed_generator(seed, index, group))
                return (drawn < kept).to(x.device, x.dtype).div_(kept)

            return mask

        def masks_of(index: int) -> Callable[[str], Dropout]:
            return lambda group: mask_of(index, group)

        return [layer.with_dropout(masks_of(index)) for index, layer in enumerate(self._layers)]
