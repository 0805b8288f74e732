"""The control tokens of LLaVA-OneVision-1.5, and the texts that its chat template is made of.

The files in hf/ spell their own, because an exported folder works without this package; tests/test_model_config.py compares.
Imported wherever text is checked: no torch, no tokenizer.
"""

import re

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, VISION_PAD = "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"

# In the order of the published tokenizer. In a text they would forge a turn or an image. Grounding tokens (<|box_start|> …)
# are content, and pass, though the published tokenizers call them special too.
CONTROL_TOKENS = (
    END_OF_TEXT,
    START_OF_TURN,
    END_OF_TURN,
    VISION_START,
    VISION_END,
    VISION_PAD,
    IMAGE_PAD,
    VIDEO_PAD,
)
CONTROL_TOKEN = re.compile("|".join(map(re.escape, CONTROL_TOKENS)))

# Key of config.json -> the token whose id stands there, and the ids in the published (Qwen3) tokenizer.
TOKEN_ID_KEYS = {
    "image_token_id": IMAGE_PAD,
    "video_token_id": VIDEO_PAD,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
PUBLISHED_TOKEN_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}

IMAGE = "<image>"  # where an image stands in the text of a record
IMAGE_TEXT = f"{VISION_START}{IMAGE_PAD}{VISION_END}"  # the same in a rendered conversation, before the pad is repeated
SYSTEM_PROMPT = "You are a helpful assistant."  # of a conversation that brings none
ANSWER_OPENING = f"{START_OF_TURN}assistant\n"
