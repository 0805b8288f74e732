"""The Megatron model alone in this process, on a CPU or one GPU, to be asked and not trained: parity and measurements."""

import sys
from pathlib import Path

import torch

from llava_sft.training import cpu

ON_CPU = cpu.apply()

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.training.argument_utils import core_transformer_config_from_args  # noqa: E402
from megatron.training.arguments import parse_args, validate_args  # noqa: E402

from llava_sft.model.config import ModelConfig  # noqa: E402
from llava_sft.model.llava import LlavaOneVision  # noqa: E402
from llava_sft.training.arguments import language_arguments  # noqa: E402


def load_model(model: ModelConfig, checkpoint: Path, bf16: bool) -> LlavaOneVision:
    """The model with the weights of one checkpoint folder, whatever parallel sizes wrote it; layers of plain PyTorch."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    length = model.language.max_position_embeddings
    fixed = "--micro-batch-size=1 --transformer-impl=local --no-initialization --no-gradient-accumulation-fusion"
    unfused = "--no-masked-softmax-fusion --no-persist-layer-norm --no-rope-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion"
    arguments = [
        *language_arguments(model),
        f"--seq-length={length}",
        f"--max-position-embeddings={length}",
        *fixed.split(),
        *unfused.split(),
    ]
    sys.argv = [sys.argv[0], *arguments, *(["--bf16"] if bf16 else [])]
    args = parse_args()
    validate_args(args)
    config = core_transformer_config_from_args(args)
    config.hetereogenous_dist_checkpoint = True
    built = LlavaOneVision(
        config,
        model,
        vocab_size=model.language.vocab_size,
        max_sequence_length=length,
        transformer_impl="local",
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    built = built.to(torch.bfloat16 if bf16 else torch.float32).to("cpu" if ON_CPU else "cuda")
    state = dist_checkpointing.load({"model": built.sharded_state_dict()}, str(checkpoint))
    built.load_state_dict(state["model"])
    return built
