"""How a setting is declared: its type, default and text, and what a change of it does."""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from llava_sft.model.tensors import Part

Auto = Literal["auto"]
Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0)]  # `1e-5` too, which is text to YAML
NonNegative = Annotated[float, Field(ge=0)]
# Of the model, each once and in one order: the same parts are the same run.
Parts = Annotated[list[Part], Field(min_length=1), AfterValidator(lambda parts: sorted(set(parts), reverse=True))]
Trackers = Annotated[
    tuple[Literal["wandb", "swanlab", "mlflow", "trackio"], ...],
    AfterValidator(lambda names: tuple(dict.fromkeys(names))),
]
Tag = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]*$", max_length=100)]


class About(NamedTuple):
    """What a setting is, beside its type, default and text.

    identity: a change makes another run.
    shown: by preflight; None: where its value is not the default.
    later: younger than the first runs: those that do not name it did what its default says.
    """

    identity: bool
    shown: bool | None
    later: bool = False


class Section(BaseModel):
    """One section of config/config.yaml; its docstring is the heading there."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, validate_default=True)


def about_field(field: FieldInfo) -> About:
    extra: Any = field.json_schema_extra
    return About(**extra["about"])


def setting(default: Any, text: str, shown: bool | None = None, identity: bool = True, later: bool = False) -> Any:
    """A setting that is part of a run's identity. Returned is pydantic's field, which type checkers take for the value."""
    about = About(identity, shown, later)
    return Field(default, description=text, json_schema_extra={"about": about._asdict()})


def free(default: Any, text: str, shown: bool | None = None) -> Any:
    """A setting that may change while a run goes on: it changes neither what is learned at a step nor the order of steps."""
    return setting(default, text, shown, identity=False)
