"""ms-swift's inference. Its template holds the published id of the image token, so an export of the tiny tokenizer, whose
ids are others, has to have it set; the published ones need no such line."""

import torch
from asked import Job
from swift import InferRequest, RequestConfig, TransformersEngine


def main() -> None:
    job = Job()
    engine = TransformersEngine(
        job.export,
        model_type="llava_onevision1_5",
        torch_dtype=getattr(torch, job.dtype),
        device_map="cpu",
        max_batch_size=4,
        adapters=[job.adapter] if job.adapter else None,
    )
    engine.template.image_token_id = engine.model.config.image_token_id
    requests = []
    for messages in job.questions:
        text = [
            {"role": m["role"], "content": "".join(part.get("text", "<image>") for part in m["content"])}
            for m in messages
        ]
        images = [part["path"] for m in messages for part in m["content"] if part["type"] == "image"]
        requests.append(InferRequest(text, images=images))
    responses = engine.infer(requests, RequestConfig(max_tokens=job.max_new_tokens, temperature=0))
    job.give(
        'TransformersEngine(model_type="llava_onevision1_5").infer, template.image_token_id set',
        [response.choices[0].message.content for response in responses],
        ["ms-swift", "transformers", "torch"],
    )


if __name__ == "__main__":
    main()
