"""The settings of the evaluation: who is asked what, how answers are generated, and how they are scored."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from llava_sft.evaluation.scores import SPELLINGS, parse_score
from llava_sft.settings.fields import Positive, Section, free


class Evaluation(Section):
    """evaluation on the held-out split"""

    evaluate_scores: Annotated[tuple[str, ...], Field(min_length=1)] = free(
        ("exact",), f"the first decides what is right: {SPELLINGS}"
    )
    evaluate_by: str = free("kind", "the record's key that scores are reported by")
    evaluate_base: bool = free(
        True,
        "the start checkpoint answers the same questions, to show what the training changed; these answers are kept for other runs",
    )
    evaluate_samples: Positive | Literal["all"] = free("all", "or a number")
    evaluate_batch_size: Positive = free(
        64, "questions answered at once by transformers; half as many where they do not fit"
    )
    evaluate_with: Literal["transformers", "vllm"] | None = free(
        None, "who generates: transformers | vllm (default: vLLM where there are it and a GPU)"
    )
    vllm_python: Path | None = free(
        None, "interpreter of an environment with vLLM, ENVIRONMENT/bin/python (default: the one of this workflow)"
    )
    max_new_tokens: Positive = free(32, "longest answer, in tokens")

    @field_validator("evaluate_scores", mode="before")
    @classmethod
    def _one_or_several(cls, scores: Any) -> Any:
        return (scores,) if isinstance(scores, str) else scores

    @field_validator("evaluate_scores")
    @classmethod
    def _known_scores(cls, scores: tuple[str, ...]) -> tuple[str, ...]:
        for spelled in scores:
            parse_score(spelled)
        return scores
