"""Raw records and images → WebDataset shards → .nv-meta index → inspection."""


wildcard_constraints:
    # What the settings of the experiments name and nothing else: a file of the user's is never an output.
    shard=r"([\w.-]+/)?(subtaskdata|heldout)-\d+",
    exp_dir=flow.pattern("exp_dir"),
    experiment=flow.pattern("experiment"),
    run_name=flow.pattern("run_name"),
    checkpoint=flow.pattern("checkpoint"),


rule make_demo_vqa:
    output:
        # The files themselves are no output: Snakemake would delete what stands there, whoever made it.
        paths.DEMO_DONE,
    log:
        "{exp_dir}/logs/make_demo_vqa.log",
    benchmark:
        "{exp_dir}/benchmarks/make_demo_vqa.tsv"
    wildcard_constraints:
        exp_dir=flow.pattern("demo"),
    shell:
        "{PYTHON}make_demo_vqa.py --output-dir {wildcards.exp_dir:q}/demo"
        " --checkpoint-dir {wildcards.exp_dir:q}/demo/LLaVA-OneVision-1.5-tiny --done {output:q} > {log:q} 2>&1"


rule stage2_sftdata2webdataset:
    input:
        # What changed in the raw file shows in the plan (params); its date alone reruns nothing.
        ancient(flow.raw_of_shard),
    output:
        tar=paths.SHARD + ".tar",
        idx=paths.SHARD + ".tar.idx",
        samples=paths.SHARD_NOTES + ".samples.jsonl",
        stats=paths.SHARD_NOTES + ".stats.json",
        rejects=paths.SHARD_NOTES + ".rejects.jsonl",
    log:
        "{exp_dir}/logs/stage2_sftdata2webdataset/{experiment}/{shard}.log",
    benchmark:
        "{exp_dir}/benchmarks/stage2_sftdata2webdataset/{experiment}/{shard}.tsv"
    params:
        job=flow.job_of_shard,
        format_version=FORMAT_VERSION,
    shell:
        "{PYTHON}stage2_sftdata2webdataset.py --input {input:q} {params.job}"
        ' --output-dir "$(dirname {output.tar:q})" --parts-dir "$(dirname {output.stats:q})" > {log:q} 2>&1'


rule index_webdataset:
    input:
        shards=flow.shard_files,
        raw=flow.raw_files,
    output:
        paths.DATASET,
    log:
        "{exp_dir}/logs/index_webdataset/{experiment}.log",
    benchmark:
        "{exp_dir}/benchmarks/index_webdataset/{experiment}.tsv"
    params:
        folder=flow.path("webdatasets"),
        job=flow.index_job,
        options=flow.options("max_reject_fraction", "val_fraction", "split_seed"),
    shell:
        "{PYTHON}index_webdataset.py {params.folder:q} {params.job} {params.options} --output {output:q} > {log:q} 2>&1"


rule inspect_webdataset:
    input:
        flow.path("dataset"),
    output:
        json=paths.INSPECTION,
        html=paths.INSPECTION_PAGE,
    log:
        "{exp_dir}/logs/inspect_webdataset/{experiment}.log",
    benchmark:
        "{exp_dir}/benchmarks/inspect_webdataset/{experiment}.tsv"
    resources:
        # No parameter, which would have the data looked at again for another language.
        language=flow.options("report_language", without="report_"),
    params:
        folder=flow.path("webdatasets"),
        tokenizer=flow.path("tokenizer"),
        options=flow.options("seq_length", "min_pixels", "max_pixels"),
    shell:
        "{PYTHON}inspect_webdataset.py {params.folder:q} --dataset {input:q} {params.options} {resources.language}"
        " --json {output.json:q} --html {output.html:q} --tokenizer {params.tokenizer:q} > {log:q} 2>&1"
