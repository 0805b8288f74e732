"""docs/faults.md and docs/faults_zh.md, made from the tables of the harness: `python -m faults.page` writes them."""

from typing import NamedTuple

from faults.kinds import KINDS, USES
from faults.limits import LIMITS
from faults.project import ROOT

LONG, SHORT = "test_faults_long.py", "test_faults.py"


class Promise(NamedTuple):
    """A row of the table: a fault, what is promised when it happens, and the test that makes it happen."""

    fault: str
    promise: str
    fault_zh: str
    promise_zh: str
    file: str
    test: str


PROMISES = [
    Promise(
        "`kill -9` of everything, at any moment of any step", "the same command goes on, no lock is left, the results are those of an undisturbed run",
        "任何步骤的任何时刻，对全部进程 `kill -9`", "同一条命令接着运行，不留下锁，结果与未受干扰的运行相同",
        LONG, "test_kills_at_random_moments_of_every_rule_leave_no_trace",
    ),
    Promise(
        "SIGTERM, SIGINT, SIGUSR1, SIGHUP, SIGQUIT to the process group, to Snakemake alone, to the training alone",
        "the same command goes on; SIGTERM, SIGINT and SIGUSR1 to the training, SIGTERM and SIGINT to the others, save a checkpoint first",
        "SIGTERM、SIGINT、SIGUSR1、SIGHUP、SIGQUIT 发给整个进程组、只发给 Snakemake 或只发给训练",
        "同一条命令接着运行；训练收到 SIGTERM、SIGINT、SIGUSR1，其余收到 SIGTERM、SIGINT 时，先保存检查点",
        LONG, "test_signals_of_each_sort_lose_nothing_and_save_where_promised",
    ),
    Promise(
        "the disk fills up while a step writes", "the step says so; with room again, the same command goes on",
        "写入过程中磁盘写满", "该步骤会说明；腾出空间后，同一条命令接着运行",
        LONG, "test_full_disk_at_each_writing_step_is_said_and_mended_by_the_same_command",
    ),
    Promise(
        "the same command from two terminals, two trainings in one run directory", "one works, the other says why it does not",
        "两个终端运行同一条命令，或同一运行目录里有两个训练", "一个正常运行，另一个说明为何不行",
        LONG, "test_two_copies_at_once_do_not_disturb_each_other",
    ),
    Promise(
        "folders with spaces, Chinese, quotes, `$`, braces; a linked project; another working directory; umask 077; 256 descriptors",
        "the whole chain runs as anywhere",
        "文件夹名含空格、中文、引号、`$`、花括号；项目是符号链接；从别的目录启动；umask 077；256 个文件描述符", "整条流程照常运行",
        LONG, "test_odd_places_make_no_difference",
    ),
    Promise(
        "a file that the chain keeps is damaged, missing or unreadable (below)",
        "the step that uses it names the file and stops, or mends it, or its results are the same",
        "流程保存的某个文件损坏、丢失或无法读取（见下）", "使用它的步骤指出该文件并停止，或自行修复，或结果不变",
        LONG, "test_a_thousand_damaged_files_are_never_believed",
    ),
    Promise(
        "the same, a case of each kind of file", "as above, in `make test`", "同上，每类文件一例", "同上，属于 `make test`",
        SHORT, "test_damage_of_each_kind_of_file_is_never_believed",
    ),
    Promise(
        "3,000 training steps", "memory and open descriptors do not grow", "连续训练 3,000 步", "内存和打开的描述符不增长",
        LONG, "test_memory_and_descriptors_stay_flat_over_a_long_training",
    ),
]  # fmt: skip

ENGLISH = {
    "title": "# Faults, and what is promised\n\n[中文](faults_zh.md)\n",
    "intro": "Made by `python -m faults.page` from `tests/faults/`, which causes each of these faults in the real chain (Snakemake, energon,\n"
    "Megatron, transformers) on a small data set and model, and compares what comes out with an undisturbed run. A short selection\n"
    "is part of `make test`; `make test-faults` runs all (an hour), and `make soak` the chain with random faults for an hour.\n"
    "Their figures: `make figures`, rows `faults`.\n",
    "promises": "## Fault, promise, test\n\n| fault | promise | test |\n|---|---|---|\n",
    "kinds": "## Damage at rest: every kind of file that the chain keeps, raw data apart\n\n"
    "Forms of damage: a flipped bit, a changed digit, random bytes, a missing end, a zeroed block, the content of another file of\n"
    "its kind, an empty file, a missing one, a folder or a dangling link in its place; with the date kept and with a new one.\n"
    "No file of the first group stops a run that has a whole checkpoint: it is set aside or made again, and this is said;\n"
    "only a folder that stands in a file's place is named and left to you.\n\n"
    "| file | | steps that use it, each tried |\n|---|---|---|\n",
    "own": "state of a run",
    "limits": "## Limits\n\nDamage that is known to go unnoticed, and why. The harness counts it apart (`faults_documented`).\n\n",
    "none": "None.\n",
}
CHINESE = {
    "title": "# 故障与承诺\n\n[English](faults.md)\n",
    "intro": "本页由 `python -m faults.page` 根据 `tests/faults/` 生成。后者在真实流程（Snakemake、energon、Megatron、transformers）上，用很小的\n"
    "数据集和模型制造下列每种故障，并与未受干扰的运行比较结果。其中一小部分属于 `make test`；`make test-faults` 运行全部（一小时），\n"
    "`make soak` 让流程在随机故障下运行一小时。数字见 `make figures` 中的 `faults` 各行。\n",
    "promises": "## 故障、承诺与测试\n\n| 故障 | 承诺 | 测试 |\n|---|---|---|\n",
    "kinds": "## 静态损坏：流程保存的每类文件（原始数据除外）\n\n"
    "损坏方式：翻转一位、改一个数字、随机字节、缺尾、清零一块、换成同类另一文件的内容、空文件、文件丢失、原处变成文件夹或悬空链接；\n"
    "修改时间保持不变或更新。只要还有完整的检查点，第一组文件的损坏都不会让运行停下：损坏的文件被移开或重新生成，并给出说明；只有占据文件位置的文件夹会被指出，由您处理。\n\n"
    "| 文件 | | 用到它的步骤（逐一测试） |\n|---|---|---|\n",
    "own": "运行状态",
    "limits": "## 限制\n\n已知不会被发现的损坏及其原因。测试中单独计数（`faults_documented`）。\n\n",
    "none": "无。\n",
}


def page(words: dict[str, str], chinese: bool) -> str:
    promises = [
        f"| {p.fault_zh if chinese else p.fault} | {p.promise_zh if chinese else p.promise} | `{p.file}::{p.test}` |\n"
        for p in PROMISES
    ]
    kinds = sorted(KINDS, key=lambda kind: not kind.state_file)
    rows = [f"| {kind.name} | {words['own'] if kind.state_file else ''} | {', '.join(kind.uses)} |\n" for kind in kinds]
    limits = [
        f"- **{' / '.join(limit.kinds)}** ({', '.join(limit.uses or USES)}): {limit.reason_zh if chinese else limit.reason}\n"
        for limit in LIMITS
    ]
    return "\n".join(
        [
            words["title"] + "\n" + words["intro"],
            words["promises"] + "".join(promises),
            words["kinds"] + "".join(rows),
            words["limits"] + ("".join(limits) or words["none"]),
        ]
    )


PAGES = {"docs/faults.md": page(ENGLISH, False), "docs/faults_zh.md": page(CHINESE, True)}

if __name__ == "__main__":
    for name, text in PAGES.items():
        (ROOT / name).write_text(text)
