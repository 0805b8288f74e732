"""Each answer meets its own question and ends where it should; what is kept of answers, and what is asked again."""

import fcntl
import functools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from evaluate import cached_result, main
from helpers import SCRIPTS
from helpers.questions import asked_of, counted, run
from helpers.webdatasets import Raw, record
from llava_sft.data.images import decode_rgb
from llava_sft.data.index import index_webdataset
from llava_sft.data.records import Sample
from llava_sft.data.stored import read_split
from llava_sft.evaluation import answers as answers_module
from llava_sft.evaluation.answers import generate
from llava_sft.evaluation.export import Export, read_answer
from llava_sft.evaluation.judge import Answer
from llava_sft.files import read_json, write_json

# --- the exported model -----------------------------------------------------------------------------------------------


def answers(export: Path, questions: list[Sample], batch_size: int = 16, max_new_tokens: int = 4) -> list[Answer]:
    found = dict(generate(export, questions, batch_size, max_new_tokens))
    return [found[number] for number in range(len(questions))]


def test_each_answer_meets_its_question_whatever_the_batches(export, data, monkeypatch):
    questions = asked_of(data)
    together = answers(export, questions)
    assert len({answer.text for answer in together}) > 4, "answers that are all alike would show no mix-up"
    for n in (1, 2, 6):
        assert answers(export, [questions[n]]) == [together[n]], "asked alone"
    for size in (1, 4):
        assert answers(export, questions, size) == together
    complete = Export.answer

    def small(self, inputs):
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError
        return complete(self, inputs)

    monkeypatch.setattr(Export, "answer", small)
    assert answers(export, questions) == together, "a batch that is too large is halved"
    # The last one comes after the true answer to the turn before it.
    assert "Answer 8." in [message["content"] for message in questions[9].messages]


def generation_config(export: Path, **content) -> None:
    (export / "generation_config.json").write_text(json.dumps(content))


def test_answers_end_at_either_end_token_whatever_the_export_says(export, data, monkeypatch):
    """The model is made to say: a grounding word, one of the two end tokens, and then more."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(export / "tokenizer.json"))
    before = (export / "generation_config.json").read_text()
    end, text_end, pad, word, other = map(
        tokenizer.token_to_id, ("<|im_end|>", "<|endoftext|>", "<|vision_pad|>", "7", "x")
    )
    from llava_sft.evaluation import export as export_module

    load = export_module.load_export

    def scripted(folder, dtype, device):
        processor, model = load(folder, dtype, device)
        processor.tokenizer.padding_side, processor.tokenizer.pad_token = "right", None
        head = model.forward

        @functools.wraps(head)
        def forward(*given, **named):
            output = head(*given, **named)
            ids = named.get("input_ids")
            for row in range(output.logits.shape[0]):
                last = int(ids[row, -1]) if ids.shape[1] == 1 else None
                following = {None: word, word: end if row % 2 else text_end}.get(last, other)
                output.logits[row, -1] = torch.nn.functional.one_hot(torch.tensor(following), output.logits.shape[-1])
            return output

        model.forward = forward
        return processor, model

    monkeypatch.setattr(export_module, "load_export", scripted)
    try:
        for given in (
            {},
            {"eos_token_id": pad},
            {"eos_token_id": word, "repetition_penalty": 9.0, "num_beams": 3, "do_sample": True},
        ):
            generation_config(export, **given)
            assert set(answers(export, asked_of(data))) == {Answer("7", False)}, given
        assert answers(export, asked_of(data), max_new_tokens=1) == [Answer("7", True)] * 10
    finally:
        (export / "generation_config.json").write_text(before)


def test_grounding_tokens_are_part_of_an_answer():
    class Tokenizer:
        def decode(self, tokens, skip_special_tokens, **_):
            words = {1: "<|box_start|>", 2: "(1,2)", 3: "<|box_end|>", 9: "<|im_end|>"}
            return "".join(words[token] for token in tokens if not (skip_special_tokens and token != 2))

    assert read_answer(Tokenizer(), [1, 2, 3, 9, 2], [9]) == Answer("<|box_start|>(1,2)<|box_end|>", False)
    assert read_answer(Tokenizer(), [1, 2], [9]).cut


def test_a_streamed_answer_is_the_greedy_one_and_stops_when_it_is_closed(export, data):
    question = list(read_split(data / "wds", "val"))[1].before(1)
    loaded, images = Export(export, 12), [decode_rgb(image) for image in question.images]
    (whole,) = loaded.answer(loaded.encode([loaded.render(question.messages)], images))
    pieces = list(loaded.stream(question.messages, images))
    assert whole.text and "".join(pieces).strip() == whole.text
    longer = loaded.stream(question.messages, images, max_new_tokens=10_000)
    next(longer)
    longer.close()  # would take minutes
    with pytest.raises(ValueError, match="temperature"):
        list(loaded.stream(question.messages, images, do_sample=True, temperature=-1.0))


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    return counted(monkeypatch)


def test_kept_answers_are_used_for_the_same_model_data_and_options_alone(
    export, data, tmp_path, monkeypatch, capsys, asked
):
    output, kept = tmp_path / "evaluation.json", tmp_path / ".evaluation.json.kept"
    run(monkeypatch, export, data, output)
    first, lines = read_json(output), (tmp_path / "predictions.jsonl").read_text()
    assert [json.loads(line)["id"] for line in lines.splitlines()] == [f"r{n}" for n in range(9)]
    assert "1 of 9 right" in capsys.readouterr().out and first["correct"] == 1
    assert {name: group["samples"] for name, group in first["groups"].items()} == {"all": 1, "k0": 4, "k1": 4}
    output.unlink()
    run(monkeypatch, export, data, output)
    assert (read_json(output), asked) == (first, [10])
    assert "nothing to evaluate" in capsys.readouterr().out
    for words in (("--scores", "f1"), ("--by", "nokey")):  # judged anew, not asked
        run(monkeypatch, export, data, output, *words)
        assert ("no record has the key 'nokey'" in capsys.readouterr().out) == ("nokey" in words)
    assert asked == [10] and list(read_json(output)["groups"]) == ["all"]
    for words in (("--samples", "2"), ("--batch-size", "3"), ("--max-new-tokens", "3")):
        run(monkeypatch, export, data, output, *words)
    assert asked == [10, 2, 10, 10]
    run(monkeypatch, export, data, output)
    assert read_json(output)["correct"] == 1 and len(asked) == 5

    for path, old, new in (
        (kept, b'"correct": 1', b'"correct": 7'),
        (tmp_path / ".evaluation.json.answers", b"Answer", b"answer"),
    ):
        path.write_bytes(path.read_bytes().replace(old, new, 1))
        kept.write_bytes(kept.read_bytes().replace(b'"correct"', b'"korrect"', 1))
        run(monkeypatch, export, data, output)
        assert read_json(output)["correct"] == 1
        assert "damaged" in "".join(capsys.readouterr())
    assert len(asked) == 6, "the answers were whole the first time"
    (tmp_path / "predictions.jsonl").unlink()
    run(monkeypatch, export, data, output)
    assert len(asked) == 6 and (tmp_path / "predictions.jsonl").is_file()
    kept.write_text("[1]")
    assert cached_result(kept, "x") is None


def test_an_interrupted_evaluation_asks_only_what_is_left(export, data, tmp_path, monkeypatch, capsys, asked):
    output, complete = tmp_path / "evaluation.json", answers_module.generate

    def killed(folder, questions, *options):
        for number, answer in complete(folder, questions, *options):
            if number == 3:
                raise KeyboardInterrupt
            yield number, Answer(f"{answer.text} {number}", False)

    monkeypatch.setattr(answers_module, "generate", killed)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, export, data, output)
    assert end.value.code == 130 and "the same command goes on" in capsys.readouterr().err
    partial = tmp_path / ".evaluation.json.answers.partial"
    partial.write_text(partial.read_text().replace("Answer 0. 5", "Answer 0. 9") + '12345678 [2, "half')
    monkeypatch.setattr(answers_module, "generate", complete)
    run(monkeypatch, export, data, output)
    assert asked == [10, 5] and not partial.exists(), "question 5 and those from 3 on"
    assert "10 questions, of which 5 were answered before" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [turn["prediction"] for row in rows for turn in row["turns"]] == [
        *["Answer 0."] * 4, "Answer 0. 4", "Answer 0.", *(f"Answer 0. {n}" for n in (6, 7, 8, 9)),
    ]  # fmt: skip


def test_a_second_evaluation_of_the_same_waits_for_the_answers_of_the_first(
    export, data, tmp_path, monkeypatch, capsys, asked
):
    output, complete, second = tmp_path / "evaluation.json", answers_module.generate, []

    def met(folder, questions, *options):
        """While the first one asks, another begins."""
        for number, answer in complete(folder, questions, *options):
            if number == 5:
                code = f"import sys; sys.argv = {sys.argv!r}; from evaluate import main; main()"
                environment = os.environ | {"PYTHONPATH": str(SCRIPTS)}
                second.append(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment))
                waits = second[0].stdout.readline().decode()
                assert "another evaluation asks these questions" in waits, waits
            yield number, answer

    monkeypatch.setattr(answers_module, "generate", met)
    run(monkeypatch, export, data, output)
    said, _ = second[0].communicate()
    assert b"answered before" in said and second[0].returncode == 0 and asked == [10]
    assert not (tmp_path / ".evaluation.json.answers.lock").exists() and read_json(output)["correct"] == 1


def test_a_lock_that_the_one_before_has_removed_is_taken_anew(tmp_path):
    """Who waited for it has a file without a name: a third one would find none, and ask the same questions."""
    cache, lock = tmp_path / "answers.json", tmp_path / "answers.json.lock"
    with open(lock, "w") as held, ThreadPoolExecutor(1) as pool:
        fcntl.flock(held, fcntl.LOCK_EX)

        def second() -> bool:
            with answers_module._alone(cache), open(lock) as third:
                try:
                    fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return True
            return False

        waits = pool.submit(second)
        with suppress(TimeoutError):
            waits.result(0.2)
        lock.unlink()
        fcntl.flock(held, fcntl.LOCK_UN)
        assert waits.result(60), "no third one may have it"
    assert not lock.exists()


def test_an_answer_is_on_the_disk_before_the_next_is_made(export, data, tmp_path, monkeypatch, asked):
    partial, complete = tmp_path / ".evaluation.json.answers.partial", answers_module.generate

    def looked(folder, questions, *options):
        for count, pair in enumerate(complete(folder, questions, *options)):
            assert len(partial.read_text().splitlines()) == 1 + count, "what kill -9 leaves"
            yield pair

    monkeypatch.setattr(answers_module, "generate", looked)
    run(monkeypatch, export, data, tmp_path / "evaluation.json")


def test_no_held_out_split_is_said_and_no_model_is_loaded(export, tmp_path, monkeypatch, capsys):
    raw = Raw(tmp_path, [record(n, None) for n in range(3)])
    raw.convert()
    write_json(tmp_path / "dataset.json", index_webdataset(raw.wds, raw.parts))
    monkeypatch.setattr(answers_module, "generate", None)
    run(monkeypatch, export, tmp_path, tmp_path / "e.json")
    assert "there is no accuracy" in capsys.readouterr().err
    assert (result := read_json(tmp_path / "e.json"))["samples"] == 0 and result["accuracy"] is None


def test_raw_records_of_any_format_are_a_test_set_of_their_own(export, data, tmp_path, monkeypatch, asked):
    raw = Raw(tmp_path, [record(n, ["a.png", "b.jpg"][: n % 3], kind="k") for n in range(5)])
    array = tmp_path / "other.json"
    array.write_text(json.dumps([json.loads(line) for line in raw.path.read_text().splitlines()]))
    for path in (raw.path, array):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", str(export), str(path), "--image-root", str(raw.images)])
        main()
        result = read_json(export.parent / "evaluations" / path.stem / "evaluation.json")
        assert (result["samples"], result["correct"], result["split"]) == (5, 1, "all")
    assert asked == [5, 5]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(export), str(raw.path), "--image-root", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
