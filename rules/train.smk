"""Token counts, preflight and training."""


rule measure_webdataset:
    input:
        flow.path("dataset"),
        flow.path("converted_done"),
    output:
        paths.SIZES,
    log:
        "{exp_dir}/logs/measure_webdataset/{run_name}.log",
    benchmark:
        "{exp_dir}/benchmarks/measure_webdataset/{run_name}.tsv"
    threads: workflow.cores
    params:
        folder=flow.path("webdatasets"),
        sidecars=flow.path("sidecars"),
        kept=flow.path("kept_sizes"),
        options=flow.options("seq_length", "min_pixels", "max_pixels"),
    shell:
        "{PYTHON}measure_webdataset.py {params.folder:q} --dataset {input[0]:q} --tokenizer {params.sidecars:q}"
        " {params.options} --processes {threads} --kept {params.kept:q} --output {output:q} > {log:q} 2>&1"


rule preflight:
    input:
        flow.path("dataset"),
        flow.path("converted_done"),
        flow.path("sizes"),
    output:
        # Those of a finished run stay when another in its directory is refused.
        resolved=update(paths.RESOLVED),
        prediction=update(paths.PREDICTION),
    log:
        "{exp_dir}/logs/preflight/{run_name}.log",
    benchmark:
        "{exp_dir}/benchmarks/preflight/{run_name}.tsv"
    localrule: True
    params:
        job=flow.preflight_job,
        settings=flow.settings,
    shell:
        "{PYTHON}preflight.py {params.job} > {log:q} 2>&1"


rule train:
    input:
        flow.path("resolved"),
    output:
        # The run directory itself is no output: Snakemake would delete its checkpoints.
        paths.TRAIN_DONE,
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
        " --srun-options={resources.srun_options:q} > {log:q} 2>&1"
