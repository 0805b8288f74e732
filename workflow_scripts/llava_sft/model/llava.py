"""LLaVA-OneVision-1.5 in Megatron-Core: vision tower → adapter → Qwen3 language model.

Notable:
- the language model is Megatron's `GPTModel`; image features take the places of the `<|image_pad|>` embeddings;
- the places come from the loader as an index, so that no step waits for the GPU to say where they are;
- with pipeline parallelism the vision tower and the adapter live in the first stage; tensor-parallel ranks have all of
  them, and some of the images each: its heads of 64 and short rows are not worth cutting;
- checkpoint keys are one per layer and tensor (`hetereogenous_dist_checkpoint`), equal for the local and the
  Transformer Engine layer spec: a checkpoint written on a CPU loads on a GPU.
"""

import copy
import itertools
from contextlib import suppress

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint, make_viewless_tensor
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llava_sft.model.attention import SegmentAttention, vision_attention
from llava_sft.model.config import ModelConfig
from llava_sft.model.fused_layers import FusedLanguageLayer, FusedVisionLayer
from llava_sft.model.products import AccumulatingLinear
from llava_sft.model.vision import Adapter, Grid, RiceViT

with suppress(ImportError):  # a machine without it has no GPU
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

LOGITS_CHUNK = 8192  # tokens: 152k logits of one take 0.3 MB in bf16, and 0.6 MB more where the loss is made in float32


class LlavaOneVision(MegatronModule):
    """The whole model, or one pipeline stage of it.

    Args:
        config: TransformerConfig of the language model (parallelism and precision are taken from it).
        model: the architecture.
        max_sequence_length: longest sequence, in tokens.
        recompute_vision: make the vision tower's activations again in the backward pass.
    """

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        max_sequence_length: int,
        pg_collection,
        pre_process: bool,
        post_process: bool,
        recompute_vision: bool,
    ):
        super().__init__(config=config)
        self.pg_collection = pg_collection
        self.pre_process, self.post_process = pre_process, post_process
        self.share_embeddings_and_output_weights = False
        self.begins_frozen = False  # embeddings are frozen, and layers are not
        self.dropout_seed: int | None = None  # of LoRA's dropout
        if pre_process:
            vision_config = vision_transformer_config(config, model, recompute_vision)
            groups = copy.copy(pg_collection)
            groups.tp = pg_collection.cp  # of this rank alone
            self.vision_model = RiceViT(vision_config, model.vision, layer_spec(vision_config, vision=True), groups)
            for parameter in self.vision_model.parameters():
                parameter.tensor_model_parallel = False
            self.adapter = Adapter(vision_config, model)
        self.language_model = GPTModel(
            config=config,
            transformer_layer_spec=layer_spec(config, vision=False),
            vocab_size=model.language.vocab_size,
            max_sequence_length=max_sequence_length,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            position_embedding_type="rope",
            rotary_base=model.language.rotary_base,
            pg_collection=pg_collection,
        )

    def set_input_tensor(self, input_tensor) -> None:
        self.language_model.set_input_tensor(input_tensor)

    def forward(
        self,
        input_ids: Tensor,
        pixels: Tensor | None,
        grids: list[Grid],
        image_index: Tensor | None,
        answer_index: Tensor | None = None,
        answer_labels: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Loss of each answer token [answer tokens] where answers are given, else logits [batch, tokens, vocabulary].

        Args:
            input_ids: [batch, tokens], padded behind the text.
            pixels: uint8 [patches, 3·patch_size²] of all images of the batch, None without images.
            grids: height and width in patches of each image, on the host.
            image_index: [image tokens] places of the `<|image_pad|>` tokens in the flattened [tokens, batch].
            answer_index: [answer tokens] places, in the same order, that predict a token of an answer.
            answer_labels: [answer tokens] those tokens.
        """
        embeddings = None
        if self.pre_process:
            embeddings = self.language_model.embedding(
                input_ids=input_ids, position_ids=None
            )  # [tokens, batch, hidden]
            if self.begins_frozen and torch.is_grad_enabled():
                embeddings.requires_grad_()  # recomputation has no backward pass for a layer whose input wants no gradient
            if grids:
                features = self.image_features(pixels, grids).to(embeddings.dtype)
                flat = embeddings.flatten(0, 1).index_copy(0, image_index, features)
                embeddings = flat.view_as(embeddings)
        output = self.language_model(
            input_ids=input_ids,
            position_ids=None,
            attention_mask=None,
            decoder_input=embeddings,
            packed_seq_params=packed_seq_params,
            output_processor=None if answer_index is None else answer_losses,
            output_processor_context=(answer_index, answer_labels),
        )
        if self.post_process:
            return output
        # Megatron frees a stage's output once it is sent, and refuses to free a view of another tensor.
        return make_viewless_tensor(output, requires_grad=True, keep_graph=True)

    def own_images(self, grids: list[Grid]) -> slice:
        """Those whose features this tensor-parallel rank makes: neighbours, with a share of the patches that is near its
        part of them."""
        ranks, rank = self.pg_collection.tp.size(), self.pg_collection.tp.rank()
        ends = [0, *itertools.accumulate(height * width for height, width in grids)]
        nearest = [min(range(len(ends)), key=lambda i: abs(ends[i] * ranks - ends[-1] * n)) for n in (rank, rank + 1)]
        return slice(*nearest)

    def image_features(self, pixels: Tensor, grids: list[Grid]) -> Tensor:
        """[image tokens, hidden] of all images. Each tensor-parallel rank has the whole vision tower, and makes those of its
        images; the gradients of the tower are summed in megatron/distributed.py."""
        if self.pg_collection.tp.size() == 1:
            return self.adapter(self.vision_model(pixels, grids))
        mine = self.own_images(grids)
        counts = [height * width for height, width in grids]
        first, last = sum(counts[: mine.start]), sum(counts[: mine.stop])
        if counts[mine]:
            features = self.adapter(self.vision_model(pixels[first:last], grids[mine]))
        else:
            learns = any(p.requires_grad for part in (self.vision_model, self.adapter) for p in part.parameters())
            # All ranks go through the same backward pass, whichever of them has an image.
            out = self.adapter.linear_fc2.weight
            features = out.new_zeros(0, out.size(0), requires_grad=learns and torch.is_grad_enabled())
        merged = self.vision_model.vision.spatial_merge_size**2
        places = F.pad(features, (0, 0, first // merged, (sum(counts) - last) // merged))
        return reduce_from_tensor_model_parallel_region(places, group=self.pg_collection.tp)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """What a checkpoint holds: weights alone. Megatron's `_extra_state` (scales of delayed FP8) depends on the
        layer spec and would tie a checkpoint to the kind of machine that wrote it."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.pre_process and self.pg_collection.tp.size() > 1:  # one of the copies is written
            copies = ensure_metadata_has_dp_cp_group(metadata) | {"dp_cp_group": self.pg_collection.tp_dp_cp}
            state |= self.vision_model.sharded_state_dict(f"{prefix}vision_model.", sharded_offsets, copies)
        state = {key: value for key, value in state.items() if not key.endswith("_extra_state")}
        return {key: split_pair(entry, self.pg_collection.tp, metadata) for key, entry in state.items()}

    def load_state_dict(self, state_dict, strict=True, assign=False):
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [key for key in result.missing_keys if not key.endswith("_extra_state")]
        if strict and (missing or result.unexpected_keys):
            raise RuntimeError(f"missing: {missing}, unexpected: {result.unexpected_keys}")
        return result


def split_pair(entry, group, metadata):
    """LoRA's pairs are split over tensor-parallel ranks as their linear layer is, whose own state knows its weight alone."""
    if not (entry.key.endswith(("lora_a", "lora_b")) and getattr(entry.data, "tensor_model_parallel", False)):
        return entry
    replicas = ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]
    groups = {"tp_group": group, "dp_cp_group": replicas}
    made = make_tp_sharded_tensor_for_checkpoint(entry.data, entry.key, entry.data.partition_dim, **groups)
    if entry.key.startswith("language_model") and entry.key.endswith("linear_fc1.lora_b"):  # each rank: gate, then up
        return apply_swiglu_sharded_factory(made, (), tp_group=group, dp_group=replicas)
    return made


def answer_losses(hidden_states: Tensor, output_layer, config, context, **unused) -> Tensor:
    """Cross entropy [answer tokens] at the places that predict an answer: no other place needs its 152k logits.

    More than `LOGITS_CHUNK` of them go piece by piece, and their logits are made again in the backward pass.
    """
    index, labels = context
    group = output_layer.tp_group
    if config.sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
    hidden = hidden_states.flatten(0, 1).index_select(0, index).unsqueeze(1)  # [answer tokens, 1, hidden]

    def losses(hidden: Tensor, labels: Tensor) -> Tensor:
        if not (hidden.is_cuda and len(labels)):  # the kernel wants one answer token at least
            logits, _ = output_layer(hidden)
            return vocab_parallel_cross_entropy(logits.float(), labels.unsqueeze(1), tp_group=group).squeeze(1)
        if group.size() > 1:
            logits, _ = output_layer(hidden)
        else:
            logits = AccumulatingLinear.apply(hidden.squeeze(1), output_layer.weight).unsqueeze(1)
        # In float32 inside, but nothing of that size is written; the gradient takes the place of the logits.
        return parallel_cross_entropy(
            logits, labels.unsqueeze(1), dist_process_group=group, overwrite_input=True
        ).squeeze(1)

    if len(index) <= LOGITS_CHUNK:
        return losses(hidden, labels)
    pieces = zip(hidden.split(LOGITS_CHUNK), labels.split(LOGITS_CHUNK), strict=True)
    return torch.cat([checkpoint(losses, *piece, use_reentrant=False) for piece in pieces])


def layer_spec(config: TransformerConfig, vision: bool) -> ModuleSpec:
    """The layers of the language model or of the vision tower, on Transformer Engine or on plain PyTorch."""
    kinds = {"qk_layernorm": not vision, "normalization": "LayerNorm" if vision else "RMSNorm"}
    module = TransformerLayer
    if config.transformer_impl == "transformer_engine":
        kinds.pop("normalization")
        submodules = get_gpt_layer_with_transformer_engine_submodules(**kinds)
        module = FusedVisionLayer if vision else FusedLanguageLayer
    else:
        submodules = get_gpt_layer_local_submodules(**kinds)
        submodules.self_attention.submodules.core_attention = SegmentAttention
    if vision:
        attention = submodules.self_attention
        attention.params["attn_mask_type"] = AttnMaskType.no_mask
        attention.submodules.core_attention = vision_attention(attention.submodules.core_attention)
    return ModuleSpec(module=module, submodules=submodules)


def vision_transformer_config(language: TransformerConfig, model: ModelConfig, recompute: bool) -> TransformerConfig:
    """The vision tower's TransformerConfig: its own shape and recomputation, the language model's precision."""
    vision, config = model.vision, copy.copy(language)
    config.num_layers = vision.num_layers
    config.hidden_size = vision.hidden_size
    config.ffn_hidden_size = vision.ffn_hidden_size
    config.num_attention_heads = config.num_query_groups = vision.num_attention_heads
    config.kv_channels = vision.hidden_size // vision.num_attention_heads
    config.layernorm_epsilon = vision.layernorm_epsilon
    config.normalization = "LayerNorm"
    config.qk_layernorm = False
    config.add_bias_linear = config.add_qkv_bias = True
    config.gated_linear_unit = False
    config.activation_func = F.gelu
    config.bias_activation_fusion = False
    config.recompute_granularity = "full" if recompute else None
    config.recompute_method, config.recompute_num_layers = ("uniform", 1) if recompute else (None, None)
    config.pipeline_model_parallel_size = 1  # the whole tower stands in the first stage
    config.tensor_model_parallel_size = 1  # on each rank
    config.num_layers_in_first_pipeline_stage = None
    config.fp8 = None  # its rows are too short: casting costs more than the products gain
    return config
