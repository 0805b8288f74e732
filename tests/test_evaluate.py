"""What counts as a right answer, that each answer meets its own question, and that answers end where they should."""

import argparse
import functools
import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

import evaluate
from evaluate import cached_result, main
from helpers.webdatasets import Raw, record
from llava_sft.data.index import index_webdataset
from llava_sft.data.records import Sample
from llava_sft.data.stored import read_split
from llava_sft.evaluation.answers import generate
from llava_sft.evaluation.export import read_answer
from llava_sft.evaluation.judge import RIGHT_SHOWN, WRONG_SHOWN, Answer, judge
from llava_sft.files import read_json, write_json


def sample(name: str, *answers: str, kind: str | None = None) -> Sample:
    messages = []
    for number, text in enumerate(answers):
        messages += [{"role": "user", "content": f"{name} {number}?"}, {"role": "assistant", "content": text}]
    return Sample(name, messages, [], {"kind": kind} if kind else {})


def said(*texts: str) -> list[Answer]:
    return [Answer(text, False) for text in texts]


@pytest.mark.parametrize(
    ("truth", "prediction", "right"),
    [
        ("Temple", "Temple", True), (" Temple\n", "Temple", True), ("Temple", "Temple.", False), ("Temple", "temple", False),
        ("a  b", "a b", False), ("3", "", False), ("3", "3 3", False), ("3", "13", False),
    ],
)  # fmt: skip
def test_right_is_the_expected_text_exactly_but_for_space_at_both_ends(truth, prediction, right):
    (row,), _ = judge([sample("a", truth)], said(prediction), "kind")
    assert row["correct"] is right


def test_a_sample_of_several_turns_is_right_when_every_answer_is():
    asked = [sample("a", "1", "2"), sample("b", "3"), sample("c", "4", "5")]
    rows, _ = judge(asked, said("1", "2", "3", "4", "wrong"), "kind")
    assert [row["correct"] for row in rows] == [True, True, False]
    assert [turn["prediction"] for turn in rows[2]["turns"]] == ["4", "wrong"]
    assert [row["correct"] for row in judge(asked, said("wrong", "2", "3", "4", "5"), "kind")[0]] == [False, True, True]


def test_the_wrong_ones_are_kept_first_with_as_many_as_the_report_shows():
    asked = [sample(str(n), "x") for n in range(60)]
    rows, examples = judge(asked, said(*("x" if n % 2 else "y" for n in range(60))), "kind")
    assert len(rows) == 60
    assert [each["correct"] for each in examples] == [False] * WRONG_SHOWN + [True] * RIGHT_SHOWN


# --- the exported model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A WebDataset with a held-out split of none to two images, one and two turns, two kinds and one record of none."""
    folder = tmp_path_factory.mktemp("evaluate")
    held = Raw(
        folder,
        [record(n, [None, "a.png", ["a.png", "b.jpg"]][n % 3], kind=f"k{n % 2}") for n in range(8)],
        "held.jsonl",
    )
    more = record(8, None)
    more["conversations"] += [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "a longer answer"}]
    with open(held.path, "a") as file:
        file.write(json.dumps(more) + "\n")
    held.convert("heldout")
    Raw(folder, [record(100 + n, None) for n in range(3)]).convert()
    write_json(folder / "dataset.json", index_webdataset(held.wds, held.parts))
    return folder


@pytest.fixture(scope="module")
def export(small_checkpoint) -> Path:
    """A folder that `evaluate` takes: an export's files, of random weights."""
    write_json(small_checkpoint / "converted.json", {"depends": "this export"})
    return small_checkpoint


def arguments(export: Path, data: Path, **changed) -> argparse.Namespace:
    common = {"by": "kind", "samples": "all", "batch_size": 16, "max_new_tokens": 4}
    return argparse.Namespace(
        model_dir=export, webdatasets=data / "wds", dataset=data / "dataset.json", **common | changed
    )


def content_of(rows: list[dict]) -> list:
    return [(row["id"], [turn["prediction"] for turn in row["turns"]]) for row in rows]


def test_each_answer_meets_its_question_whatever_the_batches(export, data):
    result, rows = evaluate.evaluate(arguments(export, data))
    assert [row["id"] for row in rows] == [f"r{n}" for n in range(9)]
    assert len({str(row["turns"]) for row in rows}) > 4, "answers that are all alike would show no mix-up"
    samples = list(read_split(data / "wds", "val"))
    for n in (1, 2, 6):  # asked alone
        (alone,) = generate(export, [samples[n].before(1)], 16, 4)
        assert alone.text == rows[n]["turns"][0]["prediction"]
    for size in (1, 4):
        assert content_of(evaluate.evaluate(arguments(export, data, batch_size=size))[1]) == content_of(rows)
    assert {name: group["samples"] for name, group in result["groups"].items()} == {"all": 1, "k0": 4, "k1": 4}
    assert result["answers"] == 10 and result["max_new_tokens"] == 4
    by_id, _ = evaluate.evaluate(arguments(export, data, by="id", samples="3"))
    assert by_id["samples"] == 3 and list(by_id["groups"]) == ["all"]


def generation_config(export: Path, **content) -> None:
    (export / "generation_config.json").write_text(json.dumps(content))


def test_answers_end_at_either_end_token_whatever_the_export_says(export, data, monkeypatch):
    """The model is made to say: a grounding word, one of the two end tokens, and then more."""
    import torch
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
            result, rows = evaluate.evaluate(arguments(export, data))
            assert {turn["prediction"] for row in rows for turn in row["turns"]} == {"7"}, given
            assert result["cut"] == 0
        result, rows = evaluate.evaluate(arguments(export, data, max_new_tokens=1))
        assert result["cut"] == result["answers"] == 10
        assert all(turn["cut"] for row in rows for turn in row["turns"])
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
    from llava_sft.data.images import decode_rgb
    from llava_sft.evaluation.export import Export

    question = list(read_split(data / "wds", "val"))[1].before(1)
    loaded, images = Export(export, 12), [decode_rgb(image) for image in question.images]
    (whole,) = loaded.answer([loaded.render(question.messages)], images)
    pieces = list(loaded.stream(question.messages, images))
    assert whole.text and "".join(pieces).strip() == whole.text
    longer = loaded.stream(question.messages, images, max_new_tokens=10_000)
    next(longer)
    longer.close()  # would take minutes
    with pytest.raises(ValueError, match="temperature"):
        list(loaded.stream(question.messages, images, do_sample=True, temperature=-1.0))


def run(monkeypatch, export: Path, data: Path, output: Path, *words: str) -> None:
    options = ["--dataset", str(data / "dataset.json"), "--output", str(output), "--max-new-tokens", "2", *words]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(export), str(data / "wds"), *options])
    main()


def test_kept_answers_are_used_for_the_same_model_data_and_options_alone(export, data, tmp_path, monkeypatch, capsys):
    output = tmp_path / "evaluation.json"
    run(monkeypatch, export, data, output)
    first, lines = read_json(output), (tmp_path / "predictions.jsonl").read_text()
    assert [json.loads(line)["id"] for line in lines.splitlines()] == [f"r{n}" for n in range(9)]
    assert "of 9 right" in capsys.readouterr().out
    made = []

    def answer(model_dir, questions, *options):
        made.append(len(questions))
        return [Answer("Answer 0.", False)] * len(questions)

    monkeypatch.setattr(evaluate, "generate", answer)
    output.unlink()
    run(monkeypatch, export, data, output)
    assert (read_json(output), made) == (first, [])
    assert "nothing to evaluate" in capsys.readouterr().out
    for words in (("--samples", "2"), ("--by", "id"), ("--batch-size", "3")):
        run(monkeypatch, export, data, output, *words)
    assert len(made) == 3
    run(monkeypatch, export, data, output)
    kept = tmp_path / ".evaluation.json.kept"
    assert read_json(output)["correct"] == 1 and len(made) == 4

    kept.write_bytes(kept.read_bytes().replace(b'"correct": 1', b'"correct": 7', 1))
    run(monkeypatch, export, data, output)
    assert read_json(output)["correct"] == 1 and len(made) == 5
    assert "evaluating again" in capsys.readouterr().err
    (tmp_path / "predictions.jsonl").unlink()
    run(monkeypatch, export, data, output)
    assert len(made) == 6 and (tmp_path / "predictions.jsonl").is_file()
    kept.write_text("[1]")
    assert cached_result(kept, "x") is None


def test_no_held_out_split_is_said_and_no_model_is_loaded(export, tmp_path, monkeypatch, capsys):
    raw = Raw(tmp_path, [record(n, None) for n in range(3)])
    raw.convert()
    write_json(tmp_path / "dataset.json", index_webdataset(raw.wds, raw.parts))
    monkeypatch.setattr(evaluate, "generate", None)
    run(monkeypatch, export, tmp_path, tmp_path / "e.json")
    assert "there is no accuracy" in capsys.readouterr().err
    assert (result := read_json(tmp_path / "e.json"))["samples"] == 0 and result["accuracy"] is None


@pytest.mark.parametrize("case", ["no export", "marker", "weights", "config.json", "tokenizer.json", "samples"])
def test_what_cannot_be_evaluated_is_one_message(export, data, tmp_path, monkeypatch, capsys, case):
    folder = tmp_path / "export"
    folder.mkdir()
    for path in export.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    words = ["--samples", "half"] if case == "samples" else []
    if case == "no export":
        (folder / "converted.json").unlink()
    elif case == "marker":
        write_json(folder / "converted.json", {"fingerprint": 1})
    elif case != "samples":
        (folder / {"weights": "model.safetensors"}.get(case, case)).write_bytes(b"\0" * 30)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, folder, data, tmp_path / "e.json", *words)
    said = capsys.readouterr().err
    assert end.value.code == 1 and "error: " in said and "Traceback" not in said
    assert not (tmp_path / "e.json").exists()


def test_pictures_of_the_examples_are_embedded(data):
    samples = list(read_split(data / "wds", "val"))
    _, examples = judge(samples, said(*["x"] * 10), "kind")
    assert examples[2]["images"][1].startswith("data:image/jpeg;base64,")
    assert Image.open(io.BytesIO(samples[2].images[0])).size == (32, 28)
