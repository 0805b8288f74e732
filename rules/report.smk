"""Evaluation on the held-out split, and the report."""


rule evaluate:
    input:
        export=flow.path("export_done"),
        dataset=flow.path("dataset"),
        scores=flow.path("score_files"),
    output:
        paths.EVALUATION,
    log:
        "{exp_dir}/logs/evaluate/{run_name}.log",
    benchmark:
        "{exp_dir}/benchmarks/evaluate/{run_name}.tsv"
    threads: workflow.cores
    params:
        folder=paths.EXPORT,
        webdatasets=flow.path("webdatasets"),
        start_of=flow.path("evaluated_start_of"),
        base_answers=flow.path("base_answers"),
        options=flow.options(
            "evaluate_scores",
            "evaluate_by",
            "evaluate_samples",
            "evaluate_batch_size",
            "evaluate_with",
            "vllm_python",
            "max_new_tokens",
            without="evaluate_",
        ),
    shell:
        "{PYTHON}evaluate.py {params.folder:q} {params.webdatasets:q} --dataset {input.dataset:q} {params.options}"
        " --start-of={params.start_of:q} --skip-missing-start --base-answers {params.base_answers:q} --output {output:q}"
        " > {log:q} 2>&1"


rule report:
    input:
        resolved=flow.path("resolved"),
        prediction=flow.path("prediction"),
        dataset=flow.path("dataset"),
        inspection=flow.path("inspection"),
        train_done=flow.path("train_done"),
        evaluation=flow.path("evaluation"),
    output:
        paths.REPORT,
    log:
        "{exp_dir}/logs/report/{run_name}.log",
    benchmark:
        "{exp_dir}/benchmarks/report/{run_name}.tsv"
    localrule: True
    params:
        run_dir=flow.path("run_dir"),
        export=flow.path("export"),
    shell:
        "{PYTHON}report.py --resolved {input.resolved:q} --prediction {input.prediction:q} --dataset {input.dataset:q}"
        " --inspect {input.inspection:q} --train-done {input.train_done:q} --run-dir {params.run_dir:q}"
        " --evaluation {input.evaluation:q} --export {params.export:q} --output {output:q} > {log:q} 2>&1"
