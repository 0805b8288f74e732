"""Every setting, once: type, default, what it means, and what a change of it does.

`setting` declares one whose change makes another run, `free` one that may change while a run goes on. config/config.yaml
and config/schema.json are generated from here (`make schema`). Imported while Snakemake builds its DAG: no torch.
"""

import datetime
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, PrivateAttr, field_validator

from llava_sft.model.lora import Lora
from llava_sft.model.trained import Trained
from llava_sft.settings.data import Data
from llava_sft.settings.evaluation import Evaluation
from llava_sft.settings.fields import (
    Auto,
    Fraction,
    Natural,
    NonNegative,
    Parts,
    Positive,
    Rate,
    Section,
    Tag,
    Trackers,
    about_field,
    free,
    setting,
)
from llava_sft.settings.lora import LoraSettings

# Names of run directories begin like this; the values of a stage are in config/stages/.
STAGES = {"align": "stage1_align", "mid": "stage1.5_mid", "sft": "stage2_sft"}


class Named(Section):
    """What the name of the experiment's file says."""

    experiment: str = free(..., "name of the file in config/experiments/", shown=False)


class Where(Section):
    """where"""

    exp_dir: Path = free(
        "output", "EXP_DIR: everything the workflow makes; {exp_dir} in the paths below stands for it", shown=False
    )
    run_tag: Tag = free("", "free suffix that makes another run of the same experiment: stage2_sft_X_<run_tag>")

    @field_validator("run_tag", mode="before")
    @classmethod
    def _tag_is_text(cls, value: Any) -> Any:
        """`run_tag: 1220` is a number to YAML, and a date to people."""
        return str(value) if isinstance(value, int | datetime.date) and not isinstance(value, bool) else value

    @field_validator("exp_dir")
    @classmethod
    def _a_folder_for_rules(cls, exp_dir: Path) -> Path:
        """Snakemake reads braces as wildcards and drops `./`, scripts a dash as an option, and no shell expands a `~`."""
        if re.search(r"[{}\\]|^\w+:/|^[-~]|^[./]$", str(exp_dir)):
            raise ValueError(
                "a folder on a disk, not . or /, without braces and backslashes, that begins neither with - nor with ~"
            )
        return exp_dir


class Model(Section):
    """model"""

    model: str = setting("4b", "config/models/<model>.yaml", shown=False)
    load: str = free(
        "",
        "CHECKPOINT_PATH: Hugging Face folder | org/name or org/name@revision on the hub | …_mcore_tp1_pp1 | an earlier "
        "run's iter_0000400 | random. Megatron folders of the original project are converted, too",
        shown=False,
    )
    load_parts: dict[str, str] = free(
        {},
        "parts that come from elsewhere: {vision_model: RICE-ViT, language_model: Qwen3, adapter: random}; each a folder or "
        "hub id of that model, or of a whole one",
    )
    tokenizer: Path | None = free(
        None, "TOKENIZER_PATH: folder with tokenizer.json (default: that of the start checkpoint)", shown=False
    )
    stage: Literal["align", "mid", "sft"] = free(
        "sft", "align (stage 1) | mid (stage 1.5) | sft (stage 2): config/stages/<stage>.yaml", shown=True
    )
    trainable_modules: Parts = setting(
        ["language_model", "adapter", "vision_model"], "what is trained; parts left out are frozen", shown=True
    )


class Batches(Section):
    """batches and length"""

    seq_length: Positive = setting(
        32768, "SEQ_LEN, tokens; a longer conversation is cut at the end of a turn", shown=True
    )
    packing: bool = setting(
        True, "several samples in one sequence, none of which sees another; a batch then counts sequences"
    )
    packing_buffer_size: Positive | Auto = setting(
        "auto", "samples that are packed at a time: those of 200 packs, 2,000 to 10,000"
    )
    micro_batch_size: Positive | Auto = free(
        1,
        "MBS; auto: global_batch_size / data-parallel size, which is raised to fit; for small models",
        shown=True,
    )
    global_batch_size: Positive | Auto = setting(
        "auto",
        "GBS: 4 × data-parallel size × MBS; counts packs (packing: false: samples, as the guide does)",
        shown=True,
    )
    train_iters: Positive | Auto = free(
        "auto",
        "NSTEP: epochs × packs / GBS (packing: false: samples), raised to two significant digits",
        shown=True,
    )
    epochs: Rate = free(1, "passes over the data: in each, every sample is seen once, in an order of its own")


class Optimizer(Section):
    """optimizer"""

    lr: Rate = setting(1e-5, "unstable or exploding: 5e-6 or 1e-6; too slow: 2e-5 or 5e-5", shown=True)
    lr_vision: Rate | Auto = setting("auto", "of the vision_model: lr")
    lr_adapter: Rate | Auto = setting("auto", "of the adapter: lr")
    min_lr: NonNegative | Auto = setting(
        "auto", "the schedule ends here: lr / 10; other parts' rates end at the same share of theirs"
    )
    lr_decay_style: Literal["cosine", "linear", "constant"] = setting("cosine", "cosine | linear | constant")
    lr_decay_iters: Positive | Auto = free(
        "auto", "length of the schedule: train_iters at the first start; after it the rate is min_lr"
    )
    lr_warmup_fraction: Fraction = setting(0.002, "share of the schedule in which the rate rises from 0")
    weight_decay: NonNegative = setting(0, "not of biases and norms")
    adam_beta1: Fraction = setting(0.9, "Adam's decay of the mean gradient")
    adam_beta2: Fraction = setting(0.99, "Adam's decay of the squared gradient")
    adam_eps: Rate = setting(1e-5, "added to the root of the squared gradient")
    clip_grad: NonNegative = setting(1.0, "greatest norm of the gradient; 0 does not clip")
    seed: Natural = setting(42, "of the order of the samples")


class Run(Section):
    """run"""

    bf16: bool | Auto = setting("auto", "bf16 on GPUs, float32 on a CPU")
    fp8: Literal["none", "tensorwise", "blockwise"] = setting(
        "none",
        "none | tensorwise | blockwise: products of the language model in FP8 in training (Ada, Hopper or newer; blockwise: "
        "Hopper); validation is in bf16",
    )
    attention: Literal["auto", "cudnn", "flash4"] = free(
        "auto",
        "auto | cudnn | flash4: on Hopper, FlashAttention-4 where it is faster and installed (make doctor says how), never, "
        "or everywhere; deterministic runs have cuDNN's",
    )
    optimizer_precision: Literal["bf16", "fp32"] = setting(
        "bf16",
        "of gradients and Adam's moments on GPUs: bf16 (10 bytes a parameter in all) | fp32 (18); the weights are "
        "float32 in either: with bf16 moments as bf16 and what it lacks",
    )
    deterministic: bool = setting(False, "the same run gives the same bits on GPUs too; slower (CPU runs always do)")
    pack_chunk_tokens: Positive = free(
        8192,
        "a longer pack goes through the model in chunks of about so many tokens, cut between samples: the same "
        "gradients, and activations of one chunk. Not with pipeline parallelism",
    )
    recompute_language: Literal["none", "full"] = free(
        "none", "recompute activations in the backward pass: none | full: less memory, slower"
    )
    recompute_vision: Literal["none", "full"] = free(
        "none", "none | full, for the vision tower: what a pack of many pictures wants first"
    )
    memory_check: Literal["stop", "warn"] = free(
        "stop", "stop | warn: what to do when a run, or a save, needs more memory than its machine or job has"
    )
    save_interval: Positive | Auto = free(
        "auto", "steps between checkpoints: 20, 50, 100, 200 …, so that there are at most 16"
    )
    async_save: bool | Auto = free(
        "auto", "the training goes on while a checkpoint is written, from a copy in host memory: on GPUs"
    )
    keep_last: Positive | None = free(
        None, "keep this many newest checkpoints (2 or more survive a damaged one); null keeps all"
    )
    keep_every: Positive | None = free(
        None, "of those that keep_last would delete, keep each of this many steps; the best stays too"
    )
    max_minutes: Rate | None = free(None, "save and stop after this time, exit code 75; the same command goes on")
    num_workers: Positive | Auto = free(
        "auto", "loader processes of a training process: half as many again as keep up, by measurement"
    )
    nodes: Positive | Auto = free(
        "auto",
        "machines that train together: 1, with --profile slurm what the profile says, on a platform that starts several "
        "(NNODES or WORLD_SIZE) all of them",
    )
    gpus_per_node: Natural | Auto = free(
        "auto", "GPUS_PER_NODE: those of this machine, with --profile slurm what the profile says; 0: CPU"
    )
    nproc_per_node: Positive | Auto = free(
        "auto", "training processes: one a GPU; on a CPU TP × PP, or more for data parallelism"
    )
    tensor_model_parallel_size: Positive = free(1, "TP; a run on GPUs keeps it")
    pipeline_model_parallel_size: Positive = free(1, "PP; a run on GPUs keeps it")
    first_stage_layers: Positive | Auto = free(
        "auto",
        "of a model in pipeline stages: layers of the language model beside the vision tower; the other stages share the "
        "rest evenly; auto: all stages equally slow. A run on GPUs keeps it",
    )


class Watching(Section):
    """watching"""

    log_interval: Positive = free(10, "steps from one progress line to the next")
    eval_interval: Positive | Auto = free(
        "auto", "steps from one validation on the held-out split to the next: save_interval"
    )
    eval_iters: Natural | Auto = free(
        "auto", "global batches of a validation: the held-out split, at most 10; 0 for none"
    )
    log_answers: Natural = free(
        4, "held-out samples that are answered at each validation, for the report and TensorBoard"
    )
    log_samples: bool = free(
        True, "note the ids of every step's samples in samples/, and at the end how often each was seen"
    )
    trackers: Trackers = free(
        (),
        "wandb | swanlab | mlflow | trackio, one or several: a run there, too; one that fails never stops a training",
    )
    tracker_project: str | None = free(
        None, "project there (MLflow: experiment; default: WANDB_PROJECT and the like, else llava-sft)"
    )
    max_damaged_samples: Natural = free(
        0, "samples that the training may leave out because they cannot be read, each noted in damaged_samples.jsonl"
    )
    report_language: Literal["auto", "en", "zh"] = free(
        "auto",
        "of the report and the inspection: en | zh (Chinese); auto: that of the locale (LC_ALL, LC_MESSAGES, LANG)",
    )
    max_bad_steps: Positive = free(
        20, "stop after so many bad steps in a row (NaN, or a loss far above the steps before)"
    )


class Export(Section):
    """export"""

    parity: Literal["check", "cpu", "gpu", "skip"] = free(
        "check",
        "the export is compared with the Megatron model before it gets its name: check | cpu | gpu | skip; check: on a "
        "GPU if there is one. Needs memory for the whole model, in float32 where it fits",
    )
    export_names: Literal["model", "published"] = free(
        "model",
        "how the export spells the names of its tensors: model (model.visual.…, model.language_model.…, as transformers 5 "
        "does) | published (visual.…, model.layers.…, for programs that look for the names of the published "
        "checkpoints). transformers 5.0 to 5.8 would read the published ones with a random language model, which only the "
        "code in the export's folder prevents",
    )
    license: str | None = free(
        None, "of the trained model, for its model card, as the hub spells it: apache-2.0, cc-by-nc-4.0, other …"
    )
    base_model: str | None = free(
        None, "org/name on the hub that the model card names as its origin (default: `load`, where that is on the hub)"
    )
    language: tuple[str, ...] = free((), "languages of the data, for the model card: [en, zh]")


SECTIONS = (Where, Data, Model, LoraSettings, Batches, Optimizer, Run, Watching, Evaluation, Export)


# The experiment's name comes first, then the sections in order: pydantic collects the fields of the last base first.
class AllSettings(Export, Evaluation, Watching, Run, Optimizer, Batches, LoraSettings, Model, Data, Where, Named):
    """The settings of one experiment, given or resolved."""

    @property
    def run_name(self) -> str:
        """`stage2_sft_vqa`, or `stage2_sft_vqa_<run_tag>`."""
        return f"{STAGES[self.stage]}_{self.experiment}" + (f"_{self.run_tag}" if self.run_tag else "")

    @property
    def model_parallel_size(self) -> int:
        """Processes that share one replica of the model, TP × PP."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def trained(self) -> Trained:
        """Which parts of the model learn, and how."""
        pairs = tuple(self.lora_modules) if self.lora_rank else ()
        whole = tuple(part for part in self.trainable_modules if part not in pairs)
        return Trained(whole, Lora(self.lora_rank, self.lora_alpha, pairs, self.lora_dropout) if pairs else None)


ABOUT = {name: about_field(field) for name, field in AllSettings.model_fields.items()}
DEFAULTS = {name: field.default for name, field in AllSettings.model_fields.items() if name not in Named.model_fields}


class Settings(AllSettings):
    """One experiment's settings as the user gave them; `auto` is still `auto`."""

    model_config = ConfigDict(extra="forbid")

    _origin: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def origin(self) -> dict[str, str]:
        """Setting → where its value was given: a file, or `--config`."""
        return self._origin
