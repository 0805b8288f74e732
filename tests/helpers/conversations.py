"""Settings of a training on a CPU, and conversations as the loader hands them to the model."""

import io

import numpy as np
from PIL import Image

from helpers.models import MAX_PIXELS, MIN_PIXELS
from llava_sft.data.loader import Conversation, VlmTaskEncoder
from llava_sft.model.template import ChatTemplate
from llava_sft.settings.resolve import ResolvedSettings

SIZES = [(56, 56), (60, 130), (200, 57), (84, 84), (28, 300)]  # height, width of pictures
VALUES = ResolvedSettings(experiment="x", seq_length=512, micro_batch_size=1, global_batch_size=4)


def conversation(number_of_images: int, first: int = 0):
    """(messages, pictures): the pictures are spread over two turns."""
    rng = np.random.default_rng(first)
    sizes = [SIZES[(first + i) % len(SIZES)] for i in range(number_of_images)]
    pictures = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    early = number_of_images // 2
    messages = [
        {"role": "user", "content": "<image>" * early + "Which digit is this?"},
        {"role": "assistant", "content": f"It is {first}."},
        {"role": "user", "content": "<image>" * (number_of_images - early) + "\nWhich is the larger of the digits?"},
        {"role": "assistant", "content": "The larger of the two digits is 7. " * (1 + first)},
    ]
    return messages, pictures


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def loader_batch(folder, conversations, packing=False, pad_multiple=1):
    """What the loader hands to the model for these conversations."""
    encoder = VlmTaskEncoder(
        ChatTemplate(folder), VALUES.seq_length, MIN_PIXELS, MAX_PIXELS, packing=packing, pad_multiple=pad_multiple
    )
    keys = {"__restore_key__": (), "__subflavors__": {}}
    samples = [
        Conversation(__key__=str(i), **keys, messages=messages, images=[png(p) for p in pictures])
        for i, (messages, pictures) in enumerate(conversations)
    ]
    return encoder.batch([encoder.encode_sample(sample) for sample in samples])
