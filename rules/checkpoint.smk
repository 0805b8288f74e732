"""Checkpoints between Hugging Face and Megatron, both ways."""


rule convert_checkpoint_hf2mcore:
    input:
        flow.checkpoint_folders,
    output:
        paths.CHECKPOINT_DONE,
    log:
        "{exp_dir}/logs/convert_checkpoint_hf2mcore/{checkpoint}.log",
    benchmark:
        "{exp_dir}/benchmarks/convert_checkpoint_hf2mcore/{checkpoint}.tsv"
    params:
        folder=paths.CHECKPOINT,
        job=flow.checkpoint_job,
    shell:
        "{PYTHON}convert_checkpoint.py hf2mcore {params.job} --done {output:q} -- {params.folder:q} > {log:q} 2>&1"


rule convert_checkpoint_mcore2hf:
    input:
        to_export(flow),
    output:
        paths.EXPORT_DONE,
    log:
        "{exp_dir}/logs/convert_checkpoint_mcore2hf/{run_name}.log",
    benchmark:
        "{exp_dir}/benchmarks/convert_checkpoint_mcore2hf/{run_name}.tsv"
    params:
        folder=paths.EXPORT,
        run_dir=flow.path("run_dir"),
        webdatasets=flow.path("webdatasets"),
        options=flow.options("parity", "export_names"),
        form=export_form(),  # exports of an earlier version are made anew
    shell:
        "{PYTHON}convert_checkpoint.py mcore2hf {params.run_dir:q} {params.folder:q} {params.options}"
        " --samples {params.webdatasets:q} --done {output:q} > {log:q} 2>&1"
