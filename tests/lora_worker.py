"""One rank of test_lora.py: the pairs of a small model, filled by one process, then loss and gradients at a layout.

torchrun --nproc-per-node=2 tests/lora_worker.py JOB_DIR TP PP
"""

import os
import sys
from pathlib import Path

import torch

from llava_sft.files import read_json
from llava_sft.megatron import cpu
from llava_sft.model.config import ModelConfig

cpu.apply()

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402

from llava_sft.megatron import distributed, parallel  # noqa: E402
from llava_sft.training.forward import build_model  # noqa: E402


def main(folder: Path, tp: int) -> None:
    job = read_json(folder / "job.json")
    values = job["values"] | {"tensor_model_parallel_size": tp}
    parallel.start(values, torch.distributed.FileStore(str(folder / f"store{tp}"), int(os.environ["WORLD_SIZE"])))
    model = build_model(ModelConfig(**job["model"]), values)
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    if tp == 1:
        torch.manual_seed(1)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        (folder / "start").mkdir()
        dist_checkpointing.save(model.sharded_state_dict(metadata=metadata), str(folder / "start"))
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(metadata=metadata), str(folder / "start")))
    wrapped = distributed.wrap(model, values)
    wrapped.train()
    torch.manual_seed(2)
    ids, pixels = torch.randint(0, 400, (2, 20)), torch.randint(0, 256, (16, 588), dtype=torch.uint8)
    images, answers, labels = torch.arange(4, 12, 2), torch.arange(20, 38), torch.randint(0, 400, (18,))
    losses = wrapped(ids, pixels, [(4, 4)], images, answer_index=answers, answer_labels=labels)
    losses.sum().backward()
    gradients = {k: v for k, v in model.sharded_state_dict(metadata=metadata).items() if v.data.requires_grad}
    for value in gradients.values():
        value.data = value.data.main_grad
    (folder / f"tp{tp}").mkdir(exist_ok=True)
    dist_checkpointing.save(gradients, str(folder / f"tp{tp}"))
    if torch.distributed.get_rank() == 0:
        (folder / f"loss{tp}").write_text(str(float(losses.sum())))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
