"""What the documents' commands are run by, where README's figures stand, and where the questions of docs/faq.md were asked."""

OPTIONS = r"( ARGS=.*| --config .*|( \w+=\S+)+)?"
EXPORT = r"(\$EXPORT|output/\w+/huggingface)"
CONVERT = "python workflow_scripts/convert_checkpoint.py"

# A form of command → the test that runs it, or the script whose dated result is in benchmarks/results.
COMMANDS = {
    r"make (gpu|doctor|wheels WHEELS=wheels|setup WHEELS=wheels)": "tests/test_set_up.py::doctor",
    r"python workflow_scripts/import_shell_script.py \S+\.sh": "tests/test_import_shell_script.py::import_shell_script",
    r"(NNODES=2 .* )?\.venv/bin/snakemake --cores all train_mydata": "tests/test_nodes.py::snakemake",
    rf"make train_\w+{OPTIONS}": 'benchmarks/clone_to_report.py::"make", "train_vqa"',
    rf"snakemake( --cores 8)? (-n )?train_(vqa|mydata|agriculture|X){OPTIONS}": "tests/test_end_to_end.py::test_killed_run_goes_on",
    r"snakemake inspect_mydata": "tests/test_terminal.py::inspect_bad",
    r"snakemake preflight_mydata": "tests/conftest.py::preflight_vqa",
    rf"snakemake --profile slurm (-n )?(inspect|train)_\w+{OPTIONS}": "tests/test_slurm.py::test_the_whole_chain_reaches_its_report",
    r"make (test|setup)": ".ci/run::make test",
    r"make experiment NAME=mydata": "tests/test_stages.py::test_make_experiment_gives_a_file",
    r"make runs": "tests/test_run_directory.py::list_runs.py",
    r"make compare RUNS=\S+": "tests/test_pages.py::compare_runs",
    r"make chat RUN=\S+": "tests/test_chat.py::test_the_answer_alone_stands_on_stdout",
    r"make chat RUN=\S+ ARGS=--web": "tests/test_chat_page.py::--web",
    r"python workflow_scripts/chat.py output/stage2_sft_vqa .*": "tests/test_end_to_end.py::test_a_checkpoint_of_the_run_answers",
    rf"python workflow_scripts/evaluate.py {EXPORT} \S+( --.*)?": "tests/test_evaluate.py::test_raw_records_of_any_format",
    rf"python workflow_scripts/push_to_hub.py {EXPORT} org/name( --dry-run)?": "tests/test_publish.py::test_what_is_shown_is_uploaded",
    r"python workflow_scripts/index_webdataset.py FOLDER --verify": "tests/test_foreign.py::test_a_sample_changed_at_rest",
    r"python workflow_scripts/preflight.py vqa --gpu H100 --config .*": "tests/test_end_to_end.py::test_preflight_for_another_machine",
    rf"{CONVERT} mcore2hf RUN FOLDER": "tests/test_checkpoint.py::mcore2hf",
    rf"{CONVERT} verify FOLDER": "tests/test_hostile_checkpoint.py::verify",
    rf"{CONVERT} mcore2peft \S+ \S+": "tests/test_adapters.py::mcore2peft",
    rf"{CONVERT} merge BASE \S+ \S+ \S+": "tests/test_adapters.py::merge",
    r"lmms/bin/python -m lmms_eval .*": "tests/programs/with_lmms_eval.py::lmms_eval",
    r"uv venv (lmms|vllm) && uv pip install .*": "tests/programs/environments.py::venv",
}
# Those that no test runs: shell and Slurm's own commands, what needs the network, a GPU or another machine. Day, where.
BY_HAND = {
    r"(docker|apptainer) (build|run) .*": "not run: no container program at hand; tests/test_set_up.py checks the recipes",
    r"export NNODES=.*": "not run: no Volcano at hand",
    r"source .venv/bin/activate|cd /shared/me/llava_sft|tmux|EXPORT=\S+": "the shell's own",
    r"squeue --me .*|tail -f \S+|tensorboard --logdir .*|make tensorboard|nvcc --version": "of other programs",
    r"snakemake|snakemake -n train_vqa|make clean": "2026-11-28, two CPU cores",
    r"snakemake --rulegraph dot train_vqa \| dot -Tsvg > chain.svg": "2026-11-28, two CPU cores",
    r"\.venv/bin/python -c 'import torch; .*'": "2026-11-28, two CPU cores",
    r"NVTE_\S+ .* -m pip wheel .*|\.venv/bin/uv pip install nvidia-.*": "compiled in part on 2026-11-28, two CPU cores, not to the end",
    r"hf (download|auth) .*": "the hub's own; no network at hand",
    r"vllm serve .*": "not on a GPU: docs/use.md, What was run",
    r"printf .* > overrides\.txt|VLLM_CPU_\S+ .*|curl .*": "2026-11-28, two CPU cores",
}

# File in benchmarks/results, metric, settings, how README shows it.
H200 = {"model": "4b", "gpu": "NVIDIA H200", "seq_length": 8192, "micro_batches": 16, "fp8": "none"}
FIGURES = [
    ("clone_to_report", "clone_to_report_s", {}, "{:.1f} s"),
    ("training", "mfu_bf16_8192_h200", H200, "{:.1%}"),
    ("training", "speedup_vs_transformers", H200, "{:.2f} ×"),
    ("lora", "peak_reserved_gib", {"run": "4b-lora: 22 GiB, recomputed", "gpu": "NVIDIA H200"}, "{:.1f} GiB"),
    ("lora", "lora_speedup_peft", {"gpu": "NVIDIA H200"}, "{:.2f} ×"),
    ("faults", "faults_mutations", {"faults": "damage at rest"}, "{:,.0f}"),
    ("faults", "faults_silent", {"faults": "damage at rest"}, "{:.0f}"),
    ("faults", "faults_lost", {"faults": "damage at rest"}, "{:.0f}"),
]

# Issues on GitHub in which people ask it → the heading in docs/faq.md. Read in November 2026.
QUESTIONS = [
    ("haotian-liu/LLaVA#1121, #564, #831", "I have pictures and answers. What do I have to do?"),
    ("haotian-liu/LLaVA#1228", "I have only pictures and captions. What is the question?"),
    ("QwenLM/Qwen3-VL#937, modelscope/ms-swift#1074", "How do I ask about several images at once?"),
    ("haotian-liu/LLaVA#1121, #1499, QwenLM/Qwen3-VL#564", "Which GPU do I need, in full and with LoRA?"),
    ("EvolvingLMMs-Lab/LLaVA-OneVision-2#80", "Is there a cheap way to fine-tune it?"),
    ("haotian-liu/LLaVA#1658", "Must I mix in the original instruction data?"),
    (
        "NVIDIA/TransformerEngine#553",
        '"The detected CUDA version mismatches the version that was used to compile PyTorch"',
    ),
    ("NVIDIA/Megatron-LM#878, pytorch/pytorch#5040", '"Unexpected bus error", "insufficient shared memory (shm)"'),
    ("modelscope/ms-swift#4071, #6687, hiyouga/LlamaFactory#952", "Can I watch it in Weights & Biases or SwanLab?"),
    (
        "QwenLM/Qwen3-VL#1981, #1658, zai-org/GLM-4#261, hiyouga/LlamaFactory#4031, modelscope/ms-swift#5238",
        "The loss is 0",
    ),
    ("modelscope/ms-swift#7174, #2491, #1258", "The loss is low, but the answers are wrong"),
    ("modelscope/ms-swift#2280, 2U1/Qwen-VL-Series-Finetune#143", "The loss is NaN or explodes"),
    ("haotian-liu/LLaVA#1546", "It answers the same to everything"),
    ("modelscope/ms-swift#2529, We-IOT/chatglm3_6b_finetune#18, QwenLM/Qwen3-VL#1573", "My GPU runs out of memory"),
    ("modelscope/ms-swift#2057, #2485, #4897, #8413, QwenLM/Qwen3-VL#631", "How do I train on two nodes?"),
    ("modelscope/ms-swift#5197, #6049, hiyouga/LlamaFactory#5354", "Does it go on with the data where it stopped?"),
    ("QwenLM/Qwen3-VL#1161, #721, modelscope/ms-swift#3407", "Must I resize my boxes with the images?"),
    ("modelscope/ms-swift#2200, #2612", "How do I use the model in Python?"),
    (
        "modelscope/ms-swift#440, QwenLM/Qwen3-VL#576, #629",
        "How do I get predictions for a whole test set, in batches?",
    ),
    ("modelscope/ms-swift#3544, #3779", "I have a validation and a test set"),
    ("EvolvingLMMs-Lab/lmms-eval#241", "How do I run lmms-eval on it?"),
    ("modelscope/ms-swift#4009, #5745, #2445, QwenLM/Qwen3-VL#935, #1025", "Another program answers differently"),
    ("LLaVA-VL/LLaVA-NeXT#155", 'It answers "!!!!" or rubbish'),
    ("modelscope/ms-swift#3974", "My LoRA has no effect after merging"),
]
