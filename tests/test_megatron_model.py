"""The Megatron model against the project's Hugging Face model: the same weights, the same numbers.

Everything that needs Megatron in this process stands in this one file: its import takes most of the time.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

from helpers import MODELS, fp8
from helpers.conversations import VALUES, conversation, loader_batch
from helpers.megatron_model import (
    answer_losses,
    assert_same,
    greatest_difference,
    losses_and_gradients,
    mcore_forward,
    megatron_here,
    recompute_all,
    use_fused_layers,
)
from llava_sft.checkpoint.convert import hf2mcore
from llava_sft.megatron import cpu
from llava_sft.model import fused_layers
from llava_sft.model.config import load_model_config
from llava_sft.model.tensors import tensor_rows
from llava_sft.run.identity import BUCKETS_ALIKE
from llava_sft.settings.resolve import ResolvedSettings

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU layer changes nothing where there is a GPU")


@pytest.fixture(scope="module")
def megatron():
    with megatron_here() as build_model:
        yield SimpleNamespace(build=lambda model: build_model(model, VALUES))


@pytest.fixture(scope="module")
def both(megatron, small_checkpoint, small_model, tmp_path_factory):
    """The same weights in both models; Megatron's came through hf2mcore and Megatron's own loading."""
    from megatron.core import dist_checkpointing

    folder = tmp_path_factory.mktemp("mcore") / "small_mcore_tp1_pp1"
    hf2mcore(small_checkpoint, folder, small_model)
    model = megatron.build(small_model)
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder / "release"))
    model.load_state_dict(state["model"])
    hf = AutoModelForImageTextToText.from_pretrained(small_checkpoint, trust_remote_code=True)
    return SimpleNamespace(
        mcore=model, hf=hf, processor=AutoProcessor.from_pretrained(small_checkpoint, trust_remote_code=True)
    )


def hf_inputs(processor, conversations):
    texts = [processor.apply_chat_template(messages) for messages, _ in conversations]
    pictures = [picture for _, pictures in conversations for picture in pictures]
    return processor(text=texts, images=pictures or None, padding=True, padding_side="right", return_tensors="pt")


CASES = {
    "no image": [conversation(0)],
    "one image": [conversation(1, 1)],
    "two images": [conversation(2, 2)],
    "five images": [conversation(5)],
    "padded batch of three": [conversation(1, 3), conversation(0, 1), conversation(3, 2)],
}


@pytest.fixture(scope="module")
def pack(small_checkpoint):
    """Several samples in one sequence, and each alone."""
    conversations = [*CASES["padded batch of three"], conversation(0), conversation(5)]
    packed = loader_batch(small_checkpoint, conversations, packing=True, pad_multiple=64)
    return packed, [loader_batch(small_checkpoint, [each]) for each in conversations]


def test_packed_sequence_has_the_losses_and_gradients_of_its_samples(both, pack):
    packed, alone = pack
    assert packed.input_ids.shape[0] == 1 and packed.input_ids.shape[1] % 64 == 0
    assert sum(packed.segments) == packed.input_ids.shape[1] > packed.num_tokens
    model = both.mcore.train()
    assert_same(losses_and_gradients(model, [packed]), losses_and_gradients(model, alone))


@pytest.mark.parametrize("size", [64, 150, 300])
def test_a_pack_in_chunks_has_the_losses_and_gradients_of_the_pack(both, pack, size):
    packed, chunks = pack[0], pack[0].chunks(size, 16)
    assert len(chunks) > 1 and all(chunk.input_ids.numel() % 16 == 0 for chunk in chunks)
    assert [length for chunk in chunks for length in chunk.lengths if length] == packed.lengths
    assert sum(len(chunk.pixels) for chunk in chunks) == len(packed.pixels)
    model = both.mcore.train()
    assert_same(losses_and_gradients(model, chunks), losses_and_gradients(model, [packed]))
    assert packed.chunks(10_000) == [packed]


def test_fused_layers_compute_what_megatrons_do(both, small_checkpoint, monkeypatch):
    """With PyTorch's attention in the place of cuDNN's, and the kernels run by Triton's interpreter."""
    # Texts and pictures of several sizes, and no more: the interpreter takes most of this file's time.
    conversations = [conversation(1), conversation(0, 1), conversation(2, 2)]
    packed = loader_batch(small_checkpoint, conversations, packing=True, pad_multiple=64)
    model = both.mcore.train()
    expected = losses_and_gradients(model, [packed])
    seen = use_fused_layers(model, monkeypatch)
    assert_same(losses_and_gradients(model, [packed]), expected)
    assert seen == {True, False}  # both towers
    recompute_all(model, monkeypatch)
    assert_same(losses_and_gradients(model, [packed]), expected)


def test_fp8_with_largest_values_of_the_kernels_that_write_is_the_same(both, small_checkpoint, monkeypatch):
    """Bit for bit; only the output of attention and a pass's first gradient are read for them."""
    conversations = [conversation(1), conversation(0, 1)]
    packed = loader_batch(small_checkpoint, conversations, packing=True, pad_multiple=64)
    model = both.mcore.train()
    exact = losses_and_gradients(model, [packed])
    use_fused_layers(model, monkeypatch)
    counted = fp8.use(model, monkeypatch)
    with monkeypatch.context() as twice:
        twice.setattr(fused_layers, "places", lambda *given: None)
        expected = losses_and_gradients(model, [packed])
    before = len(counted)
    found = losses_and_gradients(model, [packed])
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], gradient) for name, gradient in expected[1].items())
    layers = len(model.language_model.decoder.layers)
    weights = 4 * layers  # of the first pass alone
    assert before - weights == 8 * layers and len(counted) - before == layers + 1
    assert 1e-5 < greatest_difference(found[0], exact[0]) < 0.05


def test_what_stands_for_gradients_is_not_taken_up(megatron, both, small_model, small_checkpoint, monkeypatch):
    """A product that adds to Megatron's buffer gives autograd a tensor without values: here of values that are no numbers. Nor
    do the kernels leave a value of theirs unwritten."""
    from llava_sft.megatron.distributed import wrap

    packed = loader_batch(small_checkpoint, [conversation(1)], packing=True, pad_multiple=64)
    expected = losses_and_gradients(both.mcore.train(), [packed])[1]
    model = megatron.build(small_model)
    model.load_state_dict(both.mcore.state_dict())
    wrapped = wrap(model, VALUES)
    use_fused_layers(model, monkeypatch)
    empty_like = torch.empty_like

    def no_numbers(*given, **named):
        empty = empty_like(*given, **named)
        return empty.fill_(float("nan")) if empty.is_floating_point() else empty

    monkeypatch.setattr(torch, "empty_like", no_numbers)
    wrapped.zero_grad_buffer()
    for _ in range(2):
        answer_losses(wrapped, packed).sum().backward()
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(parameter.grad_added_to_main_grad for parameter in found.values()) > 10
    for name, parameter in found.items():
        assert greatest_difference(parameter.main_grad, 2 * expected[name]) <= 1e-5, name


def test_a_validation_is_in_bf16_where_the_training_is_in_fp8(both, monkeypatch):
    """FP8 wants tokens in eights, and samples alone have any number of them; its copies of weights would be old ones."""
    from megatron.core import parallel_state

    from llava_sft.training import validation
    from llava_sft.training.loop import Loop

    assert (
        both.mcore.config
        is both.mcore.language_model.decoder.config
        is both.mcore.language_model.decoder.layers[0].config
    )
    config, seen = SimpleNamespace(fp8="hybrid"), []
    inner = SimpleNamespace(config=config)
    model = SimpleNamespace(module=inner, eval=lambda: None, train=lambda: None)  # in Megatron's wrapper
    forward = SimpleNamespace(device="cpu", evaluate=lambda batches: seen.append(config.fp8) or torch.ones(2))
    values = SimpleNamespace(eval_iters=2, log_answers=1, max_new_tokens=1)
    watch = SimpleNamespace(writes=False, pause=lambda seconds: None)
    parts = {"model": model, "forward": forward, "values": values, "watch": watch}
    loop = SimpleNamespace(**parts, stages=1, micro_batches=1, replicas=1)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *given, **named: None)
    monkeypatch.setattr(parallel_state, "get_data_parallel_rank", lambda: 0)
    monkeypatch.setattr(validation, "answers", lambda *given: seen.append(config.fp8))
    Loop.validate(loop, SimpleNamespace(rewind=lambda: None), 1)
    assert seen == [None, None, None] and config.fp8 == "hybrid"


def test_samples_alone_are_filled_up_for_fp8(both, small_checkpoint):
    conversations = [conversation(1, 1), conversation(0, 2)]
    plain, padded = (loader_batch(small_checkpoint, conversations, pad_multiple=multiple) for multiple in (1, 64))
    assert plain.input_ids.shape[1] % 64 and padded.input_ids.shape[1] % 64 == 0 and padded.segments == []
    model = both.mcore.train()
    assert_same(losses_and_gradients(model, [padded]), losses_and_gradients(model, [plain]))


def test_logits_in_pieces_give_the_same_losses_and_gradients(both, small_checkpoint, monkeypatch):
    batch, model = loader_batch(small_checkpoint, CASES["padded batch of three"]), both.mcore.train()
    weight = model.language_model.output_layer.weight
    runs = []
    for chunk in (10**6, 7):
        monkeypatch.setattr("llava_sft.model.llava.LOGITS_CHUNK", chunk)
        model.zero_grad()
        losses = answer_losses(model, batch)
        losses.sum().backward()
        runs.append((losses.detach(), weight.grad.clone()))
    assert greatest_difference(runs[0][0], runs[1][0]) <= 1e-6
    assert greatest_difference(runs[0][1], runs[1][1]) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_hugging_face_models(both, small_checkpoint, case):
    batch, inputs = loader_batch(small_checkpoint, CASES[case]), hf_inputs(both.processor, CASES[case])
    assert torch.equal(batch.input_ids, inputs["input_ids"])
    text = inputs["attention_mask"] == 1
    assert (len(CASES[case]) > 1) == bool((~text).any())
    theirs = both.hf.eval()(**inputs).logits[text]
    ours = mcore_forward(both.mcore.eval(), batch)[text]
    difference = greatest_difference(ours, theirs)
    print(f"{case}: logits differ by {difference:.1e} of the greatest, {theirs.abs().max():.3f}")
    assert difference <= 1e-5


def test_gradients_of_the_masked_loss_equal_the_hugging_face_models(both, small_checkpoint, small_model):
    conversations = CASES["padded batch of three"]
    batch, inputs = loader_batch(small_checkpoint, conversations), hf_inputs(both.processor, conversations)
    tokens, rows = batch.answer_index // len(conversations), batch.answer_index % len(conversations)
    assert set(rows.tolist()) == {0, 1, 2} and len(rows) < batch.num_tokens
    for model in (both.mcore, both.hf):
        model.train()
        model.zero_grad()
    losses = answer_losses(both.mcore, batch)
    losses.sum().backward()
    theirs = F.cross_entropy(both.hf(**inputs).logits[rows, tokens], batch.answer_labels, reduction="none")
    theirs.sum().backward()
    assert greatest_difference(losses, theirs) <= 1e-5

    parameters = {value.key: value.data for value in both.mcore.sharded_state_dict().values()}
    gradients = {name: parameter.grad for name, parameter in both.hf.named_parameters()}
    worst = {}
    for row in tensor_rows(small_model):
        ours = parameters[row.mcore].grad
        if ours is None:
            assert row.mcore in ("vision_model.class_embedding", "vision_model.class_pos_emb")
            continue
        expected = row.join([gradients[name] for name in row.hf])
        assert expected.abs().max() > 0, row.mcore
        worst[row.mcore] = greatest_difference(ours, expected)
    key = max(worst, key=worst.get)
    print(f"gradients of {len(worst)} tensors: the worst is {key}, {worst[key]:.1e} of its greatest value")
    assert worst[key] <= 1e-4


@torch.no_grad()
def test_images_have_the_features_that_they_have_alone(both, small_checkpoint):
    batch = loader_batch(small_checkpoint, [conversation(5)])
    grids = [tuple(grid) for grid in batch.grids.tolist()]
    model = both.mcore.eval()
    together = model.adapter(model.vision_model(batch.pixels, grids))
    places = np.cumsum([0, *(h * w for h, w in grids)])
    for i, grid in enumerate(grids):
        alone = model.adapter(model.vision_model(batch.pixels[places[i] : places[i + 1]], [grid]))
        torch.testing.assert_close(together[places[i] // 4 : places[i + 1] // 4], alone, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_packed_attention_equals_attention_segment_by_segment(megatron, causal):
    from megatron.core.transformer.enums import AttnMaskType

    from llava_sft.model.attention import SegmentAttention, packed_seq_params

    kind = AttnMaskType.causal if causal else AttnMaskType.no_mask
    attention = SegmentAttention(SimpleNamespace(attention_dropout=0.0), 1, kind, "self")
    lengths = [5, 5, 17, 1, 5, 30]
    tokens = sum(lengths)
    query, key, value = (torch.randn(tokens, heads, 16) for heads in (4, 2, 2))
    packed = attention(query, key, value, packed_seq_params=packed_seq_params(lengths, torch.device("cpu")))
    expected, start = [], 0
    for length in lengths:
        q, k, v = (x[start : start + length] for x in (query, key, value))
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / 4
        if causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        expected.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1))
        start += length
    torch.testing.assert_close(packed, torch.cat(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("size", "count"), [("4b", 4_741_610_528), ("8b", 8_527_214_624)])
def test_published_sizes_build_with_exactly_their_tensors(megatron, monkeypatch, size, count):
    model = load_model_config(MODELS / f"{size}.yaml")
    with monkeypatch.context() as patch, torch.device("meta"):
        patch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
        built = megatron.build(model)
    assert {parameter.device.type for parameter in built.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in built.parameters()) == count
    stored = {value.key: tuple(value.data.shape) for value in built.sharded_state_dict().values()}
    assert stored == {row.mcore: row.shape for row in tensor_rows(model)}


def test_the_cpu_layer_stays_within_torch_and_megatron(megatron):
    assert len(cpu.PATCHED) == len(set(cpu.PATCHED))
    assert [name for name in cpu.PATCHED if not name.startswith(("torch.", "megatron."))] == []
    assert [name.rpartition(".")[2] for name in cpu.PATCHED if name.startswith("megatron.")] == ["_set_cuda_rng_state"]


def test_the_cpu_layer_is_applied_once(megatron):
    before = list(cpu.PATCHED)
    assert cpu.apply() is True
    assert before == cpu.PATCHED


def test_the_cpu_layer_moves_cuda_tensors_to_the_cpu_and_leaves_other_devices_alone(megatron):
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.ones(2).to("cuda:0", torch.float64).dtype == torch.float64
    assert torch.ones(2).to(device=torch.device("cuda")).device.type == "cpu"
    assert torch.zeros(2, device="meta").device.type == "meta"
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta"


def test_a_run_changes_its_number_of_replicas_only_where_the_buckets_of_its_gradients_stay(megatron):
    from llava_sft.megatron.config import ddp_config

    values = ResolvedSettings(experiment="x", gpus_per_node=1)
    sizes = {replicas: ddp_config(values, replicas).bucket_size for replicas in (1, 2, 40, 41)}
    alike = [replicas for replicas in sizes if sizes[replicas] == sizes[2]]
    assert alike == [replicas for replicas in sizes if replicas in BUCKETS_ALIKE] == [2, 40]
