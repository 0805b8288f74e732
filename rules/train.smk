"""Preflight and training."""


rule preflight:
    input:
        flow.path("dataset"),
        flow.path("converted_done"),
    output:
        resolved="{exp_dir}/{run_name}_results/resolved.json",
        prediction="{exp_dir}/{run_name}_results/preflight.json",
    log:
        "{exp_dir}/logs/preflight/{run_name}.log",
    benchmark:
        "{exp_dir}/benchmarks/preflight/{run_name}.tsv"
    localrule: True
    params:
        job=flow.preflight_job,
        settings=flow.settings(),
    shell:
        "{PYTHON}preflight.py {params.job} 2>&1 | tee -i {log:q}"


rule train:
    input:
        flow.path("resolved"),
    output:
        # The run directory itself is no output: Snakemake would delete its checkpoints.
        "{exp_dir}/{run_name}_results/train.done.json",
    log:
        "{exp_dir}/logs/train/{run_name}.log",
    benchmark:
        "{exp_dir}/benchmarks/train/{run_name}.tsv"
    # Under Slurm, a cancelled or crashed training is tried again; out of time, the job requeues itself (train.py).
    retries: 2 if flow.cluster else 0
    threads: workflow.cores
    resources:
        mpi="",  # the Slurm plugin then leaves srun to train.py
        nodes=flow.nodes,
        tasks=flow.tasks,
        gres=flow.gres,
        srun_options="",
    params:
        run_dir=flow.path("run_dir"),
    shell:
        "{PYTHON}train.py {input:q} --run-dir {params.run_dir:q} --done {output:q}"
        " --srun-options={resources.srun_options:q} 2>&1 | tee -i {log:q}"
