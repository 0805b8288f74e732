"""Fine-tune LLaVA-OneVision-1.5 with Megatron, end to end. `snakemake` alone lists the targets; see README.md."""

import gc
import shlex
import sys
from functools import partial
from pathlib import Path

# Ten thousand jobs are millions of objects that stay: to search them for garbage takes a fifth of the planning.
gc.set_threshold(200_000, 20, 100)

SCRIPTS = Path(workflow.basedir) / "workflow_scripts"
sys.path.insert(0, str(SCRIPTS))
# Scripts are command lines, run with this interpreter: whoever calls snakemake need not have activated anything. `exec`: no
# shell is left that prints `Terminated`.
PYTHON = f"cd {shlex.quote(str(workflow.basedir))} && exec {shlex.quote(sys.executable)} workflow_scripts/"

import snakemake_logger_plugin_llava_sft as terminal
from llava_sft import paths
from llava_sft.data.shards import FORMAT_VERSION
from llava_sft.locks import GAVE_JOBS, lift_stale_lock, pass_on_signals
from llava_sft.model.export_files import export_form
from llava_sft.training.meeting import role_of_node
from llava_sft.training.slurm import require_slurm
from llava_sft.workflow import STEPS, Workflow, cluster_numbers, outcome, overview, to_export, where_jobs_run

flow = Workflow(overrides=config, words=sys.argv[1:], cluster=cluster_numbers(workflow.resource_settings))

# Where a platform has started several nodes, the first runs the workflow, and the others never come back from here.
if workflow.is_main_process and (host := role_of_node(sys.argv[1:])):
    workflow.execute = host.until_end(workflow.execute)

if workflow.is_main_process:  # a job may run on another machine, where the kernel knows nothing of the main process
    lift_stale_lock(wait=not {"-n", "--dry-run", "--dryrun"} & set(sys.argv))

# A closed terminal ends nothing: Snakemake hears of it and asks the jobs to save.
shell.prefix("set -euo pipefail; trap '' HUP; export PYTHONUTF8=1; ")

terminal.targets.update({"targets"}, {f"{step}_{name}" for step in STEPS for name in flow.experiments})
terminal.closing = partial(outcome, flow, sys.argv[1:])

if workflow.is_main_process:
    flow.force = lambda files: workflow.dag.forcefiles.update(files)
    flow.jobs_run = lambda: where_jobs_run(workflow.executor_plugin)


rule targets:
    localrule: True
    params:
        text=overview(flow),
    shell:
        "printf '%s' {params.text:q}"


onstart:
    if workflow.is_main_process:
        pass_on_signals()
        if workflow.executor_plugin.name == "slurm":
            require_slurm(workflow.executor_settings.status_command)
            GAVE_JOBS.touch()


include: "rules/data.smk"
include: "rules/checkpoint.smk"
include: "rules/train.smk"
include: "rules/report.smk"


for experiment in flow.experiments:
    for step in STEPS:

        rule:
            name:
                f"{step}_{experiment}"
            input:
                flow.target(step, experiment),
            localrule: True
